"""What a model makes of images, as maps over their patches: without prefix tokens and registers, patched or not."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from testreg.families import Tower, find_tower
from testreg.io.images import Images, ImageStream
from testreg.io.preprocessing import OwnTransform, Transform
from testreg.io.sources import images_in, named_source, single_images, undecoded
from testreg.measure.attention import Query, attention_to_patches, pooling
from testreg.measure.hooks import recorded_tokens
from testreg.patching.forward import has_no_registers
from testreg.patching.layout import Layout
from testreg.patching.state import find_patch


def attention(
    model: nn.Module,
    images: Images,
    block: int = -1,
    *,
    query: Query | None = None,
    transform: Transform | None = None,
    batch_size: int = 16,
) -> Tensor:
    """What CLS, a pooling query or the patches give to each patch in a block: (B, heads, h, w), for h x w patches.

    Attention may be computed by any kernel; it is measured in float32 or better. Patched or not, the maps hold the
    patches alone: they sum to less than one, the rest goes to prefix tokens and registers.

    Example:
        >>> testreg.attention(model, images).shape
        torch.Size([45, 4, 4, 4])
        >>> with testreg.patched(model, planted):
        ...     maps = testreg.attention(model, "photos/", block=2).mean(1)

    Args:
        model: a vision tower, or any model that contains one. It is measured in eval mode.
        images: float tensors (B, 3, h, w) are the model's input as they stand. One or several PIL images or paths, or a
            folder, of which the order is that of the names, are prepared as the model's own library does.
        block: 0-based; -1 is the last. A tower may attend several times in a block, side by side: all heads are given.
        query: "cls" for the first token; "mean" for the mean of the patches; "pool" for the query of a head that pools
            the last block's tokens by attention (SigLIP). None: "cls" if there is a prefix token; else, for the last
            block, "pool" if there is such a head; else "mean".
        transform: PIL image -> tensor (3, h, w); None takes the preprocessing that the model's own library names.

    Raises:
        ValueError: an argument does not fit the model, or an image cannot be read.
        RuntimeError: attention cannot be observed from Python (compiled or custom kernels).
    """
    tower = find_tower(model)
    _check(tower, block)
    if query not in (None, "cls", "pool", "mean"):
        raise ValueError(f"query must be 'cls', 'pool', 'mean' or None, got {query!r}")
    if query == "cls" and not tower.num_prefix:
        raise ValueError(f"{type(tower.module).__name__} has no CLS token: pass query='pool' or query='mean'")
    if query == "pool" and block % tower.depth != tower.depth - 1:
        raise ValueError(f"query='pool' looks at the last block's tokens, not at those of block {block}")
    batch = image_batch(model, images, transform)
    with tower.evaluating():
        if query is None and not tower.num_prefix and block % tower.depth == tower.depth - 1:
            query = "pool" if pooling(tower, batch) else "mean"
        maps = [attention_to_patches(tower, part, block, query) for part in batch.split(batch_size)]
    return torch.cat(maps).unflatten(-1, tower.grid(batch))


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
        >>> with testreg.patched(model, planted):
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
    with recorded_tokens(tower, block) as recorded:
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
        >>> with testreg.patched(model, planted, num_registers=2):
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
