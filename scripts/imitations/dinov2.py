"""Imitations of facebookresearch/dino and dinov2, made of parts of timm where these have the same modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

DEPTH, WIDTH, MLP_WIDTH, PATCH, IMAGE = 4, 48, 192, 16, 64
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class _Transformer(nn.Module):
    """What the towers of DINO and DINOv2 have in common."""

    def __init__(self, blocks: Sequence[nn.Module], width: int, img_size: int, patch_size: int) -> None:
        super().__init__()
        self.num_features = self.embed_dim = width
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim=width, strict_img_size=False)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.patch_embed.num_patches, width))
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(width)

    def prepare_tokens(self, x: Tensor) -> Tensor:
        size = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        positions = resample_abs_pos_embed(self.pos_embed, [*size], [*self.patch_embed.grid_size])
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), self.patch_embed(x)], 1) + positions

    def _normed(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the tokens after each block, normalised by the final norm."""
        x = self.prepare_tokens(x)
        for block in self.blocks.modules():
            if isinstance(block, Block):
                x = block(x)
                yield self.norm(x)


class DinoAttention(Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens, and the weights (B, heads, T, T)."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attn = (query @ key.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((attn @ value).transpose(1, 2).flatten(2)), attn


class DinoBlock(Block):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads, norm_layer=LayerNorm)
        self.attn = DinoAttention(width, num_heads, qkv_bias=True)

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor:
        """The tokens, or the attention weights if `return_attention`."""
        y, attn = self.attn(self.norm1(x))
        if return_attention:
            return attn
        x = x + y
        return x + self.mlp(self.norm2(x))


class VisionTransformer(_Transformer):
    """The tower of DINO."""

    def __init__(self, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int) -> None:
        super().__init__([DinoBlock(embed_dim, num_heads) for _ in range(depth)], embed_dim, img_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_intermediate_layers(x)[-1][:, 0]

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        x = self.prepare_tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](x, return_attention=True)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        return [*self._normed(x)][-n:]


class SwiGLUFFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w12 = nn.Linear(WIDTH, 2 * MLP_WIDTH)
        self.w3 = nn.Linear(MLP_WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * up)


class NestedTensorBlock(Block):
    """A block that takes a tensor, or a list of tensors (as in training on crops of several sizes)."""

    def __init__(self, swiglu: bool) -> None:
        super().__init__(WIDTH, 4, MLP_WIDTH / WIDTH, qkv_bias=True, init_values=0.5, norm_layer=LayerNorm)
        if swiglu:
            self.mlp = SwiGLUFFN()

    def forward(self, x: Any) -> Any:
        forward = super().forward
        return [forward(each) for each in x] if isinstance(x, list) else forward(x)


class BlockChunk(nn.ModuleList):
    def forward(self, x: Any) -> Any:
        for block in self:
            x = block(x)
        return x


class DinoVisionTransformer(_Transformer):
    """The tower of DINOv2."""

    def __init__(self, *, num_register_tokens: int = 0, swiglu: bool = False, chunks: int = 0) -> None:
        blocks: list[nn.Module] = [NestedTensorBlock(swiglu) for _ in range(DEPTH)]
        if chunks:
            # Identity modules in front of a chunk's blocks keep the blocks' numbers in the state_dict.
            size = DEPTH // chunks
            starts = range(0, DEPTH, size)
            blocks = [BlockChunk([nn.Identity()] * start + blocks[start : start + size]) for start in starts]
        super().__init__(blocks, WIDTH, IMAGE, PATCH)
        self.num_register_tokens = num_register_tokens
        self.chunked_blocks = chunks > 0
        self.register_tokens = nn.Parameter(torch.randn(1, num_register_tokens, WIDTH))
        self.head = nn.Identity()

    def prepare_tokens(self, x: Tensor) -> Tensor:
        x = super().prepare_tokens(x)
        return torch.cat([x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)

    def forward_features(self, images: Tensor | list[Tensor]) -> Any:
        x: Any = self.prepare_tokens(images) if isinstance(images, Tensor) else list(map(self.prepare_tokens, images))
        for block in self.blocks:
            x = block(x)
        return self._outputs(x) if isinstance(images, Tensor) else list(map(self._outputs, x))

    def _outputs(self, x: Tensor) -> dict[str, Tensor | None]:
        normed, first = self.norm(x), 1 + self.num_register_tokens
        tokens = {"clstoken": normed[:, 0], "regtokens": normed[:, 1:first], "patchtokens": normed[:, first:]}
        return {**{f"x_norm_{name}": each for name, each in tokens.items()}, "x_prenorm": x, "masks": None}

    def get_intermediate_layers(self, images: Tensor, n: int = 1, reshape: bool = False) -> tuple[Tensor, ...]:
        outputs = [tokens[:, 1 + self.num_register_tokens :] for tokens in self._normed(images)]
        if reshape:
            grid = self.patch_embed.dynamic_feat_size(images.shape[-2:])
            outputs = [out.transpose(1, 2).unflatten(2, grid).contiguous() for out in outputs]
        return tuple(outputs[-n:])

    def forward(self, images: Tensor, is_training: bool = False) -> Any:
        features = self.forward_features(images)
        return features if is_training else self.head(features["x_norm_clstoken"])
