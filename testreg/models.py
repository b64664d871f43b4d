"""Load a model by name, with its library's own preprocessing: timm, transformers, open_clip, torch.hub, torchvision, or a
folder that one of them, or `testreg.save`, wrote.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from testreg import checkpoint
from testreg.families import find_tower

if TYPE_CHECKING:
    from PIL import Image

_NAMES = "timm:NAME, hf:NAME, open_clip:ARCH/PRETRAINED, hub:OWNER/REPO/NAME, torchvision:NAME or a checkpoint folder"
_HUB_FIX = "Check the name on huggingface.co, and the network"
# Evaluation crops 224 of 256: the ratio that ImageNet preprocessing keeps at every size.
_RESIZE = 256 / 224


@dataclass(frozen=True)
class LoadedModel:
    """A model and how its images are prepared."""

    model: nn.Module
    """In eval mode; patched if it came from a patched checkpoint."""
    transform: Callable[[Image.Image], Tensor]
    """From an image to the model's input, (3, h, w), float32. Can be pickled, for DataLoader workers."""
    name: str
    forward_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the vision tower (`testreg.families.find_tower`) has to be called with beside the images."""
    processor: Any = None
    """transformers' image processor, for `testreg.save(..., processor=...)`."""


def load_model(
    name: str,
    *,
    image_size: int | None = None,
    pretrained: bool = True,
    device: torch.device | str | None = None,
) -> LoadedModel:
    """Load a model and its preprocessing.

    Args:
        name: `timm:NAME` (also `timm:hf-hub:ORG/NAME`), `hf:NAME`, `open_clip:ARCH/PRETRAINED`, `hub:OWNER/REPO/NAME`,
            `torchvision:NAME`, or the folder of a checkpoint of timm, transformers, open_clip or testreg.
        image_size: side of the square input, in pixels, if not the model's own. Position embeddings are resampled.
        pretrained: False for random weights.

    Raises:
        ValueError: the name means nothing, or the folder lacks something.
        OSError: a folder or file is missing, or a download failed.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    source, _, rest = name.partition(":")
    loaders = {
        "timm": _load_timm,
        "hf": _load_transformers,
        "open_clip": _load_open_clip,
        "hub": _load_hub,
        "torchvision": _load_torchvision,
    }
    if source in loaders and rest:
        loaded = loaders[source](name, rest, image_size, pretrained)
    else:
        loaded = _load_folder(name, image_size, pretrained)
    loaded.model.eval()
    if device is not None:
        loaded.model.to(device)
    return loaded


@contextmanager
def _explained(name: str, fix: str) -> Iterator[None]:
    """Turn whatever a library raises into one error that names the input and the fix."""
    try:
        yield
    except Exception as error:
        message = (str(error) or type(error).__name__).splitlines()[0][:300]
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"cannot load {name}: {message.rstrip('.')}. {fix}") from error


@dataclass(frozen=True)
class _Rgb:
    """`transform`, of any PIL image."""

    transform: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(image.convert("RGB"))


@dataclass(frozen=True)
class _Processor:
    """An image processor of transformers, of one image."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        if pixels.ndim != 4 or len(pixels) != 1:
            raise ValueError(
                f"{type(self.processor).__name__} makes {tuple(pixels.shape)} of one image, not (1, 3, h, w): "
                "load the vision tower's own checkpoint"
            )
        return pixels[0]


def _load_timm(name: str, rest: str, image_size: int | None, pretrained: bool) -> LoadedModel:
    import timm

    if rest.startswith("local-dir:"):
        _require_file(Path(rest.removeprefix("local-dir:")), "model.safetensors")
    with _explained(name, "Names: timm.list_models(pretrained=True)"):
        model = timm.create_model(rest, pretrained=pretrained, **({"img_size": image_size} if image_size else {}))
    return LoadedModel(model, _timm_transform(model, image_size), name)


def _timm_transform(model: nn.Module, image_size: int | None = None) -> _Rgb:
    from timm.data import create_transform, resolve_model_data_config

    own = {"input_size": (3, image_size, image_size)} if image_size else {}
    return _Rgb(create_transform(**resolve_model_data_config(model, args=own), is_training=False))


def _load_transformers(name: str, rest: str, image_size: int | None, pretrained: bool) -> LoadedModel:
    import transformers

    local = Path(rest).is_dir()
    if local:
        _require_file(Path(rest), "config.json")
        if pretrained:
            _require_file(Path(rest), "*.safetensors")
    processor = _image_processor(name, rest, image_size)
    with _explained(name, _HUB_FIX):
        config = transformers.AutoConfig.from_pretrained(rest, trust_remote_code=False)
        # The class that was saved, not AutoModel's, so that nothing of the checkpoint (a head, a text tower) is lost.
        model_class = checkpoint.transformers_class((config.architectures or [""])[0]) or transformers.AutoModel
        if pretrained:
            model = model_class.from_pretrained(rest, dtype="auto", use_safetensors=True if local else None)
        elif model_class is transformers.AutoModel:
            model = model_class.from_config(config)
        else:
            model = model_class(config)
    return _with_processor(model, processor, name)


def _image_processor(name: str, rest: str, image_size: int | None) -> Any:
    """transformers' image processor of a checkpoint, all its sizes scaled so that it makes `image_size`."""
    import transformers

    folder = Path(rest)
    if folder.is_dir() and not any(
        (folder / f"{kind}_config.json").is_file() for kind in ("preprocessor", "processor")
    ):
        raise ValueError(
            f"{folder} has no preprocessor_config.json, so its preprocessing is unknown: save the original's there with "
            "transformers.AutoImageProcessor.from_pretrained(ORIGINAL).save_pretrained(FOLDER)"
        )
    with _explained(name, _HUB_FIX):
        processor = transformers.AutoImageProcessor.from_pretrained(rest, trust_remote_code=False)
        if image_size is None:
            return processor
        sizes = {key: _edges(processor, key) for key in ("size", "crop_size")}
        made = _output_edges(processor)
        scaled = {
            key: {edge: round(value * image_size / made[0]) for edge, value in edges.items()}
            for key, edges in sizes.items()
            if edges
        }
        return transformers.AutoImageProcessor.from_pretrained(rest, trust_remote_code=False, **scaled)


def _edges(processor: Any, key: str) -> dict[str, int]:
    """A processor's "size" or "crop_size", {"height": 224, "width": 224} or {"shortest_edge": 256}."""
    return {edge: value for edge, value in dict(processor.to_dict().get(key) or {}).items() if value}


def _output_edges(processor: Any) -> list[int]:
    """Height and width of what a processor makes; only the shortest edge where they depend on the image."""
    cropped = getattr(processor, "do_center_crop", False)
    return list(_edges(processor, "crop_size" if cropped else "size").values())


def _with_processor(model: nn.Module, processor: Any, name: str) -> LoadedModel:
    tower: Any = find_tower(model).module
    kwargs = {}
    if "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
        size = tower.config.image_size
        own = [size, size] if isinstance(size, int) else list(size)
        if _output_edges(processor) != own:
            kwargs["interpolate_pos_encoding"] = True
    return LoadedModel(model, _Processor(processor), name, kwargs, processor)


def _load_open_clip(name: str, rest: str, image_size: int | None, pretrained: bool) -> LoadedModel:
    import open_clip

    arch, tag = rest, None
    if rest.startswith("local-dir:"):
        _require_file(Path(rest.removeprefix("local-dir:")), "open_clip_model.safetensors")
    elif not rest.startswith("hf-hub:"):
        arch, _, tag = rest.rpartition("/")
        if not arch:
            raise ValueError(
                f"{name} does not say which weights: open_clip:{rest}/PRETRAINED, with PRETRAINED one of "
                f"{', '.join(open_clip.list_pretrained_tags_by_model(rest)) or 'open_clip.list_pretrained()'}"
            )
    # Without it open_clip runs OpenAI's weights with an activation they were not trained with, and only warns.
    quick_gelu = bool(tag and open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu"))
    with _explained(name, "Names and their weights: open_clip.list_pretrained()"):
        model, _, transform = open_clip.create_model_and_transforms(
            arch,
            tag if pretrained else None,
            load_weights=pretrained,
            pretrained_text=pretrained,
            force_quick_gelu=quick_gelu,
            force_image_size=image_size,
        )
    model.testreg_source = name
    return LoadedModel(model, _Rgb(transform), name)


def _load_hub(name: str, rest: str, image_size: int | None, pretrained: bool) -> LoadedModel:
    repository, _, entry = rest.rpartition("/")
    if repository.count("/") != 1:
        raise ValueError(f"{name} is not of the form hub:OWNER/REPO/NAME")
    with _explained(name, "Check the name on github.com, and the network"):
        model = torch.hub.load(repository, entry, **({} if pretrained else {"pretrained": False}))
    model.testreg_source = name
    tower = find_tower(model)
    patch_size = max(tower.module.get_submodule(tower.family.patch_embed[0]).stride)  # type: ignore[arg-type, type-var]
    return LoadedModel(model, _imagenet_transform((image_size or 224) // patch_size * patch_size), name)


def _imagenet_transform(size: int) -> _Rgb:
    """The evaluation preprocessing of DINO and DINOv2, whose repositories hand out no transform."""
    from torchvision import transforms

    steps = [
        transforms.Resize(round(size * _RESIZE), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ]
    return _Rgb(transforms.Compose(steps))


def _load_torchvision(name: str, rest: str, image_size: int | None, pretrained: bool) -> LoadedModel:
    import torchvision
    from torchvision.models.vision_transformer import interpolate_embeddings

    with _explained(name, "Names: torchvision.models.list_models()"):
        weights = torchvision.models.get_model_weights(rest)["DEFAULT"]
        if image_size is None:
            model = torchvision.models.get_model(rest, weights=weights if pretrained else None)
        else:
            model = torchvision.models.get_model(rest, weights=None, image_size=image_size)
            if pretrained:
                state = weights.get_state_dict(progress=True, check_hash=True)
                model.load_state_dict(interpolate_embeddings(image_size, model.patch_size, state))
    model.testreg_source = name
    return LoadedModel(model, _torchvision_transform(rest, image_size), name)


def _torchvision_transform(model_name: str, image_size: int | None) -> _Rgb:
    import torchvision

    make = torchvision.models.get_model_weights(model_name)["DEFAULT"].transforms
    return _Rgb(make(crop_size=image_size, resize_size=round(image_size * _RESIZE)) if image_size else make())


def _load_folder(name: str, image_size: int | None, pretrained: bool) -> LoadedModel:
    """A checkpoint folder: the files in it tell whose it is."""
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"{name!r} is no checkpoint folder, and no model name: those are {_NAMES}")
    if (folder / checkpoint.RECORD).is_file():
        return _load_patched(folder, image_size)
    if (folder / "open_clip_config.json").is_file():
        return _load_open_clip(name, f"local-dir:{name}", image_size, pretrained)
    _require_file(folder, "config.json")
    with _explained(name, "Its config.json is damaged: copy it again"):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "architecture" in config:
        return _load_timm(name, f"local-dir:{name}", image_size, pretrained)
    if "model_type" in config:
        return _load_transformers(name, name, image_size, pretrained)
    raise ValueError(
        f'{folder}/config.json is neither timm\'s ("architecture") nor transformers\' ("model_type"): save the model with '
        "one of these libraries, open_clip or testreg"
    )


def _load_patched(folder: Path, image_size: int | None) -> LoadedModel:
    name, record = str(folder), checkpoint.Record.load(folder)
    if record.library == "transformers":
        processor = _image_processor(name, name, image_size)
        return _with_processor(checkpoint.load(folder), processor, name)
    if image_size is not None:
        raise ValueError(
            f"the patched checkpoint {folder} has one image size: patch a model loaded at image_size instead"
        )
    model: Any = checkpoint.load(folder)
    if record.library == "timm":
        return LoadedModel(model, _timm_transform(model), name)
    if record.library == "open_clip":
        from open_clip import image_transform_v2
        from open_clip.transform import PreprocessCfg

        return LoadedModel(model, _Rgb(image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), False)), name)
    return LoadedModel(model, _torchvision_transform(record.model_args["name"], model.image_size), name)


def _require_file(folder: Path, pattern: str) -> None:
    if any(folder.glob(pattern)):
        return
    pickles = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth")]
    if pattern.endswith(".safetensors") and pickles:
        raise ValueError(
            f"{folder} has no {pattern}, and pickles ({pickles[0]}) are not read from folders, as they can run code: if "
            "you trust it, load it with its own library and save it as safetensors"
        )
    raise FileNotFoundError(f"{folder} has no {pattern}: is it the folder of a checkpoint?")
