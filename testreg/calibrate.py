"""Find register neurons in one pass over images (arXiv 2506.08010, Algorithm 1).

Outlier tokens are known only once the forward has passed the layer that shows them; the neurons that make them live
before it. So the pass keeps the *input* of every MLP, four times smaller than its hidden activation, and recomputes
the hidden activation afterwards, at the outlier tokens and a few normal ones only. The cost is about that of the plain
forward, the memory that of one batch.

The layer that shows the outliers best is not known beforehand either. Statistics are therefore kept for every
candidate layer at once, which is cheap because outliers are few, and the layer is chosen at the end.
"""

from __future__ import annotations

import datetime
import functools
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from testreg.data import ImageBatches, Images, Transform
from testreg.families import Block, Mlp, Tower, find_tower
from testreg.neurons import RegisterNeurons, describe_model
from testreg.outliers import OutlierRule, recorded_norms
from testreg.register import is_patched

if TYPE_CHECKING:
    from PIL.Image import Image

Score = Literal["write", "activation"]

NORMAL_TOKENS = 8  # sampled from each image, for comparison
MIN_FRACTION = 1e-3  # of the patches must be outliers somewhere, or there is nothing to fix
SPARSE = 0.5  # activations below it count as silent for the released code's sparsity filter


class NoOutliersError(Exception):
    """The model shows no outlier tokens on these images: there is nothing to fix."""


@dataclass
class Statistics:
    """Sums over images, from which every score follows. D candidate detection layers, L blocks, H neurons.

    `outlier[d, l, h]` sums, over the images with outliers at candidate d, the image's mean |activation| of neuron
    (l, h) at those outliers: images count alike, however many outliers they have (Algorithm 1).
    """

    candidates: list[int]
    outlier: Tensor  # (D, L, H)
    normal: Tensor  # (L, H), sum over sampled normal tokens of |activation|
    num_normal: int
    images_with_outliers: Tensor  # (D,)
    num_outliers: Tensor  # (D,)
    excess: Tensor  # (D, L), sum over the outliers at d of norm / median - 1 at l
    median_norm: Tensor  # (L,), sum over images
    num_images: int
    num_patches: int

    @classmethod
    def empty(cls, tower: Tower, candidates: list[int], device: torch.device) -> Statistics:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        num_candidates, depth, width = len(candidates), tower.depth, tower.mlp_width
        return cls(
            candidates=candidates,
            outlier=zeros(num_candidates, depth, width),
            normal=zeros(depth, width),
            num_normal=0,
            images_with_outliers=zeros(num_candidates),
            num_outliers=zeros(num_candidates),
            excess=zeros(num_candidates, depth),
            median_norm=zeros(depth),
            num_images=0,
            num_patches=0,
        )

    def detection(self) -> int:
        """Index of the candidate whose outliers stand out most: the sum of norm / median - 1 over them."""
        return int(torch.stack([self.excess[d, layer] for d, layer in enumerate(self.candidates)]).argmax())

    def onset(self, d: int) -> int:
        """The layer after which candidate d's outliers are there: the first with half of the excess that they reach."""
        excess = self.excess[d, : self.candidates[d] + 1]
        return int((excess >= 0.5 * excess[-1]).float().argmax())


def calibrate(
    model: nn.Module,
    images: Images,
    *,
    transform: Transform | None = None,
    layer: int | None = None,
    threshold: float | None = None,
    rule: OutlierRule | None = None,
    max_layer: int | None = None,
    top_k: int = 50,
    score: Score = "write",
    sparsity_filter: bool = False,
    batch_size: int = 16,
    num_images: int | None = None,
    workers: int = 0,
    amp: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RegisterNeurons:
    """Rank the MLP neurons of `model` by how much they do at its outlier tokens, in one pass over `images`.

    Args:
        model: a vision tower, or any model that contains one; not patched. It is run on the device it is on.
        images: a folder, a Dataset, or any iterable of PIL images or tensors (see `testreg.data.ImageBatches`).
        transform: PIL image -> tensor (3, h, w); None takes the preprocessing that the model's own library names.
        layer: block (0-based, negative from the end) at whose output outliers are looked for; None takes the layer
            where they stand out most.
        threshold: norm above which a token is an outlier; None for the `rule`, which adapts to the model.
        max_layer: last block whose neurons are ranked; None for the block after which the outliers are there.
            Neurons behind it fire at outliers because of them.
        top_k: how many neurons the list recommends. The ranking keeps more, so that it can be cut anew.
        score: "write" ranks by how much more a neuron adds to the residual stream at outliers than at normal tokens:
            (mean |a| at outliers - mean |a| at normal tokens) * norm of its output column, as a fraction of the
            layer's median token norm. Neurons that are loud everywhere, or that write nothing, rank low. "activation"
            is the paper's: mean |a| at outliers (Algorithm 1; CLS may count as an outlier, as in the released code).
        sparsity_filter: as in the released code, a neuron counts in an image only if at least half of the tokens have
            |a| < 0.5. Needs all hidden activations, so it is slower.
        amp: torch.bfloat16 or torch.float16 to run under autocast.

    Returns:
        The ranked neurons, with the facts of the run in `calibration`.

    Raises:
        NoOutliersError: there is nothing to fix.
        ValueError: an argument does not fit the model; no image could be read.
        RuntimeError: the model is patched.
    """
    tower = find_tower(model)
    if is_patched(model):
        raise RuntimeError("the model is patched: calibrate it before, or after testreg.unpatch(model)")
    if score not in ("write", "activation"):
        raise ValueError(f"score must be 'write' or 'activation', got {score!r}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if threshold is not None and rule is not None:
        raise ValueError("give a threshold or a rule, not both")
    rule = rule or OutlierRule(threshold=threshold)
    candidates = list(range(tower.depth)) if layer is None else [_layer(layer, tower.depth, "layer")]
    last_layer = None if max_layer is None else _layer(max_layer, tower.depth, "max_layer")
    batches = ImageBatches(
        images,
        transform or OwnTransform(model),
        batch_size=batch_size,
        num_images=num_images,
        workers=workers,
        seed=seed,
    )
    statistics = Statistics.empty(tower, candidates, tower.device)
    generator = torch.Generator().manual_seed(seed)
    image_size: tuple[int, ...] = ()
    was_training = tower.module.training
    tower.module.eval()
    try:
        for batch in with_progress(batches, "calibrating", progress):
            image_size = tuple(batch.shape[-2:])
            _accumulate(
                statistics, tower, batch, rule, generator, amp, sparsity_filter, include_prefix=score == "activation"
            )
    finally:
        tower.module.train(was_training)
    return _rank(
        statistics,
        model,
        tower,
        max_layer=last_layer,
        top_k=top_k,
        score=score,
        facts={
            "images": statistics.num_images,
            "unreadable_images": batches.num_skipped,
            "source": batches.source,
            "image_size": list(image_size),
            "rule": rule.describe(),
            "sparsity_filter": sparsity_filter,
            "seed": seed,
            "dtype": str(amp or tower.dtype).removeprefix("torch."),
        },
    )


def _layer(index: int, depth: int, name: str) -> int:
    if not -depth <= index < depth:
        raise ValueError(f"{name}={index} is out of range: the model has {depth} blocks")
    return index % depth


class OwnTransform:
    """The preprocessing that the model's own library names; looked up only if an image needs it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @functools.cached_property
    def transform(self) -> Transform:
        from testreg.models import transform_for

        return transform_for(self.model)

    def __call__(self, image: Image) -> Tensor:
        return self.transform(image)


def with_progress(batches: ImageBatches, what: str, progress: bool) -> Iterator[Tensor]:
    from tqdm import tqdm

    # disable=None shows the bar on a terminal only
    with tqdm(total=batches.length, unit="image", desc=what, disable=None if progress else True) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


@torch.no_grad()
def _accumulate(
    statistics: Statistics,
    tower: Tower,
    images: Tensor,
    rule: OutlierRule,
    generator: torch.Generator,
    amp: torch.dtype | None,
    sparsity_filter: bool,
    *,
    include_prefix: bool,
) -> None:
    """Add one batch (B, 3, h, w) to the statistics."""
    device = tower.device
    with (
        torch.autocast(device.type, amp) if amp is not None else nullcontext(),
        recorded_norms(tower) as block_norms,
        _recorded_mlp_inputs(tower, sparsity_filter) as (mlp_inputs, sparse),
    ):
        tower.run(images)
    norms = torch.stack(block_norms)  # (L, B, T)

    num_prefix = tower.num_prefix
    patches = norms[..., num_prefix:]
    limit = rule.limit(patches)
    is_outlier = norms > limit  # (L, B, T)
    is_outlier_patch = is_outlier[..., num_prefix:]
    if not include_prefix:
        is_outlier = is_outlier.clone()
        is_outlier[..., :num_prefix] = False
    candidates = torch.tensor(statistics.candidates, device=device)
    detected = is_outlier[candidates]  # (D, B, T)
    detected_patches = detected[..., num_prefix:].float()  # (D, B, N)
    median = patches.median(-1, keepdim=True).values

    statistics.num_images += len(images)
    statistics.num_patches += patches[0].numel()
    statistics.median_norm += median.sum((1, 2))
    statistics.num_outliers += detected_patches.sum((1, 2))
    statistics.excess += torch.einsum("dbn,lbn->dl", detected_patches, patches / median - 1)
    per_image = detected.sum(-1)  # (D, B)
    statistics.images_with_outliers += (per_image > 0).sum(1)

    normal = _sample_normal(is_outlier_patch.any(0), generator)  # (B, N)
    selected = detected.any(0)  # (B, T)
    selected[:, num_prefix:] |= normal
    image, token = selected.nonzero(as_tuple=True)  # (n,) each
    weight = detected[:, image, token] / per_image[:, image].clamp(min=1)  # (D, n), sums to 1 in each image
    is_normal = torch.zeros_like(selected)
    is_normal[:, num_prefix:] = normal
    normal_weight = is_normal[image, token].float()  # (n,)
    statistics.num_normal += int(normal.sum())
    for i, block in enumerate(tower.blocks):
        hidden = _hidden_at(block, [inputs[image, token] for inputs in mlp_inputs[i]]).float().abs()  # (n, H)
        statistics.normal[i] += normal_weight @ hidden
        if sparsity_filter:
            hidden = hidden * torch.cat(sparse[i], -1)[image]
        statistics.outlier[:, i] += weight @ hidden


def _sample_normal(outlier: Tensor, generator: torch.Generator) -> Tensor:
    """A mask (B, N) of up to NORMAL_TOKENS patches an image that are outliers (B, N) at no layer."""
    order = torch.rand(outlier.shape, generator=generator).to(outlier.device).masked_fill(outlier, -1)
    count = min(NORMAL_TOKENS, outlier.shape[1])
    chosen = torch.zeros_like(outlier).scatter_(1, order.topk(count, dim=1).indices, True)
    return chosen & ~outlier


@contextmanager
def _recorded_mlp_inputs(
    tower: Tower, sparsity_filter: bool
) -> Iterator[tuple[list[list[Tensor]], list[list[Tensor]]]]:
    """Inputs (B, T, C) of each block's MLPs; of one that is no module, the hidden activation (B, T, H) itself.

    With `sparsity_filter` also, for each MLP, which neurons (B, H) are silent on half of an image's tokens.
    """
    inputs: list[list[Tensor]] = [[] for _ in tower.blocks]
    sparse: list[list[Tensor]] = [[] for _ in tower.blocks]

    def record(layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[layer].append(tower.batch_first(args[0]))

    def record_sparse(layer: int, mlp: Mlp, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden = tower.batch_first(args[0])[..., mlp.first :]
        sparse[layer].append((hidden.abs() < SPARSE).float().mean(1) >= 0.5)

    handles = []
    for layer, block in enumerate(tower.blocks):
        for mlp in block.mlps:
            handles.append((mlp.module or mlp.down).register_forward_pre_hook(functools.partial(record, layer)))
            if sparsity_filter:
                handles.append(mlp.down.register_forward_pre_hook(functools.partial(record_sparse, layer, mlp)))
    try:
        yield inputs, sparse
    finally:
        for handle in handles:
            handle.remove()


def _hidden_at(block: Block, selected: Sequence[Tensor]) -> Tensor:
    """Inputs (n, C) of each of the block's MLPs -> hidden activations (n, H)."""
    return torch.cat([_mlp_hidden_at(*each) for each in zip(block.mlps, selected, strict=True)], -1)


def _mlp_hidden_at(mlp: Mlp, selected: Tensor) -> Tensor:
    """The MLP is run, and the input of its second linear kept."""
    if mlp.module is None:
        return selected[:, mlp.first :]
    kept: list[Tensor] = []
    handle = mlp.down.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    try:
        mlp.module(selected.unsqueeze(0))
    finally:
        handle.remove()
    return kept[0].squeeze(0)


def _rank(
    statistics: Statistics,
    model: nn.Module,
    tower: Tower,
    *,
    max_layer: int | None,
    top_k: int,
    score: Score,
    facts: dict[str, Any],
) -> RegisterNeurons:
    d = statistics.detection()
    layer = statistics.candidates[d]
    fraction = float(statistics.num_outliers[d]) / statistics.num_patches
    if fraction < MIN_FRACTION:
        raise NoOutliersError(
            f"no outliers: at most {fraction:.3%} of the patches of {statistics.num_images} images "
            f"({facts['rule']}), so there is nothing to fix"
        )
    onset = statistics.onset(d)
    last = onset if max_layer is None else max_layer
    scores = _scores(statistics, tower, d, score)[: last + 1]  # (layers, H)
    values, order = scores.flatten().sort(descending=True, stable=True)
    keep = int((values > 0).sum().clamp(max=max(10 * top_k, 1000)))
    ranking = tuple(
        (index // tower.mlp_width, index % tower.mlp_width, value)
        for index, value in zip(order[:keep].tolist(), values[:keep].tolist(), strict=True)
    )
    return RegisterNeurons(
        ranking,
        top_k=min(top_k, len(ranking)),
        model=describe_model(model, tower),
        calibration={
            **facts,
            "score": score,
            "detection_layer": layer,
            "onset_layer": onset,
            "max_layer": last,
            "outlier_fraction": fraction,
            "images_with_outliers": int(statistics.images_with_outliers[d]),
            "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": _versions(),
        },
        verified=True,
    )


def _scores(statistics: Statistics, tower: Tower, d: int, score: Score) -> Tensor:
    """(L, H)"""
    at_outliers = statistics.outlier[d] / statistics.images_with_outliers[d]
    if score == "activation":
        return at_outliers
    contrast = at_outliers - statistics.normal / max(statistics.num_normal, 1)
    median_norm = statistics.median_norm / statistics.num_images  # (L,)
    return contrast * torch.stack([_column_norms(block) for block in tower.blocks]) / median_norm.unsqueeze(-1)


def _column_norms(block: Block) -> Tensor:
    """(H,): norm of what one unit of a neuron's activation adds to the residual stream, LayerScale included."""
    norms = []
    for mlp in block.mlps:
        columns = mlp.columns.detach().float()
        if mlp.scale is not None:
            columns = columns * mlp.scale.detach().float().unsqueeze(-1)
        norms.append(columns.norm(dim=0))
    return torch.cat(norms)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("testreg", "torch", "timm", "transformers", "open_clip_torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
