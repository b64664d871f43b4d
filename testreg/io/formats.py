"""Writes and reads checkpoints in the format of the model's library: timm, transformers, open_clip, torchvision.

Weights are always safetensors, nothing is unpickled, and classes are looked up in the library only. When a checkpoint
is written, a model without weights is built from the config, to check that it fits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from testreg.families import Tower, find_tower
from testreg.io.trust import one_line, without_asking

LIBRARIES = ("timm", "transformers", "open_clip", "torchvision")


def library_of(model: nn.Module) -> str | None:
    """The library that can rebuild `model`; None if there is none: its class is not the library's own, timm's config is
    missing, or a torchvision model was not loaded by `testreg.load_model`."""
    package, class_name = type(model).__module__.partition(".")[0], type(model).__name__
    is_own_class = {
        "timm": lambda: bool(getattr(model, "pretrained_cfg", {}).get("architecture")),
        "transformers": lambda: transformers_class(class_name) is type(model),
        "open_clip": lambda: class_name in ("CLIP", "CustomTextCLIP", "CoCa"),
        "torchvision": lambda: str(model.__dict__.get("testreg_source")).startswith("torchvision:"),
    }
    return package if package in is_own_class and is_own_class[package]() else None


def write(
    model: nn.Module,
    library: str | None,
    folder: Path,
    *,
    arch: str | Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `model` into an empty folder in the format of its library.

    Args:
        library: the library, see `library_of`; if it is None, only the weights are written.
        arch: for open_clip, the name of the model's config, or the config.
        model_args: for timm, arguments of `timm.create_model` that it did not record.

    Returns:
        The arguments that `read` needs besides the files to rebuild the model.

    Raises:
        ValueError: the library could not build the model from what was written.
    """
    if library == "timm":
        _write_timm(model, folder, model_args)
    elif library == "transformers":
        _write_transformers(model, folder)
    elif library == "open_clip":
        _write_open_clip(model, folder, arch)
    else:
        _save_tensors(model, folder / "model.safetensors")
        if library == "torchvision":
            return _torchvision_args(model)
    return {}


def read(library: str, folder: Path, *, class_name: str, weights: Sequence[str], args: Mapping[str, Any]) -> nn.Module:
    """Rebuild the model that `write` wrote, with its weights in their dtypes.

    Args:
        class_name: the name of the model's class.
        weights: the names of the safetensors files.
        args: what `write` returned.
    """
    if library == "timm":
        return _read_timm(folder, weights)
    if library == "transformers":
        return _read_transformers(folder, class_name)
    if library == "open_clip":
        return _read_open_clip(folder, weights)
    return _read_torchvision(folder, weights, args)


# timm -----------------------------------------------------------------------------------------------------------------


def _write_timm(model: nn.Module, stage: Path, model_args: Mapping[str, Any] | None) -> None:
    """Write a model of timm: config.json and model.safetensors."""
    import timm
    from timm.models._hub import save_config_for_hf  # timm's function that writes weights too refuses channels_last

    path: Any = stage / "config.json"  # timm annotates it as a str, but older releases need a Path
    save_config_for_hf(model, path, model_args=dict(model_args or {}))
    _save_tensors(model, stage / "model.safetensors")
    with torch.device("meta"):
        rebuilt = timm.create_model(f"local-dir:{stage}", pretrained=False)
    _check_rebuilds(rebuilt, model, "pass the arguments of timm.create_model that timm did not record as model_args=")


def _read_timm(folder: Path, weights: Sequence[str]) -> nn.Module:
    """Rebuild a model of timm."""
    import timm

    return fill(timm.create_model(f"local-dir:{folder}", pretrained=False), tensors(folder, weights), folder)


# transformers ---------------------------------------------------------------------------------------------------------


def transformers_class(name: str) -> Any:
    """The model class of that name in transformers; None if there is none. No other package is searched."""
    import transformers

    model_class = getattr(transformers, name, None)
    return (
        model_class if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel) else None
    )


@without_asking()
def _write_transformers(model: Any, stage: Path) -> None:
    """Write a model of transformers by its `save_pretrained`."""
    dtypes = {str(value.dtype) for value in model.state_dict().values() if value.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(f"transformers checkpoints have one dtype, this model has {', '.join(sorted(dtypes))}")
    model.save_pretrained(stage)
    with torch.device("meta"):
        rebuilt = type(model)(type(model).config_class.from_pretrained(stage))
    _check_rebuilds(rebuilt, model, "undo, or merge, what changed its modules (adapters, another head)")


@without_asking()
def _read_transformers(folder: Path, class_name: str) -> nn.Module:
    """Rebuild a model of transformers by `from_pretrained`."""
    model_class = transformers_class(class_name)
    if model_class is None:
        raise ValueError(f"it has no class {class_name}")
    model, info = model_class.from_pretrained(
        folder, dtype="auto", use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    if missing := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise ValueError(f"the weights do not fit its config: {missing[:3]}")
    return model


# open_clip ------------------------------------------------------------------------------------------------------------


# {dtypes in a checkpoint: open_clip's name for that precision}; where there are two, the norms are float32.
_OPEN_CLIP_PRECISION = {
    frozenset({"F32"}): "fp32",
    frozenset({"BF16"}): "pure_bf16",
    frozenset({"F16"}): "pure_fp16",
    frozenset({"F32", "BF16"}): "bf16",
    frozenset({"F32", "F16"}): "fp16",
}


@without_asking()
def _write_open_clip(model: Any, stage: Path, arch: str | Mapping[str, Any] | None) -> None:
    """Write a model of open_clip: open_clip_config.json and open_clip_model.safetensors."""
    preprocess = {key: value for key, value in getattr(model.visual, "preprocess_cfg", {}).items() if key != "size"}
    config = {"model_cfg": _open_clip_config(model, arch), "preprocess_cfg": preprocess}
    (stage / "open_clip_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _save_tensors(model, stage / "open_clip_model.safetensors")


@without_asking()
def _read_open_clip(folder: Path, weights: Sequence[str]) -> nn.Module:
    """Rebuild a model of open_clip, in the precision of its weights."""
    import open_clip

    with safe_open(folder / weights[0], framework="pt") as file:
        dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    precision = _OPEN_CLIP_PRECISION[frozenset(dtype for dtype in dtypes if "F" in dtype)]
    return open_clip.create_model(f"local-dir:{folder}", precision=precision)


def _open_clip_config(model: Any, arch: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The config from which open_clip can rebuild `model`: `arch`, or the only one of open_clip's configs that fits.

    Raises:
        ValueError: `arch` does not fit, or none or several of open_clip's configs do.
    """
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
        known_configs = map(open_clip.get_model_config, open_clip.list_models())
        candidates = [config for config in known_configs if _could_fit(config, tower)]
    configs = [_with_options_of(config, model) for config in candidates]
    differences = [_difference_to_config(config, model) for config in configs]
    fitting: list[dict[str, Any]] = []  # without duplicates: a config may have several names
    for config, difference in zip(configs, differences, strict=True):
        if not difference and config not in fitting:
            fitting.append(config)
    if len(fitting) != 1:
        fit = f"{len(fitting)} of open_clip's configs fit" if fitting else "no config of open_clip fits"
        detail = f" ({differences[0]})" if len(differences) == 1 and not fitting else ""
        raise ValueError(f"{fit} this {type(model).__name__}{detail}: pass arch=, the name of its config or its dict")
    return fitting[0]


def _open_clip_arch(model: nn.Module) -> str | None:
    """The name of an open_clip model's config, if `testreg.load_model` noted it."""
    source = str(model.__dict__.get("testreg_source", ""))
    if (Path(source) / "open_clip_config.json").is_file():
        return f"local-dir:{source}"
    library, _, name = source.partition(":")
    return name.rpartition("/")[0].replace("/", "-") if library == "open_clip" else None


def _could_fit(config: Mapping[str, Any], tower: Tower) -> bool:
    """Whether a config has the tower's depth and width, or its name in timm: a quick test before a model is built."""
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        timm_name: Any = getattr(tower.module, "pretrained_cfg", {}).get("architecture")
        return vision["timm_model_name"].partition(".")[0] == timm_name
    return (vision.get("layers", 12), vision.get("width", 768)) == (tower.depth, tower.width)


def _with_options_of(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """`config` with the image size, activation and class of the model, which `open_clip.create_model` can change."""
    config = {key: value for key, value in deepcopy(dict(config)).items() if key not in ("quick_gelu", "custom_text")}
    size = getattr(model.visual, "image_size", None) or config["vision_cfg"].get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    config["vision_cfg"]["image_size"] = height if height == width else [height, width]
    if any(type(module).__name__ == "QuickGELU" for module in model.modules()):
        config["quick_gelu"] = True
    if type(model).__name__ != "CLIP":
        config["custom_text"] = True
    return config


def _difference_to_config(config: Mapping[str, Any], model: nn.Module) -> str:
    """How the model's state_dict differs from that of a model built from a config, in words; "" if it does not."""
    arguments = {key: value for key, value in deepcopy(dict(config)).items() if key != "custom_text"}
    if "hf_model_name" in arguments["text_cfg"]:
        arguments["text_cfg"]["hf_model_pretrained"] = False
    try:
        with torch.device("meta"):
            rebuilt = type(model)(**arguments)
    except Exception as error:  # e.g. a config for another class, or with a text tower that cannot be downloaded
        return str(error)
    return _difference(rebuilt.state_dict(), model.state_dict())


# torchvision ----------------------------------------------------------------------------------------------------------


def _torchvision_args(model: Any) -> dict[str, Any]:
    """The arguments from which a torchvision model, which has no config, can be rebuilt."""
    name = model.testreg_source.partition(":")[2]
    args = {"name": name, "image_size": model.image_size, "num_classes": model.num_classes}
    with torch.device("meta"):
        _check_rebuilds(_torchvision_model(args), model, "undo what changed its modules, or `del model.testreg_source`")
    return args


def _read_torchvision(folder: Path, weights: Sequence[str], args: Mapping[str, Any]) -> nn.Module:
    """Rebuild a model of torchvision."""
    return fill(_torchvision_model(args), tensors(folder, weights), folder)


def _torchvision_model(args: Mapping[str, Any]) -> nn.Module:
    """Build a model of torchvision with random weights."""
    import torchvision

    return torchvision.models.get_model(args["name"], weights=None, **{k: v for k, v in args.items() if k != "name"})


# Weights --------------------------------------------------------------------------------------------------------------


def tensors(folder: Path, weights: Sequence[str]) -> dict[str, Tensor]:
    """{key of the state_dict: tensor}, from several safetensors files."""
    return {key: value for name in weights for key, value in load_file(folder / name).items()}


def fill(model: nn.Module, values: Mapping[str, Tensor], folder: Path) -> nn.Module:
    """Load the state_dict `values` into `model`, in their dtypes, and return the model.

    Raises:
        ValueError: keys or shapes do not fit the model. `folder` is named in the error.
    """
    expected = model.state_dict()
    if difference := _difference(expected, values):
        raise ValueError(f"the weights in {folder} do not fit this {type(model).__name__} ({difference})")
    dtypes = {value.dtype for value in values.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())  # so that buffers that are not in the state_dict get the dtype too
    for key, value in model.state_dict(keep_vars=True).items():
        value.data = value.data.to(values[key].dtype)
    model.load_state_dict(values)
    return model


def _save_tensors(model: nn.Module, path: Path) -> None:
    """Write the state_dict. A tensor with several keys (tied weights) is written for each, as strict loading needs."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in model.state_dict().items():
        tensor = value.detach().contiguous()
        tensors[key] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(tensor.untyped_storage().data_ptr())
    save_file(tensors, path, metadata={"format": "pt"})


def _check_rebuilds(rebuilt: nn.Module, model: nn.Module, fix: str) -> None:
    """Raise ValueError, with the fix, if the state_dict of the rebuilt model differs from the model's."""
    if difference := _difference(rebuilt.state_dict(), model.state_dict()):
        raise ValueError(f"{type(model).__name__} could not be rebuilt from the written config ({difference}): {fix}")


def _difference(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """How two state_dicts differ in keys, shapes or kinds of numbers, in words; "" if they do not."""
    common = expected.keys() & given.keys()
    kinds = {
        "missing": expected.keys() - given.keys(),
        "unexpected": given.keys() - expected.keys(),
        "of another shape": {key for key in common if expected[key].shape != given[key].shape},
        "floating point or not": {
            key for key in common if expected[key].is_floating_point() != given[key].is_floating_point()
        },
    }
    return "; ".join(f"{kind}: {one_line(', '.join(sorted(keys)[:3]))}" for kind, keys in kinds.items() if keys)
