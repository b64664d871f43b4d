"""The reference that patched models are compared with: one image at a time, with an explicit register token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from testreg.families import Tower

Forward = Callable[..., Any]


@contextmanager
def explicit_register(tower: Tower, neurons: Mapping[int, Sequence[int]], start: str) -> Iterator[None]:
    """Within the `with` block, the blocks of the unpatched tower run with a register, which is a local variable here.

    It enters block 0 as zeros, or, if `start` is "mean", the first block with neurons as the mean of the patches.

    It works for one image at a time, without padding and packing. Masks and other arguments of blocks get one more row,
    which is decided by their shapes alone. It shares no code with `testreg.patch`, except the table of families.
    """
    register: list[Tensor] = []
    padding: list[int] = []
    dim = 0 if tower.sequence_first else -2

    def block(original: Forward, first: bool) -> Forward:
        """A forward of a block that appends the register, and takes it off again."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            tokens = args[0] if args else kwargs[next(iter(kwargs))]
            count = tokens.shape[dim]
            padding[:] = _padding((*args, *kwargs.values()), count)
            if first and start == "mean":
                numbers = [number for number in _patches(tower, count) if number not in padding]
                patches = tokens.index_select(dim, torch.tensor(numbers))
                mean = patches.mean(dim, keepdim=True)
                mean_norm = patches.norm(dim=-1, keepdim=True).mean(dim, keepdim=True)
                register[:] = [mean / mean.norm(dim=-1, keepdim=True) * mean_norm]
            elif first:
                token = tokens.new_zeros(1, 1, tokens.shape[-1])
                if tower.entry_norm is not None:
                    token = type(tower.entry_norm).forward(tower.entry_norm, token)
                shape = list(tokens.shape)
                shape[dim] = 1
                register[:] = [token.flatten().expand(shape)]
            longer = torch.cat([tokens, register[0]], dim)
            extend = lambda extra: longer if extra is tokens else _with_one_more_row(extra, count, tower.num_prefix)
            output = original(*map(extend, args), **{name: extend(extra) for name, extra in kwargs.items()})
            output_tokens = output[0] if isinstance(output, tuple) else output
            if output_tokens.shape != longer.shape:  # DINO's block returns attention weights instead, if asked to
                return output
            register[:] = [output_tokens.narrow(dim, count, 1)]
            tokens = output_tokens.narrow(dim, 0, count)
            return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

        return forward

    def wrap_linear(original: Forward, units: Sequence[int]) -> Forward:
        """A forward of an MLP's second linear that moves the neurons' activations onto the register."""

        def forward(hidden: Tensor, *args: Any) -> Any:
            hidden = hidden.clone()
            batch = hidden.transpose(0, 1) if tower.sequence_first else hidden.view(-1, *hidden.shape[-2:])
            for sequence in batch:  # (T+1, H); an image may have several sequences: tiles or frames
                for unit in units:
                    magnitude = sequence[:, unit].abs()
                    magnitude[padding] = -1
                    loudest = sequence[:, unit][magnitude.argmax()].clone()
                    patches = _patches(tower, len(sequence) - 1)
                    # With this start, neurons that are at rest on a patch keep their value.
                    at_rest = sequence[patches, unit].clamp(-0.28, 0)
                    sequence[patches, unit] = at_rest if start == "mean" else torch.zeros_like(at_rest)
                    sequence[-1, unit] = loudest
            return original(hidden, *args)

        return forward

    def attention(original: Forward) -> Forward:
        """A forward of attention that takes the register out of the weights that are returned."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            is_pair = isinstance(output, tuple) and len(output) > 1
            return (output[0], without(output[1]), *output[2:]) if is_pair else output

        def without(weights: Tensor | list[Any] | None) -> Any:
            if not isinstance(weights, Tensor):
                return weights and [without(each) for each in weights]
            size = weights.shape[-1]
            kept = [i for i in range(size) if i != size - 1 - tower.family.appended]
            return weights[..., kept, :][..., kept]

        return forward

    def bias(original: Forward) -> Forward:
        """A method that makes a relative position bias, extended by zeros for the register."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if tower.family.bias_count in kwargs:
                kwargs[tower.family.bias_count] -= 1
            return nn.functional.pad(original(*args, **kwargs), (0, 1, 0, 1))

        return forward

    with ExitStack() as stack:

        def replace(module: nn.Module, wrap: Callable[..., Forward], *extra: Any, method: str = "forward") -> None:
            setattr(module, method, wrap(getattr(module, method), *extra))
            stack.callback(delattr, module, method)

        entry = min(neurons) if start == "mean" else 0
        for i, each in list(enumerate(tower.blocks))[entry:]:
            replace(each.module, block, i == entry)
            offset = 0
            for mlp in each.mlps:
                end = offset + mlp.width
                units = [mlp.first + unit - offset for unit in neurons.get(i, ()) if offset <= unit < end]
                for module in mlp.consumers:
                    replace(module, wrap_linear, units)
                offset = end
            if each.attention is not None:
                replace(each.attention, attention)
            if each.bias is not None:
                replace(each.bias[0], bias, method=each.bias[1])
        yield


def _patches(tower: Tower, count: int) -> list[int]:
    """The indices of the patches among `count` tokens. In nearly all families they come after the prefix."""
    if tower.family.name == "transformers Llama 4":  # CLS is the last token
        return list(range(count - 1))
    if tower.family.name == "transformers Mllama":  # tiles in a row, each with CLS, patches and padding
        config = tower.module.config
        num_patches, tile = (config.image_size // config.patch_size) ** 2, count // config.max_num_tiles
        return [token for token in range(count) if 1 <= token % tile <= num_patches]
    return list(range(tower.num_prefix, count))


def _padding(extras: Sequence[Any], count: int) -> list[int]:
    """The indices of padding, i.e. of tokens that a mask hides even from themselves. (A single image may have some.)"""
    for extra in extras:
        if isinstance(extra, Tensor) and extra.shape == (1, count):  # a mask for flash attention, or of transformers 4
            return (extra[0] == 0).nonzero().flatten().tolist()
        if isinstance(extra, Tensor) and extra.ndim == 4 and extra.shape[-1] == count:
            square = extra.shape[-2] == count
            return (~_is_visible(extra[0, 0].diagonal() if square else extra[0, 0, 0])).nonzero().flatten().tolist()
    return []


def _is_visible(mask: Tensor) -> Tensor:
    """Where a mask allows attention; masks are boolean, or numbers that are added to logits."""
    return mask if mask.dtype is torch.bool else mask > -1e30


def _with_one_more_row(extra: Any, count: int, num_prefix: int) -> Any:
    """An argument of a block, with a row for one more token if it has one for each of `count` tokens.

    The new row is neutral: nothing is masked, the bias is 0, and the rotation is by 0. Other arguments stay as they
    are.
    """
    if isinstance(extra, tuple | list) and len(extra) == 2 and all(isinstance(part, Tensor) for part in extra):
        cosine, sine = extra
        return torch.cat([cosine, torch.ones_like(cosine[..., :1, :])], -2), _padded_row(sine)
    if not isinstance(extra, Tensor):
        return extra + 1 if type(extra) is int and extra == count else extra
    if extra.ndim == 1 and extra.numel() == 2 and extra.tolist() == [0, count]:  # cumulative lengths of packed images
        return extra + torch.tensor([0, 1]).to(extra)
    if extra.shape == (1, count):
        return nn.functional.pad(extra, (0, 1), value=1)
    if extra.shape[-1] == count:
        neutral = float(extra.dtype is torch.bool)
        if extra.ndim > 1 and extra.shape[-2] == count:
            row = extra[..., :1, :]
            extra = torch.cat([extra, torch.where(_is_visible(row), torch.full_like(row, neutral), row)], -2)
        return nn.functional.pad(extra, (0, 1), value=neutral)
    if extra.is_complex():
        return torch.cat([extra, torch.ones_like(extra[:1])])
    if not extra.is_floating_point():  # the row and column of each patch
        return nn.functional.pad(extra, (0, 0, 0, 1)) if extra.ndim > 1 and extra.shape[-2] == count else extra
    if extra.ndim >= 2 and extra.shape[-2] in (count, count - num_prefix):  # rotary embeddings: sines, then cosines
        sine, cosine = extra.chunk(2, -1)
        return torch.cat([_padded_row(sine), torch.cat([cosine, torch.ones_like(cosine[..., :1, :])], -2)], -1)
    return extra


def _padded_row(rows: Tensor) -> Tensor:
    """The rows and a row of zeros."""
    return torch.cat([rows, torch.zeros_like(rows[..., :1, :])], -2)
