"""How the tokens of one forward are laid out, and where the registers go among them.

Most towers hand their blocks a batch (B, T, C), a few (T, B, C). Images of several sizes come padded to one length,
with a mask that hides the padding, or packed behind one another in one sequence (S, C). The registers of an image
always follow its tokens.

Shapes: B images, T tokens of each, R registers; S tokens of all images in a packed sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask  # which imports sympy: half a second

HIDDEN = -5e3  # a mask that adds less than this to a logit hides the token (-inf, -1e9, -1e4); biases add more


@dataclass
class Layout:
    """The layout of a hidden state: (T, B, C) if `sequence_first`, (S, C) or (1, S, C) if packed, else (B, T, C)."""

    num_registers: int
    sequence_first: bool = False
    lengths: Sequence[int] | None = None
    """The number of tokens of each image in a packed sequence, without registers; None: the images are a batch."""
    valid: Tensor | None = None
    """Which tokens (B, T+R) of a padded batch are no padding; None: all."""
    patches: Tensor | None = None
    """Which tokens (1, T+R) are patches; None: all behind the prefix, except the registers."""

    def replace(self, **changes: Any) -> Layout:
        """A copy of the layout with these changes."""
        return dataclasses.replace(self, **changes)

    def batch_first(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(0, 1) if self.sequence_first else tokens

    def extend(self, rows: Tensor, dim: int, value: float | Tensor) -> Tensor:
        """Put R entries of `value` (a tensor is expanded to their shape) behind those of each image in `rows`, which
        have one per token along `dim`."""
        shape = list(rows.shape)
        shape[dim] = self.num_registers
        more = value.expand(shape) if isinstance(value, Tensor) else rows.new_full(shape, value)
        if self.lengths is None:
            return torch.cat([rows, more], dim)
        return torch.cat([part for image in rows.split(list(self.lengths), dim) for part in (image, more)], dim)

    @property
    def dim(self) -> int:
        """The dimension along which tokens lie, counted from the end."""
        return -3 if self.sequence_first else -2

    def join(self, tokens: Tensor, registers: Tensor) -> Tensor:
        """Put the registers (B, R, C) of each image behind its tokens."""
        if self.lengths is None:
            return torch.cat([tokens, self.batch_first(registers)], self.dim)
        images = zip(tokens.split(list(self.lengths), -2), registers, strict=True)
        return torch.cat([part for image, own in images for part in (image, own.expand(*image.shape[:-2], -1, -1))], -2)

    def tokens(self, sequence: Tensor) -> Tensor:
        """Take the registers off. The tokens of a batch are a view of the sequence."""
        if self.lengths is None:
            dim = self.dim
            return sequence.narrow(dim, 0, sequence.shape[dim] - self.num_registers)
        return torch.cat([image[..., : -self.num_registers, :] for image in self._packed(sequence)], -2)

    def images(self, sequence: Tensor) -> list[Tensor]:
        """Views of the sequence: one of the batch (B, T+R, C), or one of each packed image (1, T+R, C)."""
        if self.lengths is None:
            return [self.batch_first(sequence)]
        return [image if image.ndim == 3 else image.unsqueeze(0) for image in self._packed(sequence)]

    def of_images(self, images: Sequence[Tensor], sequence: Tensor) -> Tensor:
        """The inverse of `images`: the result is laid out as `sequence` is."""
        if self.lengths is None:
            return self.batch_first(images[0])
        return torch.cat(list(images), 1).view(sequence.shape)

    def num_images(self, tokens: Tensor) -> int:
        return self.batch_first(tokens).shape[0] if self.lengths is None else len(self.lengths)

    def patch_means(self, tokens: Tensor, num_prefix: int) -> Tensor:
        """The mean (B, 1, C) of each image's patches; `tokens` have no registers yet."""
        if self.lengths is not None:
            means = [each[..., num_prefix:, :].mean(-2, keepdim=True) for each in tokens.split(list(self.lengths), -2)]
            return torch.cat([mean.view(1, 1, -1) for mean in means])
        batch = self.batch_first(tokens)
        if self.valid is None and self.patches is None:
            return batch[:, num_prefix:].mean(1, keepdim=True)
        size = batch.shape[1]
        counted = torch.arange(size, device=batch.device) >= num_prefix
        if self.patches is not None:
            counted = self.patches[:, :size]
        if self.valid is not None:
            counted = counted & self.valid[:, :size]
        weights = counted.unsqueeze(-1).to(batch.dtype)
        return (batch * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)

    def registers(self, sequence: Tensor) -> Tensor:
        """The registers (B, R, C): a copy, or a view if they are contiguous in a batch (as they are of one image)."""
        if self.lengths is None:
            dim = self.dim
            own = sequence.narrow(dim, sequence.shape[dim] - self.num_registers, self.num_registers)
            return self.batch_first(own).contiguous()
        return torch.cat([image[:, -self.num_registers :] for image in self.images(sequence)])

    def _packed(self, sequence: Tensor) -> Sequence[Tensor]:
        assert self.lengths is not None
        return sequence.split([length + self.num_registers for length in self.lengths], -2)

    def weights_without_registers(self, weights: Tensor, appended: int = 0) -> Tensor:
        """Take the rows and columns of the registers off attention weights.

        Those of a batch are (..., T+R+A, T+R+A), and (..., T+A, T+A) without registers.

        Args:
            appended: A, the number of tokens behind the registers, whose rows and columns stay; 0 in a packed sequence.
        """
        if self.lengths is not None:
            index = torch.arange(weights.shape[-1], device=weights.device).view(1, -1, 1)
            kept = self.tokens(index).flatten()
            return weights.index_select(-2, kept).index_select(-1, kept)
        end = weights.shape[-1] - appended
        for dim in (-2, -1):
            head, tail = weights.narrow(dim, 0, end - self.num_registers), weights.narrow(dim, end, appended)
            weights = torch.cat([head, tail], dim) if appended else head
        return weights

    def weights_with_registers(self, shown: Tensor, weights: Tensor) -> Tensor:
        """The inverse of `weights_without_registers`, for a batch.

        Returns a copy of `weights` (..., T+R, T+R), in which `shown` (..., T, T) replaces those between tokens.
        """
        size = weights.shape[-1] - self.num_registers
        rows = torch.cat([shown, weights[..., :size, size:]], -1)
        return torch.cat([rows, weights[..., size:, :]], -2)

    def validity(self, mask: Tensor | BlockMask) -> Tensor:
        """Which tokens (B, T+R) are visible to any token under a mask (B, heads, T or 1, T) or (T, T).

        The others are padding.
        """
        return self.extend(_seen(mask), -1, True)

    def extend_mask(self, mask: Tensor | BlockMask) -> Tensor | BlockMask:
        """Add rows and columns for the registers to a mask, which is boolean or is added to the logits.

        A mask with one row for all tokens gets columns alone. Registers are visible to all tokens, and see all tokens
        but padding, even if these do not see each other. In a packed sequence they see the same tokens, and are visible
        to the same, as the last token of their image.
        """
        if not isinstance(mask, Tensor):
            return self._extend_block_mask(mask)
        if self.lengths is not None:
            index = torch.arange(sum(self.lengths), device=mask.device)
            index = torch.cat(
                [torch.cat([image, image[-1:].expand(self.num_registers)]) for image in index.split(list(self.lengths))]
            )
            return mask.index_select(-2, index).index_select(-1, index)
        if mask.shape[-2] > 1:
            seen = _visible(mask).any(-2, keepdim=True)
            row = (
                seen
                if mask.dtype is torch.bool
                else torch.zeros_like(mask[..., :1, :]).masked_fill(~seen, torch.finfo(mask.dtype).min)
            )
            mask = torch.cat([mask, row.expand(*row.shape[:-2], self.num_registers, -1)], -2)
        return self.extend(mask, -1, float(mask.dtype is torch.bool))

    def _extend_block_mask(self, mask: BlockMask) -> BlockMask:
        from torch.nn.attention.flex_attention import create_block_mask

        if self.lengths is not None:
            raise NotImplementedError("flex attention over packed images: use the sdpa or eager attention instead")
        seen, num_tokens, inner = _seen(mask), mask.shape[-1], mask.mask_mod

        def outer(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            token = key.clamp(max=num_tokens - 1)
            shown = inner(image, head, query.clamp(max=num_tokens - 1), token)
            own = seen[image.clamp(max=len(seen) - 1), token]  # a mask may have one row for all images
            return (key >= num_tokens) | torch.where(query >= num_tokens, own, shown)

        batch, heads, _, _ = mask.shape
        size = num_tokens + self.num_registers
        return create_block_mask(outer, batch, heads, size, size, device=seen.device, BLOCK_SIZE=mask.BLOCK_SIZE)


def _visible(mask: Tensor) -> Tensor:
    """Which entries of a mask let a token be seen, as booleans."""
    if mask.dtype is torch.bool:
        return mask
    if not mask.is_floating_point():
        raise NotImplementedError(f"an attention mask of {mask.dtype}: pass it as booleans, or added to the logits")
    return mask > HIDDEN


def _seen(mask: Tensor | BlockMask) -> Tensor:
    """Which tokens (B or 1, T) are visible to at least one token in one head."""
    if not isinstance(mask, Tensor):
        from torch.nn.attention.flex_attention import create_mask

        batch, heads, queries, keys = mask.shape
        mask = create_mask(mask.mask_mod, batch, heads, queries, keys, device=mask.kv_num_blocks.device)
    if mask.ndim not in (2, 4):
        raise NotImplementedError(f"an attention mask of shape {tuple(mask.shape)}: pass (T, T) or (B, heads, T, T)")
    seen = _visible(mask).any(-2)  # (B, heads, T) or (T,)
    return seen.any(1) if seen.ndim == 3 else seen.unsqueeze(0)
