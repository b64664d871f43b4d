"""The families: where their parts are, and that everything outside the blocks sees what it always saw."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import open_clip
import pytest
import timm
import tiny
import torch
import transformers
from imitations import clip
from marks import slow_except
from reference import LAYOUTS, block_outputs, build, forward_by_hand, run
from tiny import DEPTH, HF, HF_DINOV2, HF_TEXT, IMAGE, TIMM, WIDTH
from torch import Tensor, nn

from testreg import is_patched, patch, unpatch
from testreg.families import find_tower

RANKING = [(1, 3), (1, 77), (1, 120), (2, 0), (2, 64), (2, 127)]
NEURONS = {1: [3, 77, 120], 2: [0, 64, 127]}
SIDE = IMAGE // tiny.PATCH

all_families = pytest.mark.parametrize("family", LAYOUTS)


def images(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(7)).to(dtype)


def signature(output: Any) -> Any:
    """Types, shapes and dtypes of an output, however nested."""
    if isinstance(output, Tensor):
        return type(output), tuple(output.shape), output.dtype
    if isinstance(output, dict):  # transformers' outputs too
        return type(output), {key: signature(value) for key, value in output.items()}
    if isinstance(output, list | tuple):
        return type(output), [signature(value) for value in output]
    return type(output)


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for value in output.values() if isinstance(output, dict) else output:
            yield from tensors(value)


def same(one: Any, other: Any) -> bool:
    return all(a.equal(b) for a, b in zip(tensors(one), tensors(other), strict=True))


# The grid of patches -------------------------------------------------------------------------------------------------

NAFLEX = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4}
PADDING: dict[str, Callable[..., nn.Module]] = {
    "timm ViT": lambda **pad: timm.create_model("vit_base_patch16_224", dynamic_img_size=True, **TIMM, **pad),
    "timm Eva": lambda **pad: timm.create_model("eva02_base_patch14_224", dynamic_img_size=True, **TIMM, **pad),
    "timm NaFlexVit": lambda **pad: timm.create_model("naflexvit_base_patch16_gap", **NAFLEX, **pad),
    "timm hybrid": lambda **pad: timm.create_model("vit_tiny_r_s16_p8_224", dynamic_img_size=True, **pad),
}


def num_patches(model: nn.Module, inputs: Tensor) -> int:
    """As many as block 0 gets."""
    tower, lengths = find_tower(model), list[int]()
    handle = tower.blocks[0].module.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(next(iter((*args, *kwargs.values()))).shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        tower.run(inputs)
    handle.remove()
    return lengths[0] - tower.num_prefix


@pytest.mark.parametrize("size", [(128, 256), (130, 250), (127, 129)])
@pytest.mark.parametrize("name", PADDING)
def test_the_grid_counts_the_patches_of_padded_images(name: str, size: tuple[int, int]) -> None:
    if tiny.TIMM_1_0_26 and name == "timm NaFlexVit" and any(side % tiny.PATCH for side in size):
        pytest.skip("NaFlexVit of timm 1.0.26 fails on images that it pads")
    model, inputs = PADDING[name](dynamic_img_pad=True).eval(), torch.randn(1, 3, *size)
    rows, columns = find_tower(model).grid(inputs)
    assert rows * columns == num_patches(model, inputs)


@pytest.mark.parametrize("family", [name for name in LAYOUTS if name.startswith("hf")])
def test_the_grid_counts_the_patches_of_images_that_are_cut(family: str) -> None:
    model, inputs = build(family), torch.randn(1, 3, IMAGE + 8, IMAGE + tiny.PATCH + 3)
    rows, columns = find_tower(model).grid(inputs)
    assert (rows, columns) == (SIDE, SIDE + 1)
    assert rows * columns == num_patches(model, inputs)


@pytest.mark.parametrize("family", ["timm_vit", "hf_siglip", "hf_dinov2_registers"])
def test_the_patches_are_the_tokens_behind_the_prefix(family: str) -> None:
    tower, inputs = find_tower(build(family)), images()
    patches = tower.patches(inputs)
    assert (patches.start, patches.stop) == (LAYOUTS[family].prefix, LAYOUTS[family].prefix + SIDE**2)


def test_units_are_numbered_through_mlps_that_run_side_by_side() -> None:
    model = timm.create_model("vit_base_patch16_18x2_224", **TIMM)
    block = find_tower(model).blocks[0]
    first, second = block.mlps
    assert list(block.units_by_mlp([])) == []
    assert list(block.units_by_mlp([7, 0])) == [(first, {7: 7, 0: 0})]
    width = first.width
    of_both = [(first, {width - 1: width - 1}), (second, {width: 0, 2 * width - 1: width - 1})]
    assert list(block.units_by_mlp([width, width - 1, 2 * width - 1])) == of_both


def test_the_final_norm_is_behind_the_blocks_and_not_in_front_of_them() -> None:
    for family, path in (
        ("timm_vit", "norm"),
        ("hf_dinov2", "layernorm"),
        ("hf_clip", "post_layernorm"),  # which is somewhere else in older releases
        ("open_clip", "visual.ln_post"),
        ("torchvision_vit", "encoder.ln"),
    ):
        model = build(family)
        names = {module: name for name, module in model.named_modules()}
        assert names[find_tower(model).final_norm].endswith(path)
    openai = clip.VisionTransformer(IMAGE, tiny.PATCH, WIDTH, DEPTH, 4)
    assert find_tower(openai).final_norm is openai.ln_post
    pooled = timm.create_model("vit_base_patch16_224", global_pool="avg", **TIMM)
    assert find_tower(pooled).final_norm is pooled.fc_norm
    assert find_tower(timm.create_model("vit_base_patch16_224", final_norm=False, **TIMM)).final_norm is None


def test_a_tower_returns_from_eval_mode_as_it_was() -> None:
    model = build("timm_vit").train()
    model.blocks[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    tower = find_tower(model)
    with tower.evaluating():
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(ZeroDivisionError), tower.evaluating():
        raise ZeroDivisionError
    assert {name: module.training for name, module in model.named_modules()} == before


# The table -----------------------------------------------------------------------------------------------------------


@all_families
def test_the_table_finds_every_part(family: str) -> None:
    model, layout = build(family), LAYOUTS[family]
    tower = find_tower(model)
    assert tower.module is getattr(model, "visual", model)
    assert model.get_submodule(tower.path) is tower.module
    assert [block.module for block in tower.blocks] == list(layout.blocks(model))
    assert (tower.depth, tower.mlp_width, tower.num_prefix) == (DEPTH, layout.mlp_width, layout.prefix)
    assert tower.entry_norm is (layout.entry_norm(model) if layout.entry_norm else None)
    assert tower.sequence_first == layout.sequence_first
    assert tower.grid(images()) == (SIDE, SIDE)
    for block in tower.blocks:
        expected = layout.read(block.module)
        (mlp,) = block.mlps
        assert mlp.fc2_linear.weight is expected.fc2[0]
        assert mlp.fc2 is (expected.middle_norm or mlp.fc2_linear)
        assert (block.attention is not None) == family.startswith("hf")
        if family not in ("timm_parallel", *tiny.SPREAD_MLP):  # have neither
            assert mlp.module is not None
            assert mlp.module(torch.zeros(5, WIDTH)).shape == (5, WIDTH)
            assert mlp.scale is (expected.scale2 if isinstance(expected.scale2, Tensor) else None)


# Public outputs ------------------------------------------------------------------------------------------------------

Call = Callable[[Any, Tensor], Any]

TIMM_CALLS: dict[str, Call] = {
    "forward": lambda m, x: m(x),
    "forward_features": lambda m, x: m.forward_features(x),
    "pre_logits": lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True),
    "nchw": lambda m, x: m.forward_intermediates(x, return_prefix_tokens=True),
    "nlc": lambda m, x: m.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True, norm=True),
    "some": lambda m, x: m.forward_intermediates(x, indices=[1, 2], intermediates_only=True, stop_early=True),
    "layers": lambda m, x: m.get_intermediate_layers(x, n=3),
    "layers_nchw": lambda m, x: m.get_intermediate_layers(x, n=3, reshape=True, return_prefix_tokens=True, norm=True),
}
HF_CALLS: dict[str, Call] = {
    "forward": lambda m, x: m(x),
    "tuple": lambda m, x: m(x, return_dict=False),
    "hidden_states": lambda m, x: m(x, output_hidden_states=True),
    "attentions": lambda m, x: m(x, output_attentions=True, output_hidden_states=True),
}
OPEN_CLIP_CALLS: dict[str, Call] = {
    "visual": lambda m, x: m.visual(x),
    "encode_image": lambda m, x: m.encode_image(x, normalize=True),
    "forward": lambda m, x: m(x, torch.zeros(2, 16, dtype=torch.long)),
    "nchw": lambda m, x: m.visual.forward_intermediates(x, output_extra_tokens=True),
    "nlc": lambda m, x: m.visual.forward_intermediates(x, output_fmt="NLC", normalize_intermediates=True),
    "some": lambda m, x: m.visual.forward_intermediates(x, indices=[1, 2], intermediates_only=True, stop_early=True),
    "clip": lambda m, x: m.forward_intermediates(x),
}
DINOV2_CALLS: dict[str, Call] = {
    "forward": lambda m, x: m(x),
    "training": lambda m, x: m(x, is_training=True),
    "layers": lambda m, x: m.get_intermediate_layers(x, n=3),
    "layers_nchw": lambda m, x: m.get_intermediate_layers(x, n=3, reshape=True),
}
CALLS = {
    "timm": TIMM_CALLS,
    "hf": HF_CALLS,
    "open": OPEN_CLIP_CALLS,
    "torchvision": {"forward": lambda m, x: m(x)},
    "dinov2": DINOV2_CALLS,
}


@pytest.mark.parametrize(
    ("family", "call"),
    [
        (family, call)
        for family in LAYOUTS
        for call in CALLS[family.partition("_")[0]]
        if not (call.startswith("layers") and family in ("timm_dinov3", "timm_eva02", "timm_eva_without_rope"))
    ],  # timm's Eva has no get_intermediate_layers
)
@torch.no_grad()
def test_public_outputs_keep_their_types_and_shapes(family: str, call: str) -> None:
    model, forward = build(family), CALLS[family.partition("_")[0]][call]
    if call == "attentions":
        model.set_attn_implementation("eager")
    before = forward(model, images())
    after = forward(patch(model, NEURONS, num_registers=2), images())
    assert signature(after) == signature(before)
    assert not same(after, before)


@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_open_clip_returns_its_tokens(batch_first: bool) -> None:
    model = build("open_clip" if batch_first else "open_clip_sequence_first")
    model.visual.output_tokens = True
    before = model.visual(images())
    after = patch(model, NEURONS).visual(images())
    assert signature(after) == signature(before)
    assert after[1].shape == (2, SIDE * SIDE, WIDTH)
    assert not same(after, before)


@torch.no_grad()
def test_intermediates_of_timm_are_the_blocks_by_hand() -> None:
    for family in ("timm_vit", "timm_siglip", "timm_dinov2_reg4"):
        model, inputs = build(family).double(), images(dtype=torch.float64)
        expected = forward_by_hand(family, model, inputs, RANKING)
        pairs = patch(model, NEURONS).forward_intermediates(inputs, return_prefix_tokens=True, intermediates_only=True)
        for pair, by_hand in zip(pairs, expected, strict=True):
            patches, prefix = pair if isinstance(pair, tuple) else (pair, by_hand[:, :0])
            tokens = torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)
            torch.testing.assert_close(tokens, by_hand, rtol=0, atol=1e-10)


@torch.no_grad()
def test_intermediates_of_open_clip_are_the_blocks_by_hand() -> None:
    for family in ("open_clip", "open_clip_sequence_first"):
        model, inputs = build(family).double(), images(dtype=torch.float64)
        expected = forward_by_hand(family, model, inputs, RANKING)
        found = patch(model, NEURONS).visual.forward_intermediates(inputs, output_extra_tokens=True)
        patches, prefixes = found["image_intermediates"], found["image_intermediates_prefix"]
        for patch_map, prefix, by_hand in zip(patches, prefixes, expected, strict=True):
            tokens = torch.cat([prefix, patch_map.flatten(2).transpose(1, 2)], dim=1)
            torch.testing.assert_close(tokens, by_hand, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", [name for name in LAYOUTS if name.startswith("hf")])
@torch.no_grad()
def test_hidden_states_and_attentions_of_transformers_are_those_by_hand(family: str) -> None:
    model, inputs, weights = build(family).double(), images(dtype=torch.float64), []
    expected = forward_by_hand(family, model, inputs, RANKING, num_registers=2, attentions=weights)
    model.set_attn_implementation("eager")
    output = patch(model, NEURONS, num_registers=2)(inputs, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == DEPTH + 1
    # Eager attention takes its softmax in float32 here and there. Some releases put the normed output last.
    for ours, by_hand in zip(output.hidden_states[1:-1], expected[:-1], strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-5)
    for ours, by_hand in zip(output.attentions, weights, strict=True):
        torch.testing.assert_close(ours, by_hand[..., :-2, :-2], rtol=0, atol=1e-6)
        assert (ours.sum(-1) < 1).all()  # by what the registers received


@torch.no_grad()
def test_an_image_of_another_size_keeps_its_registers_last() -> None:
    family = "hf_dinov2_registers"
    model = build(family).double()
    inputs = torch.randn(1, 3, IMAGE, 2 * IMAGE, dtype=torch.float64)
    expected = forward_by_hand(family, model, inputs, RANKING)
    torch.testing.assert_close(block_outputs(family, patch(model, NEURONS), inputs)[-1], expected[-1])


# Whole models --------------------------------------------------------------------------------------------------------


def hf_clip() -> nn.Module:
    text = {**HF_TEXT, "eos_token_id": 1}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=HF, projection_dim=32))


def hf_siglip() -> nn.Module:
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=HF_TEXT, vision_config=HF))


def backbone(kind: str) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**HF_DINOV2, out_indices=[1, 2, 4], reshape_hidden_states=True)
    return getattr(transformers, f"{kind}Backbone")(config)


def llava() -> nn.Module:
    text = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=99,
    )
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**HF), text_config=text, image_token_index=98
        )
    )


def depth_anything() -> nn.Module:
    config = transformers.Dinov2Config(**HF_DINOV2, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    return transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(
            backbone_config=config,
            patch_size=tiny.PATCH,
            reassemble_hidden_size=WIDTH,
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
            head_hidden_size=8,
        )
    )


def open_clip_timm() -> nn.Module:
    return open_clip.model.CustomTextCLIP(
        embed_dim=32,
        vision_cfg={"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
        text_cfg={"context_length": 16, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2},
    )


TEXT = torch.tensor([[5, 6, 1, 0], [7, 8, 9, 1]])
PROMPT = torch.tensor([[5, *[98] * SIDE**2, 6]] * 2)

WHOLE: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "classifier": (lambda: nn.Sequential(tiny.BUILDERS["timm_vit"](), nn.Linear(10, 3)), lambda m, x: m(x)),
    "compiled": (lambda: torch.compile(tiny.BUILDERS["timm_vit"](), backend="eager"), lambda m, x: m(x)),
    "timm features_only": (
        lambda: timm.create_model("vit_base_patch16_224", features_only=True, out_indices=[1, 3], **TIMM),
        lambda m, x: m(x),
    ),
    "ViTForImageClassification": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**HF)),
        lambda m, x: m(x),
    ),
    "Dinov2ForImageClassification": (
        lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**HF_DINOV2)),
        lambda m, x: m(x),
    ),
    "Dinov2Backbone": (lambda: backbone("Dinov2"), lambda m, x: m(x, output_hidden_states=True)),
    "Dinov2WithRegistersBackbone": (lambda: backbone("Dinov2WithRegisters"), lambda m, x: m(x)),
    "DepthAnything": (depth_anything, lambda m, x: m(x)),
    "CLIPModel": (hf_clip, lambda m, x: m(input_ids=TEXT, pixel_values=x)),
    "CLIPVisionModelWithProjection": (
        lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**HF)),
        lambda m, x: m(x),
    ),
    "SiglipModel": (hf_siglip, lambda m, x: m(input_ids=TEXT, pixel_values=x)),
    "Llava": (llava, lambda m, x: m(input_ids=PROMPT, pixel_values=x)),
    "open_clip TimmModel": (open_clip_timm, lambda m, x: m.encode_image(x.repeat(1, 1, 3, 3)[..., :160, :160])),
}


@pytest.mark.parametrize("name", slow_except(WHOLE, *(WHOLE.keys() - {"compiled"})))
@torch.no_grad()
def test_whole_models_are_patched_at_their_tower(name: str) -> None:
    make, forward = WHOLE[name]
    torch.manual_seed(0)
    model = make().eval()
    tower = find_tower(model)
    for block in tower.blocks:  # the first weights of most libraries are too small to make a difference
        for parameter in block.module.parameters():
            parameter.normal_(std=0.3)
    inputs = images()
    before = forward(model, inputs)
    assert patch(model, NEURONS) is model
    assert is_patched(model)
    assert is_patched(tower.module)
    after = forward(model, inputs)
    assert signature(after) == signature(before)
    assert not same(after, before)
    assert same(forward(copy.deepcopy(model), inputs), after)
    assert same(forward(unpatch(model), inputs), before)
    patch(tower.module, NEURONS)
    assert same(forward(model, inputs), after)
    assert is_patched(model)


@torch.no_grad()
def test_the_text_tower_stays_as_it_is() -> None:
    model = hf_clip().eval()
    before, classes = model.get_text_features(TEXT), [type(m) for m in model.text_model.modules()]
    patch(model, NEURONS)
    after = model.get_text_features(TEXT)
    assert same(after, before)
    assert [type(m) for m in model.text_model.modules()] == classes
    assert not any("forward" in module.__dict__ for module in model.text_model.modules())


def test_a_vlm_generates_with_registers() -> None:
    model = patch(llava().eval(), NEURONS)
    generated = model.generate(input_ids=PROMPT, pixel_values=images(), max_new_tokens=3, min_new_tokens=3)
    assert generated.shape == (2, PROMPT.shape[1] + 3)


@torch.no_grad()
def test_a_pruned_tower_is_patched_at_the_blocks_it_has() -> None:
    model = build("timm_vit")
    full = patch(copy.deepcopy(model), NEURONS).forward_intermediates(images(), indices=[2], intermediates_only=True)
    model.prune_intermediate_layers([2], prune_norm=True)
    assert find_tower(model).depth == 3
    pruned = patch(model, NEURONS).forward_intermediates(images(), indices=[2], intermediates_only=True)
    assert same(pruned, full)


# Errors --------------------------------------------------------------------------------------------------------------


class FusedSwiGLU(nn.Module):
    """Like xformers': it reads the weights of w12 and w3, and never calls them."""

    __module__ = "xformers.ops.swiglu_op"

    def __init__(self) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(WIDTH, 2 * tiny.MLP_WIDTH), nn.Linear(tiny.MLP_WIDTH, WIDTH)


class SwiGLUFFNFused(FusedSwiGLU):
    """The subclass that the model's own package defines."""


def test_dinov2_of_before_it_had_registers():
    model = build("dinov2")
    del model.num_register_tokens
    assert find_tower(model).num_prefix == 1


def with_mlp(make: Callable[[], nn.Module]) -> nn.Module:
    model = build("dinov2")
    model.blocks[2].mlp = make()
    return model


def with_a_fast_path() -> nn.Module:
    model = build("timm_vit")
    model.blocks[1] = nn.TransformerEncoderLayer(WIDTH, 4, tiny.MLP_WIDTH, batch_first=True)
    return model


def without_blocks() -> nn.Module:
    model = build("timm_vit")
    model.blocks = nn.Sequential()
    return model


def with_a_wider_mlp() -> nn.Module:
    model = build("timm_vit")
    model.blocks[3].mlp = timm.layers.Mlp(WIDTH, 2 * tiny.MLP_WIDTH)
    return model


def two_towers() -> nn.Module:
    return nn.ModuleDict({"left": build("timm_vit"), "right": build("open_clip")})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(3, 3), ValueError, "tower in Linear: see https://.*/covered .*testreg.add_family"),
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1), num_heads=(1, 1)),
            ValueError,
            "SwinTransformer cannot be patched: .* patches are merged between stages",
        ),
        (
            lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**HF_TEXT)),
            ValueError,
            "no supported vision tower in CLIPTextModel",
        ),
        (two_towers, ValueError, r"several vision towers \('left', 'right.visual'\): pass the one you mean"),
        (lambda: nn.DataParallel(build("timm_vit")), TypeError, "nn.DataParallel .* pass its .module"),
        (lambda: torch.jit.script(nn.Linear(3, 3)), TypeError, "TorchScript modules cannot be patched"),
        (lambda: with_mlp(FusedSwiGLU), ValueError, "block 2 .* uses xformers' fused SwiGLU.* XFORMERS_DISABLED=1"),
        (lambda: with_mlp(SwiGLUFFNFused), ValueError, "block 2 .* uses xformers' fused SwiGLU.* XFORMERS_DISABLED=1"),
        (lambda: with_mlp(lambda: nn.Linear(WIDTH, WIDTH)), ValueError, "block 2 .* has no second MLP linear"),
        (with_a_fast_path, ValueError, "block 1 .* fast path bypasses .*set_fastpath_enabled"),
        (without_blocks, ValueError, "has no blocks"),
        (with_a_wider_mlp, ValueError, "MLPs of different widths"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:FutureWarning")
def test_models_that_cannot_be_patched_say_why(
    make: Callable[[], nn.Module], error: type[Exception], message: str
) -> None:
    model = make()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        patch(model, NEURONS)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert not is_patched(model)


def test_something_that_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got str"):
        patch("dinov2", NEURONS)  # type: ignore[type-var]


@torch.no_grad()
def test_one_of_two_towers_can_be_patched() -> None:
    model = two_towers()
    right = run(model.right, images())
    patch(model.left, NEURONS)
    assert is_patched(model)
    assert run(model.right, images()).equal(right)
