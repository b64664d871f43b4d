"""The preprocessing of a model, as the model's library defines it.

A *transform* maps an RGB image to the model's input (3, h, w); for a model that takes clips, it maps the frames of a
clip to (frames, 3, h, w).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from testreg.families import find_tower
from testreg.families.inputs import separate_images
from testreg.io.trust import CHECK_FOLDER, CHECK_HUB, asking_only_if, explained

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[[Any], Tensor]
"""Maps an RGB image to the model's input (3, h, w), or a list of RGB images (a clip) to (frames, 3, h, w)."""

_RESIZE = 256 / 224  # as ImageNet is evaluated: the short side is resized to 256, then the middle 224 x 224 are cropped


def transform_for(model: nn.Module) -> Transform:
    """The transform of a model of timm, transformers or open_clip, or of one that `testreg.load_model` loaded.

    Raises:
        ValueError, OSError: the model does not tell its preprocessing, or its processor cannot be found.
    """
    source, _, name = str(model.__dict__.get("testreg_source", "")).partition(":")
    config: Any = getattr(model, "config", None)
    if (preprocess := getattr(getattr(model, "visual", model), "preprocess_cfg", None)) is not None:
        return open_clip_transform(preprocess)
    if getattr(model, "pretrained_cfg", None):
        return timm_transform(model)
    if folder_or_name := getattr(config, "_name_or_path", ""):
        return processed_by(image_processor(folder_or_name), model)
    if source == "torchvision":
        return torchvision_transform(name, model.image_size)  # type: ignore[arg-type]
    if source == "hub":
        return imagenet_transform(model)
    raise ValueError(
        f"this {type(model).__name__} does not say how its images are prepared: pass transform=, a function from a PIL "
        "image to a tensor (3, h, w), or load the model with testreg.load_model"
    )


class OwnTransform:
    """The transform of a model, see `transform_for`; it is looked up when the first image needs it, not before."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @functools.cached_property
    def transform(self) -> Transform:
        return transform_for(self.model)

    def __call__(self, image: Any) -> Tensor:
        return self.transform(image)


def timm_transform(model: nn.Module, image_size: int | None = None) -> Transform:
    """The transform of a timm model, at another image size if one is given."""
    from timm.data import create_transform, resolve_model_data_config

    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)  # with create_model(..., img_size=...)
    height, width = (image_size, image_size) if image_size else built_for or (None, None)
    input_size = {"input_size": (3, height, width)} if height else {}
    return create_transform(**resolve_model_data_config(model, args=input_size), is_training=False)


_WHOLE_IMAGE_FIRST = ("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")
"""Processors that return the whole image first, then its tiles."""


def processed_by(processor: Any, model: nn.Module) -> Transform:
    """The transform that applies a processor of transformers to one image, or to one clip if the model takes clips."""
    try:
        tower = find_tower(model)
    except ValueError:  # no supported tower: running the model will raise this error
        return OneImage(processor)
    separate = functools.partial(tower.family.separate, getattr(tower.module, "config", None))
    return OneImage(processor, separate) if tower.num_frames is None else OneClip(processor, separate)


@dataclass(frozen=True)
class OneImage:
    """A transform that applies an image processor of transformers to one image.

    If the processor cuts images into tiles, the transform returns the whole image. That works for processors that
    return the whole image first, or that have an option not to cut; for others it raises ValueError.
    """

    processor: Any
    separate: Callable[[Mapping[str, Any]], list[Tensor]] = field(default=functools.partial(separate_images, None))

    def __call__(self, image: Image) -> Tensor:
        whole = {"do_image_splitting": False} if hasattr(self.processor, "do_image_splitting") else {}
        images = self.separate(self.processor(images=image, return_tensors="pt", **whole))
        if type(self.processor).__name__.startswith(_WHOLE_IMAGE_FIRST):
            del images[1:]
        if len(images) != 1:
            raise ValueError(
                f"{type(self.processor).__name__} makes {len(images)} images of one, since it cuts images into tiles: "
                "pass a transform= of your own, or what the processor returns, in which each tile counts as an image"
            )
        return images[0]


@dataclass(frozen=True)
class OneClip:
    """A transform that applies an image or video processor of transformers to the frames of one clip."""

    processor: Any
    separate: Callable[[Mapping[str, Any]], list[Tensor]]

    def __call__(self, frames: Sequence[Image]) -> Tensor:
        (clip,) = self.separate(self.processor(list(frames), return_tensors="pt"))
        return clip


def image_processor(source: str, image_size: int | None = None, trust_remote_code: bool = False) -> Any:
    """The image processor of a checkpoint of transformers, or its video processor if a folder has only that.

    Args:
        source: the checkpoint's folder, or its name on the Hub.
        image_size: side of the images that the processor shall make, in pixels: its sizes are scaled accordingly.
            None keeps them.

    Raises:
        ValueError, OSError: the checkpoint has no processor, or one whose size cannot be changed.
    """
    import transformers

    folder = Path(source)
    processors: Any = transformers.AutoImageProcessor
    if folder.is_dir() and not any(
        (folder / f"{kind}_config.json").is_file() for kind in ("preprocessor", "processor")
    ):
        processors = transformers.AutoVideoProcessor
    if folder.is_dir() and not any(folder.glob("*processor_config.json")):
        raise ValueError(
            f"{folder} has no preprocessor_config.json, which says how images are prepared: pass transform=, or write "
            "it there: testreg.save(model, FOLDER, processor=...), or transformers' processor.save_pretrained(FOLDER), "
            "with the processor of the original, transformers.AutoImageProcessor.from_pretrained(ORIGINAL)"
        )
    trust = {"trust_remote_code": trust_remote_code}
    with explained(source, CHECK_FOLDER if folder.is_dir() else CHECK_HUB), asking_only_if(trust_remote_code):
        processor = processors.from_pretrained(source, **trust)
        if image_size is None:
            return processor
        if hasattr(processor, "temporal_patch_size"):
            raise ValueError(f"{type(processor).__name__} keeps the shape of images: leave the image size out")
        settings = processor.to_dict()
        sizes = {
            key: {edge: n for edge, n in dict(settings.get(key) or {}).items() if n} for key in ("size", "crop_size")
        }
        size_made = next(iter(sizes["crop_size" if settings.get("do_center_crop") else "size"].values()))
        scaled = {
            key: {edge: round(n * image_size / size_made) for edge, n in edges.items()}
            for key, edges in sizes.items()
            if edges
        }
        return processors.from_pretrained(source, **trust, **scaled)


def own_processor(model: nn.Module) -> Any:
    """The image processor of the checkpoint that a transformers model was loaded from; None if it is not found."""
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "")
    try:
        return image_processor(name) if name else None
    except (OSError, ValueError):
        return None


def open_clip_transform(preprocess: dict[str, Any]) -> Transform:
    """The transform of an open_clip model, from its `preprocess_cfg`."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**preprocess), is_train=False)


def imagenet_transform(model: nn.Module, image_size: int | None = None) -> Transform:
    """The transform with which DINO and DINOv2 are evaluated on ImageNet. (Their repositories come without one.)"""
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


def torchvision_transform(model_name: str, image_size: int | None) -> Transform:
    """The transform of a torchvision model, at another image size if one is given."""
    from torchvision import models

    transform = models.get_model_weights(model_name)["DEFAULT"].transforms
    if image_size in (None, transform.keywords["crop_size"]):
        return transform()
    return transform(crop_size=image_size, resize_size=round(image_size * _RESIZE))
