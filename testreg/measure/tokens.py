"""What evaluation tasks read off a tower: tokens after the final norm, and the queries, keys and values of attention.

Shapes: B images of T tokens, C width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

from testreg.families import Tower
from testreg.measure.attention_observer import Attention, AttentionObserver
from testreg.measure.hooks import recording_inputs, recording_outputs

Part = Literal["q", "k", "v"]
"""Queries, keys or values."""


def normed_tokens(tower: Tower, images: Tensor, depth: int = 1) -> list[Tensor]:
    """Run images, and return the tokens (B, T, C) after each of the last `depth` blocks, with the final norm applied.

    The registers that a patched model adds are not among them.
    """
    recorded: list[Tensor] = []
    blocks = [block.module for block in tower.blocks[-depth:]]
    with recording_outputs(blocks, lambda index, tokens: recorded.append(tower.arranged(tokens, images))):
        tower.run(images)
    return [behind_norm(tower, tokens) for tokens in recorded]


def behind_norm(tower: Tower, tokens: Tensor) -> Tensor:
    """Apply the tower's final norm, if it has one, to the tokens (B, T, C) of a block."""
    norm = tower.final_norm
    return tokens if norm is None else norm(tokens)


def global_token(tokens: Tensor, tower: Tower) -> Tensor:
    """The token (B, C) that stands for the whole image: CLS, or the mean of the tokens (B, T, C) if there is no CLS."""
    return tokens[:, 0] if tower.num_prefix else tokens.mean(1)


@contextmanager
def recorded_projections(tower: Tower, blocks: Sequence[int]) -> Iterator[dict[int, dict[Part, Tensor]]]:
    """Within the context, a forward records the queries, keys and values (B, T, C) of some blocks, by block and part.

    If a block attends several times, they are those of the last time.

    All heads are side by side in C. The tokens are those inside the block: prefix tokens, patches, and the registers
    of a patched model.

    Raises:
        RuntimeError: a block computes attention in a way that cannot be observed from Python.
    """
    projections: dict[int, dict[Part, Tensor]] = {}
    modules = [tower.blocks[block].module for block in blocks]
    in_block: list[dict[Part, Tensor]] = []  # of each attention in the running block

    def record(attention: Attention) -> None:
        if attention.is_self_attention and attention.projections is not None:
            query, key, value = attention.projections
            in_block.append({"q": query, "k": key, "v": value})

    def end_block(index: int, tokens: Tensor) -> None:
        if not in_block:
            raise RuntimeError(
                f"saw no attention in block {blocks[index]} of {tower.family.name}: its queries, keys and values are "
                "read from F.scaled_dot_product_attention and nn.MultiheadAttention (transformers: load the model "
                'with attn_implementation="sdpa"; do not compile it)'
            )
        projections[blocks[index]] = in_block[-1]

    with (
        AttentionObserver(record),
        recording_inputs(modules, lambda index, tokens: in_block.clear()),
        recording_outputs(modules, end_block),
    ):
        yield projections
