"""The preprocessing of a model, as its own library defines it: RGB image -> the model's input (3, h, w).

Of a model that takes clips: the frames of one -> (frames, 3, h, w).
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
"""An RGB image -> the model's input (3, h, w), or a list of them, the frames of a clip -> (frames, 3, h, w)."""

_RESIZE = 256 / 224  # ImageNet evaluation: short side to 256, then the middle 224


def transform_for(model: nn.Module) -> Transform:
    """The preprocessing of a model that timm, transformers or open_clip made, or `load_model`: RGB image -> (3, h, w),
    or frames -> (frames, 3, h, w).

    Raises:
        ValueError, OSError: the model does not say, or what it says cannot be found.
    """
    source, _, name = str(model.__dict__.get("testreg_source", "")).partition(":")
    own_config: Any = getattr(model, "config", None)
    if (preprocess := getattr(getattr(model, "visual", model), "preprocess_cfg", None)) is not None:
        return open_clip_transform(preprocess)
    if getattr(model, "pretrained_cfg", None):
        return timm_transform(model)
    if folder_or_name := getattr(own_config, "_name_or_path", ""):
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
    """The transform that `transform_for(model)` finds, looked up only if an image needs it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @functools.cached_property
    def transform(self) -> Transform:
        return transform_for(self.model)

    def __call__(self, image: Any) -> Tensor:
        return self.transform(image)


def timm_transform(model: nn.Module, image_size: int | None = None) -> Transform:
    from timm.data import create_transform, resolve_model_data_config

    made_for = getattr(getattr(model, "patch_embed", None), "img_size", None)  # with create_model(..., img_size=...)
    height, width = (image_size, image_size) if image_size else made_for or (None, None)
    asked = {"input_size": (3, height, width)} if height else {}
    return create_transform(**resolve_model_data_config(model, args=asked), is_training=False)


_WHOLE_FIRST = ("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")  # and its tiles behind it


def processed_by(processor: Any, model: nn.Module) -> Transform:
    """The transform that applies a processor of transformers to one image, or to one clip, for the tower of a model."""
    try:
        tower = find_tower(model)
    except ValueError:  # which whoever runs it will say
        return OneImage(processor)
    separate = functools.partial(tower.family.separate, getattr(tower.module, "config", None))
    return OneImage(processor, separate) if tower.num_frames is None else OneClip(processor, separate)


@dataclass(frozen=True)
class OneImage:
    """A transform that applies an image processor of transformers to one image.

    Of a processor that cuts images into tiles, it takes the whole image: if that comes first, or if the processor can
    be told not to cut.
    """

    processor: Any
    separate: Callable[[Mapping[str, Any]], list[Tensor]] = field(default=functools.partial(separate_images, None))

    def __call__(self, image: Image) -> Tensor:
        whole = {"do_image_splitting": False} if hasattr(self.processor, "do_image_splitting") else {}
        images = self.separate(self.processor(images=image, return_tensors="pt", **whole))
        if type(self.processor).__name__.startswith(_WHOLE_FIRST):
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
    """The image processor of a checkpoint of transformers, its sizes scaled so that it makes the size asked for. That
    of videos, if a folder has no other."""
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
        made = next(iter(sizes["crop_size" if settings.get("do_center_crop") else "size"].values()))
        scaled = {
            key: {edge: round(n * image_size / made) for edge, n in edges.items()}
            for key, edges in sizes.items()
            if edges
        }
        return processors.from_pretrained(source, **trust, **scaled)


def own_processor(model: nn.Module) -> Any:
    """The image processor of the checkpoint that a model of transformers says it is; None if it says none, or if there
    is none or it cannot be fetched."""
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "")
    try:
        return image_processor(name) if name else None
    except (OSError, ValueError):
        return None


def open_clip_transform(preprocess: dict[str, Any]) -> Transform:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**preprocess), is_train=False)


def imagenet_transform(model: nn.Module, image_size: int | None = None) -> Transform:
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


def torchvision_transform(model_name: str, image_size: int | None) -> Transform:
    from torchvision import models

    own = models.get_model_weights(model_name)["DEFAULT"].transforms
    if image_size in (None, own.keywords["crop_size"]):
        return own()
    return own(crop_size=image_size, resize_size=round(image_size * _RESIZE))
