"""CLIP of sentence-transformers: python sentence_transformers_clip.py MODEL PHOTO [NEURONS]"""

import sys

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

import testreg

TEXTS = ("two cats on a sofa", "a mountain at dusk")


def main(name: str, photo: str, neurons: str | None = None) -> torch.Tensor:
    model = SentenceTransformer(name, device="cpu")
    testreg.patch(model, neurons)  # finds the vision tower within
    image, texts = model.encode(Image.open(photo)), model.encode(list(TEXTS))
    scores = model.similarity(image, texts)[0]
    for text, score in zip(TEXTS, scores, strict=True):
        print(f"{score:.3f}  {text}")
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:])
