"""An imitation of facebookresearch/dinov2's model, which cannot be installed: same class name, modules and outputs.

Where timm's parts have the same modules, they stand in.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import LayerScale, Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

DEPTH, WIDTH, MLP_WIDTH, PATCH, IMAGE = 4, 48, 192, 16, 64


class SwiGLUFFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w12 = nn.Linear(WIDTH, 2 * MLP_WIDTH)
        self.w3 = nn.Linear(MLP_WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * up)


class NestedTensorBlock(nn.Module):
    """Takes a tensor, or (as in training on crops of several sizes) a list of them."""

    def __init__(self, swiglu: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = Attention(WIDTH, num_heads=4, qkv_bias=True)
        self.mlp = SwiGLUFFN() if swiglu else Mlp(WIDTH, MLP_WIDTH)
        self.ls1, self.ls2 = LayerScale(WIDTH, 0.5), LayerScale(WIDTH, 0.5)

    def forward(self, x: Any) -> Any:
        if isinstance(x, list):
            return [self.forward(each) for each in x]
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class BlockChunk(nn.ModuleList):
    def forward(self, x: Any) -> Any:
        for block in self:
            x = block(x)
        return x


class DinoVisionTransformer(nn.Module):
    def __init__(self, *, num_register_tokens: int = 0, swiglu: bool = False, chunks: int = 0) -> None:
        super().__init__()
        self.num_register_tokens = num_register_tokens
        self.chunked_blocks = chunks > 0
        self.patch_embed = PatchEmbed(IMAGE, PATCH, embed_dim=WIDTH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (IMAGE // PATCH) ** 2, WIDTH))
        self.register_tokens = nn.Parameter(torch.randn(1, num_register_tokens, WIDTH))
        blocks = [NestedTensorBlock(swiglu) for _ in range(DEPTH)]
        if chunks:
            # Each chunk is padded in front with Identity, so that a block keeps its number in the state dict.
            size = DEPTH // chunks
            starts = range(0, DEPTH, size)
            blocks = [BlockChunk([nn.Identity()] * start + blocks[start : start + size]) for start in starts]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Identity()

    def prepare_tokens(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(images.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        return torch.cat([x[:, :1], self.register_tokens.expand(images.shape[0], -1, -1), x[:, 1:]], dim=1)

    def forward_features(self, images: Tensor | list[Tensor]) -> Any:
        x: Any = self.prepare_tokens(images) if isinstance(images, Tensor) else list(map(self.prepare_tokens, images))
        for block in self.blocks:
            x = block(x)
        return self._outputs(x) if isinstance(images, Tensor) else list(map(self._outputs, x))

    def _outputs(self, x: Tensor) -> dict[str, Tensor | None]:
        normed, first = self.norm(x), 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first],
            "x_norm_patchtokens": normed[:, first:],
            "x_prenorm": x,
            "masks": None,
        }

    def get_intermediate_layers(self, images: Tensor, n: int = 1, reshape: bool = False) -> tuple[Tensor, ...]:
        x, outputs = self.prepare_tokens(images), []
        blocks = [b for chunk in self.blocks for b in chunk] if self.chunked_blocks else list(self.blocks)
        for block in blocks:
            x = block(x)
            if not isinstance(block, nn.Identity):
                outputs.append(self.norm(x)[:, 1 + self.num_register_tokens :])
        if reshape:
            side = IMAGE // PATCH
            outputs = [out.transpose(1, 2).unflatten(2, (side, side)).contiguous() for out in outputs]
        return tuple(outputs[-n:])

    def forward(self, images: Tensor, is_training: bool = False) -> Any:
        features = self.forward_features(images)
        return features if is_training else self.head(features["x_norm_clstoken"])
