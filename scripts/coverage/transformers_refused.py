"""The Vision Transformers of transformers that testreg refuses, at the library's own sizes.

They are not run, and so are built without storage (on the meta device). One that testreg comes to support fails here,
and needs a row in `transformers_vision` or `transformers_vlm`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from coverage.registry import Architecture
from coverage.transformers_small import Row, Settings, transformers_class

_ONE_LAYER = {"num_hidden_layers": 1, "mlp_layer_types": ["dense"]}
_VITDET = {"model_type": "vitdet", "out_features": ["stage12"]}
_WINDOWS = {"window_size": 2, "window_block_indices": [0, 1], "residual_block_indices": [2]}
ROWS = (
    Row(
        """DeepseekOcr2VisionModel Dots3NoteForConditionalGeneration EomtDinov3ForUniversalSegmentation
        EomtForUniversalSegmentation Exaone4_5_ForConditionalGeneration Florence2ForConditionalGeneration
        GotOcr2ForConditionalGeneration GroupViTVisionModel HieraModel HyperCLOVAXVisionV2ForConditionalGeneration
        Lfm3VlForConditionalGeneration LwDetrForObjectDetection LwDetrViTBackbone MiniCPMOcrForConditionalGeneration
        MiniCPMV4_6ForConditionalGeneration MiniCPMV4_7ForConditionalGeneration MuseGlimmerForConditionalGeneration
        MuseSparkForConditionalGeneration Phi4MultimodalForCausalLM Qwen2_5OmniThinkerForConditionalGeneration
        Qwen2_5_VLForConditionalGeneration RfDetrDinov2Backbone RfDetrForInstanceSegmentation RfDetrForObjectDetection
        Sam2VisionModel Sam3ViTModel Sam3VisionModel SamHQVisionModel SamVisionModel SegGptForImageSegmentation
        SegGptModel SwinModel VJEPA2ForVideoClassification VJEPA2Model VideoLlavaForConditionalGeneration
        VideomtForUniversalSegmentation ViltForImageAndTextRetrieval ViltForQuestionAnswering VitDetBackbone VitDetModel
        YolosForObjectDetection YolosModel"""
    ),
    Row("DeepseekOcr2*", {"text_config": _ONE_LAYER}),
    Row("DepthProForDepthEstimation", {"use_fov_model": True}),
    Row("EomtForUniversalSegmentation [SwiGLU]", {"use_swiglu_ffn": True}),
    Row("EomtDinov3ForUniversalSegmentation [gated]", {"use_gated_mlp": True}),
    Row("SamVisionModel [no relative positions]", {"use_rel_pos": False}),
    Row("SamVisionModel SamHQVisionModel [no windows]", {"window_size": 0}),
    Row("SamVisionModel SamHQVisionModel [eager]", {"attn_implementation": "eager"}),
    *(
        Row(f"TimesformerModel TimesformerForVideoClassification [{kind}]", {"attention_type": kind})
        for kind in ("divided_space_time", "joint_space_time", "space_only")
    ),
    Row("VitDetModel [windows]", _WINDOWS),
    Row("VitMatteForImageMatting", {"backbone_config": _VITDET, "fusion_hidden_sizes": [256, 128, 64, 32]}),
    Row("YolosModel [positions only at the start]", {"use_mid_position_embeddings": False}),
)


def architectures() -> Iterator[Architecture]:
    for row in ROWS:
        for model_class, name in row.each():
            yield Architecture("transformers", name, partial(_build, model_class, row.config), _run)


def _build(name: str, config: Settings) -> nn.Module:
    model_class = transformers_class(name)
    with torch.device("meta"):
        return model_class(model_class.config_class(**copy.deepcopy(config)))  # configs write into their settings


def _run(model: nn.Module, numbers: Sequence[int]) -> Mapping[str, Any]:
    raise AssertionError(f"{type(model).__name__} is no longer refused, but has no row of its own")
