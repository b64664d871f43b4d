"""`scripts/coverage`, over one architecture of each family and over its traps; the script goes over all."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from coverage.check import Verdict, check
from coverage.registry import Absent, Architecture, registry
from torch import Tensor

from testreg.families import FAMILIES, find_tower, layout
from testreg.patching import fc2

SLICE = {
    "timm VisionTransformer": "radio; vit_base_patch16_18x2_224; vit_dpwee_patch16_reg1_gap_256; vit_base_r26_s32_224",
    "timm Eva": "eva02_base_patch14_224; vit_base_patch16_rope_mixed_224; vit_base_patch16_dinov3",
    "timm Beit": "beit_base_patch16_224",
    "timm VisionTransformerRelPos": "vit_relpos_base_patch16_cls_224; vit_srelpos_small_patch16_224",
    "timm NaFlexVit": "naflexvit_base_patch16_gap; vit_base_patch16_dinov3, use_naflex=True",
    "transformers ViT": "ViTModel",
    "transformers DeiT": "DeiTModel",
    "transformers ViTMAE": "ViTMAEModel",
    "transformers IJepa": "IJepaModel",
    "transformers Pixio": "PixioModel",
    "transformers BEiT": "BeitModel [bias in each block]; BeitModel [shared bias]; ZoeDepthForDepthEstimation",
    "transformers Data2VecVision": "Data2VecVisionModel [bias in each block]; Data2VecVisionModel [shared bias]",
    "transformers FLAVA": "FlavaImageModel",
    "transformers DPT": "DPTModel",
    "transformers VitPose": "VitPoseBackbone [experts]",
    "transformers MGP-STR": "MgpstrModel",
    "transformers ViViT": "VivitModel",
    "transformers VideoMAE": "VideoMAEModel",
    "transformers VideoPrism": "VideoPrismVisionModel",
    "transformers Pix2Struct": "Pix2StructVisionModel",
    "transformers Dinov2": "DepthAnythingForDepthEstimation",
    "transformers Dinov2WithRegisters": "Dinov2WithRegistersModel",
    "transformers DINOv3ViT": "DINOv3ViTModel",
    "transformers Sapiens2": "Sapiens2Model",
    "transformers RADIO": "NemotronH_Omni_Reasoning_V3",
    "transformers CLIP": "OwlViTForObjectDetection",
    "transformers X-CLIP": "XCLIPVisionModel",
    "transformers MLCD": "MLCDVisionModel",
    "transformers BLIP": "BlipVisionModel",
    "transformers SigLIP": "LlavaOnevisionForConditionalGeneration",
    "transformers SigLIP 2": "Siglip2VisionModel",
    "transformers AIMv2": "Aimv2VisionModel",
    "transformers BridgeTower": "BridgeTowerModel",
    "transformers BLIP-2": "Blip2ForConditionalGeneration",
    "transformers Idefics": "IdeficsForVisionText2Text",
    "transformers InternVL": "InternVLForConditionalGeneration",
    "transformers Janus": "JanusForConditionalGeneration",
    "transformers Idefics3": "Idefics3ForConditionalGeneration",
    "transformers Ovis2": "Ovis2ForConditionalGeneration",
    "transformers Molmo2": "Molmo2ForConditionalGeneration",
    "transformers Unlimited-OCR": "UnlimitedOcrForConditionalGeneration",
    "transformers Step3": "Step3p7ForConditionalGeneration",
    "transformers Llama 4": "Llama4ForConditionalGeneration",
    "transformers Mllama": "MllamaForConditionalGeneration",
    "transformers Gemma 4": "Gemma4ForConditionalGeneration",
    "transformers Kosmos-2.5": "Kosmos2_5ForConditionalGeneration",
    "transformers Pixtral": "PixtralVisionModel",
    "transformers PaddleOCR-VL": "PaddleOCRVLForConditionalGeneration",
    "transformers VideoLLaMA 3": "VideoLlama3ForConditionalGeneration",
    "transformers HunYuan-VL": "HunYuanVLForConditionalGeneration",
    "transformers MiniMax-M3-VL": "MiniMaxM3SparseForConditionalGeneration",
    "transformers Inkling 2": "Inkling2ForConditionalGeneration",
    "transformers Ernie 4.5 VL": "Ernie4_5_VLMoeForConditionalGeneration",
    "transformers Kimi-K2.5": "Kimi_K25ForConditionalGeneration",
    "transformers Qwen2-VL": "Qwen2VLForConditionalGeneration",
    "transformers Qwen3-VL": "Qwen3VLForConditionalGeneration",
    "transformers GLM-4V": "Glm4vForConditionalGeneration",
    "open_clip VisionTransformer": "coca_ViT-B-32",
    "torchvision VisionTransformer": "vit_b_16",
    "OpenAI CLIP": "clip ViT-B/32",
    "facebookresearch/dinov2": "dinov2_vits14_reg",
    "facebookresearch/dino": "dino_vits16",
}
SCRIPT = Path(__file__).parents[2] / "scripts/coverage"
KNOWN = {name: each for (_, name), each in registry().items()}
NAMES = [(family, name) for family, names in SLICE.items() for name in names.split("; ")]

pytestmark = pytest.mark.filterwarnings("ignore")


def verdict_on(name: str) -> Verdict:
    verdict = check(KNOWN[name])
    if verdict.word == "absent":
        raise Absent(verdict.reason)
    return verdict


@pytest.mark.parametrize(("family", "name"), NAMES, ids=[name for _, name in NAMES])
def test_is_supported(family: str, name: str) -> None:
    assert find_tower(KNOWN[name].build()).family.name == family
    verdict = verdict_on(name)
    assert (verdict.word, verdict.reason) == ("supported", "")


def test_every_row_of_the_table_has_an_architecture() -> None:
    assert list(SLICE) == [family.name for family in FAMILIES]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("samvit_base_patch16", "VisionTransformerSAM, .* windows"),
        ("VitDetModel", "VitDetModel, .* windows"),
        ("SwinModel", "SwinModel, patches are merged between stages"),
        ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VisionTransformerPretrainedModel, .* windows"),
        ("Florence2ForConditionalGeneration", "Florence2VisionBackbone, patches are merged"),
        ("VideoLlavaForConditionalGeneration", "several vision towers .* pass the one you mean"),
    ],
)
def test_is_refused_with_the_reason(name: str, reason: str) -> None:
    verdict = verdict_on(name)
    assert verdict.word == "refused"
    assert re.search(reason, verdict.reason)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("vit_base_patch16_dinov3", "differs from the explicit register"),
        ("Siglip2VisionModel", "differs from the explicit register"),
        ("Qwen2VLForConditionalGeneration", "differs from the explicit register"),
    ],
)
def test_the_check_fails_if_the_shift_is_wrong(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fc2.shift

    def wrong(hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        hidden = right(hidden, *args, **options)
        hidden[:, -1] *= -1  # of the register
        return hidden

    monkeypatch.setattr(fc2, "shift", wrong)
    verdict = verdict_on(name)
    assert verdict.word == "FAILED"
    assert what in verdict.reason


def test_the_check_fails_if_padding_gives_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout.Layout, "validity", lambda self, mask: None)
    verdict = verdict_on("Gemma4ForConditionalGeneration")
    assert verdict.word == "FAILED"


def test_the_check_fails_if_the_register_is_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotated(self: layout.Layout, rows: Tensor, dim: int, value: float | Tensor) -> Tensor:
        return right(self, rows, dim, 0.5 if value == 1.0 else value)

    right = layout.Layout.extend
    monkeypatch.setattr(layout.Layout, "extend", rotated)
    verdict = verdict_on("eva02_base_patch14_224")
    assert verdict.word == "FAILED"


def test_a_model_without_a_known_tower_is_a_failure() -> None:
    verdict = check(Architecture("timm", "linear", lambda: torch.nn.Linear(3, 3), lambda model, numbers: {}))
    assert verdict.word == "FAILED"
    assert "no supported vision tower in Linear" in verdict.reason


@pytest.mark.slow
def test_the_script_counts() -> None:
    command = [sys.executable, SCRIPT, "--library", "torchvision", "--match", "vit_b_16", "--workers", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("\n1 supported, 0 refused, 0 failed\n")
