"""Save and load patched checkpoints: what the model's own library writes, plus `testreg.json`.

Without testreg the folder is an ordinary checkpoint of its library: the patch changes no weight and no key. Weights are
read from safetensors only; nothing is ever unpickled, and `testreg.json` names no code outside the libraries.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from testreg.families import Tower, checkpoint_names, find_tower
from testreg.neurons import RegisterNeurons
from testreg.register import is_patched, patch, patch_of

FORMAT = "testreg-checkpoint"
VERSION = 1
RECORD = "testreg.json"
LIBRARIES = ("timm", "transformers", "open_clip", "torchvision")
# open_clip's name for the dtypes in a checkpoint; in the mixtures the norms are float32.
_OPEN_CLIP_PRECISION = {
    frozenset({"F32"}): "fp32",
    frozenset({"BF16"}): "pure_bf16",
    frozenset({"F16"}): "pure_fp16",
    frozenset({"F32", "BF16"}): "bf16",
    frozenset({"F32", "F16"}): "fp16",
}


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
    """Arguments of `patch`."""
    neurons: RegisterNeurons

    @property
    def weights(self) -> list[str]:
        return [name for name in self.files if name.endswith(".safetensors")]

    def to_json(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"format": FORMAT, "version": VERSION, **values, "neurons": self.neurons.to_json()}

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read and check the testreg.json of `folder`.

        Raises:
            FileNotFoundError, ValueError: there is none, or not a valid one.
        """
        path = folder / RECORD
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{folder} is not a patched checkpoint (it has no {RECORD}): load it with its own library, or make a "
                "patched one of it with `testreg apply`"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON (truncated?): {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f'{path} was not written by testreg ("format": "{FORMAT}" is missing)')
        version: Any = data.get("version")
        if type(version) is not int or version < 1:
            raise ValueError(f"{path}: version must be a whole number, got {version!r}")
        if version > VERSION:
            unknown = ", ".join(sorted(data.keys() - {"format", "version", *_VALID, "neurons"})) or "none"
            warnings.warn(
                f"{path} has version {version}, newer than this testreg reads ({VERSION}); "
                f"keys that are ignored: {unknown}. Upgrade testreg to use them",
                stacklevel=3,
            )
        for key, valid in _VALID.items():
            if not valid(data.get(key)):
                raise ValueError(f'{path}: "{key}" is not valid: {data.get(key)!r}')
        neurons = RegisterNeurons.from_json(data.get("neurons"), source=f'"neurons" of {path}')
        return cls(**{key: data[key] for key in _VALID}, neurons=neurons)


def _is_file_name(name: object) -> bool:
    # A name alone: the record of a stranger must not lead out of its folder.
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:")


def _are_options(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {"num_registers", "max_over", "zero"}:
        return False
    registers = value["num_registers"]
    rules = (value["max_over"] in ("neuron", "layer"), value["zero"] in ("patches", "all"))
    return type(registers) is int and registers >= 1 and all(rules)


_VALID: dict[str, Callable[[Any], bool]] = {
    "library": lambda value: value is None or value in LIBRARIES,
    "class_name": lambda value: isinstance(value, str),
    "source": lambda value: value is None or isinstance(value, str),
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
) -> None:
    """Write a patched model: the files of its own library (config, safetensors) and `testreg.json`.

    Everything is written beside `folder` and then moved in. If anything fails, `folder` is what it was. An earlier
    checkpoint of testreg in it is replaced; files that testreg did not write stay.

    Args:
        model: what was patched, whole: a classifier, a CLIP, a vision tower. `load` rebuilds models of timm,
            transformers, open_clip (a whole CLIP) and torchvision (from `load_model`). Of any other model the weights
            are written, and `load` needs `model=`.
        arch: for open_clip, the name of its config, or the config itself. Needed where the model does not know it
            (`load_model` notes it) and not exactly one of open_clip's configs fits.
        model_args: for timm, arguments of `timm.create_model` that it did not record (before 1.0.31 it recorded none).
        processor: for transformers, the image processor: written too, so that `load_model` can load the folder.

    Raises:
        ValueError: the model is not patched, or its library could not rebuild it from what it would write.
        FileExistsError: `folder` holds something else than a checkpoint of testreg.
        OSError: the checkpoint could not be written.
    """
    if not is_patched(model):
        raise ValueError(f"this {type(model).__name__} is not patched: call testreg.patch(model, ...) before saving it")
    target = Path(folder).resolve()
    stale = _replaceable_files(target)
    state = patch_of(model)
    library = _library(model)
    args = _torchvision_args(model) if library == "torchvision" else {}
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        if library == "timm":
            _write_timm(model, stage, model_args)
        elif library == "transformers":
            _write_transformers(model, stage)
        elif library == "open_clip":
            _write_open_clip(model, stage, arch)
        else:
            _save_tensors(model, stage / "model.safetensors")
        if processor is not None:
            processor.save_pretrained(stage)
        files = sorted(os.listdir(stage))
        record = Record(library, type(model).__name__, _source(model), files, args, state.options, state.neurons)
        (stage / RECORD).write_text(json.dumps(record.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _install(stage, target, {*stale, *files})
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write the checkpoint to {folder}, which is left as it was: {error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replaceable_files(target: Path) -> list[str]:
    """The files of the checkpoint in `target`; none if that is new or empty."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return []
    try:
        return Record.load(target).files
    except (OSError, ValueError) as error:
        raise FileExistsError(
            f"{target} exists and is no checkpoint of testreg, so it is not replaced: choose a new or an empty folder"
        ) from error


def _install(stage: Path, target: Path, replaced: Iterable[str]) -> None:
    """Move the `replaced` files out of `target` and the staged ones in: all, or after an error none.

    testreg.json leaves first and arrives last, so a crash in between leaves nothing that passes for a checkpoint.
    """
    previous = stage / ".previous"
    arriving = sorted(os.listdir(stage), key=lambda name: name == RECORD)
    leaving = [name for name in (RECORD, *replaced) if (target / name).exists()]
    moves = [(target / name, previous / name) for name in leaving]
    moves += [(stage / name, target / name) for name in arriving]
    previous.mkdir()
    new_folder = not target.exists()
    target.mkdir(exist_ok=True)
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            os.rename(source, destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            os.rename(destination, source)
        if new_folder:
            target.rmdir()
        raise


def _library(model: nn.Module) -> str | None:
    """The library that can rebuild `model`, if any: a class of its own, not one derived from it."""
    package, class_name = type(model).__module__.partition(".")[0], type(model).__name__
    rebuilds = {
        "timm": lambda: bool(getattr(model, "pretrained_cfg", {}).get("architecture")),
        "transformers": lambda: transformers_class(class_name) is type(model),
        "open_clip": lambda: class_name in ("CLIP", "CustomTextCLIP", "CoCa"),
        "torchvision": lambda: str(model.__dict__.get("testreg_source")).startswith("torchvision:"),
    }
    return package if package in rebuilds and rebuilds[package]() else None


def _source(model: nn.Module) -> str | None:
    """The name under which the model was loaded, unless that is a path, which means nothing on another machine."""
    names = (name for name in checkpoint_names(model) if ":" in name)
    return next((name for name in names if not Path(name.partition(":")[2]).exists()), None)


def transformers_class(name: str) -> Any:
    """The model class of transformers with that name, or None: nothing outside the package is ever looked up."""
    import transformers

    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _write_timm(model: nn.Module, stage: Path, model_args: Mapping[str, Any] | None) -> None:
    import timm
    from timm.models._hub import save_config_for_hf  # without the weights: timm's own refuses channels_last

    path: Any = stage / "config.json"  # annotated as a str, which older releases do not take
    save_config_for_hf(model, path, model_args=dict(model_args or {}))
    _save_tensors(model, stage / "model.safetensors")
    with torch.device("meta"):
        twin = timm.create_model(f"local-dir:{stage}", pretrained=False)
    _check_twin(twin, model, "pass the arguments of timm.create_model that timm did not record as model_args=")


def _write_transformers(model: Any, stage: Path) -> None:
    dtypes = {str(value.dtype) for value in model.state_dict().values() if value.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(f"transformers checkpoints have one dtype, this model has {', '.join(sorted(dtypes))}")
    model.save_pretrained(stage)
    with torch.device("meta"):
        twin = type(model)(type(model).config_class.from_pretrained(stage))
    _check_twin(twin, model, "undo, or merge, what changed its modules (adapters, another head)")


def _write_open_clip(model: Any, stage: Path, arch: str | Mapping[str, Any] | None) -> None:
    preprocess = {key: value for key, value in getattr(model.visual, "preprocess_cfg", {}).items() if key != "size"}
    config = {"model_cfg": _open_clip_config(model, arch), "preprocess_cfg": preprocess}
    (stage / "open_clip_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _save_tensors(model, stage / "open_clip_model.safetensors")


def _torchvision_args(model: Any) -> dict[str, Any]:
    name = model.testreg_source.partition(":")[2]
    args = {"name": name, "image_size": model.image_size, "num_classes": model.num_classes}
    with torch.device("meta"):
        _check_twin(_torchvision_model(args), model, "undo what changed its modules, or `del model.testreg_source`")
    return args


def _torchvision_model(args: Mapping[str, Any]) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(args["name"], weights=None, **{k: v for k, v in args.items() if k != "name"})


def _save_tensors(model: nn.Module, path: Path) -> None:
    """Write the state_dict. Tied tensors are written once for each key, as strict loading wants them."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in model.state_dict().items():
        tensor = value.detach().contiguous()
        tensors[key] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(tensor.untyped_storage().data_ptr())
    save_file(tensors, path, metadata={"format": "pt"})


def _check_twin(twin: nn.Module, model: nn.Module, fix: str) -> None:
    if difference := _difference(twin.state_dict(), model.state_dict()):
        raise ValueError(f"{type(model).__name__} could not be rebuilt from the written config ({difference}): {fix}")


def _difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Where two state_dicts disagree in keys or shapes, in a few words; "" if nowhere."""
    kinds = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "of another shape": {key for key in expected.keys() & found.keys() if expected[key].shape != found[key].shape},
    }
    return "; ".join(f"{kind}: {', '.join(sorted(keys)[:3])}" for kind, keys in kinds.items() if keys)


def _open_clip_config(model: Any, arch: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The config that open_clip rebuilds `model` from: the one named, or the only one of its own that fits."""
    import open_clip

    arch = arch or _open_clip_arch(model)
    if isinstance(arch, Mapping):
        candidates: list[Any] = [arch]
    elif arch:
        candidates = [open_clip.get_model_config(arch)]
        if candidates == [None]:
            raise ValueError(f"open_clip has no config {arch!r}: pass arch=, one of open_clip.list_models()")
    else:
        tower = find_tower(model)
        known = map(open_clip.get_model_config, open_clip.list_models())
        candidates = [config for config in known if _may_describe(config, tower)]
    configs = [_as_built(config, model) for config in candidates]
    differences = [_difference_from(config, model) for config in configs]
    fitting: list[dict[str, Any]] = []  # several names may stand for one config
    for config, difference in zip(configs, differences, strict=True):
        if not difference and config not in fitting:
            fitting.append(config)
    if len(fitting) != 1:
        found = f"{len(fitting)} of open_clip's configs fit" if fitting else "no config of open_clip fits"
        detail = f" ({differences[0]})" if len(differences) == 1 and not fitting else ""
        raise ValueError(f"{found} this {type(model).__name__}{detail}: pass arch=, the name of its config or its dict")
    return fitting[0]


def _open_clip_arch(model: nn.Module) -> str | None:
    source = str(model.__dict__.get("testreg_source", ""))
    if (Path(source) / "open_clip_config.json").is_file():
        return f"local-dir:{source}"
    library, _, name = source.partition(":")
    return name.rpartition("/")[0].replace("/", "-") if library == "open_clip" else None


def _may_describe(config: Mapping[str, Any], tower: Tower) -> bool:
    """A quick look before a model is built of it: depth and width of the vision tower, or its name in timm."""
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        named: Any = getattr(tower.module, "pretrained_cfg", {}).get("architecture")
        return vision["timm_model_name"].partition(".")[0] == named
    width = tower.blocks[0].down_linear.out_features
    return (vision.get("layers", 12), vision.get("width", 768)) == (tower.depth, width)


def _as_built(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """`config` with what `open_clip.create_model` may have been told to change: image size, activation, class."""
    config = {key: value for key, value in deepcopy(dict(config)).items() if key not in ("quick_gelu", "custom_text")}
    size = getattr(model.visual, "image_size", None) or config["vision_cfg"].get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    config["vision_cfg"]["image_size"] = height if height == width else [height, width]
    if any(type(module).__name__ == "QuickGELU" for module in model.modules()):
        config["quick_gelu"] = True
    if type(model).__name__ != "CLIP":
        config["custom_text"] = True
    return config


def _difference_from(config: Mapping[str, Any], model: nn.Module) -> str:
    arguments = {key: value for key, value in deepcopy(dict(config)).items() if key != "custom_text"}
    if "hf_model_name" in arguments["text_cfg"]:
        arguments["text_cfg"]["hf_model_pretrained"] = False
    try:
        with torch.device("meta"):
            twin = type(model)(**arguments)
    except Exception as error:  # the config of another class, or of a text tower that cannot be fetched
        return str(error)
    return _difference(twin.state_dict(), model.state_dict())


def load(
    name: str | os.PathLike[str], model: nn.Module | None = None, *, device: torch.device | str | None = None
) -> nn.Module:
    """Load what `save` wrote: the model, patched, in eval mode, its parameters in the dtypes they were saved in.

    Args:
        name: a folder, or the id of a repository on the Hugging Face Hub (only json, txt and safetensors are fetched).
        model: an unpatched model to load the weights into. Needed where no library can rebuild it (torch.hub, a class
            of your own).

    Returns:
        The patched model; `model` itself if it was given.

    Raises:
        OSError: no such folder or repository, no testreg.json in it, or a file is missing.
        ValueError: a file is damaged, or weights or neurons do not fit. A given `model` has not been changed then.
        RuntimeError: the given model is patched already.
    """
    folder = _local_folder(name)
    record = Record.load(folder)
    _check_files(folder, record)
    if model is None:
        model = _rebuild(folder, record)
        _check_neurons(folder, record, model)
    else:
        if is_patched(model):
            raise RuntimeError("the model is already patched: call testreg.unpatch(model) before loading into it")
        _check_neurons(folder, record, model)
        # transformers stores other keys than the model has; its own loader translates them.
        renamed = record.library == "transformers"
        _fill(model, _rebuild(folder, record).state_dict() if renamed else _tensors(folder, record), folder)
    model.testreg_source = record.source or str(folder)  # type: ignore[assignment]
    if device is not None:
        model.to(device)
    return patch(model.eval(), record.neurons, **record.options)


def _local_folder(name: str | os.PathLike[str]) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        raise FileNotFoundError(f"there is no checkpoint folder {name} (nor is that a Hub id, ORGANISATION/NAME)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise OSError(
            f"there is no folder {name}, and no repository of that name could be fetched from the Hugging Face Hub "
            f"({str(error).splitlines()[0]}): check the name and the network"
        ) from error


def _check_files(folder: Path, record: Record) -> None:
    if not record.weights:
        raise ValueError(
            f"{folder / RECORD} lists no safetensors file, and testreg reads no pickles (.bin, .pt, .pth): "
            "save the checkpoint again with testreg.save"
        )
    if missing := [name for name in record.files if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} is incomplete: {', '.join(missing)} is missing. Copy or save it again")
    for name in record.weights:
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged or truncated ({error}): copy or save it again") from None


def _check_neurons(folder: Path, record: Record, model: nn.Module) -> None:
    tower = find_tower(model)
    try:
        record.neurons.check_fits(tower.depth, tower.mlp_width)
    except ValueError as error:
        raise ValueError(f"the register neurons in {folder / RECORD} do not fit the model: {error}") from None


def _tensors(folder: Path, record: Record) -> dict[str, Tensor]:
    return {key: value for name in record.weights for key, value in load_file(folder / name).items()}


def _rebuild(folder: Path, record: Record) -> nn.Module:
    """The model with its weights, unpatched, by the library that wrote the config."""
    if record.library is None:
        made_by = f" (it was {record.source})" if record.source else ""
        raise ValueError(
            f"{folder} holds the bare weights of a {record.class_name}{made_by}, which no library here can rebuild: "
            "build it and call testreg.load(folder, model=...)"
        )
    builders = {"timm": _timm, "transformers": _transformers, "open_clip": _open_clip, "torchvision": _torchvision}
    try:
        return builders[record.library](folder, record)
    except Exception as error:
        raise ValueError(
            f"{folder} could not be rebuilt by {record.library} ({error}): it is damaged, or another release wrote it"
        ) from error


def _timm(folder: Path, record: Record) -> nn.Module:
    import timm

    return _fill(timm.create_model(f"local-dir:{folder}", pretrained=False), _tensors(folder, record), folder)


def _torchvision(folder: Path, record: Record) -> nn.Module:
    return _fill(_torchvision_model(record.model_args), _tensors(folder, record), folder)


def _transformers(folder: Path, record: Record) -> nn.Module:
    model_class = transformers_class(record.class_name)
    if model_class is None:
        raise ValueError(f"it has no class {record.class_name}")
    model, info = model_class.from_pretrained(
        folder, dtype="auto", use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    if missing := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise ValueError(f"the weights do not fit its config: {missing[:3]}")
    return model


def _open_clip(folder: Path, record: Record) -> nn.Module:
    import open_clip

    with safe_open(folder / record.weights[0], framework="pt") as file:
        dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    precision = _OPEN_CLIP_PRECISION[frozenset(dtype for dtype in dtypes if "F" in dtype)]
    return open_clip.create_model(f"local-dir:{folder}", precision=precision)


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> nn.Module:
    """Load `tensors` into `model` and give it their dtypes."""
    expected = model.state_dict()
    if difference := _difference(expected, tensors):
        raise ValueError(f"the weights in {folder} do not fit this {type(model).__name__} ({difference})")
    dtypes = {value.dtype for value in tensors.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())  # buffers that are not saved, too
    for key, value in model.state_dict(keep_vars=True).items():
        value.data = value.data.to(tensors[key].dtype)
    model.load_state_dict(tensors)
    return model
