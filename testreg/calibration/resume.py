"""The state of a calibration that can be interrupted and resumed, and its file: the statistics of its views, and the
effects of the sets of neurons that were measured."""

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
from testreg.records.record import Start

FORMAT = "testreg-calibration"
VERSION = 5  # of the sums and effects that are saved

FIRST_CHUNK = 16  # images between two checks of whether the ranking is stable, and between two saved states
CHUNK = 64  # the same for all later images, which are not in memory yet


class State:
    """What a calibration has measured so far, which it can save to a safetensors file and resume from.

    Args:
        path: the file; None if nothing is to be saved.
        detected: the outliers of each view.
        facts: options and inputs. A saved state is of this run only if they are the same, and weights, image sizes and
            detection as well.
    """

    def __init__(self, path: Path | None, detected: Sequence[Detected], facts: Mapping[str, Any]) -> None:
        self.path = path
        run = {
            **facts,
            "weights": fingerprint(detected[0].tower),
            "sizes": [each.diagnosis.image_size for each in detected],
            "detection": [[each.detection.block, each.onset, sorted(each.detection.ignored)] for each in detected],
        }
        self.run: dict[str, Any] = json.loads(json.dumps(run))
        """All that must be the same in a saved state of this run, as it reads back from JSON."""
        self.done = 0
        """The statistics include all images with lower numbers than this."""
        self.statistics = [SUMS[each.view.options.score].zeros(each.tower) for each in detected]
        """Of each view."""
        self.effects: dict[str, Effect] = {}
        """The effects of sets of neurons, by `key_of`."""

    def save(self) -> None:
        """Write the file, in the first process alone; without a path, do nothing."""
        if self.path is None or rank() != 0:
            return
        tensors = {
            f"{i}.{name}": tensor
            for i, statistics in enumerate(self.statistics)
            for name, tensor in statistics.tensors().items()
        }
        effects = {key: effect.to_json() for key, effect in self.effects.items()}
        saved = {"format": FORMAT, "version": VERSION, "done": self.done, "run": self.run, "effects": effects}
        with replacing(self.path) as temporary:
            save_file(tensors, temporary, metadata={"testreg": json.dumps(saved)})

    def load(self) -> None:
        """Take over the state in the file, if there is one.

        The first process reads it for all of them, since other machines may not have the file, or have another one.

        Raises:
            ValueError: the file is damaged, or of another run.
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
            self.done, self.statistics, self.effects = saved

    def _read(self, path: Path) -> tuple[int, list[Statistics], dict[str, Effect]]:
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
        if not isinstance(run := saved.get("run"), dict):
            raise self._damage("it does not say of which run it is")
        for key in self.run | run:
            if self.run.get(key) != run.get(key):
                name = key if key in self.run else _short(key)
                raise ValueError(
                    f"{self.path} is of another run: {name} was {_short(run.get(key))}, and is "
                    f"{_short(self.run.get(key))}. Name another file, or delete it to start anew"
                )
        done = saved.get("done")
        if type(done) is not int or not 0 < done <= sys.maxsize or done % FIRST_CHUNK:
            raise self._damage(f"it cannot have ended at image {_short(done)}")
        try:
            effects = {key: Effect.from_json(effect, "an effect") for key, effect in saved["effects"].items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._damage("its effects are not valid") from None
        return done, [self._statistics(tensors, i, done) for i in range(len(self.statistics))], effects

    def _statistics(self, tensors: dict[str, Tensor], index: int, done: int) -> Statistics:
        """The statistics of one view, checked."""
        expected = self.statistics[index].tensors()
        sums = {name: tensors.get(f"{index}.{name}") for name in expected}
        for name, like in expected.items():
            value = sums[name]
            if value is None or value.shape != like.shape or value.dtype != like.dtype:
                raise self._damage(f"{name} is missing, or does not fit the model")
            if not value.isfinite().all():
                raise self._damage(f"{name} is not finite")
        statistics = type(self.statistics[index])(**sums)  # type: ignore[arg-type]
        if not 0 < float(statistics.num_images.sum()) <= done:
            raise self._damage(f"it cannot be of {float(statistics.num_images.sum()):g} images, if it ended at {done}")
        return statistics

    def _damage(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {what}. Delete it to start anew")


def key_of(neurons: Sequence[Neuron], num_registers: int, start: Start) -> str:
    """The key in the file of a set of neurons, moved to so many registers."""
    names = (f"{block}.{unit}" for block, unit in sorted(each[:2] for each in neurons))
    return f"{num_registers} {start}: {' '.join(names)}"


def _short(value: object) -> str:
    """A short repr of what a file holds, which may be anything, at any length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
