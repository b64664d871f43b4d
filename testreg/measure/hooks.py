"""Record what modules take and return while a model runs, by hooks that are removed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from testreg.families import Tower


@contextmanager
def recording_inputs(modules: Iterable[nn.Module], record: Callable[[int, Tensor], object]) -> Iterator[None]:
    """Within the context, `record(i, tokens)` is called with the first argument of the i-th module before it runs."""

    def hook_of(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            record(index, args[0] if args else next(iter(kwargs.values())))

        return hook

    with ExitStack() as stack:
        for index, module in enumerate(modules):
            stack.enter_context(module.register_forward_pre_hook(hook_of(index), with_kwargs=True))
        yield


@contextmanager
def replacing_inputs(modules: Iterable[nn.Module], replace: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Within the context, the i-th module gets `replace(i, tokens)` in place of its first argument `tokens`."""

    def hook_of(index: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (replace(index, args[0]), *args[1:]), kwargs
            (name, tokens), *others = kwargs.items()
            return (), {name: replace(index, tokens), **dict(others)}

        return hook

    with ExitStack() as stack:
        for index, module in enumerate(modules):
            stack.enter_context(module.register_forward_pre_hook(hook_of(index), with_kwargs=True))
        yield


@contextmanager
def recording_outputs(modules: Iterable[nn.Module], record: Callable[[int, Tensor], object]) -> Iterator[None]:
    """Within the context, `record(i, tokens)` is called with what the i-th module returns, or the first of several
    outputs."""

    def hook_of(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            record(index, output[0] if isinstance(output, tuple) else output)

        return hook

    with ExitStack() as stack:
        for index, module in enumerate(modules):
            stack.enter_context(module.register_forward_hook(hook_of(index)))
        yield


@contextmanager
def recorded_norms(tower: Tower, images: Tensor) -> Iterator[list[Tensor]]:
    """Within the context, a forward of `images` fills the list with the norms (B, T) of the tokens after each block.

    The norms are in float32.
    """
    with _recorded_blocks(tower, images, range(tower.depth), lambda tokens: tokens.float().norm(dim=-1)) as norms:
        yield norms


@contextmanager
def recorded_tokens(tower: Tower, images: Tensor, block: int) -> Iterator[list[Tensor]]:
    """Within the context, a forward of `images` fills the list with one tensor: the tokens (B, T, C) after a block."""
    with _recorded_blocks(tower, images, [block], lambda tokens: tokens) as tokens:
        yield tokens


@contextmanager
def _recorded_blocks(
    tower: Tower, images: Tensor, indices: Sequence[int], reduce: Callable[[Tensor], Tensor]
) -> Iterator[list[Tensor]]:
    """Within the context, a forward fills the list with `reduce(tokens)` of the tokens after each of some blocks."""
    recorded: list[Tensor] = []

    def record(index: int, tokens: Tensor) -> None:
        recorded.append(reduce(tower.arranged(tokens.detach(), images)))

    with recording_outputs([tower.blocks[index].module for index in indices], record):
        yield recorded
