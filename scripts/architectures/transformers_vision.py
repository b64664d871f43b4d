"""The Vision Transformers of transformers, apart from the generative VLMs: one row for each config that matters.

All are three blocks deep (where a head taps four: four), 32 wide and see four by four patches: what is checked is the
code of an architecture, which does not depend on its size. Every flag that changes the blocks has a row of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from architectures import Absent, Architecture, image, images

Settings = dict[str, Any]
Inputs = Callable[[Sequence[int]], dict[str, Any]]

# One dictionary fits all, because a config keeps whatever it does not know as a plain attribute.
_TINY: Settings = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "mlp_ratio": 2,
    "image_size": 32,
    "pretrain_image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
_TEXT: Settings = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_FLOAT = {"mlp_ratio": 2.0}  # some configs insist on a float here, the others on an integer
_TAPS = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
_TOKENS = [0, 5, 6, 7, 8, 2]


def _tiny(**flags: Any) -> Settings:
    return _TINY | flags


def _pair(text: Settings | None = None, **vision: Any) -> Settings:
    """A CLIP: an image and a text tower."""
    return {
        "vision_config": _tiny(projection_dim=16, **vision),
        "text_config": _TEXT | {"projection_dim": 16} | (text or {}),
        "projection_dim": 16,
    }


def _dense(backbone: str = "dinov2", flags: Settings | None = None, **head: Any) -> Settings:
    """A head with a small convolutional neck on the four taps of a backbone."""
    flags = {"reshape_hidden_states": False} | (flags or {})
    return {
        "backbone_config": {"model_type": backbone, **_TINY, **_TAPS, **flags},
        "patch_size": 8,
        "reassemble_hidden_size": 32,
        "neck_hidden_sizes": [8, 8, 8, 8],
        "fusion_hidden_size": 8,
        "head_hidden_size": 8,
        "num_labels": 5,
        **head,
    }


def _pixels(height: int = 32, width: int | None = None, **more: Any) -> Inputs:
    return lambda numbers: {"pixel_values": images(numbers, height, width), **more}


def _texts(count: int | None = 2, **more: Any) -> Inputs:
    """Images and `count` texts that every image is compared with; None: a text for each image."""
    return lambda numbers: {
        "pixel_values": images(numbers, 32),
        "input_ids": torch.tensor([_TOKENS] * (count or len(numbers))),
        **more,
    }


def _video(frames: int = 4, size: int = 32, key: str = "pixel_values", **more: Any) -> Inputs:
    return lambda numbers: {
        key: torch.stack([images(range(n * frames, (n + 1) * frames), size) for n in numbers]),
        **more,
    }


def _of_several_sizes(texts: Mapping[str, Tensor] | None = None) -> Inputs:
    """SigLIP 2: patches as vectors, padded to a common length; even images have four rows of them, odd ones three."""

    def inputs(numbers: Sequence[int]) -> dict[str, Any]:
        patches, shapes = [], []
        for number in numbers:
            rows = 4 - number % 2
            vectors = (
                image(number, rows * 8, 32).unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 3, 4, 0).reshape(-1, 192)
            )
            patches.append(torch.cat([vectors, vectors.new_zeros(16 - len(vectors), 192)]))
            shapes.append((rows, 4))
        shape = torch.tensor(shapes)
        mask = (torch.arange(16) < shape.prod(1, keepdim=True)).long()
        padded = {"pixel_values": torch.stack(patches), "pixel_attention_mask": mask, "spatial_shapes": shape}
        return padded | dict(texts or {})

    return inputs


def _flattened(numbers: Sequence[int]) -> dict[str, Any]:
    """Pix2Struct: every patch is its row, its column and its values; rows and columns of padding are zero."""
    patches = images(numbers, 32).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(-1, 16, 192)
    place = torch.cartesian_prod(torch.arange(1.0, 5), torch.arange(1.0, 5)).expand(len(numbers), -1, -1)
    patches = torch.cat([torch.cat([place, patches], -1), torch.zeros(len(numbers), 4, 194)], 1)
    return {"flattened_patches": patches, "attention_mask": (patches[..., 0] > 0).float()}


def _in_order(numbers: Sequence[int]) -> dict[str, Any]:
    """ViT-MAE keeps the patches of smallest noise, which it would draw itself: here the first ones, in their order."""
    return {"pixel_values": images(numbers, 32), "noise": torch.arange(16.0).expand(len(numbers), -1)}


def _masked_video(numbers: Sequence[int]) -> dict[str, Any]:
    mask = (torch.arange(32) % 2).bool().expand(len(numbers), -1)
    return _video()(numbers) | {"bool_masked_pos": mask}


def _with_experts(numbers: Sequence[int]) -> dict[str, Any]:
    return {"pixel_values": images(numbers, 32, 24), "dataset_index": torch.tensor([n % 3 for n in numbers])}


def _prompted(numbers: Sequence[int]) -> dict[str, Any]:
    """SegGPT: an example image with its mask above the image to segment."""
    example = {"prompt_pixel_values": images([n + 10 for n in numbers], 32)}
    return {"pixel_values": images(numbers, 32), "prompt_masks": images([n + 20 for n in numbers], 32), **example}


def _decoding(numbers: Sequence[int]) -> dict[str, Any]:
    tokens = torch.tensor([_TOKENS] * len(numbers))
    return {"pixel_values": images(numbers, 32), "decoder_input_ids": tokens, "use_cache": False}


def _kosmos(numbers: Sequence[int]) -> dict[str, Any]:
    """Two of the tokens are places for what the resampler makes of the image."""
    places = torch.tensor([[0, 1, 1, 0, 0, 0]] * len(numbers))
    return _texts(None)(numbers) | {"image_embeds_position_mask": places, "use_cache": False}


_SQUARE = _pixels()
_WIDE = _pixels(32, 48)
_WIDE_INTERPOLATED = _pixels(32, 48, interpolate_pos_encoding=True)


@dataclass(frozen=True)
class _Row:
    classes: str
    """Names of public classes, with a space between."""
    settings: Settings
    """What their config is made from."""
    inputs: Inputs = _SQUARE
    variant: str = ""
    """What sets this row apart from another one of the same classes."""
    extras: Sequence[str] = ("hidden_states", "attentions")
    """Optional outputs, where the model has them and they do not depend on other images or on chance."""
    parts: int = 1
    """In how many parts, one behind the other, the outputs hold all images: VidEoMT's are ordered by frame."""


_RELATIVE = {"use_relative_position_bias": True}
_SHARED = {"use_shared_relative_position_bias": True}
_ABSOLUTE = {"use_absolute_position_embeddings": True}
_EAGER = {"attn_implementation": "eager"}  # for models that choose it when they are built
_IMAGE_ENCODERS = (
    _Row("ViTModel ViTForImageClassification ViTForMaskedImageModeling", _tiny(encoder_stride=8)),
    _Row("ViTModel ViTForImageClassification", _tiny(qkv_bias=False), _WIDE_INTERPOLATED, "4x6 patches"),
    _Row("DeiTModel DeiTForImageClassification DeiTForImageClassificationWithTeacher", _tiny()),
    _Row("DeiTForMaskedImageModeling", _tiny(encoder_stride=8)),
    _Row("ViTMSNModel ViTMSNForImageClassification", _tiny()),
    _Row("ViTMAEModel", _tiny(mask_ratio=0.0), _in_order),
    _Row(
        "ViTMAEModel ViTMAEForPreTraining",
        _tiny(
            mask_ratio=0.5,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=64,
        ),
        _in_order,
        "half masked",
    ),
    _Row("IJepaModel IJepaForImageClassification", _tiny()),
    _Row("IJepaModel", _tiny(), _WIDE_INTERPOLATED, "4x6 patches"),
    _Row("BeitModel BeitForImageClassification Data2VecVisionModel Data2VecVisionForImageClassification", _tiny()),
    _Row("BeitModel BeitForImageClassification Data2VecVisionModel", _tiny(**_RELATIVE), variant="bias in each block"),
    _Row("BeitModel Data2VecVisionModel", _tiny(**_SHARED), variant="shared bias"),
    _Row("BeitModel Data2VecVisionModel", _tiny(**_ABSOLUTE), variant="absolute positions"),
    _Row("BeitModel Data2VecVisionModel", _tiny(layer_scale_init_value=0.0), variant="no layer scale"),
    _Row("Data2VecVisionModel", _tiny(**_RELATIVE, **_EAGER), variant="bias in each block, eager"),
    _Row("Data2VecVisionModel", _tiny(**_SHARED, **_EAGER), variant="shared bias, eager"),
    _Row("BeitModel Data2VecVisionModel", _tiny(use_mean_pooling=False), variant="CLS pooling"),
    _Row("BeitModel", _tiny(**_RELATIVE), _WIDE_INTERPOLATED, "bias in each block, 4x6 patches"),
    _Row("BeitModel", _tiny(**_SHARED), _WIDE_INTERPOLATED, "shared bias, 4x6 patches"),
    _Row("BeitForMaskedImageModeling", _tiny(use_mask_token=True, vocab_size=20, **_SHARED)),
    _Row("BeitBackbone", _tiny(**_RELATIVE, out_indices=[1, 3])),
    _Row("BeitBackbone", _tiny(**_SHARED, **_TAPS, add_fpn=True), variant="shared bias, FPN"),
    _Row(
        "BeitForSemanticSegmentation Data2VecVisionForSemanticSegmentation",
        _tiny(**_RELATIVE, **_TAPS, pool_scales=[1, 2], auxiliary_channels=8),
    ),
    _Row("Dinov2Model Dinov2ForImageClassification Dinov2Backbone", _tiny(out_indices=[1, 3])),
    _Row("Dinov2Model Dinov2Backbone", _tiny(use_swiglu_ffn=True), _WIDE, "SwiGLU, 4x6 patches"),
    _Row(
        "Dinov2Backbone Dinov2WithRegistersBackbone",
        _tiny(reshape_hidden_states=False, apply_layernorm=False),
        variant="token sequences",
    ),
    _Row(
        "Dinov2WithRegistersModel Dinov2WithRegistersForImageClassification Dinov2WithRegistersBackbone",
        _tiny(out_indices=[1, 3]),
    ),
    _Row("Dinov2WithRegistersModel", _tiny(use_swiglu_ffn=True), _WIDE, "SwiGLU, 4x6 patches"),
    _Row("DINOv3ViTModel DINOv3ViTBackbone", _tiny()),
    _Row("DINOv3ViTModel", _tiny(num_register_tokens=4, use_gated_mlp=True), _WIDE, "registers, gated, 4x6 patches"),
    _Row("DINOv3ViTBackbone", _tiny(num_register_tokens=4, out_indices=[1, 3]), variant="registers"),
    _Row("PixioModel PixioBackbone", _tiny(out_indices=[1, 3])),
    _Row("PixioModel", _tiny(n_cls_tokens=1), _WIDE, "one CLS, 4x6 patches"),
    _Row("RadioModel", _tiny(max_img_size=64, **_FLOAT)),
    _Row("RadioModel", _tiny(max_img_size=64, **_FLOAT, use_swiglu_ffn=True), _WIDE, "SwiGLU, 4x6 patches"),
    _Row("Tipsv2VisionModel Tipsv2VisionBackbone", _tiny(out_indices=[1, 3])),
    _Row("Tipsv2VisionModel", _tiny(use_swiglu_ffn=True), _WIDE, "SwiGLU, 4x6 patches"),
    _Row("Aimv2VisionModel", _tiny()),
    _Row("Aimv2VisionModel", _tiny(qkv_bias=True, mlp_bias=True, use_head=False), variant="biases, no head"),
    _Row("Aimv2VisionModel", _tiny(is_native=True), _WIDE, "native, 4x6 patches"),
    _Row("MLCDVisionModel", _tiny()),
    _Row(
        "SegGptModel SegGptForImageSegmentation",
        _tiny(image_size=[64, 32], merge_index=0, intermediate_hidden_state_indices=[1, 2]),
        _prompted,
        extras=(),
    ),
    _Row("Sapiens2Model Sapiens2Backbone", _tiny(num_first_full_attention_layers=3, out_indices=[1, 3])),
    _Row(
        "Sapiens2Model",
        _tiny(num_key_value_heads_per_layer=[4, 2, 4], use_qk_norm=False, use_gated_mlp=False, num_register_tokens=0),
        _WIDE,
        "grouped queries, plain MLP, no registers, 4x6 patches",
    ),
    _Row(
        "TimmWrapperModel TimmWrapperForImageClassification",
        {
            "architecture": "vit_tiny_patch16_224",
            "model_args": {"depth": 3, "embed_dim": 32, "num_heads": 4, "img_size": 32, "patch_size": 8},
            "num_labels": 5,
        },
        extras=("hidden_states",),
    ),
    _Row(
        "TimmWrapperModel",
        {
            "architecture": "eva02_tiny_patch14_224",
            "model_args": {"depth": 3, "embed_dim": 32, "num_heads": 4, "img_size": 32, "patch_size": 8},
        },
        extras=("hidden_states",),
        variant="EVA02",
    ),
    _Row("TimmBackbone", {"backbone": "test_vit", "out_indices": [1, 3]}, _pixels(160), extras=()),
)

_CONTRASTIVE = (
    _Row("CLIPVisionModel CLIPVisionModelWithProjection", _tiny(projection_dim=16)),
    _Row("CLIPVisionModel", _tiny(), _WIDE_INTERPOLATED, "4x6 patches"),
    _Row("CLIPModel MetaClip2Model", _pair(), _texts()),
    _Row("MetaClip2VisionModel MetaClip2VisionModelWithProjection", _tiny(projection_dim=16)),
    _Row("CLIPForImageClassification MetaClip2ForImageClassification", _pair() | {"num_labels": 5}),
    _Row("CLIPSegVisionModel AltCLIPVisionModel ChineseCLIPVisionModel GitVisionModel", _tiny()),
    _Row("CLIPSegModel", _pair(), _texts()),
    _Row(
        "CLIPSegForImageSegmentation",
        _pair() | {"extract_layers": [1, 2], "reduce_dim": 16, "decoder_intermediate_size": 32},
        _texts(None),
    ),
    _Row("AltCLIPModel", _pair(text={"project_dim": 16}), _texts()),
    _Row("ChineseCLIPModel", _pair(), _texts()),
    _Row("SiglipVisionModel", _tiny()),
    _Row("SiglipVisionModel", _tiny(vision_use_head=False), _WIDE_INTERPOLATED, "no head, 4x6 patches"),
    _Row("SiglipModel", _pair(), _texts()),
    _Row("SiglipForImageClassification", _pair() | {"num_labels": 5}),
    _Row("Siglip2VisionModel", _tiny(num_patches=16), _of_several_sizes()),
    _Row("Siglip2VisionModel", _tiny(num_patches=16, vision_use_head=False), _of_several_sizes(), "no head"),
    _Row("Siglip2Model", _pair(num_patches=16), _of_several_sizes({"input_ids": torch.tensor([_TOKENS] * 2)})),
    _Row("Siglip2ForImageClassification", _pair(num_patches=16) | {"num_labels": 5}, _of_several_sizes()),
    _Row("Aimv2Model", _pair(), _texts()),
    _Row("Tipsv2Model", _pair(), _texts()),
    _Row("OwlViTVisionModel Owlv2VisionModel", _tiny()),
    _Row("OwlViTVisionModel Owlv2VisionModel", _tiny(), _WIDE_INTERPOLATED, "4x6 patches"),
    _Row("OwlViTModel Owlv2Model", _pair(), _texts()),
    _Row("OwlViTForObjectDetection Owlv2ForObjectDetection", _pair() | {"projection_dim": 32}, _texts(None)),
    _Row("GroupViTVisionModel", _tiny(depths=[2, 1], num_group_tokens=[4, 0], num_output_groups=[4, 2])),
    _Row("FlavaImageModel", _tiny()),
    _Row(
        "FlavaModel",
        {
            "image_config": _TINY,
            "text_config": _TEXT,
            "multimodal_config": {"model_type": "flava_multimodal_model", **_TINY},
            "hidden_size": 32,
            "projection_dim": 16,
        },
        _texts(None),
    ),
    _Row(
        "VisionTextDualEncoderModel",
        {
            "vision_config": {"model_type": "vit", **_TINY},
            "text_config": {"model_type": "bert", **_TEXT},
            "projection_dim": 16,
        },
        _texts(),
    ),
    _Row("BlipVisionModel", _tiny()),
    _Row("BlipVisionModel", _tiny(), _WIDE_INTERPOLATED, "4x6 patches"),
    _Row("BlipModel", _pair(), _texts()),
    _Row("BlipForImageTextRetrieval", _pair(text={"encoder_hidden_size": 32}), _texts(None)),
)

_BRIDGETOWER = {
    "vision_config": _tiny(hidden_size=128),  # a head for every 64 channels
    "text_config": _TEXT | {"hidden_size": 128, "num_hidden_layers": 3},
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
}
_GENERATIVE = {"decoder": {"model_type": "trocr", "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4}}
_FUSED = (
    _Row("BridgeTowerModel", _BRIDGETOWER, _texts(None), extras=("attentions",)),  # hidden states are (T, B, C)
    # ViLT shuffles the patches, each with its position: only what is read off the text tokens stays the same.
    _Row("ViltForQuestionAnswering ViltForImageAndTextRetrieval", _TEXT | _TINY, _texts(None), extras=()),
    _Row(
        "VisionEncoderDecoderModel",
        {"encoder": {"model_type": "vit", **_TINY}} | _GENERATIVE,
        _decoding,
        "TrOCR with ViT",
    ),
    _Row(
        "VisionEncoderDecoderModel",
        {"encoder": {"model_type": "deit", **_TINY}} | _GENERATIVE,
        _decoding,
        "TrOCR with DeiT",
    ),
    _Row(
        "Kosmos2Model",
        {
            "vision_config": _TINY,
            "text_config": {"vocab_size": 50, "embed_dim": 32, "layers": 1, "ffn_dim": 64, "attention_heads": 4},
            "latent_query_num": 2,
        },
        _kosmos,
    ),
    _Row("GitModel", _TEXT | {"vision_config": _TINY}, _texts(None, use_cache=False)),
    _Row(
        "Pix2StructVisionModel",
        {"hidden_size": 32, "patch_embed_hidden_size": 192, "d_ff": 64, "d_kv": 8, "num_hidden_layers": 3}
        | {"num_attention_heads": 4, "seq_len": 20},
        _flattened,
    ),
    _Row(
        "DeepseekOcr2VisionModel",
        {
            "sam_config": _tiny(
                window_size=2,
                global_attn_indexes=[1],
                output_channels=16,
                downsample_channels=[16, 32],
                image_size=64,
                **_FLOAT,
            ),
            "encoder_config": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
            | {"num_key_value_heads": 2, "intermediate_size": 64},
        },
        _pixels(64),
    ),
)

_WINDOWS = {"window_size": 2, "global_attn_indexes": [2]}
_SAM = {**_TINY, **_FLOAT, "output_channels": 16, "num_pos_feats": 8}
_DETR = {
    "d_model": 32,
    "decoder_ffn_dim": 64,
    "decoder_layers": 1,
    "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 4,
    "num_queries": 4,
    "group_detr": 1,
    "c2f_num_blocks": 1,
    "intermediate_size": 64,
    "num_labels": 5,
}
_RF_DETR = _DETR | {
    "backbone_config": {"model_type": "rf_detr_dinov2", **_TINY, "num_windows": 2, "out_indices": [1, 3]}
}
_QUERIES = {"num_blocks": 1, "num_queries": 3, "num_upscale_blocks": 1}
_POSE = {"image_size": [32, 24], "patch_size": [8, 8], "part_features": 16}
_PYRAMID = {
    "upsample_out_channels": [8, 8],
    "conv_out_channels": [8],
    "scale_conv_out_channels": [8],
    "scale_final_hidden_sizes": [8, 8],
}
_PRO = {"model_type": "dinov2", **_TINY}
_DENSE = (
    _Row("DepthAnythingForDepthEstimation PromptDepthAnythingForDepthEstimation", _dense()),
    _Row("DPTModel", _tiny(is_hybrid=False)),
    _Row(
        "DPTForDepthEstimation DPTForSemanticSegmentation",
        _tiny(num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8),
    ),
    _Row("DPTForDepthEstimation", _dense(), variant="Dinov2 backbone"),
    _Row(
        "ZoeDepthForDepthEstimation",
        _dense("beit", _RELATIVE, bottleneck_features=8, bin_embedding_dim=8, num_attractors=[4, 2, 2, 1]),
    ),
    _Row(
        "DepthProForDepthEstimation",
        {
            "image_model_config": _PRO,
            "patch_model_config": _PRO,
            "fov_model_config": _PRO,
            "patch_size": 32,
            "fusion_hidden_size": 16,
            "intermediate_hook_ids": [2, 1],
            "intermediate_feature_dims": [8, 8],
            "scaled_images_feature_dims": [8, 8, 8],
            "merge_padding_value": 1,
            "use_fov_model": True,
        },
        _pixels(128),
    ),
    _Row(
        "CHMv2ForDepthEstimation",
        _dense(
            "dinov3_vit",
            {"return_class_token": True, "reshape_hidden_states": True},
            post_process_channels=[8] * 4,
            number_output_channels=8,
        ),
    ),
    _Row(
        "Tipsv2DptForDepthEstimation Tipsv2DptForNormalEstimation Tipsv2DptForSemanticSegmentation",
        _dense("tipsv2_vision_model"),
    ),
    _Row("VitPoseBackbone", _tiny(**_POSE, out_indices=[1, 3]), _pixels(32, 24)),
    _Row("VitPoseBackbone", _tiny(**_POSE, num_experts=3, out_indices=[1, 3]), _with_experts, "experts"),
    *(
        _Row(
            "VitPoseForPoseEstimation",
            {
                "backbone_config": {"model_type": "vitpose_backbone", **_TINY, **_POSE},
                "use_simple_decoder": simple,
                "num_labels": 5,
            },
            _pixels(32, 24),
            "simple decoder" if simple else "",
        )
        for simple in (False, True)
    ),
    _Row("VitDetModel VitDetBackbone", _tiny(use_relative_position_embeddings=True, out_indices=[1, 3])),
    _Row(
        "VitDetModel", _tiny(window_size=2, window_block_indices=[0, 1], residual_block_indices=[2]), variant="windows"
    ),
    _Row(
        "VitMatteForImageMatting",
        {
            "backbone_config": {"model_type": "vitdet", **_TINY, "num_channels": 4, "out_features": ["stage3"]},
            "hidden_size": 32,
            "convstream_hidden_sizes": [8, 8],
            "fusion_hidden_sizes": [8, 8, 8],
        },
        lambda numbers: {"pixel_values": torch.cat([images(numbers, 32), images(numbers, 32)[:, :1]], 1)},
    ),
    _Row("YolosModel YolosForObjectDetection", _tiny(image_size=[32, 48], num_detection_tokens=3), _WIDE),
    _Row(
        "YolosModel",
        _tiny(image_size=[32, 48], num_detection_tokens=3, use_mid_position_embeddings=False),
        _WIDE,
        "positions only at the start",
    ),
    _Row("EomtForUniversalSegmentation EomtDinov3ForUniversalSegmentation", _tiny(**_QUERIES)),
    _Row("EomtForUniversalSegmentation", _tiny(**_QUERIES, use_swiglu_ffn=True), variant="SwiGLU"),
    _Row("EomtDinov3ForUniversalSegmentation", _tiny(**_QUERIES, use_gated_mlp=True), variant="gated"),
    _Row("RfDetrDinov2Backbone", _tiny(num_windows=2, out_indices=[1, 3])),
    _Row("RfDetrForObjectDetection RfDetrForInstanceSegmentation", _RF_DETR),
    _Row("LwDetrViTBackbone", _tiny(num_windows=4, window_block_indices=[0, 1], out_indices=[1, 3])),
    _Row(
        "LwDetrForObjectDetection",
        _DETR
        | {
            "backbone_config": {"model_type": "lw_detr_vit", **_TINY, "num_windows": 4, "out_indices": [1, 3]}
            | {"window_block_indices": [0, 1]},
            "projector_scale_factors": [1.0],
        },
    ),
    _Row(
        "Deimv2ForObjectDetection",
        {
            "backbone_config": {"model_type": "dinov3_vit", **_TINY, "patch_size": 16, "out_indices": [1, 2, 3]},
            "encoder_hidden_dim": 32,
            "encoder_in_channels": [32, 32, 32],
            "encoder_ffn_dim": 32,
            "encoder_attention_heads": 4,
            "d_model": 32,
            "decoder_in_channels": [32, 32, 32],
            "decoder_ffn_dim": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "num_queries": 4,
            "num_denoising": 0,
            "lqe_hidden_dim": 8,
            "num_labels": 5,
        },
        _pixels(64),
    ),
    _Row("SamVisionModel SamHQVisionModel", _SAM | _WINDOWS),
    _Row("SamVisionModel", _SAM | _WINDOWS | {"use_rel_pos": False}, variant="no relative positions"),
    _Row("SamVisionModel SamHQVisionModel", _SAM | {"window_size": 0}, variant="no windows"),
    _Row("SamVisionModel SamHQVisionModel", _SAM | _WINDOWS | _EAGER, variant="eager"),
    _Row("Sam3ViTModel", _tiny(**_WINDOWS)),
    _Row(
        "Sam3VisionModel",
        {
            "backbone_config": {"model_type": "sam3_vit_model", **_TINY, **_WINDOWS},
            "fpn_hidden_size": 8,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
    ),
    _Row(
        "Sam2VisionModel",
        {
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "image_size": [64, 64],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 2, 2],
                "window_size_per_stage": [4, 2, 2, 2],
                "global_attention_blocks": [3],
            },
            "backbone_channel_list": [64, 32, 16, 8],
            "fpn_hidden_size": 8,
        },
        _pixels(64),
    ),
    _Row(
        "Sapiens2ForSemanticSegmentation Sapiens2ForPoseEstimation Sapiens2ForNormalEstimation "
        "Sapiens2ForPointmapEstimation Sapiens2ForImageMatting",
        _tiny(head_config=_PYRAMID, num_key_value_attention_heads=4),
    ),
    _Row(
        "UperNetForSemanticSegmentation",
        {
            "backbone_config": {"model_type": "beit", **_TINY, **_TAPS, **_RELATIVE, "add_fpn": False},
            "hidden_size": 8,
            "pool_scales": [1, 2],
            "auxiliary_channels": 8,
            "num_labels": 5,
        },
    ),
    _Row("MgpstrModel", _tiny(image_size=[32, 48], max_token_length=4, **_FLOAT), _WIDE),
    _Row("SwinModel", {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
    _Row(
        "HieraModel",
        {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
        | {"masked_unit_attention": [True, False], "num_query_pool": 1},
        _pixels(64),
    ),
)

_FRAMES = {"num_frames": 4}
_PREDICTOR = {
    "pred_hidden_size": 24,
    "pred_num_hidden_layers": 1,
    "pred_num_attention_heads": 4,
    "num_pooler_layers": 1,
}
_VIDEO = (
    _Row("VideoMAEModel VideoMAEForVideoClassification", _tiny(**_FRAMES), _video()),
    _Row("VideoMAEModel", _tiny(**_FRAMES, use_mean_pooling=False, qv_bias=False), _video(), "no mean pooling"),
    _Row(
        "VideoMAEForPreTraining",
        _tiny(**_FRAMES, decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_intermediate_size=32),
        _masked_video,
    ),
    *(
        _Row(
            "TimesformerModel TimesformerForVideoClassification", _tiny(**_FRAMES, attention_type=kind), _video(), kind
        )
        for kind in ("divided_space_time", "joint_space_time", "space_only")
    ),
    _Row("VivitModel VivitForVideoClassification", _tiny(**_FRAMES, tubelet_size=[2, 8, 8]), _video()),
    _Row(
        "VJEPA2Model VJEPA2ForVideoClassification",
        _tiny(crop_size=32, frames_per_clip=4, **_PREDICTOR),
        _video(key="pixel_values_videos"),
    ),
    _Row(
        "VideoPrismVisionModel VideoPrismVideoModel VideoPrismForVideoClassification",
        _tiny(**_FRAMES, tubelet_size=[1, 8, 8], num_spatial_layers=3, num_temporal_layers=2, num_auxiliary_layers=1),
        _video(key="pixel_values_videos"),
    ),
    _Row(
        "VideomtForUniversalSegmentation",
        _tiny(**_QUERIES),
        _video(2, key="pixel_values_videos"),
        extras=(),
        parts=2,
    ),
    _Row(
        "XCLIPVisionModel",
        _tiny(**_FRAMES),
        lambda numbers: {"pixel_values": _video()(numbers)["pixel_values"].flatten(0, 1)},
    ),
    _Row(
        "XCLIPModel",
        _pair(**_FRAMES, mit_hidden_size=16, mit_intermediate_size=32, mit_num_attention_heads=4)
        | {"prompt_num_attention_heads": 4, "prompt_layers": 1},
        _video(input_ids=torch.tensor([_TOKENS] * 2)),
    ),
)


def architectures() -> Iterator[Architecture]:
    """Every row, once for each of its classes."""
    for row in (*_IMAGE_ENCODERS, *_CONTRASTIVE, *_FUSED, *_DENSE, *_VIDEO):
        for name in row.classes.split():
            yield Architecture(
                library="transformers",
                name=f"{name} [{row.variant}]" if row.variant else name,
                build=partial(_build, name, row.settings),
                run=partial(_run, row),
            )


def _build(name: str, settings: Settings) -> nn.Module:
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise Absent(f"transformers {transformers.__version__} has no {name}")
    return model_class(model_class.config_class(**copy.deepcopy(settings)))  # configs write into their settings


@torch.no_grad()
def _run(row: _Row, model: nn.Module, numbers: Sequence[int]) -> dict[str, Any]:
    """One pass as users run the model, and one with eager attention, which alone returns its weights.

    Every tensor in it has the images first.
    """
    outputs = {"usual": model(**row.inputs(numbers), output_hidden_states="hidden_states" in row.extras)}
    if "attentions" in row.extras:
        usual = model.config._attn_implementation
        model.set_attn_implementation("eager")
        outputs["eager"] = model(**row.inputs(numbers), output_attentions=True)
        model.set_attn_implementation(usual)
    return {name: _images_first(output, row) for name, output in outputs.items()}


def _images_first(output: Mapping[str, Any], row: _Row) -> dict[str, Any]:
    """What belongs to an image: no outputs of a text tower, no losses, no stacks over the layers of a decoder.

    Some models return hidden states unasked.
    """
    other = {"text", "loss", "intermediate", "hidden_states", "attentions"} - set(row.extras)
    return {
        key: torch.cat(value.unflatten(0, (row.parts, -1)).unbind(0), -1) if row.parts > 1 else value
        for key, value in output.items()
        if not any(word in key for word in other)
    }
