"""What LLaVA looks at when it answers: python llava_maps.py MODEL PHOTO QUESTION [NEURONS]"""

import sys

import torch
from matplotlib import pyplot
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import testreg


def main(name: str, photo: str, question: str, neurons: str | None = None, file: str = "llava.png") -> Tensor:
    model, processor = AutoModelForImageTextToText.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    testreg.patch(model, neurons)
    picture = Image.open(photo).convert("RGB")
    inputs = processor(images=picture, text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    print(processor.decode(answer, skip_special_tokens=True))
    after = testreg.answer_attention(model, inputs)[0]  # (h, w); blocks=range(10, 13) shows the middle of LLaVA alone
    with testreg.disabled(model):
        before = testreg.answer_attention(model, inputs)[0]
    figure, axes = pyplot.subplots(1, 2)
    for axis, title, grid in zip(axes, ("before", "after"), (before, after), strict=True):
        axis.imshow(grid)
        axis.set(title=title, xticks=[], yticks=[])
    figure.savefig(file)
    return after


if __name__ == "__main__":
    main(*sys.argv[1:])
