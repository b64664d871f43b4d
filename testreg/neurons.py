"""Register neurons and their JSON: ranked, versioned, checked; and the lists that come with the package."""

from __future__ import annotations

import difflib
import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import nn

from testreg.display import html
from testreg.families import (
    Tower,
    activation,
    checkpoint_names,
    compare_weights,
    find_tower,
    fingerprint,
    mismatch_of,
)
from testreg.files import check_format, plain, read_text, replacing, shown
from testreg.hub.card import model_card
from testreg.hub.repository import SCHEME, fetch_file, is_repository, push

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "testreg-neurons"
VERSION = 2
FILE = "neurons.json"
"""The neuron JSON of a repository on the Hugging Face Hub."""
_RENAMED = {  # entries of the calibration, since version 1
    "detection_layer": "detection_block",
    "onset_layer": "onset_block",
    "max_layer": "max_block",
    "worst_layer": "worst_block",
}
_KEYS = {"format", "version", "neurons", "top_k", "num_registers", "model", "calibration", "provenance", "verified"}

MAX_REGISTERS = 256  # as many as an image of 224 pixels has patches
MAX_NAMED = 8  # blocks, and image sizes, that a summary names

Neuron = tuple[int, int, float | None]


class UnverifiedNeuronsWarning(UserWarning):
    """The register neurons in use were not verified on images of the checkpoint."""


@dataclass(frozen=True, repr=False)
class RegisterNeurons:
    """Register neurons of one checkpoint, best first, each a (block, unit, score).

    Blocks count from 0; a unit is an input channel of the second linear (fc2) of the block's MLP. Scores may be None
    (lists published without any): such a list has no order to truncate by. The length is the number of neurons in use.

    Example:
        >>> neurons = testreg.RegisterNeurons(((7, 1203, 4.1), (6, 88, 2.9)))
        >>> neurons.truncate(1).by_block()
        {7: [1203]}
        >>> neurons.save("neurons.json")
        >>> testreg.RegisterNeurons.load("neurons.json") == neurons
        True
        >>> testreg.RegisterNeurons.from_blocks({7: [1203], 6: [88]}).ranking
        ((7, 1203, None), (6, 88, None))
        >>> testreg.RegisterNeurons.load("dinov2-vitl14-official-hub")  # a bundled list
        RegisterNeurons: 45 in blocks 12, 13, 14, 15, 16, 17, of 45 listed
          for hub:facebookresearch/dinov2/dinov2_vitl14 (24 blocks of 4,096 neurons)
          not verified; read from dinov2-vitl14-official-hub
        >>> figure = neurons.plot()

    Raises:
        ValueError: empty list, duplicate neuron, negative index, score that is no finite number, not sorted by score.
    """

    ranking: tuple[Neuron, ...]
    top_k: int | None = None
    """How many of the ranking to use; None for all."""
    num_registers: int = 1
    """How many registers to use, each of which holds all of these neurons."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """The checkpoint: name, names (aliases), depth, mlp_width, activation, fingerprint. All optional."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """How the list was made: images, image size, outlier rule, blocks, score, versions."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where a list that testreg did not make comes from."""
    verified: bool = False
    """Whether the list was made, or measured, with testreg on the checkpoint itself."""
    source: str | None = field(default=None, compare=False)
    """The file or the bundled list that it was read from."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "ranking", tuple((block, unit, score) for block, unit, score in self.ranking))
        except (TypeError, ValueError):
            raise ValueError("a ranking is a sequence of (block, unit, score or None)") from None
        if not self.ranking:
            raise ValueError("the list of register neurons is empty")
        seen: set[tuple[int, int]] = set()
        last = math.inf
        for block, unit, score in self.ranking:
            if not (_is_index(block) and _is_index(unit)):
                raise ValueError(f"a register neuron is a 0-based (block, unit), got ({shown(block)}, {shown(unit)})")
            if (block, unit) in seen:
                raise ValueError(f"duplicate register neuron: block {shown(block)}, unit {shown(unit)}")
            seen.add((block, unit))
            if score is not None:
                if not _is_finite(score):
                    raise ValueError(
                        f"the score of block {shown(block)}, unit {shown(unit)} is {shown(score)}, not a finite number"
                    )
                if score > last and not self.calibration.get("rounds"):  # each round ranks anew
                    raise ValueError(
                        f"the ranking is not sorted: block {shown(block)}, unit {shown(unit)} scores {score:g}, "
                        f"the one before it {last:g}"
                    )
                last = score
        if self.top_k is not None and (not _is_index(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k must be a whole number of at least 1, got {shown(self.top_k)}")
        if self.top_k is not None and self.top_k > len(self.ranking):
            raise ValueError(f"top_k={shown(self.top_k)}, but the list holds {len(self.ranking)} neurons")
        if not _is_index(self.num_registers) or not 1 <= self.num_registers <= MAX_REGISTERS:
            raise ValueError(f"num_registers must be 1 to {MAX_REGISTERS}, got {shown(self.num_registers)}")
        _check_entries("model", self.model, _MODEL)
        _check_entries("calibration", self.calibration, _CALIBRATION)

    @property
    def has_to_be_trusted(self) -> bool:
        """Whether the list says that something found these neurons, without having been verified.

        Neurons that someone names by hand are their own affair.
        """
        return not self.verified and (self.source is not None or bool(self.calibration))

    @classmethod
    def from_blocks(cls, blocks: Mapping[int, Sequence[int]]) -> RegisterNeurons:
        """From `{block: [units]}`, unscored; numpy and torch integers will do."""
        return cls(tuple((_as_index(block), _as_index(unit), None) for block in blocks for unit in blocks[block]))

    def truncate(self, top_k: int | None = None) -> RegisterNeurons:
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
            raise ValueError(f"top_k={shown(top_k)}, but the list holds {len(self.ranking)} neurons")
        if any(score is None for _, _, score in self.ranking[: top_k + 1]):
            raise ValueError("this list has no scores, so it cannot be truncated to top_k: use all of it, or calibrate")
        return replace(self, ranking=self.ranking[:top_k], top_k=None)

    def by_block(self, top_k: int | None = None) -> dict[int, list[int]]:
        """`{block: [units, best first]}` of the best `top_k` (None: as many as the list recommends)."""
        blocks: dict[int, list[int]] = {}
        for block, unit, _ in self.truncate(top_k).ranking:
            blocks.setdefault(block, []).append(unit)
        return dict(sorted(blocks.items()))

    def __len__(self) -> int:
        return self.top_k or len(self.ranking)

    def __repr__(self) -> str:
        first, *others = self._summary()
        return "\n  ".join([f"{type(self).__name__}: {first}", *others])

    def _repr_html_(self) -> str:
        first, *others = self._summary()
        rows = [(block, len(units), ", ".join(map(str, units))) for block, units in self.by_block().items()]
        return html([f"Register neurons: {first}", *others], ("block", "neurons", "units, best first"), rows)

    def _summary(self) -> list[str]:
        """How many and where, for which model, and whether they are verified: a line each."""
        blocks = list(self.by_block())
        where = f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks[:MAX_NAMED]))}"
        more = f" and {len(blocks) - MAX_NAMED} more" if len(blocks) > MAX_NAMED else ""
        lines = [f"{len(self)} in {where}{more}, of {len(self.ranking):,} listed"]
        size = ""
        if {"depth", "mlp_width"} <= self.model.keys():
            size = f" ({self.model['depth']} blocks of {self.model['mlp_width']:,} neurons)"
        lines.append(f"for {plain(self.model.get('name', 'a model that is not named'))}{size}")
        sizes = [each["image_size"] for each in self.calibration.get("verified_at", ()) if "image_size" in each]
        at = f" at {', '.join(f'{height} x {width}' for height, width in sizes[:MAX_NAMED])}" if sizes else ""
        source = "" if self.source is None else f"; read from {plain(self.source)}"
        lines.append((f"verified{at}" if self.verified else "not verified") + source)
        return lines

    def plot(self) -> Figure:
        """The scores by rank, and the neurons of each block: a matplotlib figure.

        Where no neuron has a score, the blocks alone are drawn.
        """
        from matplotlib import pyplot as plt
        from matplotlib.ticker import MaxNLocator

        scores = [score for _, _, score in self.ranking if score is not None]
        figure, axes = plt.subplots(
            1, 2 if scores else 1, figsize=(9 if scores else 4.5, 3.2), layout="constrained", squeeze=False
        )
        used = {block: len(units) for block, units in self.by_block().items()}
        axes[0, -1].bar(used.keys(), used.values())
        axes[0, -1].set(
            xlabel="block", ylabel="register neurons", xlim=(-0.5, self.model.get("depth", max(used) + 1) - 0.5)
        )
        for axis in (axes[0, -1].xaxis, axes[0, -1].yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        if scores:
            axes[0, 0].plot(range(1, len(scores) + 1), scores, marker=".", color="0.6", label="listed")
            axes[0, 0].plot(range(1, len(self) + 1), scores[: len(self)], "o", label="in use")
            axes[0, 0].set(xlabel="rank", ylabel="score", xscale="log")
            axes[0, 0].legend()
        plt.close(figure)  # whoever called this shows it; otherwise a notebook would show it twice
        return figure

    def check_fits(self, depth: int, mlp_width: int) -> None:
        """Raise ValueError unless the list belongs to a tower of `depth` blocks with `mlp_width` neurons each."""
        name = plain(self.model.get("name", "the register neurons"))
        if (expected := self.model.get("depth", depth)) != depth:
            raise ValueError(f"{name}: made for {expected} blocks, but this model has {depth}")
        if (expected := self.model.get("mlp_width", mlp_width)) != mlp_width:
            raise ValueError(f"{name}: made for MLPs of {expected} neurons, but this model's have {mlp_width}")
        for block, unit, _ in self.ranking:
            if block >= depth:
                raise ValueError(
                    f"block {shown(block)} (unit {shown(unit)}) is out of range: the model has {depth} blocks"
                )
            if unit >= mlp_width:
                raise ValueError(
                    f"unit {shown(unit)} of block {block} is out of range: the model's MLPs have {mlp_width} neurons"
                )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as its JSON holds it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": dict(self.model),
            "calibration": dict(self.calibration),
            "provenance": dict(self.provenance),
            "verified": self.verified,
            "top_k": self.top_k,
            "num_registers": self.num_registers,
            "neurons": [list(neuron) for neuron in self.ranking],
        }

    to_json = to_dict  # the counterpart of `from_json`

    @classmethod
    def from_json(cls, data: object, *, source: str = "the neuron JSON") -> RegisterNeurons:
        """From the parsed JSON; `source` names it in errors.

        Raises:
            ValueError: not this format, or a field that does not fit.
        """
        data = check_format(data, FORMAT, VERSION, _KEYS, source=source, expected="a register neuron JSON")
        rows = data.get("neurons")
        if not isinstance(rows, list) or any(not isinstance(row, list) or len(row) != 3 for row in rows):
            raise ValueError(f'{source}: "neurons" must be a list of [block, unit, score or null]')
        for key in ("model", "calibration", "provenance"):
            if not isinstance(data.get(key, {}), dict):
                raise ValueError(f'{source}: "{key}" must be an object')
        if not isinstance(data.get("verified", False), bool):
            raise ValueError(f'{source}: "verified" must be true or false')
        try:
            return cls(
                ranking=tuple((block, unit, score) for block, unit, score in rows),
                top_k=data.get("top_k"),
                num_registers=data.get("num_registers", 1),
                model=data.get("model", {}),
                calibration=_with_new_names(data.get("calibration", {})),
                provenance=data.get("provenance", {}),
                verified=data.get("verified", False),
            )
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; an existing file is replaced whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(self._text(), encoding="utf-8")

    def _text(self) -> str:
        """The text of the JSON, one neuron a line: long lists stay readable and diffable."""
        head, _, _ = json.dumps(self.to_dict(), indent=1, allow_nan=False).partition('\n "neurons": [')
        rows = ",\n".join("  " + json.dumps(list(neuron)) for neuron in self.ranking)
        return f'{head}\n "neurons": [\n{rows}\n ]\n}}\n'

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RegisterNeurons:
        """Read a neuron JSON, a bundled list by its name (`testreg.bundled`), or a list of the Hub: "hf:ORG/NAME".

        What has no folder and no suffix .json, and is no file, is the name of a bundled list.

        Raises:
            OSError: no such file, or not a regular one; no such repository, or it cannot be reached.
            ValueError: not JSON (a truncated file), or not a valid list; no bundled list of that name.
        """
        if (name := os.fspath(path)).startswith(SCHEME):
            return cls.from_pretrained(name.removeprefix(SCHEME))
        file = Path(path)
        if file.suffix != ".json" and file.parent == Path() and not file.exists():
            return _load_bundled(os.fspath(path))
        return cls._read(path)

    @classmethod
    def from_pretrained(cls, name: str, *, revision: str | None = None) -> RegisterNeurons:
        """The list in neurons.json of a repository on the Hugging Face Hub, checked as a file is.

        Args:
            name: ORGANISATION/NAME. Private repositories need a login: `hf auth login`, or HF_TOKEN.
            revision: a branch, a tag or a commit.

        Raises:
            OSError: no such repository or file, or it cannot be reached and is not in the cache.
            ValueError: `name` cannot be one, or not a valid list.
        """
        return cls._read(fetch_file(name, FILE, revision), source=f"{SCHEME}{name}")

    def push_to_hub(self, name: str, *, private: bool | None = None, commit_message: str | None = None) -> str:
        """Put the list into a repository on the Hugging Face Hub, as neurons.json, with a model card.

        The card says which neurons these are, how to use them and what was measured. One that you wrote stays.

        Args:
            name: ORGANISATION/NAME; it is made if there is none.
            private: of a repository that is made; None for what your organisation has set.

        Returns:
            The address of the commit.

        Raises:
            OSError: nobody is logged in, or the Hub refuses, or it cannot be reached.
            ValueError: `name` cannot be that of a repository.
        """
        card = model_card(name, self.to_dict(), self.by_block(), is_checkpoint=False)
        message = commit_message or f"Register neurons of {plain(self.model.get('name', 'a model'))}"
        return push(name, {FILE: self._text().encode()}, card, message=message, private=private)

    @classmethod
    def _read(cls, path: str | os.PathLike[str], source: str | None = None) -> RegisterNeurons:
        source = source or plain(os.fspath(path), longest=None)
        try:
            data = json.loads(
                read_text(path), parse_constant=_reject_constant, parse_int=_parse_int, parse_float=_parse_float
            )
        except FileNotFoundError:
            hub = f" (of a repository on the Hub: {SCHEME}{source})" if is_repository(source) else ""
            raise FileNotFoundError(f"no neuron JSON at {source}{hub}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{source} is not valid JSON (truncated?): {error}") from None
        except RecursionError:
            raise ValueError(f"{source}: nested too deeply for a neuron JSON") from None
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        return replace(cls.from_json(data, source=source), source=source)


def unscored(neurons: Iterable[Neuron]) -> RegisterNeurons:
    """A list of all these neurons, in any order."""
    return RegisterNeurons(tuple((block, unit, None) for block, unit, _ in neurons))


def _with_new_names(value: Any) -> Any:
    """JSON of the calibration with the entries of version 1 under the names that they have now."""
    if isinstance(value, Mapping):
        return {_RENAMED.get(key, key): _with_new_names(each) for key, each in value.items()}
    return [_with_new_names(each) for each in value] if isinstance(value, list) else value


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _is_size(value: object) -> bool:
    return _is_grid(value) and len(value) == 2


def _is_grid(value: object) -> TypeGuard[Sequence[int]]:
    if not (isinstance(value, list | tuple) and len(value) in (2, 3)):
        return False
    return all(_is_index(each) and each > 0 for each in value)


def _is_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_objects(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_object, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_Check = tuple[Callable[[object], bool], str]
_WHOLE: _Check = (_is_index, "a whole number")
_TEXT: _Check = (_is_text, "text")
_NAMES: _Check = (_is_names, "a list of text")
_SIZE: _Check = (_is_size, "two whole numbers above 0")
_GRID: _Check = (_is_grid, "two whole numbers above 0, or three of clips")
_OBJECT: _Check = (_is_object, "an object")
_OBJECTS: _Check = (_is_objects, "a list of objects")

# What testreg reads of what a list says of itself; everything else is only shown.
_MODEL = {
    "name": _TEXT,
    "names": _NAMES,
    "default_for": _NAMES,
    "depth": _WHOLE,
    "mlp_width": _WHOLE,
    "activation": _TEXT,
    "fingerprint": _TEXT,
}
_CALIBRATION = {
    "detection_block": _WHOLE,
    "verified_at": _OBJECTS,
    "curve": _OBJECTS,
    "chosen": _OBJECT,
    "stability": _OBJECT,
    "versions": _OBJECT,
}
_VERIFIED_AT = {"grid": _GRID, "image_size": _SIZE, "dtype": _TEXT}


def _check_entries(where: str, entries: Mapping[str, Any], checks: Mapping[str, _Check]) -> None:
    """Raise ValueError if an entry that testreg reads is not what it should be."""
    for key, (is_valid, expected) in checks.items():
        if key in entries and not is_valid(entries[key]):
            raise ValueError(f'"{key}" of the {where} must be {expected}, got {shown(entries[key])}')
    if where == "calibration":
        for each in entries.get("verified_at", ()):
            _check_entries('calibration\'s "verified_at"', each, _VERIFIED_AT)


def _as_index(value: Any) -> Any:
    """`value` as an int, if it is a whole number; anything else is left for the check, which names it."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a finite number")


def _parse_int(digits: str) -> int:
    if len(digits) > 18:
        raise ValueError(f"{plain(digits, 20)} is too large a number")
    return int(digits)


def _parse_float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{plain(digits, 20)} is not a finite number")
    return value


def describe_model(model: nn.Module, tower: Tower) -> dict[str, Any]:
    """The `model` entry of a list found on `model`."""
    names = checkpoint_names(model)
    computed = activation(tower)
    return {
        "name": names[0] if names else type(model).__name__,
        "names": names,
        "depth": tower.depth,
        "mlp_width": tower.mlp_width,
        **({} if computed is None else {"activation": computed}),
        "fingerprint": fingerprint(tower),
    }


def config_folder() -> Path:
    """Where the bundled lists are: in the installed package, or `configs/` of a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


class BundledLists(dict[str, RegisterNeurons]):
    """The lists that come with the package, by name; printed, they say which models they are for."""

    def __repr__(self) -> str:
        lines = []
        for name, neurons in self.items():
            checked = "verified" if neurons.verified else "not verified"
            lines.append(f"{name}  ({len(neurons)} neurons, {checked})")
            lines += [f"    {model}" for model in _models_of(neurons)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [
            (name, len(each), "yes" if each.verified else "no", ", ".join(_models_of(each)))
            for name, each in self.items()
        ]
        return html([f"{len(self)} bundled lists of register neurons"], ("name", "neurons", "verified", "models"), rows)


def _models_of(neurons: RegisterNeurons) -> list[str]:
    """The names of the list's checkpoint, and for which of them `patch` takes it unasked."""
    default_for = set(neurons.model.get("default_for", ()))
    return [f"{name}{'  (default)' if name in default_for else ''}" for name in neurons.model.get("names", ())]


def bundled() -> BundledLists:
    """The lists that come with the package, by name, with the models that they are for.

    Example:
        >>> lists = testreg.bundled()
        >>> print(lists)
        demo  (... neurons, verified)
            demo  (default)
        ...
        >>> lists["dinov2-vitl14-official-hub"].model["name"]
        'hub:facebookresearch/dinov2/dinov2_vitl14'
    """
    return BundledLists({path.stem: _load_bundled(path.stem) for path in sorted(config_folder().glob("*.json"))})


def _load_bundled(name: str) -> RegisterNeurons:
    path = config_folder() / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in config_folder().glob("*.json")))
        close = difflib.get_close_matches(name, known.split(", "), 1)
        hint = f": did you mean {close[0]}?" if close else ""
        raise ValueError(f"no bundled list {shown(name)} (and no such file){hint or f'; bundled: {known}'}")
    return replace(RegisterNeurons._read(path), source=name)


AnyNeurons = RegisterNeurons | str | os.PathLike[str] | Mapping[int, Sequence[int]] | None
"""Whatever `resolve` makes a list of."""


def resolve(neurons: AnyNeurons, model: nn.Module) -> RegisterNeurons:
    """The list that the `neurons` argument of `patch` means.

    Raises:
        FileNotFoundError, TypeError, ValueError: nothing, or nothing valid, is meant by it.
    """
    if isinstance(neurons, RegisterNeurons):
        return neurons
    if isinstance(neurons, Mapping):
        return RegisterNeurons.from_blocks(neurons)
    if neurons is None:
        return _of_checkpoint(model)
    if not isinstance(neurons, str | os.PathLike):
        raise TypeError(
            "neurons must be a RegisterNeurons, a path, a bundled name, hf:ORG/NAME, {block: [units]} or None, "
            f"got {type(neurons).__name__}"
        )
    return RegisterNeurons.load(neurons)


def _of_checkpoint(model: nn.Module) -> RegisterNeurons:
    """The default of the bundled lists, by the names of the checkpoint or else by its weights."""
    lists, names = bundled(), checkpoint_names(model)
    defaults = [each for each in lists.values() if each.model.get("default_for")]
    for name in names:
        for candidate in defaults:
            if name in candidate.model["default_for"]:
                return candidate
    tower, here = find_tower(model), type(model).__name__
    published = [key for key, each in lists.items() if not set(names).isdisjoint(each.model.get("names", ()))]
    if (wrong := mismatch_of(model, tower)) is not None:
        raise ValueError(
            f"no default register neurons for this {here}: it computes {wrong.own}, but {wrong.checkpoint} was trained "
            f"with {wrong.trained_with}. Load {wrong.right} instead"
            + (f", or name one of the lists of this checkpoint: {', '.join(published)}" if published else "")
        )
    alike = [
        (compare_weights(each.model["fingerprint"], tower), each) for each in defaults if "fingerprint" in each.model
    ]
    for likeness in ("same", "similar"):
        for found, candidate in alike:
            if found == likeness:
                return candidate
    calibrate = "(testreg.calibrate, or `testreg calibrate MODEL --images DIR -o neurons.json`)"
    if published:
        raise ValueError(
            f"no default register neurons for this {here} ({', '.join(names)}): nothing shows that this checkpoint "
            f"needs any. Look with testreg.diagnose, and calibrate it {calibrate}, or name one of the unverified lists "
            f"that were published for it: {', '.join(published)}"
        )
    says = f"it says it is {', '.join(names)}" if names else "it does not say which checkpoint it is"
    shape = {"depth": tower.depth, "mlp_width": tower.mlp_width}
    if fitting := [key for key, each in lists.items() if shape.items() <= each.model.items()]:
        raise ValueError(
            f"no bundled register neurons for this {here}: {says}. If it holds the weights of one of these lists, name "
            f"it: {', '.join(fitting)}. Otherwise calibrate it {calibrate}"
        )
    raise ValueError(
        f"no bundled register neurons for this {here}: {says}. Calibrate it {calibrate}, or name a list from "
        "`testreg list`"
    )
