"""The Vision Transformers of transformers, apart from the generative VLMs.

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
from torch import nn

from coverage.registry import Architecture, image, images, transformers_class

Settings = dict[str, Any]
Inputs = Callable[[Sequence[int]], dict[str, Any]]


# Configurations -------------------------------------------------------------------------------------------------------


def _sizes(names: Mapping[int, str]) -> Settings:
    """The settings of these names, with a space between, each at its size."""
    return {name: size for size, names_ in names.items() for name in names_.split()}


# One dictionary fits all, because a config keeps whatever it does not know as a plain attribute.
_TINY = _sizes(
    {
        2: "mlp_ratio",
        3: "num_hidden_layers",
        4: "num_attention_heads",
        5: "num_labels",
        8: "patch_size",
        32: "hidden_size image_size pretrain_image_size",
        64: "intermediate_size",
    }
)
_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT |= {"vocab_size": 50, "max_position_embeddings": 16, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_FLOAT = {"mlp_ratio": 2.0}  # some configs insist on a float here, the others on an integer
_TAPS = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
_RELATIVE = {"use_relative_position_bias": True}
_SHARED = {"use_shared_relative_position_bias": True}
_EAGER = {"attn_implementation": "eager"}  # for models that choose it when they are built
_TOKENS = [0, 5, 6, 7, 8, 2]


def _tiny(**flags: Any) -> Settings:
    return _TINY | flags


def _part(model_type: str, **flags: Any) -> Settings:
    """The config of a part of a model."""
    return {"model_type": model_type, **_TINY, **flags}


def _pair(**vision: Any) -> Settings:
    """A CLIP: an image and a text tower."""
    text = _TEXT | {"projection_dim": 16, "project_dim": 16, "encoder_hidden_size": 32}
    return {"vision_config": _tiny(projection_dim=16, **vision), "text_config": text, "projection_dim": 16}


def _dense(backbone: str = "dinov2", flags: Settings | None = None, **head: Any) -> Settings:
    """A head with a small convolutional neck on the four taps of a backbone."""
    flags = _TAPS | {"reshape_hidden_states": False} | (flags or {})
    head |= _sizes({8: "patch_size fusion_hidden_size head_hidden_size", 32: "reassemble_hidden_size", 5: "num_labels"})
    return {"backbone_config": _part(backbone, **flags), "neck_hidden_sizes": [8] * 4, **head}


# Inputs ---------------------------------------------------------------------------------------------------------------


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


def _of_several_sizes(**more: Any) -> Inputs:
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
        return {"pixel_values": torch.stack(patches), "pixel_attention_mask": mask, "spatial_shapes": shape, **more}

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


def _decoding(numbers: Sequence[int]) -> dict[str, Any]:
    tokens = torch.tensor([_TOKENS] * len(numbers))
    return {"pixel_values": images(numbers, 32), "decoder_input_ids": tokens, "use_cache": False}


def _kosmos(numbers: Sequence[int]) -> dict[str, Any]:
    """Two of the tokens are places for what the resampler makes of the image."""
    places = torch.tensor([[0, 1, 1, 0, 0, 0]] * len(numbers))
    return _texts(None)(numbers) | {"image_embeds_position_mask": places, "use_cache": False}


# The rows -------------------------------------------------------------------------------------------------------------

_SQUARE = _pixels()
_WIDE = _pixels(32, 48)
_RESIZED = _pixels(32, 48, interpolate_pos_encoding=True)


@dataclass(frozen=True)
class _Row:
    models: str
    """Names of public classes, with a space between; in brackets, what sets them apart from other rows' of the name."""
    settings: Settings
    """What their config is made from."""
    inputs: Inputs = _SQUARE
    extras: Sequence[str] = ("hidden_states", "attentions")
    """Optional outputs, where the model has them and they do not depend on other images or on chance."""


_TIMM = {"depth": 3, "embed_dim": 32, "num_heads": 4, "img_size": 32, "patch_size": 8}
_DECODER = _sizes({1: "decoder_num_hidden_layers", 4: "decoder_num_attention_heads", 32: "decoder_hidden_size"})
_IMAGE_ENCODERS = (
    _Row(
        "ViTModel ViTForImageClassification ViTForMaskedImageModeling DeiTModel DeiTForImageClassification "
        "DeiTForImageClassificationWithTeacher DeiTForMaskedImageModeling ViTMSNModel ViTMSNForImageClassification "
        "IJepaModel IJepaForImageClassification BeitModel BeitForImageClassification Data2VecVisionModel "
        "Data2VecVisionForImageClassification DINOv3ViTModel DINOv3ViTBackbone Aimv2VisionModel MLCDVisionModel "
        "CLIPVisionModel CLIPVisionModelWithProjection MetaClip2VisionModel MetaClip2VisionModelWithProjection "
        "CLIPSegVisionModel AltCLIPVisionModel ChineseCLIPVisionModel GitVisionModel SiglipVisionModel "
        "OwlViTVisionModel Owlv2VisionModel FlavaImageModel BlipVisionModel",
        _tiny(encoder_stride=8, projection_dim=16),
    ),
    _Row(
        "Dinov2Model Dinov2ForImageClassification Dinov2Backbone Dinov2WithRegistersModel "
        "Dinov2WithRegistersForImageClassification Dinov2WithRegistersBackbone PixioModel PixioBackbone "
        "Tipsv2VisionModel Tipsv2VisionBackbone",
        _tiny(out_indices=[1, 3]),
    ),
    _Row(
        "IJepaModel CLIPVisionModel OwlViTVisionModel Owlv2VisionModel BlipVisionModel [4x6 patches]", _TINY, _RESIZED
    ),
    _Row("ViTModel ViTForImageClassification [4x6 patches]", _tiny(qkv_bias=False), _RESIZED),
    _Row("SiglipVisionModel [no head, 4x6 patches]", _tiny(vision_use_head=False), _RESIZED),
    _Row("ViTMAEModel", _tiny(mask_ratio=0.0), _in_order),
    _Row("ViTMAEModel ViTMAEForPreTraining [half masked]", _tiny(mask_ratio=0.5, **_DECODER), _in_order),
    _Row("BeitModel BeitForImageClassification Data2VecVisionModel [bias in each block]", _tiny(**_RELATIVE)),
    _Row("BeitModel Data2VecVisionModel [shared bias]", _tiny(**_SHARED)),
    _Row("BeitModel Data2VecVisionModel [absolute positions]", _tiny(use_absolute_position_embeddings=True)),
    _Row("BeitModel Data2VecVisionModel [no layer scale]", _tiny(layer_scale_init_value=0.0)),
    _Row("BeitModel Data2VecVisionModel [CLS pooling]", _tiny(use_mean_pooling=False)),
    _Row("Data2VecVisionModel [bias in each block, eager]", _tiny(**_RELATIVE, **_EAGER)),
    _Row("Data2VecVisionModel [shared bias, eager]", _tiny(**_SHARED, **_EAGER)),
    _Row("BeitModel [bias in each block, 4x6 patches]", _tiny(**_RELATIVE), _RESIZED),
    _Row("BeitModel [shared bias, 4x6 patches]", _tiny(**_SHARED), _RESIZED),
    _Row("BeitForMaskedImageModeling", _tiny(use_mask_token=True, vocab_size=20, **_SHARED)),
    _Row("BeitBackbone", _tiny(**_RELATIVE, out_indices=[1, 3])),
    _Row("BeitBackbone [shared bias, FPN]", _tiny(**_SHARED, **_TAPS, add_fpn=True)),
    _Row(
        "BeitForSemanticSegmentation Data2VecVisionForSemanticSegmentation",
        _tiny(**_RELATIVE, **_TAPS, pool_scales=[1, 2], auxiliary_channels=8),
    ),
    _Row(
        "Dinov2Backbone Dinov2WithRegistersBackbone [token sequences]",
        _tiny(reshape_hidden_states=False, apply_layernorm=False),
    ),
    _Row(
        "Dinov2Model Dinov2Backbone Dinov2WithRegistersModel Tipsv2VisionModel [SwiGLU, 4x6 patches]",
        _tiny(use_swiglu_ffn=True),
        _WIDE,
    ),
    _Row("DINOv3ViTModel [registers, gated, 4x6 patches]", _tiny(num_register_tokens=4, use_gated_mlp=True), _WIDE),
    _Row("DINOv3ViTBackbone [registers]", _tiny(num_register_tokens=4, out_indices=[1, 3])),
    _Row("PixioModel [one CLS, 4x6 patches]", _tiny(n_cls_tokens=1), _WIDE),
    _Row("RadioModel", _TINY | _FLOAT | {"max_img_size": 64}),
    _Row("RadioModel [SwiGLU, 4x6 patches]", _TINY | _FLOAT | {"max_img_size": 64, "use_swiglu_ffn": True}, _WIDE),
    _Row("Aimv2VisionModel [biases, no head]", _tiny(qkv_bias=True, mlp_bias=True, use_head=False)),
    _Row("Aimv2VisionModel [native, 4x6 patches]", _tiny(is_native=True), _WIDE),
    _Row("Sapiens2Model Sapiens2Backbone", _tiny(num_first_full_attention_layers=3, out_indices=[1, 3])),
    _Row(
        "Sapiens2Model [grouped queries, plain MLP, no registers, 4x6 patches]",
        _tiny(num_key_value_heads_per_layer=[4, 2, 4], use_qk_norm=False, use_gated_mlp=False, num_register_tokens=0),
        _WIDE,
    ),
    _Row(
        "TimmWrapperModel TimmWrapperForImageClassification",
        {"architecture": "vit_tiny_patch16_224", "model_args": _TIMM, "num_labels": 5},
        extras=("hidden_states",),
    ),
    _Row(
        "TimmWrapperModel [EVA02]",
        {"architecture": "eva02_tiny_patch14_224", "model_args": _TIMM},
        extras=("hidden_states",),
    ),
    _Row("TimmBackbone", {"backbone": "test_vit", "out_indices": [1, 3]}, _pixels(160), extras=()),
)

_BRIDGETOWER = {
    **_sizes({128: "hidden_size", 4: "num_attention_heads", 2: "num_hidden_layers", 64: "intermediate_size"}),
    "vision_config": _tiny(hidden_size=128),  # a head for every 64 channels
    "text_config": _TEXT | {"hidden_size": 128, "num_hidden_layers": 3},
}
_FLAVA = {"image_config": _TINY, "text_config": _TEXT, "multimodal_config": _part("flava_multimodal_model")}
_KOSMOS_TEXT = {"vocab_size": 50, "embed_dim": 32, "layers": 1, "ffn_dim": 64, "attention_heads": 4}
_PIX2STRUCT = {"patch_embed_hidden_size": 192, "d_ff": 64, "d_kv": 8, "seq_len": 20}
_TROCR = {"model_type": "trocr", "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4}
_WITH_TEXT = (
    _Row(
        "CLIPModel MetaClip2Model CLIPSegModel AltCLIPModel ChineseCLIPModel SiglipModel Aimv2Model Tipsv2Model "
        "OwlViTModel Owlv2Model BlipModel",
        _pair(),
        _texts(),
    ),
    _Row(
        "CLIPForImageClassification MetaClip2ForImageClassification SiglipForImageClassification",
        _pair() | {"num_labels": 5},
    ),
    _Row(
        "CLIPSegForImageSegmentation",
        _pair() | {"extract_layers": [1, 2], "reduce_dim": 16, "decoder_intermediate_size": 32},
        _texts(None),
    ),
    _Row("Siglip2VisionModel", _tiny(num_patches=16), _of_several_sizes()),
    _Row("Siglip2VisionModel [no head]", _tiny(num_patches=16, vision_use_head=False), _of_several_sizes()),
    _Row("Siglip2Model", _pair(num_patches=16), _of_several_sizes(input_ids=torch.tensor([_TOKENS] * 2))),
    _Row("Siglip2ForImageClassification", _pair(num_patches=16) | {"num_labels": 5}, _of_several_sizes()),
    _Row("OwlViTForObjectDetection Owlv2ForObjectDetection", _pair() | {"projection_dim": 32}, _texts(None)),
    _Row("FlavaModel", _FLAVA | {"hidden_size": 32, "projection_dim": 16}, _texts(None)),
    _Row(
        "VisionTextDualEncoderModel",
        {"vision_config": _part("vit"), "text_config": {"model_type": "bert", **_TEXT}, "projection_dim": 16},
        _texts(),
    ),
    _Row("BlipForImageTextRetrieval", _pair(), _texts(None)),
    _Row("BridgeTowerModel", _BRIDGETOWER, _texts(None), extras=("attentions",)),  # hidden states are (T, B, C)
    _Row("VisionEncoderDecoderModel [TrOCR with ViT]", {"encoder": _part("vit"), "decoder": _TROCR}, _decoding),
    _Row("VisionEncoderDecoderModel [TrOCR with DeiT]", {"encoder": _part("deit"), "decoder": _TROCR}, _decoding),
    _Row("Kosmos2Model", {"vision_config": _TINY, "text_config": _KOSMOS_TEXT, "latent_query_num": 2}, _kosmos),
    _Row("GitModel", _TEXT | {"vision_config": _TINY}, _texts(None, use_cache=False)),
    _Row("Pix2StructVisionModel", _tiny(**_PIX2STRUCT), _flattened),
)

_DEIMV2 = _sizes(
    {
        0: "num_denoising",
        2: "decoder_layers",
        4: "encoder_attention_heads decoder_attention_heads num_queries",
        5: "num_labels",
        8: "lqe_hidden_dim",
        32: "encoder_hidden_dim encoder_ffn_dim d_model decoder_ffn_dim",
    }
) | {f"{part}_in_channels": [32, 32, 32] for part in ("encoder", "decoder")}
_POSE = {"image_size": [32, 24], "patch_size": [8, 8], "part_features": 16}
_POSE_HEAD = {"backbone_config": _part("vitpose_backbone", **_POSE), "num_labels": 5}
_PYRAMID = {f"{name}out_channels": [8] for name in ("conv_", "scale_conv_")}
_PYRAMID |= {name: [8, 8] for name in ("upsample_out_channels", "scale_final_hidden_sizes")}
_DENSE = (
    _Row("DepthAnythingForDepthEstimation PromptDepthAnythingForDepthEstimation", _dense()),
    _Row("DPTModel", _tiny(is_hybrid=False)),
    _Row(
        "DPTForDepthEstimation DPTForSemanticSegmentation",
        _tiny(num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8),
    ),
    _Row("DPTForDepthEstimation [Dinov2 backbone]", _dense()),
    _Row(
        "ZoeDepthForDepthEstimation",
        _dense("beit", _RELATIVE, bottleneck_features=8, bin_embedding_dim=8, num_attractors=[4, 2, 2, 1]),
    ),
    _Row(
        "CHMv2ForDepthEstimation",
        _dense("dinov3_vit", {"return_class_token": True, "reshape_hidden_states": True})
        | {"post_process_channels": [8] * 4, "number_output_channels": 8},
    ),
    _Row(
        "Tipsv2DptForDepthEstimation Tipsv2DptForNormalEstimation Tipsv2DptForSemanticSegmentation",
        _dense("tipsv2_vision_model"),
    ),
    _Row("VitPoseBackbone", _tiny(**_POSE, out_indices=[1, 3]), _pixels(32, 24)),
    _Row("VitPoseBackbone [experts]", _tiny(**_POSE, num_experts=3, out_indices=[1, 3]), _with_experts),
    _Row("VitPoseForPoseEstimation", _POSE_HEAD | {"use_simple_decoder": False}, _pixels(32, 24)),
    _Row("VitPoseForPoseEstimation [simple decoder]", _POSE_HEAD | {"use_simple_decoder": True}, _pixels(32, 24)),
    _Row(
        "Deimv2ForObjectDetection",
        _DEIMV2 | {"backbone_config": _part("dinov3_vit") | {"patch_size": 16, "out_indices": [1, 2, 3]}},
        _pixels(64),
    ),
    _Row(
        "Sapiens2ForSemanticSegmentation Sapiens2ForPoseEstimation Sapiens2ForNormalEstimation "
        "Sapiens2ForPointmapEstimation Sapiens2ForImageMatting",
        _tiny(head_config=_PYRAMID, num_key_value_attention_heads=4),
    ),
    _Row(
        "UperNetForSemanticSegmentation",
        {"hidden_size": 8, "pool_scales": [1, 2], "auxiliary_channels": 8, "num_labels": 5}
        | {"backbone_config": _part("beit", **_RELATIVE, add_fpn=False) | _TAPS},
    ),
    _Row("MgpstrModel", _tiny(**_FLOAT, image_size=[32, 48], max_token_length=4), _WIDE),
)

_FRAMES = {"num_frames": 4}
_PRISM = {"tubelet_size": [1, 8, 8], "num_spatial_layers": 3, "num_temporal_layers": 2, "num_auxiliary_layers": 1}
_INTEGRATION = {"mit_hidden_size": 16, "mit_intermediate_size": 32, "mit_num_attention_heads": 4}
_VIDEO = (
    _Row("VideoMAEModel VideoMAEForVideoClassification", _tiny(**_FRAMES), _video()),
    _Row("VideoMAEModel [no mean pooling]", _tiny(**_FRAMES, use_mean_pooling=False, qv_bias=False), _video()),
    _Row("VideoMAEForPreTraining", _tiny(**_FRAMES, **_DECODER), _masked_video),
    _Row("VivitModel VivitForVideoClassification", _tiny(**_FRAMES, tubelet_size=[2, 8, 8]), _video()),
    _Row(
        "VideoPrismVisionModel VideoPrismVideoModel VideoPrismForVideoClassification",
        _tiny(**_FRAMES, **_PRISM),
        _video(key="pixel_values_videos"),
    ),
    _Row(
        "XCLIPVisionModel",
        _tiny(**_FRAMES),
        lambda numbers: {"pixel_values": _video()(numbers)["pixel_values"].flatten(0, 1)},
    ),
    _Row(
        "XCLIPModel",
        _pair(**_FRAMES, **_INTEGRATION) | {"prompt_num_attention_heads": 4, "prompt_layers": 1},
        _video(input_ids=torch.tensor([_TOKENS] * 2)),
    ),
)


def architectures() -> Iterator[Architecture]:
    """Every row, once for each of its classes."""
    for row in (*_IMAGE_ENCODERS, *_WITH_TEXT, *_DENSE, *_VIDEO):
        names, bracket, variant = row.models.partition(" [")
        for name in names.split():
            yield Architecture(
                "transformers", name + bracket + variant, partial(_build, name, row.settings), partial(_run, row)
            )


def _build(name: str, settings: Settings) -> nn.Module:
    model_class = transformers_class(name)
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
    return {key: value for key, value in output.items() if not any(word in key for word in other)}
