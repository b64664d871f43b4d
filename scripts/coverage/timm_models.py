"""timm's Vision Transformers: every model name of its eight modules with ViTs, and options that no name uses."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

from coverage.registry import Absent, Architecture, image, images, label, padded_patches

MODULES = (
    *("vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam"),
    *("eva", "naflexvit", "beit", "deit"),
)
OPTIONS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True}),
    ("deit_base_distilled_patch16_224", {"dynamic_img_size": True}),
    ("samvit_base_patch16", {"use_rel_pos": False, "use_rope": True}),
    ("vit_base_patch16_224", {"dynamic_img_size": True, "dynamic_img_pad": True}),
    ("vit_base_patch16_xp_224", {"block_fn": partial(ParallelScalingBlock, fuse_out_proj=True)}),
    ("vit_relpos_base_patch16_cls_224", {"rel_pos_type": "bias"}),
    ("vit_relpos_base_patch16_224", {"rel_pos_type": "bias", "shared_rel_pos": True}),
    ("beit_base_patch16_224", {"swiglu_mlp": True, "scale_mlp": True}),
    ("eva02_base_patch14_224", {"attn_type": "rope"}),
    ("eva02_base_patch14_224", {"dynamic_img_size": True}),
    ("vit_base_patch16_rope_mixed_224", {"dynamic_img_size": True}),
    ("naflexvit_base_patch16_gap", {"attn_layer": "diff"}),
    ("naflexvit_base_patch16_gap", {"block_fn": ParallelScalingBlock}),
    ("naflexvit_base_patch16_gap", {"rope_type": "axial", "pos_embed": "none"}),
    ("naflexvit_base_patch16_gap", {"rope_type": "axial", "attn_gated": True, "swiglu_mlp": True}),
    ("naflexvit_base_patch16_gap", {"rope_type": "dinov3", "use_key_only_attn_mask": True}),
    ("naflexvit_base_patch16_gap", {"rope_type": "mixed", "pos_embed": "none"}),
    ("naflexvit_base_patch16_gap", {"rope_type": "mrope", "rope_mrope_section": (2, 3, 3)}),
    ("naflexvit_base_patch16_map", {"pre_norm": True, "use_key_only_attn_mask": True}),
    ("vit_dpwee_patch16_reg1_gap_256", {"use_naflex": True}),
    ("vit_base_patch16_clip_224", {"use_naflex": True}),
    ("eva02_base_patch16_clip_224", {"use_naflex": True}),
    ("vit_base_patch16_rope_mixed_ape_224", {"use_naflex": True}),
    ("vit_base_patch16_dinov3", {"use_naflex": True}),
)
RELEASE = tuple(map(int, timm.__version__.split(".")[:3]))
SMALL = {"depth": 3, "embed_dim": 32, "num_heads": 2}
GRID = (4, 5)  # rows and columns of patches


def architectures() -> Iterator[Architecture]:
    """Yield every ViT of timm, then those with options."""
    for module in MODULES:
        for name in timm.list_models(module=module):
            yield _architecture(name, {})
    for name, options in OPTIONS:
        yield _architecture(name, options)


def _architecture(name: str, options: Mapping[str, Any]) -> Architecture:
    height, width = image_size(name)
    build = partial(_build, name, options)
    return Architecture("timm", label(name, options), build, partial(run, height=height, width=width))


def _build(name: str, options: Mapping[str, Any]) -> nn.Module:
    arguments = {**small(name), "num_classes": 10, **options}
    try:
        return timm.create_model(name, pretrained=False, **arguments).eval()
    except ValueError as error:
        if "Unknown rope_type" in str(error):
            raise Absent(f"timm {timm.__version__} has no {label(name, options)}") from error
        raise


def small(name: str) -> dict[str, Any]:
    """Arguments of `timm.create_model` that make the model of this name small without changing its architecture."""
    if name.startswith("naflexvit"):
        return {**SMALL, "pos_embed_grid_size": (6, 6)}
    arguments = {**SMALL, "img_size": image_size(name)}
    if name == "vit_base_mci_224":  # its convolutions have a fixed width, which tokens must have too
        arguments |= {"embed_dim": 768, "num_heads": 12}
    if name.startswith("samvit"):  # as in the original, windows do not divide the grid, and some blocks are global
        arguments |= {"window_size": 3, "global_attn_indexes": (2,)}
    if name.endswith("sapiens2"):  # fewer key heads in the middle blocks, of which the base model has none
        arguments |= {"num_heads": 4, "num_kv_heads": (4, 4 if "base" in name else 2, 4), "embed_dim": 64}
    return arguments


def image_size(name: str) -> tuple[int, int]:
    """Height and width of images of few patches. They are not square, so that a mix-up of rows and columns shows."""
    if patch := re.search(r"patch(\d+)", name):
        return GRID[0] * int(patch[1]), GRID[1] * int(patch[1])
    if "resnet" in name or "_r" in name:  # hybrids, whose convolutions have stride 16 or 32 and are slow
        return 64, 96
    return GRID[0] * 16, GRID[1] * 16


def run(model: nn.Module, numbers: Sequence[int], *, height: int, width: int) -> dict[str, Any]:
    """All outputs of a timm model for images of one size, and for images of other sizes if it takes them."""
    outputs = _outputs(model, images(numbers, height, width))
    if getattr(model, "dynamic_img_size", False):
        outputs["other size"] = model.forward_intermediates(images(numbers, 2 * height, width))
    if hasattr(model, "embeds"):
        outputs |= _naflex_outputs(model, numbers)
    return outputs


def _outputs(model: nn.Module, batch: Tensor) -> dict[str, Any]:
    """The outputs of all methods that give features. Hybrids, which are slow, leave out some common ones."""
    features = model.forward_features(batch)
    outputs = {
        "forward": model(batch),
        "forward_features": features,
        "forward_head": model.forward_head(features),
        "pre_logits": model.forward_head(features, pre_logits=True),
    }
    for name, options in _intermediates(model).items():
        outputs[f"forward_intermediates, {name}"] = model.forward_intermediates(batch, **options)
    if hasattr(model, "get_intermediate_layers") and not _is_hybrid(model):
        outputs["get_intermediate_layers"] = model.get_intermediate_layers(batch, n=2)
        outputs["get_intermediate_layers, reshape"] = model.get_intermediate_layers(
            batch, n=[0, 2], reshape=True, return_prefix_tokens=True, norm=True
        )
    return outputs


def _is_hybrid(model: nn.Module) -> bool:
    """Whether a convolutional network embeds the patches."""
    return hasattr(getattr(model, "patch_embed", None), "backbone")


def _intermediates(model: nn.Module) -> dict[str, dict[str, Any]]:
    """{name: options of `forward_intermediates`} that this model supports: not all have prefix tokens, for example."""
    ways: dict[str, dict[str, Any]] = {
        "NCHW": {},
        "stop early": {"indices": [0, 1], "stop_early": True, "intermediates_only": True, "norm": True},
    }
    if _is_hybrid(model):
        return ways
    if hasattr(model, "num_prefix_tokens"):
        prefix = model.num_prefix_tokens > 0
        ways["NLC"] = {"output_fmt": "NLC", "norm": True, "return_prefix_tokens": prefix}
    if "output_dict" in inspect.signature(model.forward_intermediates).parameters:
        ways["dictionary"] = {"indices": 1, "output_dict": True, "return_prefix_tokens": True}
    return ways


def _naflex_outputs(model: nn.Module, numbers: Sequence[int]) -> dict[str, Any]:
    """All outputs of NaFlexVit for images of different sizes, padded into one batch, without those for padding.

    The tokens of all images are concatenated, so that the output of a batch is those of its images in a row.
    """
    padded = naflex_batch(model, numbers)
    valid = padded["patch_valid"]
    prefix = valid.new_ones(len(valid), model.num_prefix_tokens)
    options = {"output_fmt": "NLC", "norm": True, "output_dict": True, "return_prefix_tokens": True}
    outputs = {
        "padded, forward": model(padded),
        "padded, arguments": model(padded["patches"], padded["patch_coord"], valid),
        "padded, forward_features": model.forward_features(**padded)["patches"][torch.cat([prefix, valid], 1)],
    }
    if RELEASE >= (1, 0, 28):  # before that release, forward_intermediates takes no padded batch
        between = model.forward_intermediates(padded, **options)
        outputs["padded, forward_intermediates"] = [tokens[valid] for tokens in between["image_intermediates"]]
        outputs["padded, prefix"] = between.get("image_intermediates_prefix")
    return outputs


def naflex_batch(model: nn.Module, numbers: Sequence[int]) -> dict[str, Tensor]:
    """Images of different sizes as padded patches with coordinates, in the form that timm's collator makes."""
    side, _ = model.embeds.patch_size
    sizes = [((3, 5), (4, 3))[number % 2] for number in numbers]
    pictures = [image(number, *(side * size for size in grid)) for number, grid in zip(numbers, sizes, strict=True)]
    patches, positions, valid = padded_patches(pictures, side)
    return {"patches": patches, "patch_coord": positions.clamp(min=0), "patch_valid": valid}
