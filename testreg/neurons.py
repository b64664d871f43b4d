"""Register neurons and their JSON: ranked, versioned, checked; and the lists that come with the package."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from testreg.families import Tower, checkpoint_names
from testreg.files import read_text, replacing

FORMAT = "testreg-neurons"
VERSION = 1
_KEYS = {"format", "version", "neurons", "top_k", "model", "calibration", "provenance", "verified"}

Neuron = tuple[int, int, float | None]


@dataclass(frozen=True)
class RegisterNeurons:
    """Register neurons of one checkpoint, best first, each a (layer, unit, score).

    `layer` is a 0-based block, `unit` an input channel of that block's second MLP linear. Scores may be None (lists
    published without any): such a list has no order to cut by.

    Raises:
        ValueError: empty list, duplicate neuron, negative index, score that is no finite number, not sorted by score.
    """

    ranking: tuple[Neuron, ...]
    top_k: int | None = None
    """How many of the ranking to use; None for all."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """The checkpoint: name, names (aliases), depth, mlp_width, fingerprint. All optional."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """How the list was made: images, image size, outlier rule, layers, score, versions."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where a list that testreg did not make comes from."""
    verified: bool = False
    """Whether the list was made, or measured, with testreg on the checkpoint itself."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "ranking", tuple((layer, unit, score) for layer, unit, score in self.ranking))
        except (TypeError, ValueError):
            raise ValueError("a ranking is a sequence of (layer, unit, score or None)") from None
        if not self.ranking:
            raise ValueError("the list of register neurons is empty")
        seen: set[tuple[int, int]] = set()
        last = math.inf
        for layer, unit, score in self.ranking:
            if not (_is_index(layer) and _is_index(unit)):
                raise ValueError(f"a register neuron is a 0-based (layer, unit), got ({layer!r}, {unit!r})")
            if (layer, unit) in seen:
                raise ValueError(f"duplicate register neuron: layer {layer}, unit {unit}")
            seen.add((layer, unit))
            if score is not None:
                if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                    raise ValueError(f"the score of layer {layer}, unit {unit} is {score!r}, not a finite number")
                if score > last:
                    raise ValueError(
                        f"the ranking is not sorted: layer {layer}, unit {unit} scores {score:g}, "
                        f"the one before it {last:g}"
                    )
                last = score
        if self.top_k is not None and (not _is_index(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k must be a whole number of at least 1, got {self.top_k!r}")

    @classmethod
    def from_layers(cls, layers: Mapping[int, Sequence[int]]) -> RegisterNeurons:
        """From `{layer: [units]}`, unscored; numpy and torch integers will do."""
        return cls(tuple((_as_index(layer), _as_index(unit), None) for layer in layers for unit in layers[layer]))

    def cut(self, top_k: int | None = None) -> RegisterNeurons:
        """The best `top_k` alone, or as many as the list itself recommends.

        Raises:
            ValueError: `top_k` is below 1, or fewer than an unscored list holds.
        """
        top_k = self.top_k if top_k is None else top_k
        if top_k is None or top_k == len(self.ranking):
            return replace(self, top_k=None)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_k > len(self.ranking):
            raise ValueError(f"top_k={top_k}, but the list holds {len(self.ranking)} neurons")
        if any(score is None for _, _, score in self.ranking[: top_k + 1]):
            raise ValueError("this list has no scores, so it cannot be cut to top_k: use all of it, or calibrate")
        return replace(self, ranking=self.ranking[:top_k], top_k=None)

    def by_layer(self, top_k: int | None = None) -> dict[int, list[int]]:
        """`{layer: [units, best first]}` of the best `top_k` (None: as many as the list recommends)."""
        layers: dict[int, list[int]] = {}
        for layer, unit, _ in self.cut(top_k).ranking:
            layers.setdefault(layer, []).append(unit)
        return dict(sorted(layers.items()))

    def check_fits(self, depth: int, mlp_width: int) -> None:
        """Raise ValueError unless the list belongs to a tower of `depth` blocks with `mlp_width` neurons each."""
        name = self.model.get("name", "the register neurons")
        if (expected := self.model.get("depth", depth)) != depth:
            raise ValueError(f"{name}: made for {expected} blocks, but this model has {depth}")
        if (expected := self.model.get("mlp_width", mlp_width)) != mlp_width:
            raise ValueError(f"{name}: made for MLPs of {expected} neurons, but this model's have {mlp_width}")
        for layer, unit, _ in self.ranking:
            if layer >= depth:
                raise ValueError(f"layer {layer} (unit {unit}) is out of range: the model has {depth} blocks")
            if unit >= mlp_width:
                raise ValueError(
                    f"unit {unit} of layer {layer} is out of range: the model's MLPs have {mlp_width} neurons"
                )

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": dict(self.model),
            "calibration": dict(self.calibration),
            "provenance": dict(self.provenance),
            "verified": self.verified,
            "top_k": self.top_k,
            "neurons": [list(neuron) for neuron in self.ranking],
        }

    @classmethod
    def from_json(cls, data: object, *, source: str = "the neuron JSON") -> RegisterNeurons:
        """From the parsed JSON; `source` names it in errors.

        Raises:
            ValueError: not this format, or a field that does not fit.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f'{source} is not a register neuron JSON ("format": "{FORMAT}" is missing)')
        version: Any = data.get("version")
        if not _is_index(version) or version < 1:
            raise ValueError(f"{source}: version must be a whole number, got {version!r}")
        if version > VERSION:
            unknown = ", ".join(sorted(data.keys() - _KEYS)) or "none"
            warnings.warn(
                f"{source} has version {version}, newer than this testreg reads ({VERSION}); "
                f"keys that are ignored: {unknown}. Upgrade testreg to use them",
                stacklevel=3,
            )
        rows = data.get("neurons")
        if not isinstance(rows, list) or any(not isinstance(row, list) or len(row) != 3 for row in rows):
            raise ValueError(f'{source}: "neurons" must be a list of [layer, unit, score or null]')
        for key in ("model", "calibration", "provenance"):
            if not isinstance(data.get(key, {}), dict):
                raise ValueError(f'{source}: "{key}" must be an object')
        for key in ("depth", "mlp_width"):
            if not _is_index(data.get("model", {}).get(key, 1)):
                raise ValueError(f'{source}: "{key}" of the model must be a whole number')
        if not isinstance(data.get("verified", False), bool):
            raise ValueError(f'{source}: "verified" must be true or false')
        try:
            return cls(
                ranking=tuple((layer, unit, score) for layer, unit, score in rows),
                top_k=data.get("top_k"),
                model=data.get("model", {}),
                calibration=data.get("calibration", {}),
                provenance=data.get("provenance", {}),
                verified=data.get("verified", False),
            )
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; an existing file is replaced whole or not at all."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False)
        # One neuron a line: long lists stay readable and diffable.
        head, _, _ = text.partition('\n "neurons": [')
        rows = ",\n".join("  " + json.dumps(list(neuron)) for neuron in self.ranking)
        with replacing(path) as temporary:
            temporary.write_text(f'{head}\n "neurons": [\n{rows}\n ]\n}}\n', encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RegisterNeurons:
        """Read a neuron JSON.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON (a truncated file), or not a valid list.
        """
        try:
            data = json.loads(read_text(path), parse_constant=_reject_constant)
        except FileNotFoundError:
            raise FileNotFoundError(f"no neuron JSON at {path}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON (truncated?): {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return cls.from_json(data, source=str(path))


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _as_index(value: Any) -> Any:
    """`value` as an int, if it is a whole number; anything else is left for the check, which names it."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a finite number")


def fingerprint(tower: Tower) -> str:
    """A short hash that tells checkpoints apart, and is the same in every library that holds the checkpoint.

    It hashes the signs of 256 evenly spaced values of every block's second MLP linear: the matrices whose columns the
    neurons are, laid out alike in all libraries. Signs, because no rounding (fp16, bf16) changes them.
    """
    digest = hashlib.sha256()
    for mlp in (mlp for block in tower.blocks for mlp in block.mlps):
        weight = getattr(mlp.down_linear, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.is_meta:
            return "unknown"
        flat = weight.detach().flatten()
        at = torch.arange(256) * (flat.numel() - 1) // 255
        digest.update(flat[at.to(flat.device)].signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_model(model: nn.Module, tower: Tower) -> dict[str, Any]:
    """The `model` entry of a list found on `model`."""
    names = checkpoint_names(model)
    return {
        "name": names[0] if names else type(model).__name__,
        "names": names,
        "depth": tower.depth,
        "mlp_width": tower.mlp_width,
        "fingerprint": fingerprint(tower),
    }


def config_folder() -> Path:
    """Where the bundled lists are: in the installed package, or `configs/` of a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def bundled() -> dict[str, RegisterNeurons]:
    """The lists that come with the package, by name."""
    return {path.stem: RegisterNeurons.load(path) for path in sorted(config_folder().glob("*.json"))}


def resolve(
    neurons: RegisterNeurons | str | os.PathLike[str] | Mapping[int, Sequence[int]] | None, model: nn.Module
) -> RegisterNeurons:
    """The list that the `neurons` argument of `patch` means.

    Raises:
        FileNotFoundError, TypeError, ValueError: nothing, or nothing valid, is meant by it.
    """
    if isinstance(neurons, RegisterNeurons):
        return neurons
    if isinstance(neurons, Mapping):
        return RegisterNeurons.from_layers(neurons)
    if neurons is None:
        return _of_checkpoint(checkpoint_names(model), type(model).__name__)
    if not isinstance(neurons, str | os.PathLike):
        raise TypeError(
            "neurons must be a RegisterNeurons, a path, a bundled name, {layer: [units]} or None, "
            f"got {type(neurons).__name__}"
        )
    path = Path(neurons)
    if path.suffix != ".json" and path.parent == Path() and not path.exists():
        lists = bundled()
        if str(neurons) not in lists:
            raise ValueError(f"no bundled list {str(neurons)!r} (and no such file); bundled: {', '.join(lists)}")
        return lists[str(neurons)]
    return RegisterNeurons.load(path)


def _of_checkpoint(names: Sequence[str], class_name: str) -> RegisterNeurons:
    lists = bundled().values()
    for name in names:
        for candidate in lists:
            if name in candidate.model.get("default_for", ()):
                return candidate
    says = f"it says it is {', '.join(names)}" if names else "it does not say which checkpoint it is"
    raise ValueError(
        f"no bundled register neurons for this {class_name}: {says}. Calibrate it (testreg.calibrate, or "
        "`testreg calibrate MODEL --images DIR -o neurons.json`), or name a list from `testreg list`"
    )
