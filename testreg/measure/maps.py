"""Maps over the patches of images: attention and features, without prefix tokens (such as CLS) and registers.

*Registers* are extra tokens: trained ones are among the prefix tokens, and a patched model adds others. All functions
take models that are patched or not.

Shapes: B images of h x w patches; T tokens without and T+R with the R registers that a patched model adds; C width.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from testreg.extensions.hooks import has_no_registers
from testreg.families import Tower, find_tower
from testreg.families.layout import Layout
from testreg.io.images import Images, ImageStream
from testreg.io.preprocessing import OwnTransform, Transform
from testreg.io.sources import images_in, named_source, single_images, undecoded
from testreg.measure.attention import Query, To, attention_rollout, attention_to_patches, pooling_attention
from testreg.measure.hooks import recorded_tokens
from testreg.patching.state import find_patch


def attention(
    model: nn.Module,
    images: Images,
    block: int = -1,
    *,
    query: Query | tuple[int, int] | Tensor | None = None,
    to: To = "patches",
    rollout: bool = False,
    transform: Transform | None = None,
    batch_size: int = 16,
) -> Tensor:
    """The attention that CLS, or another `query`, gives to each patch in a block: (B, heads, h, w), for h x w patches.

    The maps hold the attention to patches only. They may sum to less than one, since the rest goes to prefix tokens and
    registers. Attention is measured in float32 or a larger dtype, whichever kernel computes it.

    Example:
        >>> testreg.attention(model, images).shape
        torch.Size([45, 4, 4, 4])
        >>> testreg.attention(model, images, query=(0, 3)).shape  # what the patch in row 0, column 3 gives
        torch.Size([45, 4, 4, 4])
        >>> with testreg.patched(model, {2: [5, 77]}):
        ...     maps = testreg.attention(model, "photos/", block=2).mean(1)
        ...     to_register = testreg.attention(model, images, to="registers")
        >>> to_register.shape
        torch.Size([45, 4, 1])

    Args:
        model: a vision tower, or any model that contains one. It is measured in eval mode.
        images: a float tensor (B, 3, H, W) is taken as the model's input. PIL images, paths and folders are prepared as
            the model's library does; the images of a folder come in the order of their names.
        block: the index of the block, 0-based; -1 is the last. If a block has several attentions in parallel, the heads
            of all are returned.
        query: the token whose attention is returned. "cls" is the first token. "mean" is the mean of the patches.
            "register" is the mean of all registers. (row, column) is this patch. A bool mask (h, w) or (B, h, w) is the
            mean of the patches in it. "pool" is the query of a module that pools the last block's tokens by attention
            (SigLIP). None takes "cls" if there is a prefix token. Otherwise it takes "pool" for the last block if there
            is such a module (but not with `rollout` or to="registers"), and else "mean".
        to: "patches"; or "registers" for the attention to each register, (B, heads, R): first the trained ones, then
            those that a patched model adds.
        rollout: follow attention from the first block to `block` (attention rollout, arXiv 2005.00928), instead of
            looking at this block alone. The maps are then (B, 1, h, w), since heads are averaged in each block. This is
            not possible for query="pool".
        transform: a function PIL image -> tensor (3, H, W); None takes the preprocessing that the model's library
            names.
        batch_size: how many images are run at once.

    Raises:
        ValueError: an argument does not fit the model, registers are asked for and there are none, or an image cannot
            be read.
        RuntimeError: attention cannot be observed from Python (compiled or custom kernels).
    """
    tower = find_tower(model)
    _check_block(tower, block)
    if to not in ("patches", "registers"):
        raise ValueError(f"to must be 'patches' or 'registers', got {to!r}")
    if isinstance(query, str) and query not in ("cls", "pool", "mean", "register"):
        raise ValueError(
            f"query must be 'cls', 'pool', 'mean', 'register', (row, column), a mask of patches or None, got {query!r}"
        )
    if query == "cls" and not tower.num_prefix:
        raise ValueError(f"{type(tower.module).__name__} has no CLS token: pass query='pool' or query='mean'")
    is_last = block % tower.depth == tower.depth - 1
    if query == "pool" and not is_last:
        raise ValueError(f"query='pool' looks at the last block's tokens, not at those of block {block}")
    if query == "pool" and (rollout or to == "registers"):
        raise ValueError("query='pool' is no token of a block: it neither rolls out nor looks at registers")
    if rollout and to == "registers":
        raise ValueError("rollout follows attention to the patches: leave to='registers' out")
    batch = image_batch(model, images, transform)
    grid = tower.rows_and_columns(batch)
    query_or_mask = query if query is None or isinstance(query, str) else _mask(query, grid, len(batch))
    maps = []
    with tower.evaluating():
        if query is None and not tower.num_prefix and is_last and not rollout and to == "patches":
            query_or_mask = "pool" if pooling_attention(tower, batch) else "mean"
        for first in range(0, len(batch), batch_size):
            part = slice(first, first + batch_size)
            of_part = query_or_mask
            if isinstance(query_or_mask, Tensor) and query_or_mask.ndim == 3:  # a mask for each image
                of_part = query_or_mask[part]
            if rollout:
                maps.append(attention_rollout(tower, batch[part], block, of_part))
            else:
                maps.append(attention_to_patches(tower, batch[part], block, of_part, to=to))
    attention = torch.cat(maps)
    return attention if to == "registers" else attention.unflatten(-1, tower.grid(batch))


def _mask(query: tuple[int, int] | Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """The bool mask, (h, w) or (B, h, w), of the patches that a query (row, column) or a mask names, checked."""
    if isinstance(query, Tensor):
        if query.dtype != torch.bool or tuple(query.shape) not in (grid, (count, *grid)):
            raise ValueError(
                f"a mask of patches is bool, {grid} or {(count, *grid)} here, got {query.dtype} {tuple(query.shape)}"
            )
        if not query.flatten(-2).any(-1).all():
            raise ValueError("the mask has no patch whose attention could be shown")
        return query
    row, column = query
    if not (-grid[0] <= row < grid[0] and -grid[1] <= column < grid[1]):
        raise ValueError(f"query={query} is out of range: the images have {grid[0]} x {grid[1]} patches")
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[row, column] = True
    return mask


@torch.no_grad()
def features(
    model: nn.Module,
    images: Images,
    block: int = -1,
    *,
    norm: bool = False,
    transform: Transform | None = None,
    batch_size: int = 16,
) -> Tensor:
    """The patches after a block as a feature map (B, C, h, w), for h x w patches.

    Example:
        >>> with testreg.patched(model, neurons):
        ...     dense = testreg.features(model, images, norm=True)
        >>> dense.shape
        torch.Size([45, 48, 4, 4])

    Args:
        model, images, block, transform, batch_size: as in `testreg.attention`.
        norm: apply the tower's final norm to the patches, after whichever block, as is usual for DINOv2's features.
            Some towers themselves apply it only to CLS, or to the mean of the patches.

    Raises:
        ValueError: an argument does not fit the model, an image cannot be read, or there is no final norm.
    """
    tower = find_tower(model)
    _check_block(tower, block)
    batch = image_batch(model, images, transform)
    with tower.evaluating():
        maps = [_feature_map(tower, part, block, norm) for part in batch.split(batch_size)]
    return torch.cat(maps)


def _feature_map(tower: Tower, images: Tensor, block: int, norm: bool) -> Tensor:
    """The feature map (B, C, h, w) of a batch."""
    with recorded_tokens(tower, images, block) as recorded:
        tower.run(images)
    tokens = recorded[0]
    if len(tokens) != len(images) or tokens.ndim != 3:  # the tower packs images in one sequence
        if len(images) > 1:
            return torch.cat([_feature_map(tower, image, block, norm) for image in images.split(1)])
        tokens = tokens.reshape(1, -1, tokens.shape[-1])
    patches = tokens[:, tower.patches(images)]
    if norm:
        if (final_norm := tower.final_norm) is None:
            raise ValueError(f"{type(tower.module).__name__} has no norm behind its last block: pass norm=False")
        patches = final_norm(patches)
    return patches.mT.unflatten(-1, tower.grid(images))


def strip_registers(
    model: nn.Module, tensor: Tensor, lengths: list[int] | None = None, *, block: int | None = None
) -> Tensor:
    """Remove the registers from a tensor that a hook inside a block of a patched model gets.

    A block of a patched model takes and returns T tokens, but computes on T+R tokens, with R registers. Output of a
    block is returned unchanged, except that of the last block, which cannot be told from a tensor inside a block. If
    the model is not patched, or `disabled`, the tensor is returned unchanged too.

    Example:
        >>> def hook(module, args, output):
        ...     seen.append(testreg.strip_registers(model, output))
        >>> seen, handle = [], model.blocks[2].mlp.register_forward_hook(hook)
        >>> with testreg.patched(model, neurons, num_registers=2):
        ...     outputs = model(images)
        >>> seen[0].shape
        torch.Size([45, 17, 48])

    Args:
        tensor: tokens (B, T+R, C), or (T+R, B, C) in a tower whose blocks have the sequence first, with any number C of
            channels; attention (B, heads, T+R, T+R); or a sequence (S, C) or (1, S, C) of the S tokens, registers
            included, of several packed images.
        lengths: how many tokens T each image has in a packed sequence.
        block: the block that the tensor is from, -L to L-1. It must be given where registers enter a later block than
            the first (`start` of `testreg.patch`), since the tensors of earlier blocks have none.

    Returns:
        The tensor with T tokens in place of T+R. Tokens of a batch are a view of it.

    Raises:
        ValueError: the tensor has another shape, a packed sequence comes without its lengths, or `block` is missing.
    """
    patch = find_patch(model)
    if patch is None or not patch.mode_for_new_forward.has_registers or has_no_registers(tensor):
        return tensor
    if block is None and patch.entry_block > 0:
        raise ValueError(
            f"the registers of this model enter block {patch.entry_block}, and blocks in front of it have none: pass "
            "block=, the block that the tensor is from, or run the hooks within testreg.hooks_without_registers(model)"
        )
    tower = find_tower(model)
    if block is not None:
        _check_block(tower, block)
        if block % tower.depth < patch.entry_block:
            return tensor
    layout = Layout(patch.num_registers, tower.sequence_first, lengths)
    if lengths is None and not {"cu_seqlens", "cu_seq_lens_q"}.isdisjoint(tower.family.block_arguments):
        raise ValueError(f"{tower.family.name} packs images in one sequence: pass lengths, the tokens T of each image")
    if lengths is not None and tensor.shape[-2] != sum(lengths) + len(lengths) * patch.num_registers:
        raise ValueError(f"{len(lengths)} images of {sum(lengths)} tokens do not fit a tensor {tuple(tensor.shape)}")
    if tensor.ndim == 4 and tensor.shape[-1] == tensor.shape[-2]:
        return layout.weights_without_registers(tensor, tower.family.appended)
    if tensor.ndim == 3 or (lengths is not None and tensor.ndim == 2):
        return layout.tokens(tensor)
    raise ValueError(
        f"expected tokens (B, T+R, C) or attention (B, heads, T+R, T+R), got {tuple(tensor.shape)}: bring it to one "
        "of these shapes"
    )


def image_batch(model: nn.Module, images: Images, transform: Transform | None = None) -> Tensor:
    """Prepare images from any source as the model's input (B, 3, H, W), in the order of the source.

    A float tensor is taken as it is.

    Raises:
        FileNotFoundError, ValueError: there are no images, one cannot be read, or their shapes differ.
    """
    if isinstance(images, Tensor) and images.is_floating_point():
        if images.ndim != 4 or not len(images):
            raise ValueError(f"expected images (B, 3, h, w), one at least, got {tuple(images.shape)}")
        return images
    stream = ImageStream(listed_images(images), transform or OwnTransform(model))
    batch = [image for _, image in stream.numbered()]
    if stream.num_skipped:
        raise ValueError(f"{stream.num_skipped} of the images could not be read: {stream.first_unreadable}")
    if not batch:
        raise stream.nothing_read()
    if len({image.shape for image in batch}) > 1:
        shapes = ", ".join(sorted({str(tuple(image.shape)) for image in batch}))
        raise ValueError(f"the images have different shapes as the model's input ({shapes}): pass them one at a time")
    return torch.stack(batch)


def listed_images(images: Images) -> list[Any]:
    """List the single images of any source, unprepared; those of a folder come in the order of their names.

    Raises:
        FileNotFoundError, ValueError: there are no images.
    """
    items = named_source(os.fspath(images)) if isinstance(images, str | os.PathLike) else images_in(images)
    return list(single_images(undecoded(items)))


def _check_block(tower: Tower, block: int) -> None:
    tower.check_runs()
    if not -tower.depth <= block < tower.depth:
        raise ValueError(f"block={block} is out of range: the model has {tower.depth} blocks")
