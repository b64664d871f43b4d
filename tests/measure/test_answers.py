"""What the answer's first token takes from the image, against the attention that transformers returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from coverage.registry import image, randomise
from coverage.transformers_inputs import SIDE
from coverage.transformers_small import small_config, transformers_class
from coverage.transformers_table import DEEPSTACK
from torch import Tensor

import testreg

IMAGE_TOKEN = 7
NEURONS = {0: [3, 11], 1: [5]}
TEXT = [1, 2, 3]


def prompts(count: int) -> Tensor:
    """Two prompts with so many image tokens; text in front of the image and behind it."""
    rows = [[*TEXT, *[IMAGE_TOKEN] * count, 20 + i, 30] for i in range(2)]
    return torch.tensor(rows)


def llava(**config: Any) -> tuple[Any, Mapping[str, Any]]:
    model = built("LlavaForConditionalGeneration", **config)
    strategy = model.config.vision_feature_select_strategy
    pixels = torch.stack([image(i, 4 * SIDE) for i in range(2)])
    return model, {"input_ids": prompts(16 + (strategy == "full")), "pixel_values": pixels}


def llava_next() -> tuple[Any, Mapping[str, Any]]:
    """Tiles of twice the height: the whole image, and two tiles with a token behind each row."""
    model = built("LlavaNextForConditionalGeneration", image_grid_pinpoints=[[8 * SIDE, 4 * SIDE]])
    tiles = torch.stack([torch.stack([image(3 * i + j, 4 * SIDE) for j in range(3)]) for i in range(2)])
    sizes = torch.tensor([[8 * SIDE, 4 * SIDE]] * 2)
    return model, {"input_ids": prompts(16 + 8 * (4 + 1)), "pixel_values": tiles, "image_sizes": sizes}


def qwen(name: str, **vision: Any) -> tuple[Any, Mapping[str, Any]]:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    model = built(name, vision_config=vision, text_config=rope)
    merge = model.config.vision_config.spatial_merge_size
    frames = model.config.vision_config.temporal_patch_size
    pixels = torch.randn(2 * 4 * 8, 3 * frames * SIDE**2, generator=torch.Generator().manual_seed(0))
    ids = prompts(4 * 8 // merge**2)
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 8]] * 2)}
    return model, {**inputs, "mm_token_type_ids": (ids == IMAGE_TOKEN).int()}


def built(name: str, **config: Any) -> Any:
    model_class = transformers_class(name)
    torch.manual_seed(0)
    return randomise(model_class(small_config(model_class.config_class, config))).eval()


MODELS: dict[str, tuple[Callable[[], tuple[Any, Mapping[str, Any]]], tuple[int, int]]] = {
    "Llava": (llava, (4, 4)),
    "Llava with CLS": (lambda: llava(vision_feature_select_strategy="full"), (4, 4)),
    "LlavaNext": (llava_next, (4, 4)),
    "Qwen2-VL": (lambda: qwen("Qwen2VLForConditionalGeneration"), (2, 4)),
    "Qwen3-VL": (lambda: qwen("Qwen3VLForConditionalGeneration", **DEEPSTACK), (2, 4)),
}


def hooks(model: Any) -> int:
    """transformers itself keeps some to record what it is asked for."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_is_what_transformers_returns(name: str, kernel: str, patched: bool) -> None:
    make, grid = MODELS[name]
    if name == "Qwen2-VL" and transformers.__version__ < "5":
        pytest.skip("transformers 4 wants configurations of Qwen2-VL with the ids of a tokenizer")
    model, inputs = make()
    if patched:
        testreg.patch(model, NEURONS)
    model.set_attn_implementation("eager")
    attentions = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation(kernel)
    first = len(TEXT) + (name == "Llava with CLS")
    rows = torch.stack([each[:, :, -1, first : first + grid[0] * grid[1]] for each in attentions], 1)
    before = hooks(model)
    found = testreg.answer_attention(model, inputs)
    assert found.shape == (2, *grid)
    torch.testing.assert_close(found, rows.mean((1, 2)).unflatten(1, grid))
    found = testreg.answer_attention(model, inputs, blocks=[1, -1], heads=[2])
    torch.testing.assert_close(found, rows[:, [1, -1], 2].mean(1).unflatten(1, grid))
    assert model.config._attn_implementation == kernel
    assert hooks(model) == before


@pytest.mark.parametrize("name", ["Llava", "Qwen3-VL"])
@torch.no_grad()
def test_over_a_neutral_prompt_the_sinks_of_the_language_model_are_gone(name: str) -> None:
    """Against the attention that transformers returns for both prompts, one divided by the other."""
    make, grid = MODELS[name]
    model, inputs = make()
    neutral = {**inputs, "input_ids": inputs["input_ids"].clone()}
    neutral["input_ids"][:, -2:] = torch.tensor([40, 41])
    found = testreg.answer_attention(model, inputs, [0, 1], neutral=neutral)
    model.set_attn_implementation("eager")
    maps = []
    for each in (inputs, neutral):
        attentions = model(**each, output_attentions=True).attentions[:2]
        rows = torch.stack([drawn[:, :, -1, len(TEXT) : len(TEXT) + grid[0] * grid[1]] for drawn in attentions])
        maps.append(rows.mean((0, 2)).unflatten(1, grid))
    torch.testing.assert_close(found, maps[0] / maps[1], rtol=1e-4, atol=1e-4)
    assert not found.allclose(torch.ones(()), atol=1e-3)
    torch.testing.assert_close(testreg.answer_attention(model, inputs, neutral=inputs), torch.ones(2, *grid))
    with pytest.raises(ValueError, match="the neutral prompts have other images"):
        testreg.answer_attention(model, inputs, neutral={key: value[:1] for key, value in neutral.items()})


@torch.no_grad()
def test_a_register_changes_the_map() -> None:
    model, inputs = llava()
    before = testreg.answer_attention(model, inputs)
    with testreg.patched(model, NEURONS):
        assert not testreg.answer_attention(model, inputs).allclose(before, rtol=1e-3)
        with testreg.disabled(model):
            torch.testing.assert_close(testreg.answer_attention(model, inputs), before)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing() -> None:
    model, inputs = llava()
    expected = testreg.answer_attention(model, inputs)
    ids = torch.cat([torch.zeros(2, 2, dtype=torch.long), inputs["input_ids"]], 1)
    padded = {**inputs, "input_ids": ids, "attention_mask": (ids != 0).long()}
    torch.testing.assert_close(testreg.answer_attention(model, padded), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="padded on the right"):
        testreg.answer_attention(model, {**padded, "attention_mask": padded["attention_mask"].flip(1)})


def test_another_kernel_is_put_back() -> None:
    model, inputs = llava()
    expected = testreg.answer_attention(model, inputs)
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(testreg.answer_attention(model, inputs), expected)
    assert model.config._attn_implementation == "flex_attention"


def test_bad_arguments() -> None:
    model, inputs = llava()
    ids = inputs["input_ids"]
    for changes, options, message in (
        ({}, {"blocks": [9]}, "the language model has 3 blocks"),
        ({}, {"heads": [4]}, "the language model has 4 heads"),
        ({"input_ids": ids[:, :3]}, {}, "each prompt needs one image"),
        ({"input_ids": torch.cat([ids, ids[:, 3:5]], 1)}, {}, "form a grid"),
        ({"pixel_values": None}, {}, "neither pixel_values nor image_grid_thw"),
    ):
        with pytest.raises(ValueError, match=message):
            testreg.answer_attention(model, {**inputs, **changes}, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no vision-language model"):
        testreg.answer_attention(transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1)), inputs)
