"""Saves and loads patched checkpoints: the files that the model's library writes, and `testreg.json`.

Without testreg, the folder is an ordinary checkpoint of the library, since a patch changes no weights and no keys.
Weights are only read from safetensors, nothing is unpickled, and `testreg.json` can name no code but the libraries'.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from testreg.families import checkpoint_names, find_tower
from testreg.files import check_format, shown
from testreg.hub.repository import SCHEME, check_can_push, fetch_checkpoint, is_repository, push
from testreg.io import formats
from testreg.io.install import PENDING, RECORD, installing, is_interrupted, recover
from testreg.io.preprocessing import own_processor
from testreg.io.trust import check_folder, is_file_name, one_line, read_json
from testreg.neurons import MAX_REGISTERS, RegisterNeurons
from testreg.patching.state import patch_of
from testreg.records.options import MaxOver, Start, Zero
from testreg.register import is_patched, patch
from testreg.static import Form, StaticRegisters

FORMAT = "testreg-checkpoint"
VERSION = 1
STATIC = "testreg.static.safetensors"
"""The file of the static registers, i.e. registers that are constants; only in checkpoints that have them."""


@dataclass(frozen=True)
class Record:
    """The contents of `testreg.json`."""

    library: str | None
    """The library that rebuilds the model; None if only weights were saved, which `load` needs a model for."""
    class_name: str
    """The name of the model's class."""
    source: str | None
    """The name under which the model was once loaded, e.g. "open_clip:ViT-B-16/openai"."""
    files: list[str]
    """The files that `save` wrote beside testreg.json."""
    model_args: dict[str, Any]
    """The arguments that a torchvision model is rebuilt from, since torchvision writes no config; {} for others."""
    options: dict[str, Any]
    """The arguments of `testreg.patch`. "static", if it is there, is the form of the static registers."""
    neurons: RegisterNeurons

    @property
    def weights(self) -> list[str]:
        """The names of the files of weights."""
        return [name for name in self.files if name.endswith(".safetensors") and name != STATIC]

    @property
    def is_static(self) -> bool:
        """Whether the registers are static."""
        return "static" in self.options

    def to_json(self) -> dict[str, Any]:
        """The record as JSON has it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"format": FORMAT, "version": VERSION, **values, "neurons": self.neurons.to_json()}

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read and check the testreg.json in `folder`.

        Raises:
            OSError, ValueError: it does not exist or is not valid, or a save into the folder was interrupted.
        """
        path = folder / RECORD
        if is_interrupted(folder):
            raise OSError(
                f"a save into {folder} was interrupted, or has not ended: testreg.io.install.recover(folder) brings "
                "back what was there before, and so does the next save into it"
            )
        if not os.path.lexists(path):
            raise FileNotFoundError(
                f"{folder} is not a patched checkpoint (it has no {RECORD}): load it with its own library, or make a "
                "patched one of it with `testreg apply`"
            )
        keys = {"format", "version", "neurons", *_VALID}
        data = check_format(
            read_json(path), FORMAT, VERSION, keys, source=str(path), expected="a record, or not written by testreg"
        )
        for key, valid in _VALID.items():
            if key not in data or not valid(data[key]):
                raise ValueError(f'{path}: "{key}" is not valid: {shown(data.get(key))}')
        neurons = RegisterNeurons.from_json(data.get("neurons"), source=f'"neurons" of {path}')
        return cls(**{key: data[key] for key in _VALID}, neurons=neurons)


def _is_file_name(name: object) -> bool:
    """Whether a value is a bare file name, without folders."""
    return _is_name(name) and is_file_name(str(name))


def _is_name(name: object) -> bool:
    """Whether a value is a text of printable characters, not too long."""
    return isinstance(name, str) and len(name) <= 1000 and name.isprintable()


def _are_options(value: object) -> bool:
    """Whether a value has the options of `testreg.patch`, all of them valid."""
    keys = {"num_registers", "split_neurons", "max_over", "zero"}
    if not isinstance(value, dict) or value.keys() - {"static", "start"} != keys:
        return False
    registers, form = value["num_registers"], value.get("static", "token")
    rules = (
        isinstance(value["split_neurons"], bool),
        value["max_over"] in get_args(MaxOver),
        value["zero"] in get_args(Zero),
        value.get("start", "zeros") in get_args(Start),
        form in get_args(Form),
    )
    return type(registers) is int and 1 <= registers <= MAX_REGISTERS and all(rules)


_VALID: dict[str, Callable[[Any], bool]] = {
    "library": lambda value: value is None or value in formats.LIBRARIES,
    "class_name": _is_name,
    "source": lambda value: value is None or _is_name(value),
    "files": lambda value: isinstance(value, list) and all(map(_is_file_name, value)),
    "model_args": lambda value: isinstance(value, dict),
    "options": _are_options,
}
"""{key of testreg.json: whether a value is valid}."""


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    arch: str | Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    processor: Any = None,
    push_to_hub: str | None = None,
) -> None:
    """Write a patched model into a folder: the files of its library (config, safetensors) and `testreg.json`.

    `testreg.load` returns the same model, bit for bit. Only the memory format is lost, which safetensors cannot store:
    if the model was in channels_last, call `.to(memory_format=torch.channels_last)` after loading.

    If anything fails, `folder` stays as it was. If the process is killed, `load` finds the earlier checkpoint or the
    new one, complete, or says that the save was interrupted; the next `save` cleans up. An earlier checkpoint of
    testreg in `folder` is replaced; files that testreg did not write are kept.

    Args:
        model: the whole model that was patched: a classifier, a CLIP, a vision tower. `load` can rebuild models of
            timm, transformers, open_clip (a whole CLIP) and torchvision (from `testreg.load_model`). Of any other
            model, only the weights are written, and `load` needs `model=`.
        folder: a new or empty folder, or one with an earlier checkpoint of testreg.
        arch: for open_clip, the name of the model's config, or the config as a dict. It is needed if the model was not
            loaded by `load_model`, and not exactly one of open_clip's configs fits.
        model_args: for timm, arguments of `timm.create_model` that timm did not record (before 1.0.31 it recorded
            none).
        processor: for transformers, the image processor to save with the model, so that `load_model` can prepare
            images. None: the processor of the checkpoint from which the model was loaded, if it can be found.
        push_to_hub: ORGANISATION/NAME of a repository on the Hugging Face Hub, to which the files are uploaded with a
            model card; `load` then takes this name. The repository is created if it does not exist. You must be logged
            in (`hf auth login`).

    Raises:
        ValueError: the model is not patched, is patched with a target, or could not be rebuilt by its library.
        FileExistsError: `folder` holds something else than a checkpoint of testreg.
        OSError: the checkpoint could not be written, or another process is saving into `folder`; or it was written, but
            could not be pushed.

    Example:
        >>> model = testreg.patch(testreg.demo_model(), {3: [47, 55]})
        >>> testreg.save(model, "patched")
        >>> import os
        >>> sorted(os.listdir("patched"))
        ['config.json', 'model.safetensors', 'testreg.json']
    """
    if not is_patched(model):
        raise ValueError(f"this {type(model).__name__} is not patched: call testreg.patch(model, ...) before saving it")
    state = patch_of(model)
    if state.target is not None:
        raise ValueError(
            "this model is patched with a target, which belongs to images: patch it without, and say where its "
            "outliers go with testreg.steered(model, target)"
        )
    if push_to_hub is not None:
        check_can_push(push_to_hub)
    target = Path(folder).resolve()
    recover(target)
    replaced = _replaceable_files(target)
    library = formats.library_of(model)
    try:
        with installing(target, replaced) as stage:
            args = formats.write(model, library, stage, arch=arch, model_args=model_args)
            if processor is None and library == "transformers":
                processor = own_processor(model)
            if processor is not None:
                processor.save_pretrained(stage)
            if state.static is not None:
                state.static.save(stage / STATIC)
            files = sorted(os.listdir(stage))
            record = Record(library, type(model).__name__, _source(model), files, args, state.options, state.neurons)
            (stage / RECORD).write_text(
                json.dumps(record.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
            )
    except (OSError, SafetensorError) as error:
        state_of_folder = "where the save was interrupted" if is_interrupted(target) else "which is left as it was"
        raise OSError(f"could not write the checkpoint to {folder}, {state_of_folder}: {error}") from error
    if push_to_hub is not None:
        card = state.neurons.model_card(push_to_hub, is_checkpoint=True)
        written = {name: target / name for name in (*files, RECORD)}
        push(push_to_hub, written, card, message="Checkpoint with test-time registers", private=None)


def check_replaceable(folder: str | os.PathLike[str]) -> None:
    """Check early that `save` may write into `folder`.

    Raises:
        FileExistsError: `folder` holds something else than a checkpoint of testreg.
    """
    target = Path(folder).resolve()
    if not is_interrupted(target):  # after an interrupted save, the next one cleans up
        _replaceable_files(target)


def _replaceable_files(target: Path) -> list[str]:
    """The files of the checkpoint in `target`; [] if the folder does not exist or is empty."""
    if not target.exists() or (target.is_dir() and not any(path.name != PENDING for path in target.iterdir())):
        return []
    try:
        return Record.load(target).files
    except (OSError, ValueError) as error:
        raise FileExistsError(
            f"{target} exists and is no checkpoint of testreg, so it is not replaced: choose a new or an empty folder"
        ) from error


def _source(model: nn.Module) -> str | None:
    """The name under which the model was loaded; None if it has none of the form LIBRARY:NAME, or if NAME is a path,
    useless on other machines."""
    names = (name for name in checkpoint_names(model) if ":" in name)
    return next((name for name in names if not Path(name.partition(":")[2]).exists()), None)


def load(
    name: str | os.PathLike[str], model: nn.Module | None = None, *, device: torch.device | str | None = None
) -> nn.Module:
    """Load a patched checkpoint that `testreg.save` wrote. The model is patched, in eval mode, with the same weights.

    Its outputs are the same bit for bit, if its memory format is the same: see `save`.

    Args:
        name: a folder, or ORGANISATION/NAME of a repository on the Hugging Face Hub, from which only json, txt and
            safetensors files are downloaded.
        model: an unpatched model to load the weights into. It is needed if no library can rebuild it (torch.hub, a
            class of your own).
        device: where to put the model; None for the CPU, or where `model` is.

    Returns:
        The patched model; `model` itself if it was given.

    Raises:
        OSError: the folder or repository does not exist, has no testreg.json, or lacks a file.
        ValueError: a file is damaged, or weights or neurons do not fit. A given `model` is then unchanged.
        RuntimeError: the given model is patched already.

    Example:
        >>> testreg.save(testreg.patch(testreg.demo_model(), {3: [47, 55]}), "patched")
        >>> testreg.is_patched(testreg.load("patched"))
        True
    """
    folder = _local_folder(name)
    record = Record.load(folder)
    _check_files(folder, record)
    static = StaticRegisters.load(folder / STATIC) if record.is_static else None
    if model is None:
        model = _rebuild(folder, record)
        _check_neurons(folder, record, model)
    else:
        if is_patched(model):
            raise RuntimeError("the model is already patched: call testreg.unpatch(model) before loading into it")
        _check_neurons(folder, record, model)
        # A checkpoint of transformers has other keys than the model; only transformers' loader translates them.
        keys_are_renamed = record.library == "transformers"
        formats.fill(
            model,
            _rebuild(folder, record).state_dict() if keys_are_renamed else formats.tensors(folder, record.weights),
            folder,
        )
    model.testreg_source = record.source or str(folder)  # type: ignore[assignment]
    if device is not None:
        model.to(device)
    return patch(model.eval(), record.neurons, **{**record.options, "static": static})


def _local_folder(name: str | os.PathLike[str]) -> Path:
    """The folder `name`, or the folder into which the repository `name` is downloaded."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    repository = str(name).removeprefix(SCHEME)
    if folder.exists() or not is_repository(repository):
        raise FileNotFoundError(f"there is no checkpoint folder {name} (nor is that a Hub id, ORGANISATION/NAME)")
    return fetch_checkpoint(repository)


def _check_files(folder: Path, record: Record) -> None:
    """Raise an error if a file of the checkpoint is missing, damaged, or not safe to load."""
    check_folder(folder)
    if not record.weights:
        raise ValueError(
            f"{folder / RECORD} lists no safetensors file, and testreg reads no pickles (.bin, .pt, .pth): "
            "save the checkpoint again with testreg.save"
        )
    if missing := [name for name in record.files if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} is incomplete: {', '.join(missing[:3])} is missing. Copy or save it again")
    for name in record.weights:
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{folder / name} is damaged or truncated ({one_line(error)}): copy or save it again"
            ) from None


def _check_neurons(folder: Path, record: Record, model: nn.Module) -> None:
    """Raise ValueError if the model does not have the register neurons' blocks and units."""
    tower = find_tower(model)
    try:
        record.neurons.check_fits(tower.depth, tower.mlp_width)
    except ValueError as error:
        raise ValueError(f"the register neurons in {folder / RECORD} do not fit the model: {error}") from None


def _rebuild(folder: Path, record: Record) -> nn.Module:
    """The unpatched model with its weights, rebuilt by its library."""
    if record.library is None:
        source = f" (it was {record.source})" if record.source else ""
        raise ValueError(
            f"{folder} holds the bare weights of a {record.class_name}{source}, which no library here can rebuild: "
            "build it and call testreg.load(folder, model=...)"
        )
    try:
        return formats.read(
            record.library, folder, class_name=record.class_name, weights=record.weights, args=record.model_args
        )
    except Exception as error:
        raise ValueError(
            f"{folder} could not be rebuilt by {record.library} ({one_line(error)}): it is damaged, or another "
            "release wrote it"
        ) from error
