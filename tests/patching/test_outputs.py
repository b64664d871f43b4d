"""What people take out of a model, beside its main output, and how they feed it: values, against independent ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import tiny
import torch
import torchvision
import transformers
from reference import LAYOUTS, block_outputs, build, forward_by_hand, run
from tiny import HF, HF_DINOV2, IMAGE, PATCH, TIMM, TRANSFORMERS_4
from torch import Tensor, nn

from testreg import disabled, is_patched, patch, unpatch

RANKING = [(1, 3), (1, 77), (1, 120), (2, 0), (2, 64), (2, 127)]
NEURONS = {1: [3, 77, 120], 2: [0, 64, 127]}
SIDE = IMAGE // PATCH


def images(height: int = IMAGE, width: int = IMAGE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def build64(family: str) -> Any:
    return build(family).double()


def with_weights_of(source: nn.Module, model: nn.Module) -> Any:
    model.load_state_dict(source.state_dict(), strict=False)
    return model.double().eval()


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return run(model, images(dtype=next(model.parameters()).dtype))


def by_hand(family: str, model: nn.Module) -> list[Tensor]:
    """The tokens that leave each block; and that they are not those of the unpatched model."""
    expected = forward_by_hand(family, model, images(), RANKING)
    plain = block_outputs(family, model, images())
    assert (expected[2] - plain[2]).abs().max() > 0.05
    return expected


def as_map(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (SIDE, SIDE))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# Features ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_intermediate_layers_of_timm_are_the_blocks_by_hand() -> None:
    model = build64("timm_vit")
    expected = by_hand("timm_vit", model)
    features = timm.create_model("vit_base_patch16_224", features_only=True, out_indices=[1, 3], **TIMM)
    with_weights_of(model, features.model)
    patch(model, NEURONS)
    layers = model.get_intermediate_layers(images(), n=[1, 3], reshape=True)
    for ours, tokens in zip(layers, (expected[1], expected[3]), strict=True):
        close(ours, as_map(tokens[:, 1:]))
    normed = model.get_intermediate_layers(images(), n=1, norm=True, return_prefix_tokens=True)
    close(torch.cat([normed[0][1], normed[0][0]], 1), model.norm(expected[3]))

    maps = patch(features, NEURONS)(images())
    for ours, tokens in zip(maps, (expected[1], expected[3]), strict=True):
        close(ours, as_map(tokens[:, 1:]))


@torch.no_grad()
def test_feature_maps_of_a_transformers_backbone_are_the_blocks_by_hand() -> None:
    model = build64("hf_dinov2")
    expected = by_hand("hf_dinov2", model)
    config = transformers.Dinov2Config(**HF_DINOV2, out_indices=[1, 2, 4])
    backbone = patch(with_weights_of(model, transformers.Dinov2Backbone(config)), NEURONS)
    maps = backbone(images()).feature_maps  # its stages: the embedding, then the blocks
    for ours, tokens in zip(maps, (expected[0], expected[1], expected[3]), strict=True):
        close(ours, as_map(model.layernorm(tokens)[:, 1:]), 1e-6)


@torch.no_grad()
def test_tokens_of_open_clip_are_the_last_block_by_hand() -> None:
    model = build64("open_clip")
    expected = by_hand("open_clip", model)[-1]
    model.visual.output_tokens = True
    pooled, tokens = patch(model, NEURONS).visual(images())
    normed = model.visual.ln_post(expected)
    close(tokens, normed[:, 1:])
    close(pooled, normed[:, 0] @ model.visual.proj)


@torch.no_grad()
def test_image_features_of_llava_are_the_blocks_by_hand() -> None:
    tower = build64("hf_clip")
    expected = by_hand("hf_clip", tower)
    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=99
    )
    config = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**HF), text_config=text)
    model: Any = transformers.LlavaForConditionalGeneration(config).double().eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    features = patch(model, NEURONS).get_image_features(images())
    features = getattr(features, "pooler_output", features)  # transformers 4 returns a list of tensors
    for ours, tokens in zip(features, expected[-2], strict=True):  # Llava reads the last block but one
        close(ours, model.model.multi_modal_projector(tokens[1:]), 1e-6)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@pytest.mark.parametrize("family", ["hf_vit", "hf_clip", "hf_dinov2_registers", "hf_dinov3"])
def test_attention_implementations_agree(family: str, implementation: str) -> None:
    model = build(family)
    expected = outputs(patch(model, NEURONS))
    with disabled(model):
        assert not torch.allclose(outputs(model), expected, atol=1e-2)
    model.set_attn_implementation(implementation)
    with torch.compiler.set_stance("force_eager"):  # transformers compiles flex attention
        close(outputs(model), expected, 1e-5)


@torch.no_grad()
def test_a_flex_attention_mask_hides_what_the_mask_of_sdpa_hides() -> None:
    visible = torch.ones(2, SIDE**2 + 1)
    visible[0, -3:] = 0
    results = []
    for implementation in ("sdpa", "flex_attention"):
        model = patch(build("hf_vit"), NEURONS)
        model.set_attn_implementation(implementation)
        with torch.compiler.set_stance("force_eager"):
            results.append(model(images(dtype=torch.float32), attention_mask=visible).last_hidden_state)
    close(results[0], results[1], 1e-5)


# Gradients -----------------------------------------------------------------------------------------------------------


def with_autograd(block: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    kept: list[Tensor] = []
    with block.register_forward_hook(lambda module, args, output: kept.append(output)):
        return torch.autograd.grad(loss(), kept)[0]


def with_a_module_hook(block: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    seen: list[Tensor] = []
    with block.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0])):
        loss().backward()
    return seen[0]


@pytest.mark.parametrize("gradient_of", [with_autograd, with_a_module_hook])
@pytest.mark.parametrize("family", ["timm_vit", "open_clip_sequence_first", "hf_dinov3"])
def test_the_gradient_of_a_hidden_state(
    family: str, gradient_of: Callable[[nn.Module, Callable[[], Tensor]], Tensor]
) -> None:
    """As Grad-CAM and captum take it, against a difference quotient."""
    model = patch(build64(family), NEURONS)
    block = LAYOUTS[family].blocks(model)[1]

    def loss() -> Tensor:
        return run(model, images()).square().sum()

    gradient = gradient_of(block, loss)
    direction = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def at(step: float) -> Tensor:
        def edit(module: nn.Module, args: Any, output: Tensor) -> None:
            output.add_(step * direction)

        with block.register_forward_hook(edit):
            return loss()

    torch.testing.assert_close((gradient * direction).sum(), (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-5, atol=1e-5)


# torch.fx ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_feature_extraction_by_tracing() -> None:
    extract = torchvision.models.feature_extraction.create_feature_extractor
    model = build64("torchvision_vit")
    expected = by_hand("torchvision_vit", model)
    with pytest.raises(TypeError, match="traced"):
        patch(extract(model, ["heads"]), NEURONS)
    assert not is_patched(model)

    nodes = {"encoder.layers.encoder_layer_1": "middle", "encoder.ln": "normed", "heads": "logits"}
    extractor = extract(patch(model, NEURONS), nodes)
    found = extractor(images())
    close(found["middle"], expected[1])
    close(found["normed"], model.encoder.ln(expected[3]))
    close(found["logits"], outputs(model))


@torch.no_grad()
def test_feature_extraction_by_tracing_in_timm() -> None:
    from timm.models._features_fx import GraphExtractNet

    model = build64("timm_vit")
    expected = by_hand("timm_vit", model)
    maps = GraphExtractNet(patch(model, NEURONS), ["blocks.1", "blocks.3"])(images())
    for ours, tokens in zip(maps, (expected[1], expected[3]), strict=True):
        close(ours, tokens)


# Images and tokens ---------------------------------------------------------------------------------------------------


def any_size_timm() -> nn.Module:
    return with_weights_of(
        build("timm_vit"), timm.create_model("vit_base_patch16_224", num_classes=10, dynamic_img_size=True, **TIMM)
    )


def any_size_hf() -> nn.Module:
    model = build64("hf_clip")
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "interpolate_pos_encoding": True}), with_kwargs=True
    )
    return model


@pytest.mark.parametrize(("family", "make"), [("timm_vit", any_size_timm), ("hf_clip", any_size_hf)])
@torch.no_grad()
def test_images_of_another_size(family: str, make: Callable[[], nn.Module]) -> None:
    model = make()
    sizes = [(IMAGE, 2 * IMAGE), (IMAGE // 2, IMAGE)]
    expected = [forward_by_hand(family, model, images(*size), RANKING)[-1] for size in sizes]
    patch(model, NEURONS)
    for size, tokens in zip(sizes, expected, strict=True):
        close(block_outputs(family, model, images(*size))[-1], tokens)


def dropping_timm() -> nn.Module:
    return with_weights_of(
        build("timm_vit"), timm.create_model("vit_base_patch16_224", num_classes=10, patch_drop_rate=0.5, **TIMM)
    )


def dropping_open_clip() -> nn.Module:
    return with_weights_of(build("open_clip"), tiny._open_clip(patch_dropout=0.5))


@pytest.mark.parametrize(("family", "make"), [("timm_vit", dropping_timm), ("open_clip", dropping_open_clip)])
@torch.no_grad()
def test_patch_dropout_leaves_the_register(family: str, make: Callable[[], nn.Module]) -> None:
    model = make().train()
    torch.manual_seed(5)
    expected = forward_by_hand(family, model, images(), RANKING)
    patch(model, NEURONS)
    torch.manual_seed(5)
    actual = block_outputs(family, model, images())
    assert actual[-1].shape[1] == 1 + SIDE**2 // 2
    for ours, tokens in zip(actual, expected, strict=True):
        close(ours, tokens)


# LoRA ----------------------------------------------------------------------------------------------------------------

# The second MLP linear is the one whose input testreg edits.
TARGETS = {
    "attention": {"timm_vit": ["qkv"], "hf_dinov2": ["query", "value"] if TRANSFORMERS_4 else ["q_proj", "v_proj"]},
    "everything": {"timm_vit": ["qkv", "proj", "fc1", "fc2"], "hf_dinov2": "all-linear"},
}
lora_cases = pytest.mark.parametrize(
    ("family", "targets"), [(family, targets) for targets in TARGETS for family in TARGETS[targets]]
)


def with_lora(family: str, targets: str, model: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=TARGETS[targets][family], init_lora_weights=False)
    )


def trained(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The output in training mode and the gradients of the adapters."""
    output = run(model.train(), images())
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    model.eval()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return output.detach(), gradients


@lora_cases
def test_lora_before_and_after_the_patch_is_the_same(family: str, targets: str) -> None:
    merged = with_lora(family, targets, build64(family)).merge_and_unload()
    expected = outputs(patch(merged, NEURONS))  # a plain model with the adapted weights

    first = with_lora(family, targets, build64(family))
    plain = outputs(first)
    assert (plain - expected).abs().max() > 0.05
    patch(first, NEURONS)
    then = with_lora(family, targets, patch(build64(family), NEURONS))
    gradients = []
    for model in (first, then):
        close(outputs(model), expected)
        output, found = trained(model)
        close(output, expected)
        gradients.append(found)
    assert gradients[0].keys() == gradients[1].keys()
    assert all("lora" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)
    for model in (first, then):
        close(outputs(unpatch(model)), plain)


@lora_cases
def test_lora_merges_into_a_patched_model(family: str, targets: str) -> None:
    adapted = with_lora(family, targets, patch(build64(family), NEURONS))
    expected = outputs(adapted)
    merged = adapted.merge_and_unload()
    close(outputs(merged), expected)
    assert not is_patched(unpatch(merged))


def test_lora_that_was_patched_with_its_wrapper_is_unpatched_before_it_merges() -> None:
    family, targets = "timm_vit", "everything"
    adapted = patch(with_lora(family, targets, build64(family)), NEURONS)
    expected = outputs(adapted)
    merged = adapted.merge_and_unload()  # drops the wrapper, and with it what moves the neurons
    with pytest.raises(RuntimeError, match=r"the second MLP linear of block 1 was replaced .*unpatch\(model\)"):
        outputs(merged)
    close(outputs(patch(unpatch(merged), NEURONS)), expected)
