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


class RegistersApart(nn.Module):
    """A linear that reads the last tokens, the registers, apart from the others."""

    def __init__(self, linear: nn.Linear, count: int) -> None:
        super().__init__()
        self.linear, self.count = linear, count
        self.weight = nn.Parameter(linear.weight.T.contiguous())  # a constant of the graph, which is quantised

    def forward(self, tokens: Tensor) -> Tensor:
        parts = tokens[:, : -self.count] @ self.weight, tokens[:, -self.count :] @ self.weight
        return torch.cat(parts, dim=1) + self.linear.bias


class Embedding(nn.Module):
    """Pixels (B, 3, h, w) to the embeddings (B, D) of the images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).image_embeds


@torch.no_grad()
def keep_registers_apart(model: nn.Module, pixels: Tensor) -> None:
    """Wrap the linears of a patched CLIP, in place, in the blocks in which pixels (n, 3, h, w) have registers."""
    with testreg.registers(model) as after_block:
        model(pixels)
    for block, registers in zip(model.vision_model.encoder.layers, after_block, strict=True):
        for parent in list(block.modules()) if registers.shape[1] else []:
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, RegistersApart(child, registers.shape[1]))


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
    testreg.patch(model, neurons)
    keep_registers_apart(model, torch.randn(1, 3, model.config.image_size, model.config.image_size))
    export(model, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
