"""The state of a calibration, which is saved to a file so that an interrupted run can be resumed.

The state has the sums by which neurons are ranked, and what moving sets of neurons to registers was measured to do
(their *effects*). A *view* is the model at one image size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from testreg.calibration.detect import Detected
from testreg.families import fingerprint
from testreg.files import replacing
from testreg.io.processes import all_gather, rank
from testreg.measure.ranking import SUMS, Statistics
from testreg.neurons import Neuron
from testreg.records.calibration import Effect
from testreg.records.options import Start

FORMAT = "testreg-calibration"
VERSION = 5  # goes up when the sums or effects change, so that older files are refused

# After each chunk of images the state is saved, and ranking ends if it is stable.
FIRST_CHUNK = 16  # numbers of images in a chunk, held-out ones included, among the first images, which are in memory
CHUNK = 64  # numbers of images in a chunk, among all later images


class State:
    """What a calibration has measured so far. It can be saved to a safetensors file, from which a later run resumes.

    Args:
        path: the file; None if nothing is to be saved.
        detected: the outliers of each view.
        facts: options and inputs of this run. A saved state is taken over only if it has the same facts, and the same
            weights, image sizes and outliers.
    """

    def __init__(self, path: Path | None, detected: Sequence[Detected], facts: Mapping[str, Any]) -> None:
        self.path = path
        identity = {
            **facts,
            "weights": fingerprint(detected[0].tower),
            "sizes": [each.diagnosis.image_size for each in detected],
            "detection": [[each.detection.block, each.onset, sorted(each.detection.ignored)] for each in detected],
        }
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        """Everything that must be the same in a saved state that this run takes over, as JSON gives it back."""
        self.num_done = 0
        """The sums include all images that rank neurons and have a lower number than this, of all processes."""
        self.statistics = [SUMS[each.view.options.score].zeros(each.tower) for each in detected]
        """The sums of each view."""
        self.effects: dict[str, Effect] = {}
        """The effects of moving sets of neurons, by the key of the set and of the registers (`key_of`)."""

    def save(self) -> None:
        """Write the file, if there is a path. Only the first process writes."""
        if self.path is None or rank() != 0:
            return
        tensors = {
            f"{i}.{name}": tensor
            for i, statistics in enumerate(self.statistics)
            for name, tensor in statistics.tensors().items()
        }
        effects = {key: effect.to_json() for key, effect in self.effects.items()}
        saved = {"format": FORMAT, "version": VERSION, "done": self.num_done, "run": self.identity, "effects": effects}
        with replacing(self.path) as temporary:
            save_file(tensors, temporary, metadata={"testreg": json.dumps(saved)})

    def load(self) -> None:
        """Take over the state in the file, if the file exists.

        The first process reads it for all processes: on other machines the file may be missing, or another one.

        Raises:
            ValueError: the file is damaged, or was saved by another version of testreg, or by a run with another
                `identity`.
        """
        saved: tuple[int, list[Statistics], dict[str, Effect]] | ValueError | None = None
        if self.path is not None and rank() == 0 and self.path.exists():
            try:
                saved = self._read(self.path)
            except ValueError as error:
                saved = error
        saved = all_gather(saved)[0]
        if isinstance(saved, ValueError):
            raise saved
        if saved is not None:
            self.num_done, self.statistics, self.effects = saved

    def _read(self, path: Path) -> tuple[int, list[Statistics], dict[str, Effect]]:
        """Read and check a file; returns its `num_done`, `statistics` and `effects`."""
        try:
            with safe_open(path, "pt") as file:
                saved = json.loads((file.metadata() or {}).get("testreg", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{self.path} is not a saved state: {reason[:200]}. Delete it to start anew") from error
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise ValueError(f"{self.path} is not the saved state of a calibration: name another file")
        if saved.get("version") != VERSION:
            raise ValueError(f"{self.path} was saved by another version of testreg. Delete it to start anew")
        if not isinstance(theirs := saved.get("run"), dict):
            raise self._damaged("it does not say of which run it is")
        for key in self.identity | theirs:
            if self.identity.get(key) != theirs.get(key):
                name = key if key in self.identity else _short(key)
                raise ValueError(
                    f"{self.path} is of another run: {name} was {_short(theirs.get(key))}, and is "
                    f"{_short(self.identity.get(key))}. Name another file, or delete it to start anew"
                )
        num_done = saved.get("done")
        if type(num_done) is not int or not 0 < num_done <= sys.maxsize or num_done % FIRST_CHUNK:
            raise self._damaged(f"it cannot have ended at image {_short(num_done)}")
        try:
            effects = {key: Effect.from_json(effect, "an effect") for key, effect in saved["effects"].items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._damaged("its effects are not valid") from None
        return num_done, [self._statistics(tensors, i, num_done) for i in range(len(self.statistics))], effects

    def _statistics(self, tensors: dict[str, Tensor], index: int, num_done: int) -> Statistics:
        """The sums of the view with this index, from the tensors of a file, which are checked."""
        expected = self.statistics[index].tensors()
        sums = {name: tensors.get(f"{index}.{name}") for name in expected}
        for name, like in expected.items():
            value = sums[name]
            if value is None or value.shape != like.shape or value.dtype != like.dtype:
                raise self._damaged(f"{name} is missing, or does not fit the model")
            if not value.isfinite().all():
                raise self._damaged(f"{name} is not finite")
        statistics = type(self.statistics[index])(**sums)  # type: ignore[arg-type]
        num_images = float(statistics.num_images.sum())
        if not 0 < num_images <= num_done:
            raise self._damaged(f"it cannot be of {num_images:g} images, if it ended at {num_done}")
        return statistics

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {what}. Delete it to start anew")


def key_of(neurons: Sequence[Neuron], num_registers: int, start: Start) -> str:
    """The key of a set of neurons and of registers: text that does not depend on the order of the neurons."""
    names = (f"{block}.{unit}" for block, unit in sorted(each[:2] for each in neurons))
    return f"{num_registers} {start}: {' '.join(names)}"


def _short(value: object) -> str:
    """The repr of a value that a file holds, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
