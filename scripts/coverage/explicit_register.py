"""The reference: one image at a time, and an explicit token behind all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from testreg.families import Tower

Forward = Callable[..., Any]


@contextmanager
def explicit_register(tower: Tower, neurons: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """While active, the blocks of the unpatched tower run with one more token, which is a plain variable here.

    For one image, so that there is neither padding nor packing: whatever goes beside the tokens gets one more row by
    its shape alone. Shares no code with `testreg.patch`; where the parts of the tower are comes from the same table.
    """
    register: list[Tensor] = []
    padding: list[int] = []
    dim = 0 if tower.sequence_first else -2

    def block(original: Forward, first: bool) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            tokens = args[0] if args else kwargs[next(iter(kwargs))]
            if first:
                token = tokens.new_zeros(1, 1, tokens.shape[-1])
                if tower.entry_norm is not None:
                    token = type(tower.entry_norm).forward(tower.entry_norm, token)
                shape = list(tokens.shape)
                shape[dim] = 1
                register[:] = [token.flatten().expand(shape)]
            longer = torch.cat([tokens, register[0]], dim)
            count = tokens.shape[dim]
            padding[:] = _padding((*args, *kwargs.values()), count)
            extend = lambda extra: longer if extra is tokens else _one_more(extra, count, tower.num_prefix)
            output = original(*map(extend, args), **{name: extend(extra) for name, extra in kwargs.items()})
            grown = output[0] if isinstance(output, tuple) else output
            if grown.shape != longer.shape:  # DINO's block, asked for its attention weights
                return output
            register[:] = [grown.narrow(dim, count, 1)]
            tokens = grown.narrow(dim, 0, count)
            return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

        return forward

    def reader(original: Forward, units: Sequence[int]) -> Forward:
        def forward(hidden: Tensor, *args: Any) -> Any:
            hidden = hidden.clone()
            batch = hidden.transpose(0, 1) if tower.sequence_first else hidden.view(-1, *hidden.shape[-2:])
            for sequence in batch:  # (T+1, H): one image may be several crops or frames
                for unit in units:
                    magnitude = sequence[:, unit].abs()
                    magnitude[padding] = -1
                    loudest = sequence[:, unit][magnitude.argmax()].clone()
                    sequence[_patches(tower, len(sequence) - 1), unit] = 0
                    sequence[-1, unit] = loudest
            return original(hidden, *args)

        return forward

    def attention(original: Forward) -> Forward:
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
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if tower.family.bias_count in kwargs:
                kwargs[tower.family.bias_count] -= 1
            return nn.functional.pad(original(*args, **kwargs), (0, 1, 0, 1))

        return forward

    with ExitStack() as stack:

        def replace(module: nn.Module, wrap: Callable[..., Forward], *extra: Any, method: str = "forward") -> None:
            setattr(module, method, wrap(getattr(module, method), *extra))
            stack.callback(delattr, module, method)

        for i, each in enumerate(tower.blocks):
            replace(each.module, block, i == 0)
            start = 0
            for mlp in each.mlps:
                units = [mlp.first + unit - start for unit in neurons.get(i, ()) if start <= unit < start + mlp.width]
                for module in mlp.consumers:
                    replace(module, reader, units)
                start += mlp.width
            if each.attention is not None:
                replace(each.attention, attention)
            if each.bias is not None:
                replace(each.bias[0], bias, method=each.bias[1])
        yield


def _patches(tower: Tower, count: int) -> list[int]:
    """Which of the `count` tokens are patches: nearly everywhere those behind the prefix."""
    if tower.family.name == "transformers Llama 4":  # CLS comes last
        return list(range(count - 1))
    if tower.family.name == "transformers Mllama":  # tiles side by side: CLS, patches, padding
        config = tower.module.config
        num_patches, tile = (config.image_size // config.patch_size) ** 2, count // config.max_num_tiles
        return [token for token in range(count) if 1 <= token % tile <= num_patches]
    return list(range(tower.num_prefix, count))


def _padding(extras: Sequence[Any], count: int) -> list[int]:
    """The tokens that a mask hides from themselves: a model may pad a single image too."""
    for extra in extras:
        if isinstance(extra, Tensor) and extra.shape == (1, count):  # for flash attention, and in transformers 4
            return (extra[0] == 0).nonzero().flatten().tolist()
        if isinstance(extra, Tensor) and extra.ndim == 4 and extra.shape[-1] == count:
            square = extra.shape[-2] == count
            return (~_shown(extra[0, 0].diagonal() if square else extra[0, 0, 0])).nonzero().flatten().tolist()
    return []


def _shown(mask: Tensor) -> Tensor:
    return mask if mask.dtype is torch.bool else mask > -1e30


def _one_more(extra: Any, count: int, num_prefix: int) -> Any:
    """An argument with a row for each of `count` tokens, with a row for one more: no mask, no bias, no rotation."""
    if isinstance(extra, tuple | list) and len(extra) == 2 and all(isinstance(part, Tensor) for part in extra):
        cosine, sine = extra
        return torch.cat([cosine, torch.ones_like(cosine[..., :1, :])], -2), _padded_row(sine)
    if not isinstance(extra, Tensor):
        return extra + 1 if type(extra) is int and extra == count else extra
    if extra.ndim == 1 and extra.numel() == 2 and extra.tolist() == [0, count]:  # where a packed sequence ends
        return extra + torch.tensor([0, 1]).to(extra)
    if extra.shape == (1, count):
        return nn.functional.pad(extra, (0, 1), value=1)
    if extra.shape[-1] == count:
        neutral = float(extra.dtype is torch.bool)
        if extra.ndim > 1 and extra.shape[-2] == count:
            row = extra[..., :1, :]
            extra = torch.cat([extra, torch.where(_shown(row), torch.full_like(row, neutral), row)], -2)
        return nn.functional.pad(extra, (0, 1), value=neutral)
    if extra.is_complex():
        return torch.cat([extra, torch.ones_like(extra[:1])])
    if not extra.is_floating_point():  # rows and columns
        return nn.functional.pad(extra, (0, 0, 0, 1)) if extra.ndim > 1 and extra.shape[-2] == count else extra
    if extra.ndim >= 2 and extra.shape[-2] in (count, count - num_prefix):  # sines, then cosines
        sine, cosine = extra.chunk(2, -1)
        return torch.cat([_padded_row(sine), torch.cat([cosine, torch.ones_like(cosine[..., :1, :])], -2)], -1)
    return extra


def _padded_row(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.zeros_like(rows[..., :1, :])], -2)
