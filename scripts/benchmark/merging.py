"""Compares a patched model with token merging, another method that changes how many tokens the blocks get.

tomesd (arXiv 2303.17604) merges similar patches before attention and unmerges them after it. Plain token merging (arXiv
2210.09461) merges a few patches after each block, which stay merged. Both match patches anew in each block. The
functions that match are those of tomesd; they are put around the attention of a ViT here.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import testreg
from benchmark.forward import DTYPES
from benchmark.measuring import Row, compared, in_turns
from benchmark.models import build, neurons, random_images, twin
from testreg.families import find_tower

MERGED_FOR_GOOD = 8  # patches that plain token merging merges in each block


def merging(args: argparse.Namespace) -> Iterator[Row]:
    """Compare a patched forward with forwards that merge one patch or half of them for attention, or some for good."""
    for dtype in args.dtype:
        plain = build(args, DTYPES[dtype])
        num_patches = plain.patch_embed.num_patches
        models = {
            "plain": plain,
            "patched": testreg.patch(twin(plain), neurons(plain)),
            "one_merged": merge_for_attention(twin(plain), 1),
            "half_merged": merge_for_attention(twin(plain), num_patches // 2),
            f"{MERGED_FOR_GOOD}_for_good": merge_for_good(twin(plain), MERGED_FOR_GOOD),
            "noise": twin(plain),
        }
        for batch in args.batch:
            images = random_images(batch, plain)
            sides = {side: functools.partial(model, images) for side, model in models.items()}
            with torch.inference_mode():
                yield {"dtype": dtype, "batch": batch, **compared(in_turns(sides, args.device, args.repeats))}


def merge_for_attention(model: nn.Module, count: int) -> nn.Module:
    """Make each attention of `model` run on `count` fewer patches, in place. Merged patches get the same output."""

    def merge(attention: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        prefix, patches = inputs[0].tensor_split([num_prefix], dim=1)
        side = math.isqrt(patches.shape[1])
        merged, unmerge_of[attention] = merge_functions(patches, side, side, count)
        return torch.cat([prefix, merged(patches)], 1), *inputs[1:]

    def unmerge(attention: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        prefix, patches = output.tensor_split([num_prefix], dim=1)
        return torch.cat([prefix, unmerge_of.pop(attention)(patches)], 1)

    tower = find_tower(model)
    num_prefix, unmerge_of = tower.num_prefix, {}
    for block in tower.blocks:
        block.module.attn.register_forward_pre_hook(merge)
        block.module.attn.register_forward_hook(unmerge)
    return model


def merge_for_good(model: nn.Module, count: int) -> nn.Module:
    """Make each block of `model` return `count` fewer patches than it gets, in place."""

    def merge(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        prefix, patches = output.tensor_split([num_prefix], dim=1)
        merged, _ = merge_functions(patches, 1, patches.shape[1], count)
        return torch.cat([prefix, merged(patches)], 1)

    tower = find_tower(model)
    num_prefix = tower.num_prefix
    for block in tower.blocks:
        block.module.register_forward_hook(merge)
    return model


def merge_functions(patches: Tensor, height: int, width: int, count: int) -> tuple[Callable[[Tensor], Tensor], ...]:
    """Two functions: one merges `count` of the patches (B, height * width, C) into similar ones, one is its inverse.

    One patch of each 2 x 2 (or of each two, if the height is 1) stays; the others may be merged into one of these.
    """
    try:
        from tomesd.merge import bipartite_soft_matching_random2d
    except ImportError:
        raise SystemExit("--only merging needs tomesd: pip install tomesd") from None
    return bipartite_soft_matching_random2d(patches, width, height, 2, min(2, height), count, no_rand=True)
