"""Loads a model by name, together with its preprocessing."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from testreg.io import checkpoints
from testreg.io.formats import transformers_class
from testreg.io.install import RECORD, is_interrupted
from testreg.io.names import NAMES
from testreg.io.preprocessing import (
    Transform,
    image_processor,
    imagenet_transform,
    processed_by,
    timm_transform,
    torchvision_transform,
    transform_for,
)
from testreg.io.trust import CHECK_FOLDER, CHECK_HUB, asking_only_if, explained, read_json, require

DEMO = Path(__file__).parents[1] / "demo" / "model"  # the folder of the demo model's checkpoint
DEMO_SIZE = 128  # side of the demo model's images in pixels


@dataclass(frozen=True)
class LoadedModel:
    """A model and its preprocessing."""

    model: nn.Module
    """The model in eval mode. It is patched if it came from a patched checkpoint."""
    transform: Transform
    """Maps an RGB image to the model's input (3, h, w), float32; for a model that takes clips, a list of frames to
    (frames, 3, h, w). It can be pickled, for DataLoader workers."""
    name: str
    """The name that was loaded."""
    processor: Any = None
    """The image processor of a model of transformers, for `testreg.save(..., processor=...)`."""


@dataclass(frozen=True)
class _LoadOptions:
    """The arguments of `load_model`, which each library's loader gets."""

    image_size: int | None = None
    pretrained: bool = True
    trust_remote_code: bool = False
    any_size: bool = False


def load_model(
    name: str,
    *,
    image_size: int | None = None,
    pretrained: bool = True,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    any_size: bool = False,
) -> LoadedModel:
    """Load a model and its preprocessing.

    Args:
        name: `timm:NAME` (also `timm:hf-hub:ORG/NAME`), `hf:NAME`, `open_clip:ARCH/PRETRAINED`, `hub:OWNER/REPO/NAME`,
            `torchvision:NAME`, the folder of a checkpoint of timm, transformers, open_clip or testreg, or `demo` for
            the model of `demo_model`.
        image_size: side of the square input in pixels; None for the size of the checkpoint. Position embeddings are
            resampled. For models of torch.hub it is rounded down to whole patches.
        pretrained: False for random weights.
        device: where to put the model; None for the CPU.
        trust_remote_code: run code that comes with the model: Python files in a repository of transformers, or a
            repository that torch.hub does not trust yet. If the model names further repositories, transformers asks
            about them on the terminal. If False, no such code is run, and nothing is asked.
        any_size: build timm models so that they take images of any size, if their class can. Models of transformers do
            that anyway.

    Raises:
        ValueError: the name is not of a known form, the folder is incomplete or has its weights only as pickles, or the
            model needs code that is not trusted.
        OSError: a folder or file is missing, or could not be downloaded.

    Example:
        >>> loaded = testreg.load_model("demo", image_size=64)
        >>> options = {"transform": loaded.transform, "num_images": 8, "progress": False}
        >>> diagnosis = testreg.diagnose(loaded.model, "photos", **options)
        >>> diagnosis.images
        8
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    options = _LoadOptions(image_size, pretrained, trust_remote_code, any_size)
    loaders = {
        "timm": _load_timm,
        "hf": _load_transformers,
        "open_clip": _load_open_clip,
        "hub": _load_hub,
        "torchvision": _load_torchvision,
    }
    library, _, rest = name.partition(":")
    if name == "demo":
        model = _load_demo(replace(options, image_size=image_size or DEMO_SIZE))
        loaded = LoadedModel(model, timm_transform(model), name)
    elif library in loaders and rest:
        loaded = loaders[library](name, rest, options)
    else:
        loaded = _load_folder(name, options)
    loaded.model.eval()
    if device is not None:
        loaded.model.to(device)
    return loaded


def demo_model(image_size: int = DEMO_SIZE) -> nn.Module:
    """The small ViT that comes with testreg, in eval mode, for images (B, 3, image_size, image_size) in [-1, 1].

    It is a timm VisionTransformer with patches of 4 x 4 pixels that classifies CIFAR-10, and has outliers on background
    patches. The neurons that make them were planted before it was trained: see `testreg/demo/model/README.md`.

    Example:
        >>> model = testreg.demo_model(image_size=64)
        >>> model(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """
    return _load_demo(_LoadOptions(image_size)).eval()


def _load_demo(options: _LoadOptions) -> nn.Module:
    """Build the demo model."""
    model = _load_timm("demo", f"local-dir:{DEMO}", options).model
    model.__dict__["testreg_source"] = "demo"
    return model


def _load_timm(name: str, rest: str, options: _LoadOptions) -> LoadedModel:
    """Load `rest`, a name of timm or local-dir:FOLDER. `name` is what the user wrote, for errors."""
    import timm

    fix = "The names are those of timm.list_models(pretrained=True)"
    if rest.startswith("local-dir:"):
        fix = CHECK_FOLDER
        require(Path(rest.removeprefix("local-dir:")), "model.safetensors")
    with explained(name, fix):
        model = timm.create_model(rest, pretrained=options.pretrained, img_size=options.image_size)
        if options.any_size and hasattr(model, "dynamic_img_size"):
            model = timm.create_model(
                rest, pretrained=options.pretrained, img_size=options.image_size, dynamic_img_size=True
            )
        return LoadedModel(model, timm_transform(model, options.image_size), name)


def _load_transformers(name: str, rest: str, options: _LoadOptions) -> LoadedModel:
    """Load `rest`, a name or folder of transformers."""
    import transformers

    is_folder = Path(rest).is_dir()
    if is_folder:
        require(Path(rest), "config.json")
        if options.pretrained:
            require(Path(rest), "*.safetensors")
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", rest):
        raise FileNotFoundError(f"there is no folder {rest}, nor can that be a name on the Hub (NAME or OWNER/NAME)")
    processor = image_processor(rest, options.image_size, options.trust_remote_code)
    trust: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    with explained(name, CHECK_FOLDER if is_folder else CHECK_HUB), asking_only_if(options.trust_remote_code):
        config = transformers.AutoConfig.from_pretrained(rest, **trust)
        # The class that was saved, not the one of AutoModel, so that a head or a text tower is not lost.
        model_class = transformers_class((config.architectures or [""])[0]) or transformers.AutoModel
        if options.pretrained:
            # Only AutoModel knows this argument; other classes would take it for a setting of the model.
            class_arguments = trust if model_class is transformers.AutoModel else {}
            model = model_class.from_pretrained(
                rest, dtype="auto", use_safetensors=True if is_folder else None, **class_arguments
            )
        elif model_class is transformers.AutoModel:
            model = model_class.from_config(config, **trust)
        else:
            model = model_class(config)
    return LoadedModel(model, processed_by(processor, model), name, processor)


def _load_open_clip(name: str, rest: str, options: _LoadOptions) -> LoadedModel:
    """Load `rest`, ARCH/PRETRAINED or local-dir:FOLDER of open_clip."""
    import open_clip

    arch, tag, quick_gelu, fix = rest, None, False, "The names are those of open_clip.list_pretrained()"
    if rest.startswith("local-dir:"):
        fix = CHECK_FOLDER
        require(Path(rest.removeprefix("local-dir:")), "open_clip_model.safetensors")
    elif not rest.startswith("hf-hub:"):
        arch, _, tag = rest.rpartition("/")
        if not arch:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(rest)) or "a tag of open_clip.list_pretrained()"
            raise ValueError(f"{name} does not say which weights: add /PRETRAINED, which is {tags}")
        # By default, open_clip runs OpenAI's weights with another activation than they were trained with.
        quick_gelu = bool(open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu"))
    with explained(name, fix), asking_only_if(options.trust_remote_code):
        model, _, transform = open_clip.create_model_and_transforms(
            arch,
            tag if options.pretrained else None,
            load_weights=options.pretrained,
            pretrained_text=options.pretrained,
            force_quick_gelu=quick_gelu,
            force_image_size=options.image_size,
        )
    model.testreg_source = name
    return LoadedModel(model, transform, name)


def _load_hub(name: str, rest: str, options: _LoadOptions) -> LoadedModel:
    """Load `rest`, OWNER/REPO/NAME of torch.hub."""
    repository, _, entry = rest.rpartition("/")
    if repository.count("/") != 1 or not entry:
        raise ValueError(f"{name} is not of the form hub:OWNER/REPO/NAME")
    hub_arguments: dict[str, Any] = {} if options.pretrained else {"pretrained": False}
    if options.trust_remote_code:
        hub_arguments["trust_repo"] = True
    elif not _hub_trusts(repository):
        raise ValueError(
            f"{name} runs code from github.com/{repository}, which torch.hub was not told to trust: if you do, pass "
            "trust_remote_code=True (--trust-remote-code), or for good add the line "
            f"{repository.partition(':')[0].replace('/', '_')} to {torch.hub.get_dir()}/trusted_list"
        )
    with explained(name, "Check the name on github.com, and the network"):
        model = torch.hub.load(repository, entry, **hub_arguments)
    model.testreg_source = name
    return LoadedModel(model, imagenet_transform(model, options.image_size), name)


def _hub_trusts(repository: str) -> bool:
    """Whether the user or torch.hub trusts a repository. (torch.hub by itself trusts all that it has cached; that does
    not count here.)"""
    owner, repo = repository.partition(":")[0].split("/")
    trusted_list = Path(torch.hub.get_dir()) / "trusted_list"
    trusted_lines = trusted_list.read_text(encoding="utf-8").splitlines() if trusted_list.is_file() else []
    return owner in torch.hub._TRUSTED_REPO_OWNERS or f"{owner}_{repo}" in [line.strip() for line in trusted_lines]


def _load_torchvision(name: str, rest: str, options: _LoadOptions) -> LoadedModel:
    """Load `rest`, a name of torchvision."""
    from torchvision import models
    from torchvision.models.vision_transformer import interpolate_embeddings

    with explained(name, "The names are those of torchvision.models.list_models()"):
        weights = models.get_model_weights(rest)["DEFAULT"]
        if options.image_size is None:
            model = models.get_model(rest, weights=weights if options.pretrained else None)
        else:
            model = models.get_model(rest, weights=None, image_size=options.image_size)
            if options.pretrained:
                state = weights.get_state_dict(progress=True, check_hash=True)
                model.load_state_dict(interpolate_embeddings(options.image_size, model.patch_size, state))
        model.testreg_source = name
        return LoadedModel(model, torchvision_transform(rest, options.image_size), name)


def _load_folder(name: str, options: _LoadOptions) -> LoadedModel:
    """Load the checkpoint in a folder. Its files tell which library wrote it."""
    folder = Path(name)
    if not folder.is_dir():
        suggestion = f": did you mean {_guessed_library(name)}:{name}?" if _guessed_library(name) else ""
        raise ValueError(
            f"{name[:300]!r} is neither a checkpoint folder nor a model name{suggestion or f': names are {NAMES}'}"
        )
    if os.path.lexists(folder / RECORD) or is_interrupted(folder):
        return _load_patched(name, options)
    if (folder / "open_clip_config.json").is_file():
        return _load_open_clip(name, f"local-dir:{name}", options)
    require(folder, "config.json")
    with explained(name, CHECK_FOLDER):
        config = read_json(folder / "config.json")
    if "architecture" in config:
        return _load_timm(name, f"local-dir:{name}", options)
    if "model_type" in config:
        return _load_transformers(name, name, options)
    raise ValueError(
        f'{folder / "config.json"} is neither of timm ("architecture") nor of transformers ("model_type"): testreg '
        "loads folders that timm, transformers, open_clip or testreg wrote"
    )


def _guessed_library(name: str) -> str:
    """The library that has, or may have, a model of that name, for a hint; "" if there is none."""
    import open_clip
    import timm

    if open_clip.get_pretrained_cfg(*name.rpartition("/")[::2]):
        return "open_clip"
    if timm.is_model(name):
        return "timm"
    return "hf" if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else ""


def _load_patched(name: str, options: _LoadOptions) -> LoadedModel:
    """Load a checkpoint that `testreg.save` wrote."""
    model = checkpoints.load(name)
    if getattr(model, "config", None) is not None:
        processor = image_processor(name, options.image_size, options.trust_remote_code)
        return LoadedModel(model, processed_by(processor, model), name, processor)
    if options.image_size is not None:
        raise ValueError(
            f"the patched checkpoint {name} has a fixed image size: patch the original at that size instead"
        )
    return LoadedModel(model, transform_for(model), name)
