"""CLIP of transformers to ONNX, in 8 bits for onnxruntime: python int8_onnx.py MODEL FILE [NEURONS]

onnxruntime gives each product one scale. The registers, which hold the large values that outliers held before, are
multiplied apart from the other tokens, so that they get a scale of their own.
"""

import sys
import tempfile
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

import testreg

REGISTERS = 3


class RegistersApart(nn.Module):
    """A linear that reads the last tokens, the registers, apart from the others."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.weight = nn.Parameter(linear.weight.T.contiguous())  # a constant of the graph, which is quantised

    def forward(self, tokens: Tensor) -> Tensor:
        parts = tokens[:, :-REGISTERS] @ self.weight, tokens[:, -REGISTERS:] @ self.weight
        return torch.cat(parts, dim=1) + self.linear.bias


class Embedding(nn.Module):
    """Pixels (B, 3, h, w) to the embeddings (B, D) of the images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).image_embeds


def keep_registers_apart(model: nn.Module) -> None:
    """Wrap the linears in the blocks of a patched CLIP, in place."""
    for parent in list(model.vision_model.encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, RegistersApart(child))


@torch.no_grad()
def export(model: nn.Module, file: str) -> None:
    """Write a CLIP to an ONNX file in 8 bits: weights as they are now, activations when they are computed."""
    size = model.config.image_size
    pixels, batch = torch.randn(2, 3, size, size), {"pixels": {0: torch.export.Dim("batch", min=1, max=64)}}
    model(pixels)  # a patch finds a wrapped linear when it runs, not while it is exported
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "float.onnx"
        torch.onnx.export(Embedding(model).eval(), (pixels,), exact, dynamo=True, dynamic_shapes=batch, verbose=False)
        quantize_dynamic(exact, file, per_channel=True, weight_type=QuantType.QInt8)


def main(name: str, file: str, neurons: str | None = None) -> None:
    model = CLIPVisionModelWithProjection.from_pretrained(name).eval()
    testreg.patch(model, neurons, num_registers=REGISTERS)
    keep_registers_apart(model)
    export(model, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
