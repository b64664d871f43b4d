"""Zero-shot classification and a map with CLIP from transformers: python clip_transformers.py MODEL PHOTO [NEURONS]"""

import sys

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

import testreg

LABELS = ("a photo of a cat", "a photo of a dog", "a photo of a landscape")


def main(name: str, photo: str, neurons: str | None = None) -> tuple[Tensor, Tensor]:
    model, processor = AutoModel.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    testreg.patch(model, neurons)  # the vision tower alone; the text tower stays as it is
    inputs = processor(text=list(LABELS), images=Image.open(photo).convert("RGB"), return_tensors="pt", padding=True)
    with torch.no_grad():
        scores = model(**inputs).logits_per_image.softmax(-1)[0]
    for label, score in zip(LABELS, scores, strict=True):
        print(f"{score:6.1%}  {label}")
    attention = testreg.attention(model, inputs["pixel_values"]).mean(1)[0]  # (h, w), mean of the heads
    return scores, attention


if __name__ == "__main__":
    main(*sys.argv[1:])
