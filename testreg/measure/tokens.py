"""Tokens as tasks read them: behind the final norm, and the queries, keys and values of attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

from testreg.families import Tower
from testreg.measure.attention_observer import Attention, AttentionObserver
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


@contextmanager
def recorded_projections(tower: Tower, blocks: Sequence[int]) -> Iterator[dict[int, dict[Part, Tensor]]]:
    """Within the context, a forward leaves the queries, keys and values (B, T, C) of some blocks, heads joined.

    Tokens are those inside the block: prefix, patches, registers.

    Raises:
        RuntimeError: a block computes attention in a way that cannot be observed from Python.
    """
    projections: dict[int, dict[Part, Tensor]] = {}
    modules = [tower.blocks[block].module for block in blocks]
    seen: list[dict[Part, Tensor]] = []

    def see(attention: Attention) -> None:
        if attention.is_of_tokens_to_themselves and attention.projections is not None:
            query, key, value = attention.projections
            seen.append({"q": query, "k": key, "v": value})

    def keep(index: int, tokens: Tensor) -> None:
        if not seen:
            raise RuntimeError(
                f"saw no attention in block {blocks[index]} of {tower.family.name}: its queries, keys and values are "
                "read from F.scaled_dot_product_attention and nn.MultiheadAttention (transformers: load the model "
                'with attn_implementation="sdpa"; do not compile it)'
            )
        projections[blocks[index]] = seen[-1]

    with (
        AttentionObserver(see),
        recording_inputs(modules, lambda index, tokens: seen.clear()),
        recording_outputs(modules, keep),
    ):
        yield projections
