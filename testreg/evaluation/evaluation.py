"""What all tasks share. A task compares models on the same images, each of which is a `Variant`:

- "plain", the model without registers;
- "patched", the same model with registers, extra tokens onto which outliers (patches of huge norm) are moved;
- "against", another model, e.g. one that was trained with registers.

An `Evaluation` makes the variants, computes their features of the images, and turns the scores of a task into a
`Result`, which has a column for each variant.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from testreg.evaluation.bootstrap import Difference, Scores, difference
from testreg.evaluation.features import Compute, Features, cache_folder, extract
from testreg.evaluation.preparing import ModelPreprocessing, Preparation, hashed
from testreg.evaluation.result import Result
from testreg.evaluation.samples import Sample
from testreg.families import Tower, find_tower
from testreg.files import check_writable_folder
from testreg.io.loading import LoadedModel, load_model
from testreg.io.preprocessing import OwnTransform, Transform
from testreg.io.progress import progress_bar
from testreg.neurons import AnyNeurons, resolve
from testreg.patching.state import patch_of
from testreg.register import disabled, is_patched, patched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEATURES_VERSION = 1  # part of the cache's key: raise it if the code of a task computes other features than before

Model = str | os.PathLike[str] | nn.Module | LoadedModel
"""The name or folder of a model (see `testreg.load_model`), a module, or what `testreg.load_model` returned."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments that all tasks have in common.

    Args:
        num_images: use at most so many images of each split, drawn at random with the seed; None for all.
        batch_size: how many images the model is given at a time.
        workers: processes that read images.
        device: cpu, cuda, cuda:1, mps; None leaves a module where it is, and loads named models to the CPU.
        cache: folder in which features are kept; None for ~/.cache/testreg/evaluation.
        resamples: how often the images are drawn anew for the 95 % intervals (bootstrap).
        seed: seed of the drawn images, the probes, and the intervals.
        progress: whether to show progress bars.
        trust_remote_code: run the Python code that a model's repository or folder brings along.

    Raises:
        ValueError: a value is out of its range.
    """

    num_images: int | None = None
    batch_size: int = 16
    workers: int = 0
    device: str | None = None
    cache: str | os.PathLike[str] | None = None
    resamples: int = 1000
    seed: int = 0
    progress: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size", "resamples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Variant:
    """A model in the state in which it is evaluated: without registers, patched, or the other model of a comparison."""

    name: str
    """"plain", "patched" or "against"."""
    model: nn.Module
    transform: Transform
    state: Callable[[], AbstractContextManager[object]]
    """Makes a context manager; inside it, the model is in this state."""
    patch: Mapping[str, Any] | None
    """The neurons that are moved to registers, and the options of `testreg.patch`; None without registers."""

    @functools.cached_property
    def tower(self) -> Tower:
        """The vision transformer in the model."""
        return find_tower(self.model)

    @functools.cached_property
    def weights(self) -> str:
        """A hash of all weights. (`testreg.families.fingerprint` is faster, but may miss changes of single neurons.)"""
        digest = hashlib.sha256(type(self.model).__name__.encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


class Evaluation:
    """One task on one model: makes the variants, computes their features of images, and builds the result.

    Args:
        task: the task's name; it is part of the key under which features are cached.
        model: the model to evaluate. If it is patched already, it has a plain and a patched variant, and `neurons` must
            be None or "none".
        data: the data set, for the result's JSON.
        neurons: the register neurons of the patched variant, as `testreg.patch` takes them. None or "none" means that
            there is no patched variant.
        against: another model, e.g. one with trained registers. It is evaluated as it is.
        image_size: side of the square images that the task will give the model, in pixels. A model given by name is
            loaded for that size, rounded up to whole patches. "any" if images have different sizes; None for the size
            that the model was trained on.

    Raises:
        ValueError: neurons are given for a model that is patched already, or they do not fit it.
    """

    def __init__(
        self,
        task: str,
        model: Model,
        data: str | os.PathLike[str],
        settings: Settings,
        *,
        neurons: AnyNeurons = None,
        against: Model | None = None,
        image_size: int | str | None = None,
    ) -> None:
        self.task, self.data, self.settings = task, os.fspath(data), settings
        self.cache = Path(settings.cache or cache_folder())
        check_writable_folder(self.cache)
        loaded = self._loaded(model, image_size)
        self.model_name = loaded.name
        self.against_name: str | None = None
        self.variants = _variants(loaded, None if neurons == "none" else neurons)
        if against is not None:
            other = self._loaded(against, image_size)
            patch = _patch_of(other.model) if is_patched(other.model) else None
            self.variants.append(Variant("against", other.model, other.transform, nullcontext, patch))
            self.against_name = other.name

    def _loaded(self, model: Model, image_size: int | str | None) -> LoadedModel:
        """The model with its preprocessing. A named model is loaded for images of that size."""
        settings = self.settings
        if isinstance(model, str | os.PathLike):
            load = functools.partial(
                load_model, os.fspath(model), device=settings.device, trust_remote_code=settings.trust_remote_code
            )
            if image_size is None:
                return load()
            loaded = load(any_size=True)
            if image_size == "any":
                return loaded
            patch = max(find_tower(loaded.model).patch_size)
            return load(any_size=True, image_size=-(-int(image_size) // patch) * patch)
        loaded = model if isinstance(model, LoadedModel) else LoadedModel(model, OwnTransform(model), _name_of(model))
        if settings.device is not None:
            loaded.model.to(settings.device)
        return loaded

    def name_of(self, variant: Variant) -> str:
        """The name of the model that a variant runs."""
        return self.against_name if variant.name == "against" and self.against_name else self.model_name

    def features(
        self,
        variant: Variant,
        samples: Sequence[Sample[Any]],
        prepare: Preparation | None,
        compute: Callable[[Variant, Tensor], Mapping[str, Tensor]],
        key: Mapping[str, Any],
    ) -> Features:
        """The features that a variant computes for each sample. They are computed once and cached on disk.

        Args:
            prepare: turns an image into the model's input; None for the model's own preprocessing.
            compute: maps the variant and images (B, 3, h, w) to named tensors (B, ...).
            key: what the features depend on besides the model, the images and their preparation: arguments of the task.
                Tasks that share features put a common name under "task", which replaces the name of the task.

        Raises:
            OSError, ValueError: an image cannot be read, or the model does not take it.
        """
        prepare = ModelPreprocessing(variant.transform) if prepare is None else prepare
        depends_on = {
            "version": FEATURES_VERSION,
            "task": self.task,
            "weights": variant.weights,
            "dtype": str(variant.tower.dtype),
            "patch": variant.patch,
            "images": [sample.name for sample in samples],
            "preparation": prepare.key,
            **key,
        }
        settings = self.settings
        with (
            torch.no_grad(),
            variant.state(),
            variant.tower.evaluating(),
            progress_bar(f"{self.task}, {variant.name}", len(samples), settings.progress) as bar,
        ):
            return extract(
                self.cache / hashed(depends_on)[:32],
                samples,
                prepare,
                _explained(compute, variant),
                batch_size=settings.batch_size,
                workers=settings.workers,
                on_images=bar.update,
            )

    def result(
        self,
        scores: Mapping[str, Scores],
        protocol: Mapping[str, Any],
        *,
        baselines: Scores | None = None,
        details: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        pictures: Mapping[str, Callable[[], Figure]] | None = None,
    ) -> Result:
        """The result of the task.

        Args:
            scores: the metrics of each variant, by the variant's name.
            protocol: how the figures were made, for the result's JSON. The other arguments are fields of `Result`.
        """
        patches = {variant.name: variant.patch for variant in self.variants}
        return Result(
            task=self.task,
            model=self.model_name,
            data=self.data,
            protocol={
                **protocol,
                "neurons": patches.get("patched"),
                "against": self.against_name,
                "seed": self.settings.seed,
            },
            metrics={name: _values(each) for name, each in scores.items()},
            difference=self._difference(scores, "patched"),
            difference_against=self._difference(scores, "against"),
            baselines=_values(baselines or {}),
            details=details or {},
            notes=notes,
            pictures=pictures or {},
        )

    def _difference(self, scores: Mapping[str, Scores], name: str) -> dict[str, Difference] | None:
        """{metric: difference of a variant from the plain one}; None if there is no such variant."""
        if name not in scores:
            return None
        resamples, seed = self.settings.resamples, self.settings.seed
        plain, other = scores["plain"], scores[name]
        return {metric: difference(plain[metric], other[metric], resamples, seed) for metric in plain}


def _values(scores: Scores) -> dict[str, float]:
    """{metric: its value}."""
    return {name: metric.value for name, metric in scores.items()}


def _variants(loaded: LoadedModel, neurons: AnyNeurons) -> list[Variant]:
    """The plain variant of a model, and the patched one if there are neurons or the model is patched already."""
    model, transform = loaded.model, loaded.transform
    if is_patched(model):
        if neurons is not None:
            raise ValueError(f"{loaded.name} is patched already: leave neurons out, or call testreg.unpatch first")
        return [
            Variant("plain", model, transform, lambda: disabled(model), None),
            Variant("patched", model, transform, nullcontext, _patch_of(model)),
        ]
    variants = [Variant("plain", model, transform, nullcontext, None)]
    if neurons is not None:
        chosen = resolve(neurons, model)
        with patched(model, chosen):  # raises an error now, before hours of work, if the neurons do not fit the model
            patch = _patch_of(model)
        variants.append(Variant("patched", model, transform, lambda: patched(model, chosen), patch))
    return variants


def _patch_of(model: nn.Module) -> dict[str, Any]:
    """The neurons that a patched model moves to registers, and the options of its patch, as JSON holds them."""
    state = patch_of(model)
    if state.target is not None:
        raise ValueError("the model is patched with a target, which belongs to other images: patch it without")
    states = {} if state.static is None else {"static_states": state.static.digest}
    return {"neurons": state.neurons.by_block(), **state.options, **states}


def _explained(compute: Callable[[Variant, Tensor], Mapping[str, Tensor]], variant: Variant) -> Compute:
    """`compute` bound to a variant. If it fails, the error says that the model may not take images of that size."""

    def computed(images: Tensor) -> Mapping[str, Tensor]:
        try:
            return compute(variant, images)
        except (AssertionError, RuntimeError, ValueError) as error:
            height, width = images.shape[-2:]
            raise ValueError(
                f"{type(variant.model).__name__} failed on images of {height} x {width} pixels ({error}): if it takes "
                "images of one size alone, name that as size (--size)"
            ) from error

    return computed


def _name_of(model: nn.Module) -> str:
    """The name under which `testreg.load_model` loaded a model, or else that of its class."""
    source = model.__dict__.get("testreg_source")
    return source if isinstance(source, str) else type(model).__name__
