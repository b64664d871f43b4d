"""What a model makes of images, as maps over their patches: without prefix tokens and registers, patched or not."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from testreg.families import Tower, find_tower
from testreg.families.layout import Layout
from testreg.io.images import Images, ImageStream
from testreg.io.preprocessing import OwnTransform, Transform
from testreg.io.sources import images_in, named_source, single_images, undecoded
from testreg.measure.attention import Query, To, attention_to_patches, pooling, rolled_out
from testreg.measure.hooks import recorded_tokens
from testreg.patching.forward import has_no_registers
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
    """What CLS, or whatever `query` says, gives to each patch in a block: (B, heads, h, w), for h x w patches.

    Attention may be computed by any kernel; it is measured in float32 or better. Patched or not, the maps hold the
    patches alone: they sum to less than one, the rest goes to prefix tokens and registers.

    Example:
        >>> testreg.attention(model, images).shape
        torch.Size([45, 4, 4, 4])
        >>> testreg.attention(model, images, query=(0, 3)).shape  # of the patch in the first row, fourth column
        torch.Size([45, 4, 4, 4])
        >>> with testreg.patched(model, {2: [5, 77]}):
        ...     maps = testreg.attention(model, "photos/", block=2).mean(1)
        ...     to_register = testreg.attention(model, images, to="registers")
        >>> to_register.shape
        torch.Size([45, 4, 1])

    Args:
        model: a vision tower, or any model that contains one. It is measured in eval mode.
        images: float tensors (B, 3, h, w) are the model's input as they stand. One or several PIL images or paths, or a
            folder, of which the order is that of the names, are prepared as the model's own library does.
        block: 0-based; -1 is the last. A tower may attend several times in a block, side by side: all heads are given.
        query: whose attention. "cls": the first token. "mean": the mean of the patches. "register": the mean of the
            registers, trained ones and those that a patch adds. (row, column): that patch. A mask (h, w) or (B, h, w)
            of patches, bool: their mean. "pool": the query of a head that pools the last block's tokens by attention
            (SigLIP). None: "cls" if there is a prefix token; else, for the last block, "pool" if there is such a head;
            else "mean".
        to: "patches", or "registers": then (B, heads, R), the trained registers first, then those that a patch adds.
        rollout: follow attention from the first block to `block` (attention rollout, arXiv 2005.00928), instead of
            looking at that block alone: (B, 1, h, w), since the mean of the heads is taken in each. Of prefix tokens,
            patches and registers; not for query="pool".
        transform: PIL image -> tensor (3, h, w); None takes the preprocessing that the model's own library names.

    Raises:
        ValueError: an argument does not fit the model, it has no registers, or an image cannot be read.
        RuntimeError: attention cannot be observed from Python (compiled or custom kernels).
    """
    tower = find_tower(model)
    _check(tower, block)
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
    asked = query if query is None or isinstance(query, str) else _mask(query, grid, len(batch))
    maps = []
    with tower.evaluating():
        if query is None and not tower.num_prefix and is_last and not rollout and to == "patches":
            asked = "pool" if pooling(tower, batch) else "mean"
        for first in range(0, len(batch), batch_size):
            part = slice(first, first + batch_size)
            of_part = asked[part] if isinstance(asked, Tensor) and asked.ndim == 3 else asked
            if rollout:
                maps.append(rolled_out(tower, batch[part], block, of_part))
            else:
                maps.append(attention_to_patches(tower, batch[part], block, of_part, to=to))
    attention = torch.cat(maps)
    return attention if to == "registers" else attention.unflatten(-1, tower.grid(batch))


def _mask(query: tuple[int, int] | Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """The patches, (h, w) or (B, h, w) bool, that a query of patches names."""
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
    """The patches behind a block as a feature map (B, C, h, w), for h x w patches; patched or not.

    Example:
        >>> with testreg.patched(model, neurons):
        ...     dense = testreg.features(model, images, norm=True)
        >>> dense.shape
        torch.Size([45, 48, 4, 4])

    Args:
        model, images, block, transform: as in `testreg.attention`.
        norm: apply the tower's final norm, as DINOv2's dense features are used, whichever block is asked for. Some
            towers themselves apply it to CLS or to the mean of the patches alone.

    Raises:
        ValueError: an argument does not fit the model, an image cannot be read, or there is no final norm.
    """
    tower = find_tower(model)
    _check(tower, block)
    batch = image_batch(model, images, transform)
    with tower.evaluating():
        maps = [_feature_map(tower, part, block, norm) for part in batch.split(batch_size)]
    return torch.cat(maps)


def _feature_map(tower: Tower, images: Tensor, block: int, norm: bool) -> Tensor:
    with recorded_tokens(tower, images, block) as recorded:
        tower.run(images)
    tokens = recorded[0]
    if len(tokens) != len(images) or tokens.ndim != 3:  # images that are packed in one sequence
        if len(images) > 1:
            return torch.cat([_feature_map(tower, image, block, norm) for image in images.split(1)])
        tokens = tokens.reshape(1, -1, tokens.shape[-1])
    patches = tokens[:, tower.patches(images)]
    if norm:
        if (final_norm := tower.final_norm) is None:
            raise ValueError(f"{type(tower.module).__name__} has no norm behind its last block: pass norm=False")
        patches = final_norm(patches)
    return patches.mT.unflatten(-1, tower.grid(images))


def strip_registers(model: nn.Module, tensor: Tensor, lengths: list[int] | None = None) -> Tensor:
    """What a hook inside a block of a patched model sees, without the registers.

    Blocks compute on T+R tokens. What they give has T, and is returned as it is; but the last block's cannot be told
    from what is inside. A model that is not patched, or disabled, has no registers inside either.

    Example:
        >>> def hook(module, args, output):
        ...     seen.append(testreg.strip_registers(model, output))
        >>> seen, handle = [], model.blocks[2].mlp.register_forward_hook(hook)
        >>> with testreg.patched(model, neurons, num_registers=2):
        ...     outputs = model(images)
        >>> seen[0].shape
        torch.Size([45, 17, 48])

    Args:
        tensor: tokens (B, T+R, ...), or (T+R, B, ...) in a tower whose blocks see them so, with any number of channels;
            attention (B, heads, T+R, T+R), of which rows and columns go; or one sequence (S, C) or (1, S, C) of packed
            images.
        lengths: tokens T of each image in a packed sequence.

    Returns:
        The same with T tokens. Those of a batch are a view.

    Raises:
        ValueError: the tensor has another shape, or a packed sequence comes without its lengths.
    """
    patch = find_patch(model)
    if patch is None or not patch.mode_for_new_forward.has_registers or has_no_registers(tensor):
        return tensor
    tower = find_tower(model)
    layout = Layout(patch.num_registers, tower.sequence_first, lengths)
    if lengths is None and not {"cu_seqlens", "cu_seq_lens_q"}.isdisjoint(tower.family.block_arguments):
        raise ValueError(f"{tower.family.name} packs images in one sequence: pass lengths, the tokens T of each image")
    if lengths is not None and tensor.shape[-2] != sum(lengths) + len(lengths) * patch.num_registers:
        raise ValueError(f"{len(lengths)} images of {sum(lengths)} tokens do not fit a tensor {tuple(tensor.shape)}")
    if tensor.ndim == 4 and tensor.shape[-1] == tensor.shape[-2]:
        return layout.without_registers(tensor, tower.family.appended)
    if tensor.ndim == 3 or (lengths is not None and tensor.ndim == 2):
        return layout.tokens(tensor)
    raise ValueError(
        f"expected tokens (B, T+R, C) or attention (B, heads, T+R, T+R), got {tuple(tensor.shape)}: bring it to one "
        "of these shapes"
    )


def image_batch(model: nn.Module, images: Images, transform: Transform | None = None) -> Tensor:
    """Images of any source as the model's input (B, 3, h, w), in the order in which they come.

    Raises:
        FileNotFoundError, ValueError: there is none, one cannot be read, or they differ in shape.
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
    """The images of any source, one by one, as they are; those of a folder in the order of their names.

    Raises:
        FileNotFoundError, ValueError: there is none.
    """
    items = named_source(os.fspath(images)) if isinstance(images, str | os.PathLike) else images_in(images)
    return list(single_images(undecoded(items)))


def _check(tower: Tower, block: int) -> None:
    tower.check_runs()
    if not -tower.depth <= block < tower.depth:
        raise ValueError(f"block={block} is out of range: the model has {tower.depth} blocks")
