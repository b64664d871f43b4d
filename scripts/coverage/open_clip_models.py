"""open_clip's models with a ViT for images: with towers of its own, with timm's, and CoCa."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from open_clip.timm_model import timm as timm_of_open_clip
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor, nn

from coverage.registry import Architecture, images, label
from coverage.timm_models import GRID, MODULES, image_size, small

OPTIONS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("ViT-B-32", {"block_type": "custom"}),
    ("ViT-B-32", {"qk_norm": True, "scale_attn_inner": True, "scale_fc": True}),
    ("ViT-B-32", {"scale_heads": True, "scale_attn": True}),
    ("ViT-B-32", {"patch_dropout": 0.5, "final_ln_after_pool": True, "norm_kwargs": {"eps": 1e-6}}),
    ("ViT-B-32", {"pool_type": "none"}),
    ("coca_ViT-B-32", {"attentional_pool": "parallel"}),
    ("coca_ViT-B-32", {"attentional_pool": "cascade"}),
)
"""Options of towers that no configuration of the library uses. (`scaled_cosine_attn` is left out: it cannot run.)"""
WIDTH, VOCABULARY, CONTEXT = 32, 64, 8
SMALL_TEXT = {"width": WIDTH, "heads": 2, "layers": 1, "vocab_size": VOCABULARY, "context_length": CONTEXT}


def architectures() -> Iterator[Architecture]:
    """Yield every configuration with a ViT for images, then those with options."""
    transformers = {name for module in MODULES for name in timm.list_models(module=module)}
    transformers |= set(timm.list_models(module="vitamin"))
    names: list[tuple[str, Mapping[str, Any]]] = []
    for name in open_clip.list_models():
        vision = open_clip.get_model_config(name)["vision_cfg"]
        trunk = vision.get("timm_model_name")
        if trunk in transformers or (trunk is None and isinstance(vision["layers"], int)):
            names.append((name, {}))
    for name, options in (*names, *OPTIONS):
        yield Architecture("open_clip", label(name, options), partial(_build, name, options), run)


def _build(name: str, options: Mapping[str, Any]) -> nn.Module:
    config = _small_config(open_clip.get_model_config(name), options)
    with mock.patch.object(timm_of_open_clip, "create_model", partial(_small_trunk, timm.create_model)):
        model = open_clip.create_model(name, load_weights=False, **config)
    model.visual.image_size = _size(config["vision_cfg"])  # TimmModel does not know that its trunk was made small
    return model


def _small_config(config: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a small model with the same kind of image tower, and a text tower of open_clip.

    (A text tower of transformers would need a download, and does not matter here.)
    """
    vision = {**config["vision_cfg"], **options, "width": WIDTH, "head_width": WIDTH // 2, "layers": 3}
    if "timm_model_name" not in vision:
        vision["image_size"] = _size(vision)
    text = {key: value for key, value in config["text_cfg"].items() if not key.startswith("hf_")}
    small = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": {**text, **SMALL_TEXT}}
    if "multimodal_cfg" in config:
        small["text_cfg"]["embed_cls"] = True  # CoCa's text tower gives a summary beside its tokens
        small["multimodal_cfg"] = {**config["multimodal_cfg"], **SMALL_TEXT}
    return small


def _size(vision: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the small images. They are squares for CLIPA, whose sine position embeddings need that."""
    if "timm_model_name" in vision:
        return image_size(vision["timm_model_name"])
    patch = vision["patch_size"]
    rows, columns = (4, 4) if vision.get("pos_embed_type") == "sin_cos_2d" else GRID
    return rows * patch, columns * patch


def _small_trunk(create_model: Any, name: str, **arguments: Any) -> nn.Module:
    """Build the timm trunk of an open_clip model, but small. open_clip itself would pass no sizes on to timm."""
    sizes = small(name)
    if name.startswith("vitamin"):  # two stages of convolutions in front of the transformer
        norms = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
        widths = (WIDTH // 2, WIDTH, WIDTH)
        sizes["embed_cfg"] = VitCfg(widths, depths=(1, 1, 1), stem_width=WIDTH // 2, conv_cfg=norms, head_type="1d")
    return create_model(name, **arguments, **sizes)


def run(model: nn.Module, numbers: Sequence[int]) -> dict[str, Any]:
    """All outputs for pairs of an image and a text, except similarities, which depend on several pairs."""
    batch, text = images(numbers, *model.visual.image_size), _texts(numbers)
    outputs = {
        "encode_image": model.encode_image(batch),
        "encode_image, normalize": model.encode_image(batch, normalize=True),
        "visual": model.visual(batch),
        "forward": _pairs(model(batch, text)),
        "forward_intermediates": model.forward_intermediates(image=batch, text=text),
        "visual, forward_intermediates": model.visual.forward_intermediates(batch, **_options(model.visual)),
        "visual, stop early": model.visual.forward_intermediates(
            batch, indices=[0, 1], stop_early=True, intermediates_only=True
        ),
    }
    if isinstance(model, open_clip.CoCa):
        outputs["image only"] = model(batch)
    if hasattr(model.visual, "output_tokens"):
        with mock.patch.object(model.visual, "output_tokens", True):  # the native tower's switch for patch tokens
            outputs["visual, tokens"] = model.visual(batch)
    return outputs


def _texts(numbers: Sequence[int]) -> Tensor:
    """Token ids (B, L). A text depends on its number only, not on the batch; its last token ends it."""
    texts = torch.stack([torch.arange(3 + number, 3 + number + CONTEXT) for number in numbers])
    texts[:, -1] = 2
    return texts


def _pairs(output: Any) -> Any:
    """The parts of a forward's output that have one row for each pair."""
    if isinstance(output, tuple):
        return output[:2]
    return {name: output[name] for name in ("image_features", "text_features", "logits")}


def _options(visual: nn.Module) -> dict[str, Any]:
    """Options of `forward_intermediates` that this tower supports."""
    trunk = getattr(visual, "trunk", None)
    return {
        "output_fmt": "NLC",
        "output_extra_tokens": trunk is None or trunk.num_prefix_tokens > 0,
        "normalize_intermediates": getattr(visual, "attn_pool", None) is None,
    }
