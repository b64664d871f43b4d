"""Hooks inside of blocks that see no registers: their tensors, their gradients, and the tools that hang on them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import build, run
from tiny import IMAGE
from torch import Tensor, nn

import testreg
from testreg.families import find_tower

NEURONS = {1: [3, 77, 120], 2: [0, 64, 127]}
FAMILIES = ["timm_vit", "hf_clip", "open_clip_sequence_first", "torchvision_vit", "hf_dinov3"]


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(7))


def unfused(family: str) -> Any:
    model = build(family)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def shapes_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: shapes_of(each) for key, each in value.items() if each is not None}
    return [shapes_of(each) for each in value if each is not None] if isinstance(value, (tuple, list)) else None


def seen_inside(model: nn.Module) -> list[Any]:
    """The shapes of all that hooks on every module inside the second block see in a forward."""
    seen: list[Any] = []
    block = find_tower(model).blocks[1].module
    handles = []
    for name, module in block.named_modules():
        if name:
            before = lambda module, args, kwargs, name=name: seen.append((name, shapes_of(args), shapes_of(kwargs)))
            after = lambda module, args, output, name=name: seen.append((name, shapes_of(output)))
            handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after),
            ]
    run(model, images())
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_hooks_see_what_they_see_in_the_unpatched_model(family: str) -> None:
    model = unfused(family)
    plain = seen_inside(model)
    expected = run(testreg.patch(model, NEURONS, num_registers=2), images())
    assert seen_inside(model) != plain
    with testreg.hooks_without_registers(model):
        assert seen_inside(model) == plain
        handle = find_tower(model).blocks[1].mlps[0].fc2.register_forward_hook(lambda module, args, output: None)
        torch.testing.assert_close(run(model, images()), expected)
        handle.remove()
    assert seen_inside(model) != plain
    assert not testreg.is_patched(testreg.unpatch(model))
    assert seen_inside(model) == plain


def test_a_hook_keeps_and_replaces_tensors_of_the_graph() -> None:
    """Against hooks that see registers: the same gradient on the tokens, and the same effect."""
    model = testreg.patch(unfused("timm_vit"), NEURONS)
    drop, norm = model.blocks[2].attn.attn_drop, model.blocks[2].norm1
    kept: list[Tensor] = []
    gradients: list[list[Tensor]] = []
    for context in (False, True):
        kept.clear()
        handles = [each.register_forward_hook(lambda m, a, output: kept.append(output)) for each in (norm, drop)]
        if context:
            with testreg.hooks_without_registers(model):
                output = model(images())
        else:
            output = model(images())
        for handle in handles:
            handle.remove()
        gradients.append(list(torch.autograd.grad(output.square().sum(), kept)))
    torch.testing.assert_close(gradients[1][0], gradients[0][0][:, :-1])
    torch.testing.assert_close(gradients[1][1], gradients[0][1][:, :, :-1, :-1])

    def halved(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :17] * 0.5, output[:, 17:]], 1)

    with norm.register_forward_hook(halved), torch.no_grad():
        expected = model(images())
    with testreg.hooks_without_registers(model), norm.register_forward_hook(halved), torch.no_grad():
        torch.testing.assert_close(model(images()), expected)


def test_hooks_on_fc2_see_moved_neurons_and_its_backward_hooks_gradients_of_the_tokens() -> None:
    model = testreg.patch(build("timm_vit"), NEURONS)
    seen: dict[str, Tensor] = {}
    fc2 = model.blocks[2].mlp.fc2
    fc2.register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0]))
    fc2.register_full_backward_hook(lambda module, inputs, outputs: seen.update(input=inputs[0], output=outputs[0]))
    with testreg.hooks_without_registers(model):
        model(images()).square().sum().backward()
    assert seen["hidden"].shape == seen["input"].shape == (2, 17, 192)
    assert seen["output"].shape == (2, 17, 48)
    assert not seen["hidden"][:, 1:, [0, 64, 127]].any()


class Wrapper(nn.Module):
    """What an adapter is: a module that holds the linear and calls it."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden)


def test_an_adapter_that_came_after_the_patch_is_seen_first_within_the_context() -> None:
    model, seen = testreg.patch(build("timm_vit"), NEURONS), []
    expected = model(images())
    mlp = model.blocks[2].mlp
    mlp.fc2 = Wrapper(mlp.fc2)
    mlp.fc2.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    with testreg.hooks_without_registers(model):
        torch.testing.assert_close(model(images()), expected)
    assert seen == [17]
    torch.testing.assert_close(model(images()), expected)
    mlp.fc2 = mlp.fc2.linear
    assert not testreg.is_patched(testreg.unpatch(model))


def test_blocks_may_share_a_module() -> None:
    model, seen = build("timm_vit"), []
    for block in model.blocks:
        block.mlp.act = model.blocks[0].mlp.act
    expected = testreg.patch(model, NEURONS)(images())
    record = lambda module, args, output: seen.append(output.shape[1])
    with model.blocks[0].mlp.act.register_forward_hook(record), testreg.hooks_without_registers(model):
        torch.testing.assert_close(model(images()), expected)
    assert seen == [17] * 4
    testreg.unpatch(model)
    assert "forward" not in vars(model.blocks[0].mlp.act)


# Tools ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tools() -> Any:
    path = Path(__file__).parents[2] / "docs" / "recipes" / "hooked_tools.py"
    spec = importlib.util.spec_from_file_location("hooked_tools", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model() -> Iterator[Any]:
    model = testreg.patch(unfused("timm_vit"), NEURONS)
    with testreg.hooks_without_registers(model):
        yield model


def test_grad_cam(tools: Any, model: Any) -> None:
    """The CAM by hand: the mean gradient of each channel weighs the patches."""
    pytest.importorskip("pytorch_grad_cam")
    found = tools.grad_cam(model, images(1))
    assert found.shape == (1, IMAGE, IMAGE)
    kept: list[Tensor] = []
    with model.blocks[-1].norm1.register_forward_hook(lambda module, args, output: kept.append(output)):
        scores = model(images(1))
    gradient = torch.autograd.grad(scores.max(), kept[0])[0][:, 1:]
    cam = (gradient.mean(1, keepdim=True) * kept[0][:, 1:]).sum(-1).relu().view(4, 4)
    coarse = found[0].view(4, 16, 4, 16).mean((1, 3))
    assert cam.flatten().argmax() == coarse.flatten().argmax()


def test_attention_rollout_and_timms_extractor(tools: Any, model: Any) -> None:
    rollout = tools.attention_rollout(model, images())
    assert rollout.shape == (2, 16)
    maps = tools.timm_attention(model, images())
    assert [tuple(each.shape) for each in maps.values()] == [(2, 4, 17, 17)] * 4
    for each in maps.values():
        assert (each.sum(-1) < 1).all()  # the rest goes to the register
    expected = testreg.attention(model, images(), 3)
    torch.testing.assert_close(list(maps.values())[3][:, :, 0, 1:].view(2, 4, 4, 4), expected)


def test_key_descriptors_and_lost(tools: Any, model: Any) -> None:
    keys = tools.key_descriptors(model, images())
    assert keys.shape == (2, 4, 17, 12)
    patches = keys[:, :, 1:].transpose(1, 2).flatten(2)
    torch.testing.assert_close(tools.lost_similarity(model, images()), patches @ patches.mT)


def test_visionzips_metric(tools: Any) -> None:
    """An attention that keeps its keys and weights as attributes, as tools do that replace its forward."""

    class Keeping(nn.Module):
        def __init__(self, attention: Any) -> None:
            super().__init__()
            self.qkv, self.proj, self.num_heads = attention.qkv, attention.proj, attention.num_heads

        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            self.metric = key.mean(1)
            self.weights = (query @ key.mT / key.shape[-1] ** 0.5).softmax(-1)
            return self.proj((self.weights @ value).transpose(1, 2).flatten(2))

    model = unfused("timm_vit")
    expected = testreg.patch(model, NEURONS)(images())
    testreg.unpatch(model)
    model.blocks[-2].attn = Keeping(model.blocks[-2].attn)
    testreg.patch(model, NEURONS)
    with testreg.hooks_without_registers(model):
        metric, scores = tools.visionzip_metric(model, images())
        torch.testing.assert_close(model(images()), expected)
    assert metric.shape == (2, 17, 12)
    assert scores.shape == (2, 16)


@torch.no_grad()
def test_stripping_what_has_no_registers_changes_nothing(model: Any) -> None:
    lengths: list[int] = []
    model.blocks[1].mlp.register_forward_hook(
        lambda module, args, output: lengths.append(testreg.strip_registers(model, output).shape[1])
    )
    model(images())
    assert lengths == [17]


def test_a_model_that_is_not_patched_has_no_registers_to_hide() -> None:
    with pytest.raises(RuntimeError, match="not patched"), testreg.hooks_without_registers(build("timm_vit")):
        pass
