"""Load a model by name, with the preprocessing that its own library names for it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from testreg.families import find_tower
from testreg.io import checkpoint, formats
from testreg.io.images import Transform
from testreg.io.install import is_interrupted
from testreg.io.names import NAMES

if TYPE_CHECKING:
    from PIL.Image import Image

DEMO = Path(__file__).parents[1] / "demo" / "model"
_CHECK_HUB = "Check the name on huggingface.co, and the network"
_CHECK_FOLDER = "The folder is damaged, or not for this release of the library: copy it, or save it, again"
_RESIZE = 256 / 224  # ImageNet evaluation: short side to 256, then the middle 224


@dataclass(frozen=True)
class LoadedModel:
    """A model and how its images are prepared."""

    model: nn.Module
    """In eval mode; patched if it came from a patched checkpoint."""
    transform: Transform
    """From an RGB image to the model's input, (3, h, w), float32. It can be pickled, for DataLoader workers."""
    name: str
    processor: Any = None
    """transformers' image processor, for `testreg.save(..., processor=...)`."""


@dataclass(frozen=True)
class _Asked:
    """The arguments of `load_model`, for each library's loader."""

    image_size: int | None = None
    pretrained: bool = True
    trust_remote_code: bool = False

    def as_trusted(self) -> AbstractContextManager[None]:
        """Where libraries may ask whether to run code only if the user trusts it."""
        return nullcontext() if self.trust_remote_code else formats.without_asking()


def load_model(
    name: str,
    *,
    image_size: int | None = None,
    pretrained: bool = True,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model and its preprocessing.

    Args:
        name: `timm:NAME` (also `timm:hf-hub:ORG/NAME`), `hf:NAME`, `open_clip:ARCH/PRETRAINED`, `hub:OWNER/REPO/NAME`,
            `torchvision:NAME`, the folder of a checkpoint of timm, transformers, open_clip or testreg, or `demo` for
            the model of `demo_model`.
        image_size: side of the square input in pixels; None for the model's own. Position embeddings are resampled.
            Models of torch.hub round it down to whole patches.
        pretrained: False for random weights.
        trust_remote_code: run code that comes with the model: Python files in a repository of transformers, and
            repositories that torch.hub was not told to trust before. Where a model names further repositories,
            transformers asks about these on the terminal. If False, nothing is asked, and no such code runs.

    Raises:
        ValueError: the name means nothing, or the folder lacks something, or holds its weights as pickles only, or the
            model needs code that is not trusted.
        OSError: a folder or file is missing, or could not be fetched.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    asked = _Asked(image_size, pretrained, trust_remote_code)
    loaders = {
        "timm": _load_timm,
        "hf": _load_transformers,
        "open_clip": _load_open_clip,
        "hub": _load_hub,
        "torchvision": _load_torchvision,
    }
    library, _, rest = name.partition(":")
    if name == "demo":
        model = demo_model() if image_size is None else demo_model(image_size)
        loaded = LoadedModel(model, _timm_transform(model), name)
    elif library in loaders and rest:
        loaded = loaders[library](name, rest, asked)
    else:
        loaded = _load_folder(name, asked)
    loaded.model.eval()
    if device is not None:
        loaded.model.to(device)
    return loaded


def demo_model(image_size: int = 128) -> nn.Module:
    """The small ViT that comes with testreg, in eval mode, for images (B, 3, image_size, image_size) in [-1, 1].

    A timm VisionTransformer with patches of 4 x 4 that classifies CIFAR-10, and has outliers on its background patches.
    The mechanism was planted and the network trained around it: see `testreg/demo/model/README.md`.
    """
    model = _load_timm("demo", f"local-dir:{DEMO}", _Asked(image_size)).model.eval()
    model.__dict__["testreg_source"] = "demo"
    return model


def transform_for(model: nn.Module) -> Transform:
    """The preprocessing of a model that timm, transformers or open_clip made, or `load_model`: RGB image -> (3, h, w).

    Raises:
        ValueError, OSError: the model does not say, or what it says cannot be found.
    """
    source, _, name = str(model.__dict__.get("testreg_source", "")).partition(":")
    own_config: Any = getattr(model, "config", None)
    if (preprocess := getattr(getattr(model, "visual", model), "preprocess_cfg", None)) is not None:
        return _open_clip_transform(preprocess)
    if getattr(model, "pretrained_cfg", None):
        return _timm_transform(model)
    if folder_or_name := getattr(own_config, "_name_or_path", ""):
        return _Processor(_image_processor(folder_or_name, _Asked()))
    if source == "torchvision":
        return _torchvision_transform(name, model.image_size)  # type: ignore[arg-type]
    if source == "hub":
        return _imagenet_transform(model)
    raise ValueError(
        f"this {type(model).__name__} does not say how its images are prepared: pass transform=, a function from a PIL "
        "image to a tensor (3, h, w), or load the model with testreg.load_model"
    )


class OwnTransform:
    """`transform_for(model)`, looked up only if an image needs it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @functools.cached_property
    def transform(self) -> Transform:
        return transform_for(self.model)

    def __call__(self, image: Image) -> Tensor:
        return self.transform(image)


@contextmanager
def _explained(name: str, fix: str) -> Iterator[None]:
    """Turn whatever a library raises into one error that names the input and the fix."""
    try:
        yield
    except Exception as error:
        message = formats.one_line(error).rstrip(".")
        if "trust_remote_code" in str(error):
            fix = "If you trust that code, pass trust_remote_code=True (--trust-remote-code)"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"cannot load {name}: {message}. {fix}") from error


def _load_timm(name: str, rest: str, asked: _Asked) -> LoadedModel:
    import timm

    fix = "The names are those of timm.list_models(pretrained=True)"
    if rest.startswith("local-dir:"):
        fix = _CHECK_FOLDER
        _require(Path(rest.removeprefix("local-dir:")), "model.safetensors")
    with _explained(name, fix):
        model = timm.create_model(rest, pretrained=asked.pretrained, img_size=asked.image_size)
        return LoadedModel(model, _timm_transform(model, asked.image_size), name)


def _timm_transform(model: nn.Module, image_size: int | None = None) -> Transform:
    from timm.data import create_transform, resolve_model_data_config

    made_for = getattr(getattr(model, "patch_embed", None), "img_size", None)  # with create_model(..., img_size=...)
    height, width = (image_size, image_size) if image_size else made_for or (None, None)
    asked = {"input_size": (3, height, width)} if height else {}
    return create_transform(**resolve_model_data_config(model, args=asked), is_training=False)


def _load_transformers(name: str, rest: str, asked: _Asked) -> LoadedModel:
    import transformers

    local = Path(rest).is_dir()
    if local:
        _require(Path(rest), "config.json")
        if asked.pretrained:
            _require(Path(rest), "*.safetensors")
    processor = _image_processor(rest, asked)
    trust: dict[str, Any] = {"trust_remote_code": asked.trust_remote_code}
    with _explained(name, _CHECK_FOLDER if local else _CHECK_HUB), asked.as_trusted():
        config = transformers.AutoConfig.from_pretrained(rest, **trust)
        # The class that was saved, not the one of AutoModel, so that a head or a text tower is not lost.
        model_class = formats.transformers_class((config.architectures or [""])[0]) or transformers.AutoModel
        if asked.pretrained:
            # Only AutoModel is told: the classes of the library would take it for a setting.
            told = trust if model_class is transformers.AutoModel else {}
            model = model_class.from_pretrained(rest, dtype="auto", use_safetensors=True if local else None, **told)
        elif model_class is transformers.AutoModel:
            model = model_class.from_config(config, **trust)
        else:
            model = model_class(config)
    return LoadedModel(model, _Processor(processor), name, processor)


@dataclass(frozen=True)
class _Processor:
    """An image processor of transformers, for one image."""

    processor: Any

    def __call__(self, image: Image) -> Tensor:
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"]
        if pixels.ndim != 4 or len(pixels) != 1:
            raise ValueError(
                f"{type(self.processor).__name__} makes {tuple(pixels.shape)} of an image, not (1, 3, h, w), since "
                "it cuts images into tiles: pass a transform= of your own"
            )
        return pixels[0]


def _image_processor(source: str, asked: _Asked) -> Any:
    """The image processor of a checkpoint of transformers, its sizes scaled so that it makes the size asked for."""
    from transformers import AutoImageProcessor

    folder = Path(source)
    if folder.is_dir() and not any(
        (folder / f"{kind}_config.json").is_file() for kind in ("preprocessor", "processor")
    ):
        raise ValueError(
            f"{folder} has no preprocessor_config.json, which says how images are prepared: save it there with "
            "transformers.AutoImageProcessor.from_pretrained(ORIGINAL).save_pretrained(FOLDER)"
        )
    image_size, trust = asked.image_size, {"trust_remote_code": asked.trust_remote_code}
    with _explained(source, _CHECK_FOLDER if folder.is_dir() else _CHECK_HUB), asked.as_trusted():
        processor = AutoImageProcessor.from_pretrained(source, **trust)
        if image_size is None:
            return processor
        settings = processor.to_dict()
        sizes = {
            key: {edge: n for edge, n in dict(settings.get(key) or {}).items() if n} for key in ("size", "crop_size")
        }
        made = next(iter(sizes["crop_size" if settings.get("do_center_crop") else "size"].values()))
        scaled = {
            key: {edge: round(n * image_size / made) for edge, n in edges.items()}
            for key, edges in sizes.items()
            if edges
        }
        return AutoImageProcessor.from_pretrained(source, **trust, **scaled)


def _load_open_clip(name: str, rest: str, asked: _Asked) -> LoadedModel:
    import open_clip

    arch, tag, quick_gelu, fix = rest, None, False, "The names are those of open_clip.list_pretrained()"
    if rest.startswith("local-dir:"):
        fix = _CHECK_FOLDER
        _require(Path(rest.removeprefix("local-dir:")), "open_clip_model.safetensors")
    elif not rest.startswith("hf-hub:"):
        arch, _, tag = rest.rpartition("/")
        if not arch:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(rest)) or "a tag of open_clip.list_pretrained()"
            raise ValueError(f"{name} does not say which weights: add /PRETRAINED, which is {tags}")
        # Left to itself, open_clip runs OpenAI's weights with another activation than they were trained with.
        quick_gelu = bool(open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu"))
    with _explained(name, fix), asked.as_trusted():
        model, _, transform = open_clip.create_model_and_transforms(
            arch,
            tag if asked.pretrained else None,
            load_weights=asked.pretrained,
            pretrained_text=asked.pretrained,
            force_quick_gelu=quick_gelu,
            force_image_size=asked.image_size,
        )
    model.testreg_source = name
    return LoadedModel(model, transform, name)


def _open_clip_transform(preprocess: dict[str, Any]) -> Transform:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**preprocess), is_train=False)


def _load_hub(name: str, rest: str, asked: _Asked) -> LoadedModel:
    repository, _, entry = rest.rpartition("/")
    if repository.count("/") != 1 or not entry:
        raise ValueError(f"{name} is not of the form hub:OWNER/REPO/NAME")
    told: dict[str, Any] = {} if asked.pretrained else {"pretrained": False}
    if asked.trust_remote_code:
        told["trust_repo"] = True
    elif not _hub_trusts(repository):
        raise ValueError(
            f"{name} runs code from github.com/{repository}, which torch.hub was not told to trust: if you do, pass "
            "trust_remote_code=True (--trust-remote-code), or for good add the line "
            f"{repository.partition(':')[0].replace('/', '_')} to {torch.hub.get_dir()}/trusted_list"
        )
    with _explained(name, "Check the name on github.com, and the network"):
        model = torch.hub.load(repository, entry, **told)
    model.testreg_source = name
    return LoadedModel(model, _imagenet_transform(model, asked.image_size), name)


def _hub_trusts(repository: str) -> bool:
    """As torch.hub decides before a download. Left to itself, it takes whatever lies in its cache for trusted."""
    owner, repo = repository.partition(":")[0].split("/")
    trusted = Path(torch.hub.get_dir()) / "trusted_list"
    listed = trusted.read_text(encoding="utf-8").splitlines() if trusted.is_file() else []
    return owner in torch.hub._TRUSTED_REPO_OWNERS or f"{owner}_{repo}" in [line.strip() for line in listed]


def _imagenet_transform(model: nn.Module, image_size: int | None = None) -> Transform:
    """How DINO and DINOv2 evaluate on ImageNet: their repositories hand out no transform."""
    from torchvision import transforms

    patch_size = find_tower(model).patch_size[0]
    size = max((image_size or 224) // patch_size, 1) * patch_size
    steps = [
        transforms.Resize(round(size * _RESIZE), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ]
    return transforms.Compose(steps)


def _load_torchvision(name: str, rest: str, asked: _Asked) -> LoadedModel:
    from torchvision import models
    from torchvision.models.vision_transformer import interpolate_embeddings

    with _explained(name, "The names are those of torchvision.models.list_models()"):
        weights = models.get_model_weights(rest)["DEFAULT"]
        if asked.image_size is None:
            model = models.get_model(rest, weights=weights if asked.pretrained else None)
        else:
            model = models.get_model(rest, weights=None, image_size=asked.image_size)
            if asked.pretrained:
                state = weights.get_state_dict(progress=True, check_hash=True)
                model.load_state_dict(interpolate_embeddings(asked.image_size, model.patch_size, state))
        model.testreg_source = name
        return LoadedModel(model, _torchvision_transform(rest, asked.image_size), name)


def _torchvision_transform(model_name: str, image_size: int | None) -> Transform:
    from torchvision import models

    own = models.get_model_weights(model_name)["DEFAULT"].transforms
    if image_size in (None, own.keywords["crop_size"]):
        return own()
    return own(crop_size=image_size, resize_size=round(image_size * _RESIZE))


def _load_folder(name: str, asked: _Asked) -> LoadedModel:
    """The files in a checkpoint's folder tell which library wrote it."""
    folder = Path(name)
    if not folder.is_dir():
        meant = f": did you mean {_library_of_name(name)}:{name}?" if _library_of_name(name) else ""
        raise ValueError(
            f"{name[:300]!r} is neither a checkpoint folder nor a model name{meant or f': names are {NAMES}'}"
        )
    if os.path.lexists(folder / checkpoint.RECORD) or is_interrupted(folder):
        return _load_patched(name, asked)
    if (folder / "open_clip_config.json").is_file():
        return _load_open_clip(name, f"local-dir:{name}", asked)
    _require(folder, "config.json")
    with _explained(name, _CHECK_FOLDER):
        config = formats.read_json(folder / "config.json")
    if "architecture" in config:
        return _load_timm(name, f"local-dir:{name}", asked)
    if "model_type" in config:
        return _load_transformers(name, name, asked)
    raise ValueError(
        f'{folder / "config.json"} is neither of timm ("architecture") nor of transformers ("model_type"): testreg '
        "loads folders that timm, transformers, open_clip or testreg wrote"
    )


def _library_of_name(name: str) -> str:
    """The library that knows a model of that name, or may know it; "" if none."""
    import open_clip
    import timm

    if open_clip.get_pretrained_cfg(*name.rpartition("/")[::2]):
        return "open_clip"
    if timm.is_model(name):
        return "timm"
    return "hf" if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else ""


def _load_patched(name: str, asked: _Asked) -> LoadedModel:
    model = checkpoint.load(name)
    if getattr(model, "config", None) is not None:
        processor = _image_processor(name, asked)
        return LoadedModel(model, _Processor(processor), name, processor)
    if asked.image_size is not None:
        raise ValueError(
            f"the patched checkpoint {name} has a fixed image size: patch the original at that size instead"
        )
    return LoadedModel(model, transform_for(model), name)


def _require(folder: Path, pattern: str) -> None:
    """Refuse a folder that lacks such a file, or that holds files which no library should be given."""
    if folder.is_dir():
        formats.check_folder(folder)
    if any(folder.glob(pattern)):
        return
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    if pattern.endswith(".safetensors") and pickles:
        raise ValueError(
            f"{folder} has no {pattern}, and testreg reads no pickles ({pickles[0]}) from folders, since they can run "
            "code: if you trust it, load it with its own library and save it as safetensors"
        )
    raise FileNotFoundError(f"{folder} has no {pattern}: name the folder of a complete checkpoint")
