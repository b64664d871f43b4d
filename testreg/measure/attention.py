"""Attention to the patches, read off any model without touching it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from testreg.families import Tower
from testreg.families.kernels import attention_kernel
from testreg.measure.attention_observer import Attention, AttentionObserver, Rows
from testreg.measure.hooks import recording_inputs, recording_outputs

Query = Literal["cls", "pool", "mean", "register"]
To = Literal["patches", "registers"]
RowsOf = Callable[[int], Rows]  # which of the tokens, from their number T
# Kernels that do not go through torch.nn.functional.
UNSEEN = ("flash_attention_2", "flash_attention_3", "flex_attention")


def mean_of_queries(weights: Tensor) -> Tensor:
    """What some queries give on average: (B, heads, n, T) -> (B, heads, T)."""
    return weights.mean(2)


def mean_of_heads(weights: Tensor) -> Tensor:
    """(B, heads, n, T) -> (B, n, T)."""
    return weights.mean(1)


class Recorder(AttentionObserver):
    """Keeps what some tokens give to all, of every attention of tokens to themselves.

    Args:
        queries: which tokens these are, from the number of tokens T.
        reduce: what is kept of their weights (B, heads, n, T).
    """

    def __init__(self, queries: RowsOf, reduce: Callable[[Tensor], Tensor] = mean_of_queries) -> None:
        super().__init__(self._keep)
        self.queries, self.reduce = queries, reduce
        self.rows: list[Tensor] = []

    def _keep(self, attention: Attention) -> None:
        if attention.is_of_tokens_to_themselves:
            self.rows.append(self.reduce(attention.weights(self.queries(attention.num_tokens))))


@torch.no_grad()
def attention_to_patches(
    tower: Tower, images: Tensor, block: int = -1, query: Query | Tensor | None = None, *, to: To = "patches"
) -> Tensor:
    """What a query gives to each patch in a block, (B, heads, N), or to each register, (B, heads, R), for images
    (B, 3, h, w).

    Queries are those of `testreg.attention`, or a mask of patches (h, w) or (B, h, w), of which the mean is taken;
    None: CLS, or in towers without prefix tokens the mean of the patches. Rows do not sum to one: the rest goes to
    other tokens.

    Raises:
        RuntimeError: the model computes attention in a way that cannot be observed from Python.
        ValueError: it has no registers, and is asked for them.
    """
    query = default_query(tower) if query is None else query
    with attention_kernel(tower.module, "sdpa", instead_of=UNSEEN):
        if isinstance(query, str) and query == "pool":
            kept = pooling(tower, images)
            if not kept:
                raise _unseen(tower, "by which it pools")
        elif isinstance(query, Tensor) and query.ndim == 3:
            pairs = zip(images.split(1), query, strict=True)
            return torch.cat([attention_to_patches(tower, image, block, mask, to=to) for image, mask in pairs])
        else:
            with recorded_attention(tower, [block], Recorder(queries_of(tower, images, query))) as seen:
                tower.run(images)
            kept = seen[0]
    if any(len(each) != len(images) for each in kept):  # images that are packed in one sequence
        return torch.cat([attention_to_patches(tower, image, block, query, to=to) for image in images.split(1)])
    attention = torch.cat(kept, 1)  # a block may attend several times, side by side
    registers = registers_in(tower, images, attention.shape[-1])
    if not len(registers) and (to == "registers" or (isinstance(query, str) and query == "register")):
        raise _without_registers(tower)
    return attention[..., tower.patches(images) if to == "patches" else registers]


def default_query(tower: Tower) -> Query:
    return "cls" if tower.num_prefix else "mean"


def queries_of(tower: Tower, images: Tensor, query: Query | Tensor) -> RowsOf:
    """The tokens that attend: `query` is a name, or a mask (h, w) of patches."""
    patches = tower.patches(images)
    if isinstance(query, Tensor):
        numbers = patches.start + query.flatten().nonzero().squeeze(1).to(tower.device)
        return lambda num_tokens: numbers
    if query == "register":
        return lambda num_tokens: registers_in(tower, images, num_tokens)
    return lambda num_tokens: slice(0, 1) if query == "cls" else patches


def registers_in(tower: Tower, images: Tensor, num_tokens: int) -> Tensor:
    """The numbers (R,), among the tokens in a block, of the registers: trained ones, then those that a patch adds."""
    trained = range(tower.num_prefix - tower.num_trained_registers, tower.num_prefix)
    added = range(tower.patches(images).stop, num_tokens - tower.family.appended)
    return torch.tensor([*trained, *added], dtype=torch.long, device=tower.device)


def _without_registers(tower: Tower) -> ValueError:
    return ValueError(f"{type(tower.module).__name__} has no registers: call testreg.patch(model, ...) first")


@contextmanager
def recorded_attention(tower: Tower, blocks: Sequence[int], recorder: Recorder) -> Iterator[list[list[Tensor]]]:
    """Within the context, a forward leaves what the recorder keeps in each of some blocks: of each attention in it.

    Raises:
        RuntimeError: attention in one of them cannot be observed from Python.
    """
    modules = [tower.blocks[block].module for block in blocks]
    kept: list[list[Tensor]] = [[] for _ in blocks]

    def forget(index: int, tokens: Tensor) -> None:
        recorder.end()
        recorder.rows.clear()

    def keep(index: int, tokens: Tensor) -> None:
        recorder.end()
        kept[index] += recorder.rows
        recorder.rows.clear()

    with (
        recorder,
        recording_inputs(modules, forget),
        recording_outputs(modules, keep),
    ):
        yield kept
    for block, seen in zip(blocks, kept, strict=True):
        if not seen:
            raise _unseen(tower, f"in block {block}")


def _unseen(tower: Tower, where: str) -> RuntimeError:
    return RuntimeError(
        f"saw no attention {where} of {tower.family.name}: compiled or custom attention kernels cannot be observed"
    )


@torch.no_grad()
def rolled_out(tower: Tower, images: Tensor, block: int = -1, query: Query | Tensor | None = None) -> Tensor:
    """Attention rollout (Abnar and Zuidema, arXiv 2005.00928) from a query to each patch: (B, 1, N).

    The product, from the first block to `block`, of (A + I) / 2, where A (T, T) is the mean of a block's heads and I
    stands for the residual stream. All tokens take part, prefix tokens and registers too.
    """
    query = default_query(tower) if query is None else query
    if isinstance(query, Tensor) and query.ndim == 3:
        pairs = zip(images.split(1), query, strict=True)
        return torch.cat([rolled_out(tower, image, block, mask) for image, mask in pairs])
    blocks = range(block % tower.depth + 1)
    with (
        attention_kernel(tower.module, "sdpa", instead_of=UNSEEN),
        recorded_attention(tower, blocks, Recorder(lambda num_tokens: slice(None), mean_of_heads)) as kept,
    ):
        tower.run(images)
    if any(len(each) != len(images) for each in kept[0]):  # images that are packed in one sequence
        return torch.cat([rolled_out(tower, image, block, query) for image in images.split(1)])
    flow = torch.eye(kept[0][0].shape[-1], device=kept[0][0].device, dtype=kept[0][0].dtype)
    if isinstance(query, str) and query == "register" and not len(registers_in(tower, images, flow.shape[-1])):
        raise _without_registers(tower)
    for seen in kept:
        flow = (torch.stack(seen).mean(0) @ flow + flow) / 2
    rows = flow[:, queries_of(tower, images, query)(flow.shape[-1])]
    return rows.mean(1, keepdim=True)[..., tower.patches(images)]


def pooling(tower: Tower, images: Tensor) -> list[Tensor]:
    """What the query that pools the last block's tokens by attention gives to each (B, heads, T); empty if there is no
    such head."""
    rows: list[Tensor] = []
    num_tokens = tower.patches(images).stop

    def see(attention: Attention) -> None:
        if not attention.is_of_tokens_to_themselves and attention.num_tokens == num_tokens:
            rows.append(mean_of_queries(attention.weights(slice(None))))

    last = tower.blocks[-1].module
    with AttentionObserver(see), recording_outputs([last], lambda index, tokens: rows.clear()):
        tower.run_with_head(images)
    return rows[:1]


def entropy(attention: Tensor) -> Tensor:
    """Entropy (...,) in nats of attention (..., N), normalised over the patches: log N if spread evenly."""
    share = attention / attention.sum(-1, keepdim=True)
    return -torch.xlogy(share, share).sum(-1)
