"""The attention that patches draw, read off any vision tower without changing it.

*Prefix tokens* are those in front of the patches, such as CLS. *Registers* are extra tokens: trained ones are the last
prefix tokens, and a patched model adds others behind the patches.

Some towers pack the tokens of all images in one sequence. Their images are run one by one here.

Shapes: B images of T tokens, N of which are patches and R are registers; n queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from testreg.families import Tower
from testreg.families.kernels import attention_kernel
from testreg.measure.attention_observer import Attention, AttentionObserver, TokenSelection
from testreg.measure.hooks import recording_inputs, recording_outputs
from testreg.patching.state import find_patch

Query = Literal["cls", "pool", "mean", "register"]
To = Literal["patches", "registers"]
SelectTokens = Callable[[int], TokenSelection]
"""Selects some of the tokens in a block, given how many there are."""
# transformers' kernels that do not go through torch.nn.functional, so their attention cannot be observed.
UNSEEN = ("flash_attention_2", "flash_attention_3", "flex_attention")


def mean_of_queries(weights: Tensor) -> Tensor:
    """Average attention weights (B, heads, n, T) over the queries: (B, heads, T)."""
    return weights.mean(2)


def mean_of_heads(weights: Tensor) -> Tensor:
    """Average attention weights (B, heads, n, T) over the heads: (B, n, T)."""
    return weights.mean(1)


class AttentionRecorder(AttentionObserver):
    """Records the attention of some queries to all tokens, in every self-attention that runs.

    Args:
        queries: selects the queries among the tokens.
        reduce: computes what is recorded from the weights (B, heads, n, T) of the queries.
    """

    def __init__(self, queries: SelectTokens, reduce: Callable[[Tensor], Tensor] = mean_of_queries) -> None:
        super().__init__(self._record)
        self.queries, self.reduce = queries, reduce
        self.recorded: list[Tensor] = []
        """What was recorded of each attention, in the order in which they ran."""

    def _record(self, attention: Attention) -> None:
        if attention.is_self_attention:
            self.recorded.append(self.reduce(attention.weights(self.queries(attention.num_tokens))))


@torch.no_grad()
def attention_to_patches(
    tower: Tower, images: Tensor, block: int = -1, query: Query | Tensor | None = None, *, to: To = "patches"
) -> Tensor:
    """The attention that a query gives to each patch in a block, (B, heads, N), or to each register, (B, heads, R).

    The weights may sum to less than one, since the rest goes to other tokens.

    Args:
        images: (B, 3, height, width) in pixels.
        query: one of the queries that `testreg.attention` names ("pool" is asked in the last block, whatever `block`
            is), or a mask of the grid of patches, (h, w) or (B, h, w), the mean of whose attention is taken. None takes
            CLS, or the mean of all patches in towers without prefix tokens.
        to: whether attention to the patches or to the registers is returned.

    Raises:
        RuntimeError: attention is compiled or computed by a custom kernel, and cannot be observed from Python.
        ValueError: `query` or `to` asks for registers, and there are none in the block.
    """
    query = default_query(tower) if query is None else query
    with attention_kernel(tower.module, "sdpa", instead_of=UNSEEN):
        if isinstance(query, str) and query == "pool":
            recorded = pooling_attention(tower, images)
            if not recorded:
                raise _not_observed(tower, "by which it pools")
        elif isinstance(query, Tensor) and query.ndim == 3:
            pairs = zip(images.split(1), query, strict=True)
            return torch.cat([attention_to_patches(tower, image, block, mask, to=to) for image, mask in pairs])
        else:
            recorder = AttentionRecorder(queries_of(tower, images, query))
            with recorded_attention(tower, [block], recorder) as of_blocks:
                tower.run(images)
            recorded = of_blocks[0]
    if any(len(each) != len(images) for each in recorded):  # the tower packs images in one sequence
        return torch.cat([attention_to_patches(tower, image, block, query, to=to) for image in images.split(1)])
    attention = torch.cat(recorded, 1)  # a block may have several attentions in parallel: all their heads are returned
    registers = register_numbers(tower, images, attention.shape[-1])
    if not len(registers) and (to == "registers" or (isinstance(query, str) and query == "register")):
        raise _has_no_registers(tower, block)
    return attention[..., tower.patches(images) if to == "patches" else registers]


def default_query(tower: Tower) -> Query:
    """CLS, or the mean of the patches in towers without prefix tokens."""
    return "cls" if tower.num_prefix else "mean"


def queries_of(tower: Tower, images: Tensor, query: Query | Tensor) -> SelectTokens:
    """A function that selects the tokens of a query: one that is named, or a mask (h, w) of patches."""
    patches = tower.patches(images)
    if isinstance(query, Tensor):
        numbers = patches.start + query.flatten().nonzero().squeeze(1).to(tower.device)
        return lambda num_tokens: numbers
    if query == "register":
        return lambda num_tokens: register_numbers(tower, images, num_tokens)
    return lambda num_tokens: slice(0, 1) if query == "cls" else patches


def register_numbers(tower: Tower, images: Tensor, num_tokens: int) -> Tensor:
    """The numbers (R,) of the registers among the `num_tokens` tokens in a block.

    The trained registers come first, then those that a patched model adds.
    """
    trained = range(tower.num_prefix - tower.num_trained_registers, tower.num_prefix)
    added = range(tower.patches(images).stop, num_tokens - tower.family.appended)
    return torch.tensor([*trained, *added], dtype=torch.long, device=tower.device)


def _has_no_registers(tower: Tower, block: int) -> ValueError:
    if (patch := find_patch(tower.module)) is not None and patch.mode_for_new_forward.has_registers:
        return ValueError(f"registers enter block {patch.entry_block} of this model: there are none in block {block}")
    return ValueError(f"{type(tower.module).__name__} has no registers: call testreg.patch(model, ...) first")


@contextmanager
def recorded_attention(
    tower: Tower, blocks: Sequence[int], recorder: AttentionRecorder
) -> Iterator[list[list[Tensor]]]:
    """Within the context, a forward fills a list for each of some blocks with what the recorder records in the block.

    Such a list has an element for each attention in the block.

    Raises:
        RuntimeError: attention in one of the blocks cannot be observed from Python.
    """
    modules = [tower.blocks[block].module for block in blocks]
    of_blocks: list[list[Tensor]] = [[] for _ in blocks]

    def begin_block(index: int, tokens: Tensor) -> None:
        recorder.end()
        recorder.recorded.clear()

    def end_block(index: int, tokens: Tensor) -> None:
        recorder.end()
        of_blocks[index] += recorder.recorded
        recorder.recorded.clear()

    with (
        recorder,
        recording_inputs(modules, begin_block),
        recording_outputs(modules, end_block),
    ):
        yield of_blocks
    for block, recorded in zip(blocks, of_blocks, strict=True):
        if not recorded:
            raise _not_observed(tower, f"in block {block}")


def _not_observed(tower: Tower, where: str) -> RuntimeError:
    return RuntimeError(
        f"saw no attention {where} of {tower.family.name}: compiled or custom attention kernels cannot be observed"
    )


@torch.no_grad()
def attention_rollout(tower: Tower, images: Tensor, block: int = -1, query: Query | Tensor | None = None) -> Tensor:
    """Attention rollout (Abnar and Zuidema, arXiv 2005.00928) from a query to each patch: (B, 1, N).

    It is the product of (A + I) / 2 over the blocks from the first one to `block`. The matrix A (T, T) is a block's
    attention, row by row what each token gives, averaged over its heads; a later block's factor stands to the left; and
    the identity I stands for the residual stream. All tokens take part, prefix tokens and registers too. Registers that
    enter a later block, as the mean patch, get the mean of the patches' rows as their row, but no column.
    """
    query = default_query(tower) if query is None else query
    if isinstance(query, Tensor) and query.ndim == 3:
        pairs = zip(images.split(1), query, strict=True)
        return torch.cat([attention_rollout(tower, image, block, mask) for image, mask in pairs])
    blocks = range(block % tower.depth + 1)
    recorder = AttentionRecorder(lambda num_tokens: slice(None), mean_of_heads)
    with (
        attention_kernel(tower.module, "sdpa", instead_of=UNSEEN),
        recorded_attention(tower, blocks, recorder) as of_blocks,
    ):
        tower.run(images)
    if any(len(each) != len(images) for each in of_blocks[0]):  # the tower packs images in one sequence
        return torch.cat([attention_rollout(tower, image, block, query) for image in images.split(1)])
    first, num_tokens = of_blocks[0][0], of_blocks[-1][0].shape[-1]
    patches = tower.patches(images)
    rollout = torch.eye(first.shape[-1], device=first.device, dtype=first.dtype).expand(len(images), -1, -1)
    if isinstance(query, str) and query == "register" and not len(register_numbers(tower, images, num_tokens)):
        raise _has_no_registers(tower, block)
    for recorded in of_blocks:
        weights = torch.stack(recorded).mean(0)
        if num_entering := weights.shape[-1] - rollout.shape[1]:
            start = rollout[:, patches].mean(1, keepdim=True).expand(-1, num_entering, -1)
            parts = [rollout[:, : patches.stop], start, rollout[:, patches.stop :]]
            rollout = torch.cat(parts, 1)  # its columns are still the tokens that entered block 0
        rollout = (weights @ rollout + rollout) / 2
    of_queries = rollout[:, queries_of(tower, images, query)(num_tokens)]
    return of_queries.mean(1, keepdim=True)[..., patches]


def pooling_attention(tower: Tower, images: Tensor) -> list[Tensor]:
    """The attention of a module that pools the last block's tokens: what its query gives to each token, (B, heads, T).

    The tokens are the prefix tokens and the patches; registers that a patched model adds are not among them. Returns a
    list with this one tensor, or an empty list if the tower has no such module.
    """
    recorded: list[Tensor] = []
    num_tokens = tower.patches(images).stop

    def record(attention: Attention) -> None:
        if not attention.is_self_attention and attention.num_tokens == num_tokens:
            recorded.append(mean_of_queries(attention.weights(slice(None))))

    last = tower.blocks[-1].module
    # What was recorded up to the end of the last block is not the attention of this module.
    with AttentionObserver(record), recording_outputs([last], lambda index, tokens: recorded.clear()):
        tower.run_with_head(images)
    return recorded[:1]


def entropy(attention: Tensor) -> Tensor:
    """The entropy (...,) in nats of attention (..., N), normalised over the N patches: log N if it is spread evenly."""
    share = attention / attention.sum(-1, keepdim=True)
    return -torch.xlogy(share, share).sum(-1)
