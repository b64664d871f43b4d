"""The ranked list of register neurons of a checkpoint.

*Outliers* are patch tokens with huge norms; *register neurons* are the MLP neurons that make them. `testreg.patch`
moves the activations of these neurons from the patches to extra tokens, the *registers*.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from testreg.files import plain, replacing, shown
from testreg.neurons.configs import bundled_file
from testreg.neurons.format import FORMAT, VERSION, check_model, checked, read_json, text_of
from testreg.records.calibration import Calibration
from testreg.records.options import MAX_REGISTERS, Start
from testreg.records.record import is_finite, is_index

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "neurons.json"
"""The name of the neuron JSON in a repository of the Hugging Face Hub."""

MAX_NAMED = 8  # a summary names at most this many blocks and image sizes

Neuron = tuple[int, int, float | None]
"""The block and the unit of a neuron, and its score, or None if it is not known."""


class UnverifiedNeuronsWarning(UserWarning):
    """Register neurons are used that were not verified on the checkpoint: nobody knows whether they work."""


@dataclass(frozen=True, repr=False)
class RegisterNeurons:
    """The register neurons of one checkpoint, best first, each as (block, unit, score).

    Blocks and units count from 0; a unit is an input channel of the second linear (fc2) of the block's MLP. Scores may
    be None, since some lists are published without scores: such a list cannot be truncated to its best neurons. The
    length of a list is the number of neurons in use.

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
        ValueError: the list is empty, or not sorted by score (unless it was found in rounds); a neuron comes twice; an
            index is negative; a score is not a finite number; another field is not valid.
    """

    ranking: tuple[Neuron, ...]
    """All neurons of the list, best first."""
    top_k: int | None = None
    """How many neurons of the ranking are used, the best ones; None for all."""
    num_registers: int = 1
    """How many registers are used. Each register holds the activations of all neurons in use."""
    start: Start = "zeros"
    """How registers start: as zeros in block 0, or as the mean of their image's patches in the first block that has
    register neurons."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """The checkpoint. All entries are optional: name, names (aliases), depth, mlp_width, activation, fingerprint,
    default_for (the names of the checkpoints for which `patch` takes the list by default)."""
    calibration: Calibration = field(default_factory=Calibration)
    """How the list was found, and what was measured."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where the list comes from, if testreg did not make it."""
    verified: bool = False
    """Whether testreg has measured on the checkpoint itself that the neurons in use remove the outliers."""
    source: str | None = field(default=None, compare=False)
    """The file, the bundled list or the repository of the Hub from which the list was read."""

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
            if not (is_index(block) and is_index(unit)):
                raise ValueError(f"a register neuron is a 0-based (block, unit), got ({shown(block)}, {shown(unit)})")
            if (block, unit) in seen:
                raise ValueError(f"duplicate register neuron: block {shown(block)}, unit {shown(unit)}")
            seen.add((block, unit))
            if score is not None:
                if not is_finite(score):
                    raise ValueError(
                        f"the score of block {shown(block)}, unit {shown(unit)} is {shown(score)}, not a finite number"
                    )
                # A calibration in rounds ranks the neurons again in each round: its scores need not be sorted.
                if score > last and not self.calibration.rounds:
                    raise ValueError(
                        f"the ranking is not sorted: block {shown(block)}, unit {shown(unit)} scores {score:g}, "
                        f"the one before it {last:g}"
                    )
                last = score
        if self.top_k is not None and (not is_index(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k must be a whole number of at least 1, got {shown(self.top_k)}")
        if self.top_k is not None and self.top_k > len(self.ranking):
            raise ValueError(f"top_k={shown(self.top_k)}, but the list holds {len(self.ranking)} neurons")
        if not is_index(self.num_registers) or not 1 <= self.num_registers <= MAX_REGISTERS:
            raise ValueError(f"num_registers must be 1 to {MAX_REGISTERS}, got {shown(self.num_registers)}")
        if self.start not in get_args(Start):
            raise ValueError(f"start must be 'zeros' or 'mean', got {shown(self.start)}")
        check_model(self.model)
        if not isinstance(self.calibration, Calibration):
            raise TypeError(
                f"calibration must be a testreg.neurons.Calibration, got {type(self.calibration).__name__}: "
                "Calibration.from_json makes one of a dictionary"
            )

    @property
    def has_to_be_trusted(self) -> bool:
        """Whether `patch` warns about this list: it was read or calibrated, and is not verified.

        It may have been read from a file or from the Hub, or be a bundled list. There is no warning about neurons that
        a user names one by one.
        """
        return not self.verified and (self.source is not None or self.calibration.is_known)

    @classmethod
    def from_blocks(cls, blocks: Mapping[int, Sequence[int]]) -> RegisterNeurons:
        """Make a list without scores from {block: [units]}; numpy and torch integers are accepted."""
        return cls(tuple((_as_index(block), _as_index(unit), None) for block in blocks for unit in blocks[block]))

    def truncate(self, top_k: int | None = None) -> RegisterNeurons:
        """Make a list of the best `top_k` neurons of this list; None takes the neurons in use.

        Raises:
            ValueError: `top_k` is below 1, or larger than the number of listed neurons, in use or not; or the list has
                no scores, and `top_k` is smaller than that number.
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
        """The best `top_k` neurons by block, {block: [units, best first]}, in the order of the blocks; None takes the
        neurons in use."""
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
        from testreg.display import html

        first, *others = self._summary()
        rows = [(block, len(units), ", ".join(map(str, units))) for block, units in self.by_block().items()]
        return html([f"Register neurons: {first}", *others], ("block", "neurons", "units, best first"), rows)

    def _summary(self) -> list[str]:
        """Three lines: how many neurons there are in which blocks, for which model, and whether they are verified."""
        blocks = list(self.by_block())
        where = f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks[:MAX_NAMED]))}"
        more = f" and {len(blocks) - MAX_NAMED} more" if len(blocks) > MAX_NAMED else ""
        lines = [f"{len(self)} in {where}{more}, of {len(self.ranking):,} listed"]
        size = ""
        if {"depth", "mlp_width"} <= self.model.keys():
            size = f" ({self.model['depth']} blocks of {self.model['mlp_width']:,} neurons)"
        lines.append(f"for {plain(self.model.get('name', 'a model that is not named'))}{size}")
        sizes = [each.image_size for each in self.calibration.verified_at]
        at = f" at {', '.join(f'{height} x {width}' for height, width in sizes[:MAX_NAMED])}" if sizes else ""
        source = "" if self.source is None else f"; read from {plain(self.source)}"
        lines.append((f"verified{at}" if self.verified else "not verified") + source)
        return lines

    def plot(self) -> Figure:
        """Draw the scores by rank, and the number of neurons in each block, as a matplotlib figure.

        If no neuron has a score, only the numbers are drawn.
        """
        from matplotlib import pyplot as plt
        from matplotlib.ticker import MaxNLocator

        scores = [score for _, _, score in self.ranking if score is not None]
        figure, axes = plt.subplots(
            1, 2 if scores else 1, figsize=(9 if scores else 4.5, 3.2), layout="constrained", squeeze=False
        )
        counts = {block: len(units) for block, units in self.by_block().items()}
        axes[0, -1].bar(counts.keys(), counts.values())
        axes[0, -1].set(
            xlabel="block", ylabel="register neurons", xlim=(-0.5, self.model.get("depth", max(counts) + 1) - 0.5)
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
        """Raise ValueError unless the list fits a tower of `depth` blocks with `mlp_width` MLP neurons each.

        All blocks and units of the list must be in range. If `model` has a depth or an MLP width, it must be the same.
        """
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

    def to_json(self) -> dict[str, Any]:
        """The whole list as a JSON object, but without `source`."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": dict(self.model),
            "calibration": self.calibration.to_json(),
            "provenance": dict(self.provenance),
            "verified": self.verified,
            "top_k": self.top_k,
            "num_registers": self.num_registers,
            "start": self.start,
            "neurons": [list(neuron) for neuron in self.ranking],
        }

    @classmethod
    def from_json(cls, data: object, *, source: str = "the neuron JSON") -> RegisterNeurons:
        """Make a list from a parsed neuron JSON, which is called `source` in errors.

        Raises:
            ValueError: the JSON has another format, or an entry is not valid.
        """
        data = checked(data, source)
        try:
            return cls(
                ranking=tuple((block, unit, score) for block, unit, score in data["neurons"]),
                top_k=data.get("top_k"),
                num_registers=data.get("num_registers", 1),
                start=data.get("start", "zeros"),
                model=data.get("model", {}),
                calibration=Calibration.from_json(data.get("calibration", {}), "the calibration"),
                provenance=data.get("provenance", {}),
                verified=data.get("verified", False),
            )
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the neuron JSON. An existing file is replaced only once the new one is complete."""
        with replacing(path) as temporary:
            temporary.write_text(self._text(), encoding="utf-8")

    def _text(self) -> str:
        return text_of(self.to_json(), self.ranking)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RegisterNeurons:
        """Read a list from a neuron JSON, from the Hugging Face Hub ("hf:ORG/NAME"), or by its name if it is bundled.

        `path` is the name of a bundled list (`testreg.bundled`) if there is no such file, and it has neither a folder
        nor the suffix .json.

        Raises:
            OSError: there is no such file, or it is not a regular file; there is no such repository, or it cannot be
                reached.
            ValueError: the file is not JSON or not a valid list; there is no bundled list with this name.
        """
        from testreg.hub.repository import SCHEME, is_repository

        name, file = os.fspath(path), Path(path)
        if name.startswith(SCHEME):
            return cls.from_pretrained(name.removeprefix(SCHEME))
        if file.suffix != ".json" and file.parent == Path() and not file.exists():
            return cls.from_file(bundled_file(name), source=name)
        source = plain(name, longest=None)
        try:
            return cls.from_file(path, source)
        except FileNotFoundError:
            hub = f" (of a repository on the Hub: {SCHEME}{source})" if is_repository(source) else ""
            raise FileNotFoundError(f"no neuron JSON at {source}{hub}") from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], source: str) -> RegisterNeurons:
        """Read the list in a file. `source` is what the file is called in errors, and becomes the list's `source`.

        Raises the errors of `load`.
        """
        return replace(cls.from_json(read_json(path, source), source=source), source=source)

    @classmethod
    def from_pretrained(cls, name: str, *, revision: str | None = None) -> RegisterNeurons:
        """Read the list in the file neurons.json of a repository of the Hugging Face Hub, with the checks of `load`.

        Args:
            name: ORGANISATION/NAME. Private repositories need a login: `hf auth login`, or HF_TOKEN.
            revision: a branch, a tag or a commit; None takes the main branch.

        Raises:
            OSError: there is no such repository or file; or it cannot be reached, and is not in the cache.
            ValueError: `name` is not ORGANISATION/NAME, or the list is not valid.
        """
        from testreg.hub.repository import SCHEME, fetch_file

        return cls.from_file(fetch_file(name, FILE, revision), f"{SCHEME}{name}")

    def push_to_hub(self, name: str, *, private: bool | None = None, commit_message: str | None = None) -> str:
        """Upload the list to a repository of the Hugging Face Hub, as neurons.json, with a model card.

        The card says which neurons these are, how to use them and what was measured. A card that you wrote yourself is
        not replaced.

        Args:
            name: ORGANISATION/NAME; the repository is created if it does not exist.
            private: whether a repository that is created is private; None takes the setting of your organisation.
            commit_message: the message of the commit; None names the model.

        Returns:
            The address of the commit.

        Raises:
            OSError: nobody is logged in, the Hub refuses the upload, or it cannot be reached.
            ValueError: `name` is not ORGANISATION/NAME.
        """
        from testreg.hub.repository import push

        message = commit_message or f"Register neurons of {plain(self.model.get('name', 'a model'))}"
        return push(name, {FILE: self._text().encode()}, self.model_card(name), message=message, private=private)

    def model_card(self, repository: str, *, is_checkpoint: bool = False) -> str:
        """The model card of a repository with this list, in Markdown.

        Args:
            is_checkpoint: whether the repository has a patched checkpoint too, and not only the list.
        """
        from testreg.hub.card import model_card

        return model_card(
            repository,
            blocks=self.by_block(),
            verified=self.verified,
            model=self.model,
            calibration=self.calibration,
            provenance=self.provenance,
            is_checkpoint=is_checkpoint,
        )


def unscored(neurons: Iterable[Neuron]) -> RegisterNeurons:
    """Make a list of some neurons without their scores, so that they may be in any order."""
    return RegisterNeurons(tuple((block, unit, None) for block, unit, _ in neurons))


def _as_index(value: Any) -> Any:
    """Turn an integer of any type (also of numpy and torch) into an int. Anything else, such as 3.0, is returned as it
    is; `RegisterNeurons` refuses it."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value
