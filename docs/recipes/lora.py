"""LoRA on a patched ViT of transformers: python lora.py MODEL FOLDER OUTPUT [NEURONS]

The adapters may sit anywhere, on the second linear of the MLP (fc2) too: there they read the activation that was moved.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torchvision.datasets import ImageFolder
from transformers import AutoImageProcessor, AutoModelForImageClassification

import testreg


def main(name: str, folder: str, output: str, neurons: str | None = None, steps: int = 10) -> list[float]:
    processor = AutoImageProcessor.from_pretrained(name)
    data = ImageFolder(folder, lambda image: processor(image, return_tensors="pt")["pixel_values"][0])
    model = AutoModelForImageClassification.from_pretrained(
        name, num_labels=len(data.classes), ignore_mismatched_sizes=True
    )
    linears = [
        key for key, module in model.named_modules() if isinstance(module, nn.Linear) and "classifier" not in key
    ]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=linears, modules_to_save=["classifier"]))
    testreg.patch(adapted, neurons)
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-2)
    images, classes = (torch.stack(list(map(torch.as_tensor, each))) for each in zip(*data, strict=True))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(adapted(pixel_values=images).logits, classes)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    merged = testreg.unpatch(adapted).merge_and_unload()  # fc2 is another module then: patch what comes out
    merged.save_pretrained(output)
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
