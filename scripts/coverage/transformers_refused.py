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

from coverage.registry import Architecture, transformers_class

CLASSES = """
    DeepseekOcr2VisionModel Dots3NoteForConditionalGeneration
    EomtDinov3ForUniversalSegmentation EomtForUniversalSegmentation Exaone4_5_ForConditionalGeneration
    Florence2ForConditionalGeneration GotOcr2ForConditionalGeneration GroupViTVisionModel HieraModel
    HyperCLOVAXVisionV2ForConditionalGeneration Lfm3VlForConditionalGeneration LwDetrForObjectDetection
    LwDetrViTBackbone MiniCPMOcrForConditionalGeneration MiniCPMV4_6ForConditionalGeneration
    MiniCPMV4_7ForConditionalGeneration MuseGlimmerForConditionalGeneration MuseSparkForConditionalGeneration
    Phi4MultimodalForCausalLM Qwen2_5OmniThinkerForConditionalGeneration Qwen2_5_VLForConditionalGeneration
    RfDetrDinov2Backbone RfDetrForInstanceSegmentation RfDetrForObjectDetection Sam2VisionModel Sam3ViTModel
    Sam3VisionModel SamHQVisionModel SamVisionModel SegGptForImageSegmentation SegGptModel SwinModel
    VJEPA2ForVideoClassification VJEPA2Model VideoLlavaForConditionalGeneration VideomtForUniversalSegmentation
    ViltForImageAndTextRetrieval ViltForQuestionAnswering VitDetBackbone VitDetModel YolosForObjectDetection YolosModel
"""
VITDET = {"model_type": "vitdet", "out_features": ["stage12"]}
VARIANTS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("DeepseekOcr2ForConditionalGeneration", {"text_config": {"num_hidden_layers": 1, "mlp_layer_types": ["dense"]}}),
    ("DepthProForDepthEstimation", {"use_fov_model": True}),
    ("EomtForUniversalSegmentation [SwiGLU]", {"use_swiglu_ffn": True}),
    ("EomtDinov3ForUniversalSegmentation [gated]", {"use_gated_mlp": True}),
    ("SamVisionModel [no relative positions]", {"use_rel_pos": False}),
    *((f"Sam{kind}VisionModel [no windows]", {"window_size": 0}) for kind in ("", "HQ")),
    *((f"Sam{kind}VisionModel [eager]", {"attn_implementation": "eager"}) for kind in ("", "HQ")),
    *(
        (f"Timesformer{task} [{kind}]", {"attention_type": kind})
        for task in ("Model", "ForVideoClassification")
        for kind in ("divided_space_time", "joint_space_time", "space_only")
    ),
    ("VitDetModel [windows]", {"window_size": 2, "window_block_indices": [0, 1], "residual_block_indices": [2]}),
    ("VitMatteForImageMatting", {"backbone_config": VITDET, "fusion_hidden_sizes": [256, 128, 64, 32]}),
    ("YolosModel [positions only at the start]", {"use_mid_position_embeddings": False}),
)


def architectures() -> Iterator[Architecture]:
    for name, settings in (*((name, {}) for name in CLASSES.split()), *VARIANTS):
        yield Architecture("transformers", name, partial(_build, name.partition(" ")[0], settings), _run)


def _build(name: str, settings: Mapping[str, Any]) -> nn.Module:
    model_class = transformers_class(name)
    with torch.device("meta"):
        return model_class(model_class.config_class(**copy.deepcopy(settings)))  # configs write into their settings


def _run(model: nn.Module, numbers: Sequence[int]) -> Mapping[str, Any]:
    raise AssertionError(f"{type(model).__name__} is no longer refused, but has no row of its own")
