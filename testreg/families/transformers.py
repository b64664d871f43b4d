"""The rows for transformers, whose ViTs name their modules in three ways: as Google's ViT, as DINOv2, or as CLIP.

Modules are renamed between releases, so many rows have several candidates for a path.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from testreg.families.extend import extend_bias, extend_cu_seqlens, extend_rope, packed, unchanged
from testreg.families.family import STAGES, WINDOWS, Family, run_plainly
from testreg.families.inputs import separate_clips, separate_padded_patches


def _run_at_any_size(tower: Any, images: Tensor) -> Any:
    """Run a tower that needs an argument to interpolate its position embeddings."""
    return tower(images, interpolate_pos_encoding=True)


def _run_without_dropping(tower: Any, images: Tensor) -> Any:
    """Run MAE with all patches; by itself it drops most of them at random, in eval mode too."""
    ratio, tower.config.mask_ratio = tower.config.mask_ratio, 0.0
    rows, columns = tower.embeddings.patch_embeddings.projection.stride
    count = (images.shape[-2] // rows) * (images.shape[-1] // columns)
    order = torch.arange(count, device=images.device).expand(len(images), count)
    try:
        return tower(images, noise=order, interpolate_pos_encoding=True)
    finally:
        tower.config.mask_ratio = ratio


def _run_on_patches(tower: Any, images: Tensor) -> Any:
    """Run SigLIP 2, which takes the pixels of the patches (B, N, p * p * 3), a mask, and the grid of each image."""
    size = tower.config.patch_size
    rows, columns = images.shape[-2] // size, images.shape[-1] // size
    patches = images.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    grid = torch.tensor([rows, columns]).expand(len(images), 2)
    return tower(patches, torch.ones(patches.shape[:2], dtype=torch.long, device=images.device), grid)


def _run_on_frames(tower: Any, clips: Tensor) -> Any:
    """Run X-CLIP, which takes the frames of all clips in a row: (B * frames, 3, h, w)."""
    frames, name = clips.flatten(0, 1), "interpolate_pos_encoding"
    takes_any_size = name in inspect.signature(type(tower).forward).parameters  # not in transformers 4
    return tower(frames, **{name: True}) if takes_any_size else tower(frames)


def _square_patch_size(tower: Any) -> tuple[int, int]:
    """Height and width of a patch in pixels, from the configuration, which may have one number for both."""
    size = tower.config.patch_size
    return (size, size) if isinstance(size, int) else tuple(size)


VIT = Family(
    name="transformers ViT",
    library="transformers",
    towers=("ViTModel", "ViTMSNModel"),
    blocks=("layers", "encoder.layer"),
    fc2=("mlp.fc2", "output.dense"),
    patch_embed="embeddings.patch_embeddings.projection",
    positions=("embeddings.position_embeddings", "embeddings.pos_embed"),
    attention=("attention.attention", "attention"),
    run=_run_at_any_size,
)
_VIDEO = replace(VIT, takes="clips", separate=separate_clips, run=run_plainly)
_DINOV2 = replace(
    VIT,
    name="transformers Dinov2",
    towers=("Dinov2Model", "Dinov2Backbone"),
    blocks="encoder.layer",
    fc2=("mlp.down_proj", "mlp.weights_out", "mlp.fc2"),
    scale="layer_scale2.lambda1",
    run=run_plainly,  # it interpolates its position embeddings without being asked
)
_DINOV3 = replace(
    _DINOV2,
    name="transformers DINOv3ViT",
    towers=("DINOv3ViTModel", "DINOv3ViTBackbone"),
    blocks=("model.layer", "layer"),
    fc2="mlp.down_proj",
    patch_embed="embeddings.patch_embeddings",
    prefix=lambda tower: 1 + tower.config.num_register_tokens,
    trained_registers=lambda tower: tower.config.num_register_tokens,
    block_arguments={"position_embeddings": extend_rope},
)
CLIP = Family(
    name="transformers CLIP",
    library="transformers",
    towers=(
        *("CLIPVisionModel", "CLIPVisionTransformer", "CLIPSegVisionModel", "CLIPSegVisionTransformer"),
        *("MetaClip2VisionModel", "MetaClip2VisionTransformer", "AltCLIPVisionModel", "AltCLIPVisionTransformer"),
        *("ChineseCLIPVisionModel", "ChineseCLIPVisionTransformer", "GitVisionModel", "GitVisionTransformer"),
        *("Kosmos2VisionModel", "Kosmos2VisionTransformer", "OwlViTVisionModel", "OwlViTVisionTransformer"),
        *("Owlv2VisionModel", "Owlv2VisionTransformer"),
    ),
    blocks=("encoder.layers", "vision_model.encoder.layers", "model.encoder.layers"),
    fc2="mlp.fc2",
    patch_embed=(
        *("embeddings.patch_embedding", "vision_model.embeddings.patch_embedding"),
        "model.embeddings.patch_embedding",
    ),
    positions=(
        *("embeddings.position_embedding", "vision_model.embeddings.position_embedding"),
        *("model.embeddings.position_embedding", "visual.embeddings.position_embedding"),
    ),
    entry_norm=(  # most releases misspell it
        *("pre_layrnorm", "vision_model.pre_layrnorm", "model.pre_layrnorm"),
        *("pre_layernorm", "vision_model.pre_layernorm"),
    ),
    attention="self_attn",
    run=_run_at_any_size,
)
BLIP = replace(CLIP, name="transformers BLIP", towers="BlipVisionModel", entry_norm=())
SIGLIP = replace(
    CLIP,
    name="transformers SigLIP",
    towers=("SiglipVisionModel", "SiglipVisionTransformer"),
    prefix=0,
    entry_norm=(),
)

_LIKE_VIT = (
    VIT,
    replace(VIT, name="transformers DeiT", towers="DeiTModel", prefix=2),
    replace(VIT, name="transformers ViTMAE", towers="ViTMAEModel", run=_run_without_dropping),
    replace(VIT, name="transformers IJepa", towers="IJepaModel", prefix=0),
    replace(
        VIT,
        name="transformers Pixio",
        towers="PixioModel",
        prefix=lambda tower: tower.config.n_cls_tokens,
        run=run_plainly,
    ),
    replace(
        VIT,
        name="transformers BEiT",
        towers=("BeitModel", "BeitBackbone"),  # from transformers 5 on, the backbone holds the model as `beit`
        blocks=("layers", "encoder.layer", "beit.layers"),
        patch_embed=(
            "embeddings.patch_embeddings.projection",
            "beit.embeddings.patch_embeddings.projection",
        ),
        scale="lambda_2",
        bias=("relative_position_bias.forward", "attention.attention.relative_position_bias.forward"),
        bias_count="dim_size",
        block_arguments={"relative_position_bias": extend_bias},
        run=run_plainly,
    ),
    replace(
        VIT,
        name="transformers Data2VecVision",
        towers="Data2VecVisionModel",
        scale="lambda_2",
        bias="attention.attention.relative_position_bias.forward",
        bias_count="dim_size",
        block_arguments={"relative_position_bias": extend_bias},
        run=run_plainly,
    ),
    replace(VIT, name="transformers FLAVA", towers="FlavaImageModel"),
    replace(
        VIT,
        name="transformers DPT",
        towers="DPTModel",
        patch_size=_square_patch_size,  # its hybrid has a convolutional network as embedding
        run=run_plainly,
    ),
    replace(
        VIT,
        name="transformers VitPose",
        towers="VitPoseBackbone",
        prefix=0,
        consumers="mlp.experts",
        block_arguments={"dataset_index": unchanged},
        run=run_plainly,
    ),
    replace(
        VIT,
        name="transformers MGP-STR",
        towers="MgpstrModel",
        blocks="encoder.blocks",
        attention="attn",
        patch_embed="embeddings.proj",
        run=run_plainly,
    ),
    replace(_VIDEO, name="transformers ViViT", towers="VivitModel", run=_run_at_any_size),
    replace(_VIDEO, name="transformers VideoMAE", towers="VideoMAEModel", prefix=0),
    replace(
        VIT,
        name="transformers VideoPrism",
        towers="VideoPrismVisionModel",
        blocks="spatial_layers",
        prefix=0,
        patch_embed="spatial_embeddings.patch_embeddings.projection",
        run=None,
    ),
    replace(
        VIT,
        name="transformers Pix2Struct",
        towers="Pix2StructVisionModel",
        blocks="encoder.layer",
        fc2="mlp.wo",
        patch_embed=(),
        prefix=0,
        run=None,
    ),
)
_LIKE_DINOV2 = (
    _DINOV2,
    replace(
        _DINOV2,
        name="transformers Dinov2WithRegisters",
        towers=(
            *("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
            *("Tipsv2VisionModel", "Tipsv2VisionBackbone"),
        ),
        prefix=lambda tower: 1 + tower.config.num_register_tokens,
        trained_registers=lambda tower: tower.config.num_register_tokens,
    ),
    _DINOV3,
    replace(_DINOV3, name="transformers Sapiens2", towers=("Sapiens2Model", "Sapiens2Backbone"), blocks="model.layer"),
    replace(
        _DINOV2,
        name="transformers RADIO",
        towers="RadioModel",
        prefix=lambda tower: tower.config.num_summary_tokens,
        patch_embed=(),
        patch_size=_square_patch_size,
        layout=packed,
        block_arguments={"cu_seqlens": extend_cu_seqlens},
    ),
)
_LIKE_CLIP = (
    CLIP,
    replace(
        CLIP,
        name="transformers X-CLIP",
        towers=("XCLIPVisionModel", "XCLIPVisionTransformer"),
        appended=1,  # the token by which frames exchange messages: each block makes it from CLS, and removes it again
        takes="clips",
        separate=separate_clips,
        frames_apart=True,
        run=_run_on_frames,
    ),
    replace(
        CLIP,
        name="transformers MLCD",
        towers=("MLCDVisionModel", "MLCDVisionTransformer"),
        block_arguments={"position_embeddings": extend_rope},
        run=run_plainly,
    ),
    BLIP,
    SIGLIP,
    replace(
        SIGLIP,
        name="transformers SigLIP 2",
        towers=("Siglip2VisionModel", "Siglip2VisionTransformer"),
        patch_embed=("embeddings.patch_embedding", "vision_model.embeddings.patch_embedding"),  # a linear
        patch_size=_square_patch_size,
        separate=separate_padded_patches,
        keeps_shape=True,
        run=_run_on_patches,
    ),
    replace(
        SIGLIP,
        name="transformers AIMv2",
        towers="Aimv2VisionModel",
        fc2="ffn.down_proj",
        patch_embed="embeddings.patch_embed",
        attention="attention",
        run=run_plainly,
    ),
    replace(
        CLIP,
        name="transformers BridgeTower",
        towers="BridgeTowerVisionModel",
        blocks="visual.transformer.resblocks",
        fc2="mlp.c_proj",
        patch_embed="visual.embeddings.patch_embedding",
        entry_norm="visual.ln_pre",
        attention=(),
        sequence_first=lambda tower: True,
        run=lambda tower, images: tower(images, None, True),
    ),
)

FAMILIES = (*_LIKE_VIT, *_LIKE_DINOV2, *_LIKE_CLIP)

# Why the method does not fit towers to which tokens of other kinds are added on the way.
TOKENS_ADDED = "other tokens join the patches between or behind the blocks' own, so that a register cannot follow them"
REFUSED = {
    **dict.fromkeys(("SamVisionEncoder", "SamHQVisionEncoder", "DeepseekOcr2SamVisionEncoder"), WINDOWS),
    **dict.fromkeys(("Sam3ViTModel", "VitDetModel", "VitDetBackbone", "SegGptModel"), WINDOWS),
    **dict.fromkeys(("RfDetrDinov2Backbone", "LwDetrViTBackbone"), WINDOWS),
    **dict.fromkeys(("Sam2HieraDetModel", "SwinModel", "SwinBackbone", "HieraModel", "PvtModel"), STAGES),
    **dict.fromkeys(("GroupViTVisionTransformer", "DavitModel"), STAGES),
    **dict.fromkeys(("YolosModel", "ViltModel"), TOKENS_ADDED),
    "EomtForUniversalSegmentation": TOKENS_ADDED,
    "EomtDinov3ForUniversalSegmentation": TOKENS_ADDED,
    "VideomtForUniversalSegmentation": TOKENS_ADDED,
    "TimesformerModel": "blocks rearrange their tokens to rows, columns and frames, where a register has no place",
    "VJEPA2Model": "attention counts its tokens to place them in space and time, and would place a register too",
    "VJEPA2Encoder": "attention counts its tokens to place them in space and time, and would place a register too",
}
