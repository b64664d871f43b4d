"""The rows for timm, whose towers have `blocks` with norm1, attn, norm2 and mlp, behind different embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from testreg.families.extend import extend_bias, extend_rope
from testreg.families.family import STAGES, WINDOWS, Family
from testreg.families.layout import Layout
from testreg.families.tower import convolved


def _extend_rope(rope: Tensor, layout: Layout) -> Tensor:
    """Extend rotary embeddings to the registers; timm keeps sines and cosines in one tensor (..., T, 2D)."""
    sine, cosine = rope.chunk(2, -1)
    cosine, sine = extend_rope((cosine, sine), layout)
    return torch.cat([sine, cosine], -1)


def _num_prefix(tower: Any) -> int:
    """The number of prefix tokens."""
    generator = getattr(tower, "patch_generator", None)  # NVlabs/RADIO replaces timm's embedding with it
    return tower.num_prefix_tokens if generator is None else generator.num_skip


def _num_registers(tower: Any) -> int:
    """The number of trained registers."""
    tokens = getattr(getattr(tower, "embeds", tower), "reg_token", None)
    return 0 if tokens is None else tokens.shape[1]


def _patch_size(tower: Any) -> tuple[int, int]:
    """Height and width of a patch in pixels."""
    generator = getattr(tower, "patch_generator", None)
    return tower.patch_embed.feat_ratio(as_scalar=False) if generator is None else (generator.patch_size,) * 2


def _grid(tower: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches. An embedding with `dynamic_img_pad` pads images at the bottom and right."""
    generator = getattr(tower, "patch_generator", None)
    if generator is not None:
        return height // generator.patch_size, width // generator.patch_size
    projection = getattr(tower.patch_embed, "proj", None)
    if isinstance(projection, nn.Conv2d) and projection.stride != projection.kernel_size:
        return convolved(projection, height, width)
    # An embedding of several convolutions always pads, which `dynamic_feat_size` does not count: round up first.
    rows, columns = getattr(tower.patch_embed, "feature_ratio", (1, 1))
    return tower.patch_embed.dynamic_feat_size((-(-height // rows) * rows, -(-width // columns) * columns))


VIT = Family(
    name="timm VisionTransformer",
    library="timm",
    towers="VisionTransformer",
    blocks="blocks",
    fc2=("mlp.w2", "mlp.norm", "mlp.fc2", "mlp_out_proj"),
    patch_embed="patch_embed.proj",
    positions=("pos_embed", "embeds.pos_embed", "patch_generator.pos_embed"),
    prefix=_num_prefix,
    trained_registers=_num_registers,
    scale=("ls2.gamma", "ls.gamma"),
    fused="out_proj",
    parallel="ffns",
    entry_norm="norm_pre",
    patch_size=_patch_size,
    grid=_grid,
    run=lambda tower, images: tower.forward_features(images),
)

FAMILIES = (
    VIT,
    replace(VIT, name="timm Eva", towers="Eva", scale="gamma_2", block_arguments={"rope": _extend_rope}),
    replace(
        VIT,
        name="timm Beit",
        towers="Beit",
        scale="gamma_2",
        entry_norm=(),
        bias="attn._get_rel_pos_bias",
        block_arguments={"shared_rel_pos_bias": extend_bias},
    ),
    replace(
        VIT,
        name="timm VisionTransformerRelPos",
        towers="VisionTransformerRelPos",
        entry_norm=(),
        bias="attn.rel_pos.get_bias",
        block_arguments={"shared_rel_pos": extend_bias},
    ),
    replace(
        VIT,
        name="timm NaFlexVit",
        towers="NaFlexVit",
        patch_embed="embeds.proj",
        block_arguments={"rope": _extend_rope},
        patch_size=lambda tower: tower.embeds.patch_size,
        grid=lambda tower, height, width: tower.embeds.dynamic_feat_size((height, width)),
    ),
)

REFUSED = {
    "VisionTransformerSAM": WINDOWS,
    **dict.fromkeys(("SwinTransformer", "SwinTransformerV2", "MultiScaleVit", "Hiera", "HieraDet", "DaVit"), STAGES),
    **dict.fromkeys(("PyramidVisionTransformerV2", "Twins", "MaxxVit", "Levit"), STAGES),
}
