"""The activation function of a tower's MLPs: its name, and whether the checkpoint wants that one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import open_clip
import pytest
import reference
import timm
import tiny
import torch
from imitations import clip
from timm.layers.create_act import get_act_layer
from torch import Tensor, nn
from transformers.activations import ACT2FN

import testreg
from testreg import RegisterNeurons
from testreg.families import activation, find_tower, mismatch_of
from testreg.neurons import describe_model

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": reference.gelu,
    "gelu_tanh": reference.gelu_tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: x * torch.sigmoid(x),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    **{f"transformers {name}": lambda name=name: ACT2FN[name] for name in ACT2FN},
    **{f"timm {name}": get_act_layer(name) for name in ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")},
    "open_clip": open_clip.transformer.QuickGELU,
    "torch tanh": lambda: nn.GELU(approximate="tanh"),
}
NAMED = {"gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu", "relu2"}


def with_activation(module: nn.Module) -> nn.Module:
    model = tiny.build("timm_vit")
    for block in model.blocks:
        block.mlp.act = module
    return model


@pytest.mark.parametrize("library", MODULES)
def test_a_name_means_the_same_function_in_all_libraries(library: str) -> None:
    module = MODULES[library]()
    name, x = activation(find_tower(with_activation(module))), torch.linspace(-4, 4, 101)
    if name is not None:
        torch.testing.assert_close(module(x), FORMULAS[name](x), rtol=0, atol=1e-5)
    if library.startswith("transformers"):
        assert name is not None or library.partition(" ")[2] not in NAMED
    else:
        assert name is not None


@pytest.mark.parametrize("family", reference.LAYOUTS)
def test_every_family_tells_its_activation(family: str) -> None:
    expected = {"hf_clip": "quick_gelu", "hf_siglip": "gelu_tanh"}.get(family, "gelu")
    gated = {"hf_dinov2_swiglu", "hf_dinov3_gated", "timm_eva02", "dinov2_chunked_swiglu_reg4"}
    assert activation(find_tower(reference.build(family))) == ("swiglu" if family in gated else expected)


def test_openais_own_class_computes_quickgelu() -> None:
    assert activation(find_tower(clip.VisionTransformer(64, 16, 48, 2, 4))) == "quick_gelu"


def test_what_is_not_known_is_left_out() -> None:
    mixed = tiny.build("timm_vit")
    mixed.blocks[1].mlp.act = nn.ReLU()
    for model in (with_activation(nn.Softplus()), mixed):
        assert activation(find_tower(model)) is None
        assert "activation" not in describe_model(model, find_tower(model))
    model = tiny.build("timm_vit")
    assert describe_model(model, find_tower(model))["activation"] == "gelu"


# ---- checkpoints that want another one -------------------------------------------------------------------------------


def small(name: str) -> nn.Module:
    return timm.create_model(name, img_size=64, embed_dim=48, depth=2, num_heads=4).eval()


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("vit_base_patch16_clip_224.openai", "vit_base_patch16_clip_quickgelu_224.openai"),
        ("vit_large_patch14_clip_336.openai", "vit_large_patch14_clip_quickgelu_336.openai"),
        ("vit_huge_patch14_clip_224.dfn5b", "vit_huge_patch14_clip_quickgelu_224.dfn5b"),
        ("vit_base_patch16_clip_quickgelu_224.openai", None),
        ("vit_base_patch16_clip_224.openai_ft_in1k", None),  # fine-tuned with GELU
        ("vit_base_patch16_clip_224.laion2b", None),
        ("vit_base_patch16_224.augreg_in21k", None),
    ],
)
def test_timms_checkpoints_that_want_quickgelu(name: str, right: str | None) -> None:
    model = small(name)
    found = mismatch_of(model, find_tower(model))
    if right is None:
        assert found is None
    else:
        assert found is not None
        assert (found.checkpoint, found.right) == (f"timm:{name}", f"timm:{right}")
        assert (found.own, found.trained_with) == ("gelu", "quick_gelu")
        assert timm.models.is_model_pretrained(right)


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("ViT-B-16/openai", "ViT-B-16-quickgelu/openai"),
        ("ViT-L-14/metaclip_400m", "ViT-L-14-quickgelu/metaclip_400m"),
        ("ViT-B-16/laion2b_s34b_b88k", None),
        ("hf-hub:someone/something", None),
    ],
)
def test_open_clips_checkpoints_that_want_quickgelu(name: str, right: str | None) -> None:
    model = tiny.build("open_clip")
    model.testreg_source = f"open_clip:{name}"
    found = mismatch_of(model, find_tower(model))
    assert (found and found.right) == (right and f"open_clip:{right}")
    if right is not None:
        assert tuple(right.split("/")) in open_clip.list_pretrained()
    for block in find_tower(model).blocks:
        block.module.mlp.gelu = open_clip.transformer.QuickGELU()
    assert mismatch_of(model, find_tower(model)) is None


PHOTOS = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
CALLS: dict[str, Callable[[nn.Module], object]] = {
    "patch": lambda model: testreg.patch(model, {0: [3]}),
    "diagnose": lambda model: testreg.diagnose(model, PHOTOS, progress=False),
    "calibrate": lambda model: testreg.calibrate(model, PHOTOS, progress=False),
}


@pytest.mark.parametrize("call", CALLS)
def test_warns_of_gelu_on_quickgelu_weights_and_names_the_right_model(call: str) -> None:
    model = small("vit_base_patch16_clip_224.openai")
    message = r"computes gelu, but timm:\S+\.openai was trained with quick_gelu.*Load timm:\S+quickgelu_224\.openai"
    with pytest.warns(UserWarning, match=message) as caught, contextlib.suppress(testreg.NoOutliersError):
        CALLS[call](model)
    assert sum("quick_gelu" in str(each.message) for each in caught) == 1
    assert {each.filename for each in caught if "quick_gelu" in str(each.message)} == {__file__}


def test_warns_of_a_checkpoint_once_for_a_model() -> None:
    model = small("vit_base_patch16_clip_224.openai")
    with pytest.warns(UserWarning, match="quick_gelu"):
        testreg.patch(model, {0: [3]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        testreg.patch(testreg.unpatch(model), {0: [3]})
    with pytest.warns(UserWarning, match="quick_gelu"):
        testreg.patch(small("vit_base_patch16_clip_224.openai"), {0: [3]})


def test_patch_warns_of_a_list_that_was_found_with_another_activation() -> None:
    model = tiny.build("hf_clip")
    found = RegisterNeurons(((1, 3, None),), model=describe_model(model, find_tower(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        testreg.unpatch(testreg.patch(model, found))
        unsaid = {key: value for key, value in found.model.items() if key != "activation"}
        testreg.unpatch(testreg.patch(model, RegisterNeurons(found.ranking, model=unsaid)))
    for block in find_tower(model).blocks:
        block.module.mlp.activation_fn = nn.GELU()
    with pytest.warns(
        UserWarning, match="found in a network that computes quick_gelu, and this CLIPVisionModel computes"
    ):
        testreg.patch(model, found)
    assert testreg.is_patched(model)
