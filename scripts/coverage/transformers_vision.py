"""The Vision Transformers of transformers, apart from the generative VLMs.

All are made small by `small_config`: what is checked is the code of an architecture, which does not depend on its size.
Every flag that changes the blocks has a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from coverage.registry import Architecture, images, transformers_class
from coverage.transformers_vlm import SIDE, flattened, siglip2, small_config
from coverage.transformers_vlm import Inputs as VlmInputs

Settings = dict[str, Any]
Inputs = Callable[[Sequence[int]], dict[str, Any]]

TOKENS = [3, 5, 6, 7, 8, 2]


# Inputs ---------------------------------------------------------------------------------------------------------------


def _pixels(rows: int = 4, columns: int = 4, **more: Any) -> Inputs:
    """Images of so many patches."""
    return lambda numbers: {"pixel_values": images(numbers, rows * SIDE, columns * SIDE), **more}


def _texts(count: int | None = None, **more: Any) -> Inputs:
    """Images and `count` texts that every image is compared with; None: a text for each image."""
    return lambda numbers: _pixels()(numbers) | {"input_ids": torch.tensor([TOKENS] * (count or len(numbers))), **more}


def _video(key: str = "pixel_values", **more: Any) -> Inputs:
    """Four frames (B, 4, 3, h, w)."""
    return lambda numbers: {key: torch.stack([images(range(4 * n, 4 * n + 4), 4 * SIDE) for n in numbers]), **more}


def _in_order(numbers: Sequence[int]) -> dict[str, Any]:
    """ViT-MAE keeps the patches of smallest noise, which it would draw itself: here the first ones, in their order."""
    return _SQUARE(numbers) | {"noise": torch.arange(16.0).expand(len(numbers), -1)}


def _frames(numbers: Sequence[int]) -> dict[str, Any]:
    return {"pixel_values": _video()(numbers)["pixel_values"].flatten(0, 1)}


def _masked_video(numbers: Sequence[int]) -> dict[str, Any]:
    return _video()(numbers) | {"bool_masked_pos": (torch.arange(32) % 2).bool().expand(len(numbers), -1)}


def _with_experts(numbers: Sequence[int]) -> dict[str, Any]:
    return _pixels(8, 6)(numbers) | {"dataset_index": torch.tensor([n % 3 for n in numbers])}


def _decoding(numbers: Sequence[int]) -> dict[str, Any]:
    return _SQUARE(numbers) | {"decoder_input_ids": torch.tensor([TOKENS] * len(numbers)), "use_cache": False}


def _kosmos(numbers: Sequence[int]) -> dict[str, Any]:
    """Two of the tokens are places for what the resampler makes of the image."""
    places = torch.tensor([[0, 1, 1, 0, 0, 0]] * len(numbers))
    return _texts()(numbers) | {"image_embeds_position_mask": places, "use_cache": False}


def _as_vlm(make: Callable[[Sequence[int]], VlmInputs], **more: Any) -> Inputs:
    """What a VLM with this tower takes: padded patches of images of two sizes."""
    return lambda numbers: {**make(numbers).features, **more}


# The rows -------------------------------------------------------------------------------------------------------------

_SQUARE, _WIDE = _pixels(), _pixels(4, 6)
_RESIZED = _pixels(4, 6, interpolate_pos_encoding=True)


class Row(NamedTuple):
    models: str
    """Names of public classes, with a space between; in brackets, what sets them apart from other rows' of the name."""
    config: Settings
    """What their configuration needs besides its size."""
    inputs: Inputs = _SQUARE
    extras: Sequence[str] = ("hidden_states", "attentions")
    """Optional outputs, where the model has them and they do not depend on other images or on chance."""


_RELATIVE = {"use_relative_position_bias": True}
_SHARED = {"use_shared_relative_position_bias": True}
_EAGER = {"attn_implementation": "eager"}  # for models that choose it when they are built
_TAPS = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
_NECK = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
_TWO = {"out_indices": [1, 3]}
_MAE = {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4, "decoder_hidden_size": 32}
_TIMM = {"depth": 3, "embed_dim": 32, "num_heads": 4, "img_size": 16, "patch_size": 4}
_POSE = {"image_size": [32, 24], "patch_size": [8, 8], "part_features": 16, "num_experts": 1}
_POSE_HEAD = {"backbone_config": {"model_type": "vitpose_backbone", **_POSE}}
_PYRAMID = {f"{name}out_channels": [8] for name in ("conv_", "scale_conv_")}
_PYRAMID |= {name: [8, 8] for name in ("upsample_out_channels", "scale_final_hidden_sizes")}
_DEIMV2 = {name: [32] * 3 for name in ("encoder_in_channels", "decoder_in_channels")}
_DEIMV2 |= {"num_denoising": 0, "decoder_layers": 2, "num_queries": 4, "lqe_hidden_dim": 8, "encoder_hidden_dim": 32}
_TROCR = {"model_type": "trocr", "decoder_attention_heads": 4}
_BRIDGETOWER = {"hidden_size": 128, "num_hidden_layers": 2}  # a head for every 64 channels
_MIT = {"mit_hidden_size": 32, "mit_intermediate_size": 32, "mit_num_attention_heads": 4}
_PRISM = {"num_frames": 4, "tubelet_size": [1, SIDE, SIDE]}
_PRISM |= {"num_spatial_layers": 3, "num_temporal_layers": 2, "num_auxiliary_layers": 1}


def _dense(backbone: str = "dinov2", flags: Settings | None = None, **head: Any) -> Settings:
    """A head with a small convolutional neck on the four taps of a backbone."""
    taps = _TAPS | {"reshape_hidden_states": False} | (flags or {})
    small = {"head_hidden_size": 8, "reassemble_hidden_size": 32}
    return {"backbone_config": {"model_type": backbone, **taps}, **_NECK, **small, **head}


ROWS = (
    # Image encoders
    Row(
        "ViTModel ViTForImageClassification ViTForMaskedImageModeling DeiTModel DeiTForImageClassification "
        "DeiTForImageClassificationWithTeacher DeiTForMaskedImageModeling ViTMSNModel ViTMSNForImageClassification "
        "IJepaModel IJepaForImageClassification BeitModel BeitForImageClassification Data2VecVisionModel "
        "Data2VecVisionForImageClassification DINOv3ViTModel DINOv3ViTBackbone Aimv2VisionModel MLCDVisionModel "
        "CLIPVisionModel CLIPVisionModelWithProjection MetaClip2VisionModel MetaClip2VisionModelWithProjection "
        "CLIPSegVisionModel AltCLIPVisionModel ChineseCLIPVisionModel GitVisionModel SiglipVisionModel "
        "OwlViTVisionModel Owlv2VisionModel FlavaImageModel BlipVisionModel RadioModel",
        {"encoder_stride": SIDE},
    ),
    Row(
        "Dinov2Model Dinov2ForImageClassification Dinov2Backbone Dinov2WithRegistersModel "
        "Dinov2WithRegistersForImageClassification Dinov2WithRegistersBackbone PixioModel PixioBackbone "
        "Tipsv2VisionModel Tipsv2VisionBackbone",
        _TWO,
    ),
    Row("IJepaModel CLIPVisionModel OwlViTVisionModel Owlv2VisionModel BlipVisionModel [4x6 patches]", {}, _RESIZED),
    Row("ViTModel ViTForImageClassification [4x6 patches]", {"qkv_bias": False}, _RESIZED),
    Row("SiglipVisionModel [no head, 4x6 patches]", {"vision_use_head": False}, _RESIZED),
    Row("ViTMAEModel", {"mask_ratio": 0.0}, _in_order),
    Row("ViTMAEModel ViTMAEForPreTraining [half masked]", {"mask_ratio": 0.5, **_MAE}, _in_order),
    Row("BeitModel BeitForImageClassification Data2VecVisionModel [bias in each block]", _RELATIVE),
    Row("BeitModel Data2VecVisionModel [shared bias]", _SHARED),
    Row("BeitModel Data2VecVisionModel [absolute positions]", {"use_absolute_position_embeddings": True}),
    Row("BeitModel Data2VecVisionModel [no layer scale]", {"layer_scale_init_value": 0.0}),
    Row("BeitModel Data2VecVisionModel [CLS pooling]", {"use_mean_pooling": False}),
    Row("Data2VecVisionModel [bias in each block, eager]", _RELATIVE | _EAGER),
    Row("Data2VecVisionModel [shared bias, eager]", _SHARED | _EAGER),
    Row("BeitModel [bias in each block, 4x6 patches]", _RELATIVE, _RESIZED),
    Row("BeitModel [shared bias, 4x6 patches]", _SHARED, _RESIZED),
    Row("BeitForMaskedImageModeling", _SHARED | {"use_mask_token": True}),
    Row("BeitBackbone", _RELATIVE | _TWO),
    Row("BeitBackbone [shared bias, FPN]", _SHARED | _TAPS | {"add_fpn": True}),
    Row(
        "BeitForSemanticSegmentation Data2VecVisionForSemanticSegmentation",
        _RELATIVE | _TAPS | {"pool_scales": [1, 2], "auxiliary_channels": 8},
    ),
    Row(
        "Dinov2Backbone Dinov2WithRegistersBackbone [token sequences]",
        {"reshape_hidden_states": False, "apply_layernorm": False},
    ),
    Row(
        "Dinov2Model Dinov2Backbone Dinov2WithRegistersModel Tipsv2VisionModel [SwiGLU, 4x6 patches]",
        {"use_swiglu_ffn": True},
        _WIDE,
    ),
    Row("DINOv3ViTModel [registers, gated, 4x6 patches]", {"num_register_tokens": 4, "use_gated_mlp": True}, _WIDE),
    Row("DINOv3ViTBackbone [registers]", {"num_register_tokens": 4, **_TWO}),
    Row("PixioModel [one CLS, 4x6 patches]", {"n_cls_tokens": 1}, _WIDE),
    Row("RadioModel [SwiGLU, 4x6 patches]", {"use_swiglu_ffn": True}, _WIDE),
    Row("Aimv2VisionModel [biases, no head]", {"qkv_bias": True, "mlp_bias": True, "use_head": False}),
    Row("Aimv2VisionModel [native, 4x6 patches]", {"is_native": True}, _WIDE),
    Row("Sapiens2Model Sapiens2Backbone", {"num_first_full_attention_layers": 3, **_TWO}),
    Row(
        "Sapiens2Model [grouped queries, plain MLP, no registers, 4x6 patches]",
        {"num_key_value_heads_per_layer": [4, 2, 4], "num_register_tokens": 0}
        | {"use_qk_norm": False, "use_gated_mlp": False},
        _WIDE,
    ),
    Row(
        "TimmWrapperModel TimmWrapperForImageClassification",
        {"architecture": "vit_tiny_patch16_224", "model_args": _TIMM, "num_labels": 5},
        extras=("hidden_states",),
    ),
    Row(
        "TimmWrapperModel [EVA02]",
        {"architecture": "eva02_tiny_patch14_224", "model_args": _TIMM},
        extras=("hidden_states",),
    ),
    Row("TimmBackbone", {"backbone": "test_vit", **_TWO}, _pixels(40, 40), extras=()),
    # With text
    Row(
        "CLIPModel MetaClip2Model CLIPSegModel AltCLIPModel ChineseCLIPModel SiglipModel Aimv2Model Tipsv2Model "
        "OwlViTModel Owlv2Model BlipModel",
        {},
        _texts(2),
    ),
    Row("CLIPForImageClassification MetaClip2ForImageClassification SiglipForImageClassification", {}),
    Row("CLIPSegForImageSegmentation", {"extract_layers": [1, 2], "reduce_dim": 16}, _texts()),
    Row("Siglip2VisionModel Siglip2ForImageClassification", {}, _as_vlm(siglip2)),
    Row("Siglip2VisionModel [no head]", {"vision_use_head": False}, _as_vlm(siglip2)),
    Row("Siglip2Model", {}, _as_vlm(siglip2, input_ids=torch.tensor([TOKENS] * 2))),
    Row("OwlViTForObjectDetection Owlv2ForObjectDetection FlavaModel BlipForImageTextRetrieval", {}, _texts()),
    Row(
        "VisionTextDualEncoderModel",
        {"vision_config": {"model_type": "vit"}, "text_config": {"model_type": "bert"}},
        _texts(2),
    ),
    Row(
        "BridgeTowerModel",
        _BRIDGETOWER
        | {"vision_config": {"hidden_size": 128}, "text_config": {"hidden_size": 128, "num_hidden_layers": 3}},
        _texts(),
        extras=("attentions",),  # hidden states are (T, B, C)
    ),
    Row("VisionEncoderDecoderModel [TrOCR with ViT]", {"encoder": {"model_type": "vit"}, "decoder": _TROCR}, _decoding),
    Row(
        "VisionEncoderDecoderModel [TrOCR with DeiT]", {"encoder": {"model_type": "deit"}, "decoder": _TROCR}, _decoding
    ),
    Row("Kosmos2Model", {"latent_query_num": 2}, _kosmos),
    Row("GitModel", {}, _texts(use_cache=False)),
    Row("Pix2StructVisionModel", {"patch_embed_hidden_size": 48, "d_kv": 8, "d_ff": 64}, _as_vlm(flattened)),
    # Dense prediction
    Row("DepthAnythingForDepthEstimation PromptDepthAnythingForDepthEstimation", _dense()),
    Row("DPTModel", {"is_hybrid": False}),
    Row(
        "DPTForDepthEstimation DPTForSemanticSegmentation",
        {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], **_NECK},
    ),
    Row("DPTForDepthEstimation [Dinov2 backbone]", _dense()),
    Row(
        "ZoeDepthForDepthEstimation",
        _dense("beit", _RELATIVE, bottleneck_features=8, bin_embedding_dim=8, num_attractors=[4, 2, 2, 1]),
    ),
    Row(
        "CHMv2ForDepthEstimation",
        _dense("dinov3_vit", {"return_class_token": True, "reshape_hidden_states": True})
        | {"post_process_channels": [8] * 4, "number_output_channels": 8},
    ),
    Row(
        "Tipsv2DptForDepthEstimation Tipsv2DptForNormalEstimation Tipsv2DptForSemanticSegmentation",
        _dense("tipsv2_vision_model"),
    ),
    Row("VitPoseBackbone", _POSE | _TWO, _pixels(8, 6)),
    Row("VitPoseBackbone [experts]", _POSE | _TWO | {"num_experts": 3}, _with_experts),
    Row("VitPoseForPoseEstimation", _POSE_HEAD | {"use_simple_decoder": False}, _pixels(8, 6)),
    Row("VitPoseForPoseEstimation [simple decoder]", _POSE_HEAD | {"use_simple_decoder": True}, _pixels(8, 6)),
    Row(
        "Deimv2ForObjectDetection",
        _DEIMV2 | {"backbone_config": {"model_type": "dinov3_vit", "patch_size": 16, "out_indices": [1, 2, 3]}},
        _pixels(16, 16),
    ),
    Row(
        "Sapiens2ForSemanticSegmentation Sapiens2ForPoseEstimation Sapiens2ForNormalEstimation "
        "Sapiens2ForPointmapEstimation Sapiens2ForImageMatting",
        {"head_config": _PYRAMID, "num_key_value_attention_heads": 4},
    ),
    Row(
        "UperNetForSemanticSegmentation",
        {"hidden_size": 8, "pool_scales": [1, 2], "auxiliary_channels": 8}
        | {"backbone_config": {"model_type": "beit", **_RELATIVE, **_TAPS}},
    ),
    Row("MgpstrModel", {"image_size": [16, 24], "max_token_length": 4}, _WIDE),
    # Videos
    Row("VideoMAEModel VideoMAEForVideoClassification", {"num_frames": 4}, _video()),
    Row("VideoMAEModel [no mean pooling]", {"num_frames": 4, "use_mean_pooling": False, "qv_bias": False}, _video()),
    Row("VideoMAEForPreTraining", {"num_frames": 4, **_MAE}, _masked_video),
    Row("VivitModel VivitForVideoClassification", {"num_frames": 4, "tubelet_size": [2, SIDE, SIDE]}, _video()),
    Row(
        "VideoPrismVisionModel VideoPrismVideoModel VideoPrismForVideoClassification",
        _PRISM,
        _video("pixel_values_videos"),
    ),
    Row(
        "XCLIPVisionModel",
        {"num_frames": 4},
        lambda numbers: {"pixel_values": _video()(numbers)["pixel_values"].flatten(0, 1)},
    ),
    Row(
        "XCLIPModel",
        {"prompt_num_attention_heads": 4, "prompt_layers": 1, "vision_config": {"num_frames": 4, **_MIT}},
        _video(input_ids=torch.tensor([TOKENS] * 2)),
    ),
)


def architectures() -> Iterator[Architecture]:
    """Every row, once for each of its classes."""
    for row in ROWS:
        names, bracket, variant = row.models.partition(" [")
        for name in names.split():
            build, run = partial(_build, name, row.config), partial(_run, row)
            yield Architecture("transformers", name + bracket + variant, build, run)


def _build(name: str, config: Settings) -> nn.Module:
    model_class = transformers_class(name)
    return model_class(small_config(model_class.config_class, config))


@torch.no_grad()
def _run(row: Row, model: nn.Module, numbers: Sequence[int]) -> dict[str, Any]:
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


def _images_first(output: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """What belongs to an image: no outputs of a text tower, no losses, no stacks over the layers of a decoder.

    Some models return hidden states unasked.
    """
    other = {"text", "loss", "intermediate", "hidden_states", "attentions"} - set(row.extras)
    return {key: value for key, value in output.items() if not any(word in key for word in other)}
