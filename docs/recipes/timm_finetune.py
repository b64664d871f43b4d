"""Fine-tune a patched classifier of timm: python timm_finetune.py MODEL FOLDER OUTPUT [NEURONS]

FOLDER has a folder of images for each class. The register is there in training and afterwards, and gradients flow
through it.
"""

import sys

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision.datasets import ImageFolder

import testreg


def main(name: str, folder: str, output: str, neurons: str | None = None, epochs: int = 1) -> list[float]:
    transform = create_transform(**resolve_model_data_config(timm.create_model(name)), is_training=False)
    data = ImageFolder(folder, transform)
    model = timm.create_model(name, pretrained=True, num_classes=len(data.classes))
    testreg.patch(model, neurons)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(epochs):
        for images, classes in torch.utils.data.DataLoader(data, batch_size=8, shuffle=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), classes)
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    testreg.save(model.eval(), output)  # testreg.load(output) patches it again; timm loads it as it is
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
