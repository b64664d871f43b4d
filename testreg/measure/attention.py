"""Attention to the patches, read off any model without touching it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from testreg.families import Tower
from testreg.families.kernels import attention_kernel
from testreg.measure.hooks import recording_inputs, recording_outputs
from testreg.measure.tokens import attends_to_itself, module_projections

Query = Literal["cls", "pool", "mean", "register"]
To = Literal["patches", "registers"]
Rows = slice | Tensor  # which of the tokens: a slice, or their numbers (n,)
RowsOf = Callable[[int], Rows]  # the same, from the number of tokens T
# Kernels that do not go through torch.nn.functional.
UNSEEN = ("flash_attention_2", "flash_attention_3", "flex_attention")
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


def mean_of_queries(weights: Tensor) -> Tensor:
    """What some queries give on average: (B, heads, n, T) -> (B, heads, T)."""
    return weights.mean(2)


def mean_of_heads(weights: Tensor) -> Tensor:
    """(B, heads, n, T) -> (B, n, T)."""
    return weights.mean(1)


class Recorder(TorchFunctionMode):
    """Sees every attention that is computed while it is active: fused, in nn.MultiheadAttention, or by a softmax.

    Args:
        queries: of which tokens, from the number of tokens T. Where attention is fused, no other weights are computed.
        reduce: what is kept of their weights (B, heads, n, T).
    """

    def __init__(self, queries: RowsOf, reduce: Callable[[Tensor], Tensor] = mean_of_queries) -> None:
        super().__init__()
        self.queries, self.reduce = queries, reduce
        self.rows: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            key = args[1] if len(args) > 1 else kwargs["key"]
            weights = fused_weights(*args, **kwargs, rows=self.queries(key.shape[-2]))
            if weights is not None:
                self.rows.append(self.reduce(weights))
        elif func is F.multi_head_attention_forward and attends_to_itself(*args, **kwargs):
            asked = kwargs.get("need_weights", True)
            out, weights = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
            assert weights is not None
            self._keep(weights)
            return out, weights.mean(1) if asked else None
        out = func(*args, **kwargs)
        if func in SOFTMAX and out.ndim == 4 and out.shape[-1] == out.shape[-2]:
            self._keep(out)
        return out

    def _keep(self, attention: Tensor) -> None:
        """Of attention (B, heads, T, T)."""
        rows = attention[:, :, self.queries(attention.shape[-1])]
        self.rows.append(self.reduce(rows.to(torch.promote_types(rows.dtype, torch.float32))))


class PoolRecorder(TorchFunctionMode):
    """Sees attention of other queries to tokens while it is active: that of a head which pools by attention.

    Keeps what these queries give, on average, to each token (B, heads, T).
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            weights = fused_weights(*args, **kwargs, rows=slice(None), to_others=True)
            if weights is not None:
                self.rows.append(weights.mean(2))
        elif func is F.multi_head_attention_forward and not attends_to_itself(*args, **kwargs):
            asked = kwargs.get("need_weights", True)
            out, weights = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
            assert weights is not None
            self.rows.append(weights.mean(2))
            return out, weights.mean(1) if asked else None
        out = func(*args, **kwargs)
        if func in SOFTMAX and out.ndim == 4 and out.shape[-1] != out.shape[-2]:
            self.rows.append(out.mean(2))
        return out


class SampleRecorder(TorchFunctionMode):
    """Sees every attention of tokens to themselves while it is active, of some queries alone.

    Where attention is fused, as it mostly is, no weights are computed but those of these queries.

    Args:
        queries: which they are (n,), from the number of tokens T.
        see: called with the weights (B, heads, n, T) of each attention, before dropout, and the values
            (B, heads, T, D), or None where these were not seen.
    """

    def __init__(self, queries: Callable[[int], Tensor], see: Callable[[Tensor, Tensor | None], object]) -> None:
        super().__init__()
        self.queries, self.see = queries, see
        self.unfused: Tensor | None = None  # weights (B, heads, T, T), until they are multiplied with the values

    def end(self) -> None:
        """What is running has ended: weights that wait for their values wait in vain."""
        if self.unfused is not None:
            self._see_unfused(None)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._see_fused(*args, **kwargs)
        elif func is F.multi_head_attention_forward and attends_to_itself(*args, **kwargs):
            return self._see_module(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in SOFTMAX and out.ndim == 4 and out.shape[-1] == out.shape[-2]:
            self.end()
            self.unfused = out
        elif self.unfused is not None and args and args[0] is self.unfused:
            if func in MATMUL:
                self._see_unfused(args[1])
            elif isinstance(out, Tensor) and out.shape == self.unfused.shape:  # dropout, another dtype
                self.unfused = out
        return out

    def _see_unfused(self, value: Tensor | None) -> None:
        assert self.unfused is not None
        weights, self.unfused = self.unfused[:, :, self.queries(self.unfused.shape[-1])], None
        self.see(weights.to(torch.promote_types(weights.dtype, torch.float32)), value)

    def _see_fused(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        weights = fused_weights(query, key, value, *args, **kwargs, rows=self.queries(key.shape[-2]))
        if weights is not None:
            self.see(weights, value.repeat_interleave(weights.shape[1] // value.shape[1], 1))

    def _see_module(self, *args: Any, **kwargs: Any) -> Any:
        """What nn.MultiheadAttention gives, of tokens (T, B, C)."""
        named = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
        given = named.arguments
        rows = self.queries(len(given["query"]))
        if all(given.get(name) is None for name in ("attn_mask", "key_padding_mask", "bias_k")):
            projected = module_projections(*args, **kwargs, rows=rows)
            query, key, value = (each.unflatten(-1, (given["num_heads"], -1)).transpose(1, 2) for each in projected)
            self.see(_softmax(query, key), value)
            return F.multi_head_attention_forward(*args, **kwargs)
        asked = given.get("need_weights", True)
        given.update(need_weights=True, average_attn_weights=False)
        out, weights = F.multi_head_attention_forward(*named.args, **named.kwargs)
        assert weights is not None
        self.see(weights[:, :, rows].float(), None)
        return out, weights.mean(1) if asked else None


def sample_recorder(
    tower: Tower,
    images: Tensor,
    queries: Callable[[int], Tensor],
    see: Callable[[Tensor, Tensor | None], object],
) -> SampleRecorder:
    """A recorder of the tower's attention within each image of a batch, whose tokens are as `Tower.arranged` lays them
    out, also where the images are packed in one sequence."""
    if tower.family.takes != "packed images":
        return SampleRecorder(queries, see)
    order, number = tower.order(images), tower.patches(images).stop
    seen: list[tuple[Tensor, Tensor | None]] = []  # of the images before, where attention is computed one by one

    def places(num_tokens: int) -> Tensor:
        """Where the tokens of an image are in its sequence."""
        rest = torch.arange(0 if order is None else number, num_tokens, device=tower.device)
        return rest if order is None else torch.cat([order, rest])

    def images_in(num_tokens: int) -> int:
        return len(images) if num_tokens >= len(images) * number else 1

    def rows(num_tokens: int) -> Tensor:
        count = images_in(num_tokens)
        length = num_tokens // count
        starts = length * torch.arange(count, device=tower.device)
        return (starts.unsqueeze(1) + places(length)[queries(length)]).flatten()

    def see_images(weights: Tensor, value: Tensor | None) -> None:
        count = images_in(weights.shape[-1])
        apart = weights[0].unflatten(1, (count, -1)).unflatten(3, (count, -1))  # (heads, images, n, images, T)
        own = apart.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)  # (images, heads, n, T)
        place = places(own.shape[-1])
        if value is not None:
            value = value[0].unflatten(1, (count, -1)).transpose(0, 1)[:, :, place]
        seen.append((own[..., place], value))
        if sum(len(each) for each, _ in seen) == len(images):
            all_weights, values = zip(*seen, strict=True)
            seen.clear()
            see(torch.cat(all_weights), None if value is None else torch.cat(values))

    return SampleRecorder(rows, see_images)


def fused_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    rows: Rows,
    to_others: bool = False,
) -> Tensor | None:
    """The weights (B, heads, n, T) of some queries behind `F.scaled_dot_product_attention`, before dropout; None unless
    tokens attend to themselves, or, if `to_others`, to others."""
    length = key.shape[-2]
    if query.ndim != 4 or (query.shape[-2] == length) == to_others:
        return None
    visible = query.new_ones(length, length, dtype=torch.bool).tril()[rows] if is_causal else None
    if attn_mask is not None and attn_mask.shape[-2] > 1:
        attn_mask = attn_mask[..., rows, :]
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return _softmax(query[:, :, rows], key, scale, (visible, attn_mask))


def _softmax(query: Tensor, key: Tensor, scale: float | None = None, masks: tuple[Tensor | None, ...] = ()) -> Tensor:
    """The weights (B, heads, n, T) that queries (B, heads, n, D) give keys, with masks of what is shown or of what is
    added."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = (query.to(dtype) * scale) @ key.to(dtype).transpose(-2, -1)
    given = [mask for mask in masks if mask is not None]
    if not given:
        return logits.softmax(-1)
    for mask in given:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else logits + mask
    # A token that sees nothing gives nothing.
    return logits.softmax(-1).masked_fill(logits.isneginf().all(-1, keepdim=True), 0)


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

    def keep(index: int, tokens: Tensor) -> None:
        kept[index] += recorder.rows
        recorder.rows.clear()

    with (
        recorder,
        recording_inputs(modules, lambda index, tokens: recorder.rows.clear()),
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
    """What the query that pools the last block's tokens by attention gives to each; empty if there is no such head."""
    last = tower.blocks[-1].module
    with PoolRecorder() as recorder, recording_outputs([last], lambda index, tokens: recorder.rows.clear()):
        tower.run_with_head(images)
    return [rows for rows in recorder.rows if rows.shape[-1] == tower.patches(images).stop][:1]


def entropy(attention: Tensor) -> Tensor:
    """Entropy (...,) in nats of attention (..., N), normalised over the patches: log N if spread evenly."""
    share = attention / attention.sum(-1, keepdim=True)
    return -torch.xlogy(share, share).sum(-1)
