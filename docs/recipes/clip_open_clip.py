"""Zero-shot classification, and a clean map, with open_clip: python clip_open_clip.py MODEL PHOTO [NEURONS]

MODEL is what open_clip takes: a name of the hub (hf-hub:ORG/NAME) or a folder (local-dir:FOLDER).
"""

import sys

import open_clip
import torch
from PIL import Image
from torch import Tensor

import testreg

LABELS = ("a photo of a cat", "a photo of a dog", "a photo of a landscape")


def main(name: str, photo: str, neurons: str | None = None) -> tuple[Tensor, Tensor]:
    model, preprocess = open_clip.create_model_from_pretrained(name)
    tokenizer = open_clip.get_tokenizer(name)
    testreg.patch(model.eval(), neurons)
    image = preprocess(Image.open(photo)).unsqueeze(0)
    with torch.no_grad():
        images, texts = model.encode_image(image, normalize=True), model.encode_text(tokenizer(LABELS), normalize=True)
        scores = (model.logit_scale.exp() * images @ texts.T).softmax(-1)[0]
    for label, score in zip(LABELS, scores, strict=True):
        print(f"{score:6.1%}  {label}")
    return scores, testreg.attention(model, image).mean(1)[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
