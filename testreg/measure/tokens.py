"""Tokens as tasks read them: behind the final norm, and the queries, keys and values of attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from testreg.families import Tower
from testreg.measure.hooks import recording_inputs, recording_outputs

Part = Literal["q", "k", "v"]


def normed_tokens(tower: Tower, images: Tensor, depth: int = 1) -> list[Tensor]:
    """The tokens (B, T, C) after each of the last `depth` blocks, behind the final norm, without registers."""
    kept: list[Tensor] = []
    blocks = [block.module for block in tower.blocks[-depth:]]
    with recording_outputs(blocks, lambda index, tokens: kept.append(tower.arranged(tokens, images))):
        tower.run(images)
    return [behind_norm(tower, tokens) for tokens in kept]


def behind_norm(tower: Tower, tokens: Tensor) -> Tensor:
    """The tokens (B, T, C) of a block, behind the tower's final norm if it has one."""
    norm = tower.final_norm
    return tokens if norm is None else norm(tokens)


def global_token(tokens: Tensor, tower: Tower) -> Tensor:
    """What stands for the image (B, C) among tokens (B, T, C): CLS, or the mean of the patches where there is none."""
    return tokens[:, 0] if tower.num_prefix else tokens.mean(1)


def attends_to_itself(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether nn.MultiheadAttention is called with tokens that attend to themselves."""
    return query is key


def module_projections(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    *args: Any,
    rows: slice | Tensor = slice(None),
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """What nn.MultiheadAttention projects tokens (T, B, C) to: the queries (B, n, C), of some `rows`, and the keys and
    values (B, T, C), heads joined."""
    width = query.shape[-1]
    biases = (None, None) if in_proj_bias is None else in_proj_bias.split([width, 2 * width])
    of_query, of_key_value = in_proj_weight.split([width, 2 * width])
    queries = F.linear(query[rows], of_query, biases[0]).transpose(0, 1)
    keys, values = F.linear(query, of_key_value, biases[1]).transpose(0, 1).chunk(2, -1)
    return queries, keys, values


class _Projections(TorchFunctionMode):
    """Keeps the queries, keys and values (B, T, C), heads joined, of every attention of tokens to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[dict[Part, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = named["query"], named["key"], named["value"]
            if query.ndim == 4 and query.shape[-2] == key.shape[-2]:
                self._keep(*(each.transpose(1, 2).flatten(2) for each in (query, key, value)))
        elif func is F.multi_head_attention_forward and attends_to_itself(*args, **kwargs):
            self._keep(*module_projections(*args, **kwargs))
        return func(*args, **kwargs)

    def _keep(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.kept.append({"q": query, "k": key, "v": value})


@contextmanager
def recorded_projections(tower: Tower, blocks: Sequence[int]) -> Iterator[dict[int, dict[Part, Tensor]]]:
    """Within the context, a forward leaves the queries, keys and values (B, T, C) of some blocks, heads joined.

    Tokens are those inside the block: prefix, patches, registers.

    Raises:
        RuntimeError: a block computes attention in a way that cannot be observed from Python.
    """
    found: dict[int, dict[Part, Tensor]] = {}
    modules = [tower.blocks[block].module for block in blocks]
    recorder = _Projections()

    def keep(index: int, tokens: Tensor) -> None:
        if not recorder.kept:
            raise RuntimeError(
                f"saw no attention in block {blocks[index]} of {tower.family.name}: its queries, keys and values are "
                "read from F.scaled_dot_product_attention and nn.MultiheadAttention (transformers: load the model "
                'with attn_implementation="sdpa"; do not compile it)'
            )
        found[blocks[index]] = recorder.kept[-1]

    with (
        recorder,
        recording_inputs(modules, lambda index, tokens: recorder.kept.clear()),
        recording_outputs(modules, keep),
    ):
        yield found
