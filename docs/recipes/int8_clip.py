"""CLIP of transformers in 8 bits, one scale for a tensor (torchao): python int8_clip.py MODEL PHOTOS [NEURONS]

The registers hold the large values that outliers held before. They stay in float, so that no scale has to reach them.
It takes torchao 0.17 or newer.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor, quantize_
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

import testreg


class RegistersInFloat(nn.Module):
    """A linear that reads all tokens but the last, the registers. These are multiplied by its weights in float."""

    def __init__(self, linear: nn.Linear, count: int) -> None:
        super().__init__()
        self.linear, self.count = linear, count

    def forward(self, tokens: Tensor) -> Tensor:
        registers = F.linear(tokens[:, -self.count :], self.linear.weight.dequantize(), self.linear.bias)
        return torch.cat([self.linear(tokens[:, : -self.count]), registers], dim=1)


@torch.no_grad()
def keep_registers_apart(model: nn.Module, pixels: Tensor) -> None:
    """Wrap the linears of a patched CLIP, in place, in the blocks in which pixels (n, 3, h, w) have registers."""
    with testreg.registers(model) as after_block:
        model(pixels)
    for block, registers in zip(model.vision_model.encoder.layers, after_block, strict=True):
        for parent in list(block.modules()) if registers.shape[1] else []:
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, RegistersInFloat(child, registers.shape[1]))


@torch.no_grad()
def quantise(model: nn.Module, pixels: Tensor) -> None:
    """Quantise the linears in the blocks, in place, with the scales that pixels (n, 3, h, w) of photographs need."""
    linears = [module for module in model.vision_model.encoder.modules() if isinstance(module, nn.Linear)]
    largest: dict[nn.Module, Tensor] = {}

    def look(linear: nn.Module, inputs: tuple[Tensor]) -> None:
        largest[linear] = inputs[0].abs().amax()

    hooks = [linear.register_forward_pre_hook(look) for linear in linears]
    model(pixels)
    for linear, hook in zip(linears, hooks, strict=True):
        hook.remove()
        scale = (largest[linear] / 127).view(1, 1, 1)
        quantize_(linear, Int8StaticActivationInt8WeightConfig(scale, granularity=[PerTensor(), PerRow()]))


@torch.no_grad()
def main(name: str, folder: str, neurons: str | None = None) -> tuple[Tensor, Tensor]:
    model = CLIPVisionModelWithProjection.from_pretrained(name).eval()
    testreg.patch(model, neurons)
    photos = [Image.open(file).convert("RGB") for file in sorted(Path(folder).iterdir())]
    pixels = CLIPImageProcessor.from_pretrained(name)(images=photos, return_tensors="pt")["pixel_values"]
    exact = model(pixels).image_embeds
    keep_registers_apart(model, pixels[:1])
    quantise(model, pixels)
    quantised = model(pixels).image_embeds
    print(f"cosine to float: {F.cosine_similarity(quantised, exact).mean():.4f}")
    return quantised, exact


if __name__ == "__main__":
    main(*sys.argv[1:])
