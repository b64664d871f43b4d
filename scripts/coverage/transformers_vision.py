"""The Vision Transformers of transformers, apart from the generative VLMs.

All are made small by `small_config`: what is checked is the code of an architecture, which does not depend on its size.
Every flag that changes the blocks has a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coverage import transformers_small
from coverage.registry import Architecture, image, images
from coverage.transformers_small import SIDE, TIMM, Settings, build
from coverage.transformers_vlm import Inputs as VlmInputs
from coverage.transformers_vlm import flattened, siglip2

Inputs = Callable[[Sequence[int]], Mapping[str, Any]]

# Inputs ---------------------------------------------------------------------------------------------------------------


def _inputs(**makers: Any) -> Inputs:
    """By name: what a function makes of the number of each image, stacked; what is no function stays as it is."""
    return lambda numbers: {
        name: torch.stack([make(number) for number in numbers]) if callable(make) else make
        for name, make in makers.items()
    }


def _pixels(rows: int = 4, columns: int = 4, **more: Any) -> Inputs:
    """Images of so many patches."""
    return _inputs(pixel_values=lambda number: image(number, rows * SIDE, columns * SIDE), **more)


def _video(number: int) -> Tensor:
    """Four frames (4, 3, h, w)."""
    return images(range(4 * number, 4 * number + 4), 4 * SIDE)


def _frames(numbers: Sequence[int]) -> dict[str, Tensor]:
    """The frames (4 * B, 3, h, w) of all videos in a row."""
    return {"pixel_values": torch.cat([_video(number) for number in numbers])}


TOKENS = torch.tensor([3, 5, 6, 7, 8, 2])
_SQUARE, _WIDE, _TALL = _pixels(), _pixels(4, 6), _pixels(8, 6)
_RESIZED = _pixels(4, 6, interpolate_pos_encoding=True)
_TWO_TEXTS = {"input_ids": TOKENS.expand(2, -1)}  # that every image is compared with
_TEXT_EACH = {"input_ids": lambda number: TOKENS}
_PAIRS, _CAPTIONED = _pixels(**_TWO_TEXTS), _pixels(**_TEXT_EACH)
_PLACES = torch.tensor([0, 1, 1, 0, 0, 0])  # in the text, of what Kosmos' resampler makes of the image
_KOSMOS = _pixels(**_TEXT_EACH, image_embeds_position_mask=lambda number: _PLACES, use_cache=False)
_DECODED = _pixels(decoder_input_ids=lambda number: TOKENS, use_cache=False)
# ViT-MAE keeps the patches of smallest noise, which it would draw itself: here the first ones, in their order.
_IN_ORDER = _pixels(noise=lambda number: torch.arange(16.0))
_VIDEO = _inputs(pixel_values=_video)
_VIDEO_OF_PRISM = _inputs(pixel_values_videos=_video)
_MASKED_VIDEO = _inputs(pixel_values=_video, bool_masked_pos=lambda number: torch.arange(32) % 2 == 1)
_WITH_EXPERTS = _pixels(8, 6, dataset_index=lambda number: torch.tensor(number % 3))


def _as_vlm(make: Callable[[Sequence[int]], VlmInputs], **more: Any) -> Inputs:
    """What a VLM with this tower takes: padded patches of images of two sizes."""
    return lambda numbers: {**make(numbers).features, **more}


# The rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row(transformers_small.Row):
    inputs: Inputs = _SQUARE
    extras: Sequence[str] = ("hidden_states", "attentions")
    """Optional outputs, where the model has them and they do not depend on other images or on chance."""


_RELATIVE = {"use_relative_position_bias": True}
_SHARED = {"use_shared_relative_position_bias": True}
_EAGER = {"attn_implementation": "eager"}  # for models that choose it when they are built
_SWIGLU = {"use_swiglu_ffn": True}
_TAPS = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
_TWO = {"out_indices": [1, 3]}
_NECK = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
_DPT = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], **_NECK}
_UPERNET = {"pool_scales": [1, 2], "auxiliary_channels": 8}
_MAE = {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4, "decoder_hidden_size": 32}
_VIT_AND_BERT = {"vision_config": {"model_type": "vit"}, "text_config": {"model_type": "bert"}}
_SEQUENCES = {"reshape_hidden_states": False, "apply_layernorm": False}
_POSE = {"image_size": [32, 24], "patch_size": [8, 8], "part_features": 16, "num_experts": 1}
_POSE_HEAD = {"backbone_config": {"model_type": "vitpose_backbone", **_POSE}}
_PYRAMID = {"conv_out_channels": [8], "scale_conv_out_channels": [8]}
_PYRAMID |= {"upsample_out_channels": [8, 8], "scale_final_hidden_sizes": [8, 8]}
_DEIMV2 = {"encoder_in_channels": [32] * 3, "decoder_in_channels": [32] * 3}
_DEIMV2 |= {"num_denoising": 0, "decoder_layers": 2, "num_queries": 4, "lqe_hidden_dim": 8, "encoder_hidden_dim": 32}
_DEIMV2 |= {"backbone_config": {"model_type": "dinov3_vit", "patch_size": 16, "out_indices": [1, 2, 3]}}
_BRIDGETOWER = {"hidden_size": 128, "num_hidden_layers": 2, "vision_config": {"hidden_size": 128}}  # heads have 64
_BRIDGETOWER |= {"text_config": {"hidden_size": 128, "num_hidden_layers": 3}}
_MIT = {"mit_hidden_size": 32, "mit_intermediate_size": 32, "mit_num_attention_heads": 4}
_XCLIP = {"prompt_num_attention_heads": 4, "prompt_layers": 1, "vision_config": {"num_frames": 4, **_MIT}}
_PRISM = {"num_frames": 4, "tubelet_size": [1, SIDE, SIDE]}
_PRISM |= {"num_spatial_layers": 3, "num_temporal_layers": 2, "num_auxiliary_layers": 1}


def _dense(backbone: str = "dinov2", flags: Settings | None = None, **head: Any) -> Settings:
    """A head with a small convolutional neck on the four taps of a backbone."""
    taps = {"model_type": backbone, **_TAPS, "reshape_hidden_states": False, **(flags or {})}
    return {"backbone_config": taps, **_NECK, "head_hidden_size": 8, "reassemble_hidden_size": 32, **head}


def _timm(architecture: str) -> Settings:
    return {"architecture": architecture, "model_args": TIMM, "num_labels": 5}


def _trocr(encoder: str) -> Settings:
    return {"encoder": {"model_type": encoder}, "decoder": {"model_type": "trocr", "decoder_attention_heads": 4}}


_HIDDEN = ("hidden_states",)
ROWS = (
    # Image encoders
    Row(
        """ViTModel ViTForImageClassification ViTForMaskedImageModeling DeiTModel DeiTForImageClassification
        DeiTForImageClassificationWithTeacher DeiTForMaskedImageModeling ViTMSNModel ViTMSNForImageClassification
        IJepaModel IJepaForImageClassification BeitModel BeitForImageClassification Data2VecVisionModel
        Data2VecVisionForImageClassification DINOv3ViTModel DINOv3ViTBackbone Aimv2VisionModel MLCDVisionModel
        CLIPVisionModel CLIPVisionModelWithProjection MetaClip2VisionModel MetaClip2VisionModelWithProjection
        CLIPSegVisionModel AltCLIPVisionModel ChineseCLIPVisionModel GitVisionModel SiglipVisionModel
        OwlViTVisionModel Owlv2VisionModel FlavaImageModel BlipVisionModel RadioModel""",
        {"encoder_stride": SIDE},
    ),
    Row(
        """Dinov2Model Dinov2ForImageClassification Dinov2Backbone Dinov2WithRegistersModel
        Dinov2WithRegistersForImageClassification Dinov2WithRegistersBackbone PixioModel PixioBackbone
        Tipsv2VisionModel Tipsv2VisionBackbone""",
        _TWO,
    ),
    Row("IJepaModel CLIPVisionModel OwlViTVisionModel Owlv2VisionModel BlipVisionModel [4x6 patches]", {}, _RESIZED),
    Row("ViTModel ViTForImageClassification [4x6 patches]", {"qkv_bias": False}, _RESIZED),
    Row("SiglipVisionModel [no head, 4x6 patches]", {"vision_use_head": False}, _RESIZED),
    Row("ViTMAEModel", {"mask_ratio": 0.0}, _IN_ORDER),
    Row("ViTMAEModel ViTMAEForPreTraining [half masked]", {"mask_ratio": 0.5, **_MAE}, _IN_ORDER),
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
    Row("BeitForSemanticSegmentation Data2VecVisionForSemanticSegmentation", _RELATIVE | _TAPS | _UPERNET),
    Row("Dinov2Backbone Dinov2WithRegistersBackbone [token sequences]", _SEQUENCES),
    Row("Dinov2Model Dinov2Backbone Dinov2WithRegistersModel Tipsv2VisionModel [SwiGLU, 4x6 patches]", _SWIGLU, _WIDE),
    Row("DINOv3ViTModel [registers, gated, 4x6 patches]", {"num_register_tokens": 4, "use_gated_mlp": True}, _WIDE),
    Row("DINOv3ViTBackbone [registers]", {"num_register_tokens": 4, **_TWO}),
    Row("PixioModel [one CLS, 4x6 patches]", {"n_cls_tokens": 1}, _WIDE),
    Row("RadioModel [SwiGLU, 4x6 patches]", _SWIGLU, _WIDE),
    Row("Aimv2VisionModel [biases, no head]", {"qkv_bias": True, "mlp_bias": True, "use_head": False}),
    Row("Aimv2VisionModel [native, 4x6 patches]", {"is_native": True}, _WIDE),
    Row("Sapiens2Model Sapiens2Backbone", {"num_first_full_attention_layers": 3, **_TWO}),
    Row(
        "Sapiens2Model [grouped queries, plain MLP, no registers, 4x6 patches]",
        {"num_key_value_heads_per_layer": [4, 2, 4]}
        | {"num_register_tokens": 0, "use_qk_norm": False, "use_gated_mlp": False},
        _WIDE,
    ),
    Row("TimmWrapperModel TimmWrapperForImageClassification", _timm("vit_tiny_patch16_224"), extras=_HIDDEN),
    Row("TimmWrapperModel [EVA02]", _timm("eva02_tiny_patch14_224"), extras=_HIDDEN),
    Row("TimmBackbone", {"backbone": "test_vit", **_TWO}, _pixels(40, 40), extras=()),
    # With text
    Row("CLIPModel MetaClip2Model CLIPSegModel AltCLIPModel ChineseCLIPModel SiglipModel Aimv2Model", inputs=_PAIRS),
    Row("Tipsv2Model OwlViTModel Owlv2Model BlipModel", inputs=_PAIRS),
    Row("CLIPForImageClassification MetaClip2ForImageClassification SiglipForImageClassification"),
    Row("CLIPSegForImageSegmentation", {"extract_layers": [1, 2], "reduce_dim": 16}, _CAPTIONED),
    Row("Siglip2VisionModel Siglip2ForImageClassification", {}, _as_vlm(siglip2)),
    Row("Siglip2VisionModel [no head]", {"vision_use_head": False}, _as_vlm(siglip2)),
    Row("Siglip2Model", {}, _as_vlm(siglip2, **_TWO_TEXTS)),
    Row("OwlViTForObjectDetection Owlv2ForObjectDetection FlavaModel BlipForImageTextRetrieval", inputs=_CAPTIONED),
    Row("VisionTextDualEncoderModel", _VIT_AND_BERT, _PAIRS),
    # BridgeTower's hidden states are (T, B, C).
    Row("BridgeTowerModel", _BRIDGETOWER, _CAPTIONED, extras=("attentions",)),
    Row("VisionEncoderDecoderModel [TrOCR with ViT]", _trocr("vit"), _DECODED),
    Row("VisionEncoderDecoderModel [TrOCR with DeiT]", _trocr("deit"), _DECODED),
    Row("Kosmos2Model", {"latent_query_num": 2}, _KOSMOS),
    Row("GitModel", {}, _pixels(**_TEXT_EACH, use_cache=False)),
    Row("Pix2StructVisionModel", {"patch_embed_hidden_size": 48, "d_kv": 8, "d_ff": 64}, _as_vlm(flattened)),
    # Dense prediction
    Row("DepthAnythingForDepthEstimation PromptDepthAnythingForDepthEstimation", _dense()),
    Row("DPTModel", {"is_hybrid": False}),
    Row("DPTForDepthEstimation DPTForSemanticSegmentation", _DPT),
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
    Row("VitPoseBackbone", _POSE | _TWO, _TALL),
    Row("VitPoseBackbone [experts]", _POSE | _TWO | {"num_experts": 3}, _WITH_EXPERTS),
    Row("VitPoseForPoseEstimation", _POSE_HEAD | {"use_simple_decoder": False}, _TALL),
    Row("VitPoseForPoseEstimation [simple decoder]", _POSE_HEAD | {"use_simple_decoder": True}, _TALL),
    Row("Deimv2ForObjectDetection", _DEIMV2, _pixels(16, 16)),
    Row(
        """Sapiens2ForSemanticSegmentation Sapiens2ForPoseEstimation Sapiens2ForNormalEstimation
        Sapiens2ForPointmapEstimation Sapiens2ForImageMatting""",
        {"head_config": _PYRAMID, "num_key_value_attention_heads": 4},
    ),
    Row(
        "UperNetForSemanticSegmentation",
        {"hidden_size": 8, **_UPERNET, "backbone_config": {"model_type": "beit", **_RELATIVE, **_TAPS}},
    ),
    Row("MgpstrModel", {"image_size": [16, 24], "max_token_length": 4}, _WIDE),
    # Videos
    Row("VideoMAEModel VideoMAEForVideoClassification", {"num_frames": 4}, _VIDEO),
    Row("VideoMAEModel [no mean pooling]", {"num_frames": 4, "use_mean_pooling": False, "qv_bias": False}, _VIDEO),
    Row("VideoMAEForPreTraining", {"num_frames": 4, **_MAE}, _MASKED_VIDEO),
    Row("VivitModel VivitForVideoClassification", {"num_frames": 4, "tubelet_size": [2, SIDE, SIDE]}, _VIDEO),
    Row("VideoPrismVisionModel VideoPrismVideoModel VideoPrismForVideoClassification", _PRISM, _VIDEO_OF_PRISM),
    Row("XCLIPVisionModel", {"num_frames": 4}, _frames),
    Row("XCLIPModel", _XCLIP, _inputs(pixel_values=_video, **_TWO_TEXTS)),
)


def architectures() -> Iterator[Architecture]:
    """Every row, once for each of its classes."""
    for row in ROWS:
        for model_class, name in row.each():
            yield Architecture("transformers", name, partial(build, model_class, row.config), partial(_run, row))


def _run(row: Row, model: nn.Module, numbers: Sequence[int]) -> dict[str, Any]:
    """One pass as users run the model, and one with eager attention, which alone returns its weights.

    Every tensor in it has the images first. Left out are the outputs of a text tower, losses, stacks over the layers of
    a decoder, and hidden states that some models return unasked.
    """
    inputs = row.inputs(numbers)
    outputs = {"usual": model(**inputs, output_hidden_states="hidden_states" in row.extras)}
    if "attentions" in row.extras:
        usual = model.config._attn_implementation
        model.set_attn_implementation("eager")
        outputs["eager"] = model(**inputs, output_attentions=True)
        model.set_attn_implementation(usual)
    other = {"text", "loss", "intermediate", "hidden_states", "attentions"} - set(row.extras)
    return {
        name: {key: value for key, value in output.items() if not any(word in key for word in other)}
        for name, output in outputs.items()
    }
