"""Save and load patched checkpoints: what the model's own library writes, plus `testreg.json`.

Without testreg the folder is an ordinary checkpoint of its library: the patch changes no weight and no key. Weights are
read from safetensors only; nothing is ever unpickled, and `testreg.json` names no code outside the libraries.
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
from testreg.records.record import Start
from testreg.register import is_patched, patch
from testreg.static import Form, StaticRegisters

FORMAT = "testreg-checkpoint"
VERSION = 1
STATIC = "testreg.static.safetensors"
"""The static registers, if the model has these."""


@dataclass(frozen=True)
class Record:
    """What `testreg.json` says."""

    library: str | None
    """The library that rebuilds the model; None for bare weights, which are loaded into a given model."""
    class_name: str
    source: str | None
    """The name under which the model was once loaded, e.g. "open_clip:ViT-B-16/openai"."""
    files: list[str]
    """The files that `save` wrote beside testreg.json."""
    model_args: dict[str, Any]
    """What torchvision, which writes no config, is rebuilt from."""
    options: dict[str, Any]
    """Arguments of `patch`; "static" is the form of its static registers, which an older testreg refuses."""
    neurons: RegisterNeurons

    @property
    def weights(self) -> list[str]:
        return [name for name in self.files if name.endswith(".safetensors") and name != STATIC]

    @property
    def is_static(self) -> bool:
        return "static" in self.options

    def to_json(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"format": FORMAT, "version": VERSION, **values, "neurons": self.neurons.to_json()}

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read and check the testreg.json of `folder`.

        Raises:
            OSError, ValueError: there is none, or not a valid one, or a save of it was interrupted.
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
    return _is_name(name) and is_file_name(str(name))


def _is_name(name: object) -> bool:
    return isinstance(name, str) and len(name) <= 1000 and name.isprintable()


def _are_options(value: object) -> bool:
    keys = {"num_registers", "split_neurons", "max_over", "zero"}
    if not isinstance(value, dict) or value.keys() - {"static", "start"} != keys:
        return False
    registers, form = value["num_registers"], value.get("static", "token")
    rules = (
        isinstance(value["split_neurons"], bool),
        value["max_over"] in ("neuron", "layer"),
        value["zero"] in ("patches", "all"),
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


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    arch: str | Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    processor: Any = None,
    push_to_hub: str | None = None,
) -> None:
    """Write a patched model: the files of its own library (config, safetensors) and `testreg.json`.

    `load` gives the same model, bit for bit. Only the memory format is not kept, since safetensors has no word for it:
    a model in channels_last computes the same, bit for bit, after `.to(memory_format=torch.channels_last)`.

    If anything fails, `folder` is what it was. If the process is killed, `load` finds the earlier checkpoint or the new
    one, whole, or says that the save was interrupted; the next `save` cleans up. An earlier checkpoint of testreg in
    `folder` is replaced; files that testreg did not write stay.

    Args:
        model: what was patched, whole: a classifier, a CLIP, a vision tower. `load` rebuilds models of timm,
            transformers, open_clip (a whole CLIP) and torchvision (from `load_model`). Of any other model the weights
            are written, and `load` needs `model=`.
        arch: for open_clip, the name of its config, or the config itself. Needed where the model does not know it
            (`load_model` notes it) and not exactly one of open_clip's configs fits.
        model_args: for timm, arguments of `timm.create_model` that it did not record (before 1.0.31 it recorded none).
        processor: for transformers, the image processor, which prepares photographs for what `load` and `load_model`
            give. None: that of the checkpoint from which the model was loaded, if it can be found.
        push_to_hub: ORGANISATION/NAME of a repository on the Hugging Face Hub. The files are put there too, with a
            model card, so that `load` takes its name; it is made if there is none. You must be logged in
            (`hf auth login`).

    Raises:
        ValueError: the model is not patched, or with a target, or its library could not rebuild it from what it would
            write.
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
    stale = _replaceable_files(target)
    library = formats.library_of(model)
    try:
        with installing(target, stale) as stage:
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
        left = "where the save was interrupted" if is_interrupted(target) else "which is left as it was"
        raise OSError(f"could not write the checkpoint to {folder}, {left}: {error}") from error
    if push_to_hub is not None:
        card = state.neurons.model_card(push_to_hub, is_checkpoint=True)
        written = {name: target / name for name in (*files, RECORD)}
        push(push_to_hub, written, card, message="Checkpoint with test-time registers", private=None)


def check_replaceable(folder: str | os.PathLike[str]) -> None:
    """Raise at once what `save` into `folder` would raise because of what is there, and change nothing.

    Raises:
        FileExistsError: `folder` holds something else than a checkpoint of testreg.
    """
    target = Path(folder).resolve()
    if not is_interrupted(target):  # which the next save cleans up
        _replaceable_files(target)


def _replaceable_files(target: Path) -> list[str]:
    """The files of the checkpoint in `target`; none if that is new or empty."""
    if not target.exists() or (target.is_dir() and not any(path.name != PENDING for path in target.iterdir())):
        return []
    try:
        return Record.load(target).files
    except (OSError, ValueError) as error:
        raise FileExistsError(
            f"{target} exists and is no checkpoint of testreg, so it is not replaced: choose a new or an empty folder"
        ) from error


def _source(model: nn.Module) -> str | None:
    """The name under which the model was loaded, unless that is a path, which means nothing on another machine."""
    names = (name for name in checkpoint_names(model) if ":" in name)
    return next((name for name in names if not Path(name.partition(":")[2]).exists()), None)


def load(
    name: str | os.PathLike[str], model: nn.Module | None = None, *, device: torch.device | str | None = None
) -> nn.Module:
    """Load what `save` wrote: the model, patched, in eval mode, its parameters bit for bit and in their dtypes.

    Outputs are the same bit for bit where the memory format is: see `save`.

    Args:
        name: a folder, or a repository on the Hugging Face Hub, ORGANISATION/NAME (only json, txt and safetensors are
            fetched).
        model: an unpatched model to load the weights into. Needed where no library can rebuild it (torch.hub, a class
            of your own).

    Returns:
        The patched model; `model` itself if it was given.

    Raises:
        OSError: no such folder or repository, no testreg.json in it, or a file is missing.
        ValueError: a file is damaged, or weights or neurons do not fit. A given `model` has not been changed then.
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
        # transformers stores other keys than the model has; its own loader translates them.
        renamed = record.library == "transformers"
        formats.fill(
            model, _rebuild(folder, record).state_dict() if renamed else formats.tensors(folder, record.weights), folder
        )
    model.testreg_source = record.source or str(folder)  # type: ignore[assignment]
    if device is not None:
        model.to(device)
    return patch(model.eval(), record.neurons, **{**record.options, "static": static})


def _local_folder(name: str | os.PathLike[str]) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder
    repository = str(name).removeprefix(SCHEME)
    if folder.exists() or not is_repository(repository):
        raise FileNotFoundError(f"there is no checkpoint folder {name} (nor is that a Hub id, ORGANISATION/NAME)")
    return fetch_checkpoint(repository)


def _check_files(folder: Path, record: Record) -> None:
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
    tower = find_tower(model)
    try:
        record.neurons.check_fits(tower.depth, tower.mlp_width)
    except ValueError as error:
        raise ValueError(f"the register neurons in {folder / RECORD} do not fit the model: {error}") from None


def _rebuild(folder: Path, record: Record) -> nn.Module:
    """The model with its weights, unpatched, by the library that wrote the config."""
    if record.library is None:
        made_by = f" (it was {record.source})" if record.source else ""
        raise ValueError(
            f"{folder} holds the bare weights of a {record.class_name}{made_by}, which no library here can rebuild: "
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
