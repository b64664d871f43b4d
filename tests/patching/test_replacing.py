"""Tensors that someone puts between two blocks: the register of the same forward stays with them, or an error says so.

Edits in place have always reached the next block: they are what a replacement is compared with.
"""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from reference import LAYOUTS, build, run
from tiny import IMAGE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import testreg
from testreg.patching.forward import running

Edit = Callable[[Tensor], Tensor]
NEURONS = {1: [3, 77, 120], 2: [0, 64, 127]}


def images(seed: int = 7, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))


def patched(family: str = "timm_vit", **options: Any) -> Any:
    return testreg.patch(build(family), NEURONS, **options)


def hooked(block: nn.Module, edit: Edit) -> Any:
    """A hook that puts `edit(tokens)` in the place of what a block returns."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    return block.register_forward_hook(hook)


def in_place(value: Tensor) -> Edit:
    def edit(tokens: Tensor) -> Tensor:
        tokens.copy_(value)
        return tokens

    return edit


def activation(model: nn.Module, block: nn.Module, x: Tensor) -> Tensor:
    """What the block gives for other images; the tensor itself, not a copy."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    with block.register_forward_hook(keep), torch.no_grad():
        run(model, x)
    return kept[0]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    yield
    assert running.call is None


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("family", LAYOUTS)
def test_the_register_stays_with_a_copy_of_the_tokens(family: str, grad: bool) -> None:
    model = patched(family, num_registers=2)
    with torch.set_grad_enabled(grad), ExitStack() as stack:
        expected = run(model, images())
        for block in LAYOUTS[family].blocks(model):
            stack.enter_context(hooked(block, lambda tokens: tokens.clone()))
        torch.testing.assert_close(run(model, images()), expected)


EDITS: dict[str, Edit] = {
    "arithmetic": lambda tokens: tokens * 0.5,
    "detached": lambda tokens: tokens.detach(),
    "deepcopy": lambda tokens: copy.deepcopy(tokens.detach()),
    "through numpy": lambda tokens: torch.from_numpy(tokens.detach().numpy().copy()),
    "moved": lambda tokens: tokens.to("cpu", copy=True),
    "another dtype and back": lambda tokens: tokens.double().mul(0.5).float(),
    "a leaf": lambda tokens: tokens.detach().clone().requires_grad_(),
    "not contiguous": lambda tokens: tokens.mT.contiguous().mT,
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("edit", EDITS)
def test_what_is_put_between_blocks_is_as_an_edit_in_place(edit: str, grad: bool) -> None:
    model = patched()
    with hooked(model.blocks[1], lambda tokens: in_place(EDITS[edit](tokens.clone()))(tokens)), torch.no_grad():
        expected = model(images())
    with torch.set_grad_enabled(grad), hooked(model.blocks[1], EDITS[edit]):
        torch.testing.assert_close(model(images()), expected)


def test_the_registers_follow_the_tokens_to_another_dtype() -> None:
    model = patched()
    with torch.no_grad():
        expected = model(images())
        model.blocks[2:].double(), model.norm.double(), model.head.double()
        with hooked(model.blocks[1], lambda tokens: tokens.double()):
            found = model(images())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected)


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("family", ["timm_vit", "hf_clip", "open_clip_sequence_first"])
@torch.no_grad()
def test_an_activation_of_other_images_leaves_the_register_of_these(family: str, copied: bool) -> None:
    """Activation patching: whether the tensor is a copy makes no difference."""
    model = patched(family)
    block = LAYOUTS[family].blocks(model)[1]
    clean = activation(model, block, images(1))
    with hooked(block, in_place(clean.clone())):
        expected = run(model, images(2))
    with testreg.registers(model) as of_clean:
        run(model, images(1))
    with hooked(block, lambda tokens: clean.clone() if copied else clean), testreg.registers(model) as held:
        torch.testing.assert_close(run(model, images(2)), expected)
    assert len(held) == len(of_clean) == 4
    assert not torch.allclose(held[1], of_clean[1], atol=1e-3)


@torch.no_grad()
def test_an_activation_of_another_model_leaves_the_register_of_this() -> None:
    """Another model whose forward is not over: its tokens carry registers of their own."""
    model, other = patched(), testreg.patch(build("timm_vit"), {0: [5], 3: [9]})
    x = other.norm_pre(other._pos_embed(other.patch_embed(images(1))))
    foreign = other.blocks[1](other.blocks[0](x))
    with hooked(model.blocks[1], in_place(foreign.clone())):
        expected = model(images(2))
    with hooked(model.blocks[1], lambda tokens: foreign):
        torch.testing.assert_close(model(images(2)), expected)


@torch.no_grad()
def test_a_hook_in_front_of_a_block_may_replace_its_tokens() -> None:
    model = patched()
    with hooked(model.blocks[1], in_place(clean := activation(model, model.blocks[1], images(1)).clone())):
        expected = model(images(2))
    with model.blocks[2].register_forward_pre_hook(lambda module, args: (clean,)):
        torch.testing.assert_close(model(images(2)), expected)


@torch.no_grad()
def test_a_block_that_is_undone_takes_its_registers_with_it() -> None:
    """What the hook returns is of the same forward, and carries the registers of the block before."""
    model, twin = patched(), patched()
    del twin.blocks[2]
    with model.blocks[2].register_forward_hook(lambda module, args, output: args[0]):
        torch.testing.assert_close(model(images()), twin(images()))


# Gradients -----------------------------------------------------------------------------------------------------------


def test_gradients_flow_through_registers_where_they_flow_through_tokens() -> None:
    model, scale = patched(), torch.tensor(0.5, requires_grad=True)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        scale.grad = None
        model(images()).square().sum().backward()
        assert scale.grad is not None
        return [scale.grad.clone(), *(parameter.grad.clone() for parameter in model.parameters())]

    with hooked(model.blocks[1], lambda tokens: tokens.mul_(scale)):
        expected = gradients()
    for edit in (
        lambda tokens: tokens * scale,
        lambda tokens: (tokens.flatten().double() * scale).float().view(2, 17, 48),
    ):
        with hooked(model.blocks[1], edit):
            torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-4)


def test_detached_tokens_stop_the_gradient_of_the_register_too() -> None:
    model = patched()
    with hooked(model.blocks[1], lambda tokens: tokens.detach()):
        model(images()).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.blocks[:2].parameters())
    assert all(parameter.grad is not None for parameter in model.blocks[2:].parameters())


@pytest.mark.parametrize("begins_disabled", [False, True])
def test_checkpointing_recomputes_a_replaced_state(begins_disabled: bool) -> None:
    plain, model = patched(), patched()
    model.set_grad_checkpointing(True)
    during = testreg.disabled if begins_disabled else (lambda model: ExitStack())
    clean = images(3)[:, :1].flatten(1)[:, : 17 * 48].view(2, 17, 48)
    losses = []
    for each in (plain.train(), model.train()):
        hooked(each.blocks[0], lambda tokens: tokens * 2)
        hooked(each.blocks[2], lambda tokens: clean)
        with during(each):
            losses.append(each(images()).square().sum())
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:  # outside of `disabled`: it is recomputed as it began
        loss.backward()
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_checkpointing_tells_two_forwards_apart_that_share_a_tensor() -> None:
    """Each hands on a view of its own, so that the recomputation finds the registers of its forward."""
    plain, model, clean = patched().train(), patched().train(), torch.randn(2, 17, 48)
    model.set_grad_checkpointing(True)
    for each in (plain, model):
        with hooked(each.blocks[1], lambda tokens: clean):
            first, second = (each(images(seed)).square().sum() for seed in (1, 2))
            (first + second).backward()
    assert not vars(clean)
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_a_recomputed_chunk_of_blocks_has_its_hooks() -> None:
    model, plain = patched(), patched()
    for each in (model, plain):
        hooked(each.blocks[1], lambda tokens: tokens * 2)
    x = plain.norm_pre(plain._pos_embed(plain.patch_embed(images()))).detach()
    y = checkpoint(lambda x: model.blocks(x), x, use_reentrant=False)
    y.square().sum().backward()
    plain.blocks(x).square().sum().backward()
    for ours, expected in zip(model.blocks.parameters(), plain.blocks.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)


# What is no replacement ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", [lambda tokens: tokens[:, :-1], lambda tokens: tokens[:1]])
def test_another_shape_fails(edit: Edit) -> None:
    model = patched()
    with hooked(model.blocks[1], edit), pytest.raises(RuntimeError, match=r"at block 2: .*\(2, 17, 48\), and \("):
        model(images())
    with hooked(model.blocks[1], edit), testreg.disabled(model):
        model(images())


@torch.no_grad()
def test_blocks_out_of_order_fail() -> None:
    model, x = patched(), torch.randn(2, 17, 48)
    with pytest.raises(RuntimeError, match="the register did not arrive at block 1"):
        model.blocks[1](x)
    y = model.blocks[0](x)
    with pytest.raises(RuntimeError, match="the register did not arrive at block 2"):
        model.blocks[2](y * 1)
    model.blocks[2](model.blocks[1](y))  # in order, by hand


@pytest.mark.parametrize("grad", [True, False])
def test_what_an_abandoned_forward_left_is_not_taken(grad: bool) -> None:
    model = patched()
    with torch.set_grad_enabled(grad):
        with hooked(model.blocks[1], lambda tokens: 1 / 0), pytest.raises(ZeroDivisionError):
            model(images())
        with pytest.raises(RuntimeError, match="the register did not arrive at block 2"):
            model.blocks[2](torch.randn(2, 17, 48))
        for _ in range(2):
            model.forward_intermediates(images(), indices=[1], stop_early=True, intermediates_only=True)
            with pytest.raises(RuntimeError, match="the register did not arrive at block 2"):
                model.blocks[2](torch.randn(2, 17, 48))


@torch.no_grad()
def test_two_forwards_side_by_side() -> None:
    """Each goes on with its own tokens; a tensor that may be of either is refused."""
    model = patched()
    expected = []
    for seed in (1, 2):
        x = model.norm_pre(model._pos_embed(model.patch_embed(images(seed))))
        expected.append(model.blocks(x))
    first, second = (model.norm_pre(model._pos_embed(model.patch_embed(images(seed)))) for seed in (1, 2))
    with testreg.registers(model) as held:
        for block in model.blocks:
            first, second = block(first), block(second)
    assert first.equal(expected[0])
    assert second.equal(expected[1])
    with testreg.registers(model) as of_second:
        model(images(2))
    torch.testing.assert_close(held, of_second)  # of the forward that began last, and of no other
    first, second = (model.blocks[0](torch.randn(2, 17, 48)) for _ in range(2))
    with pytest.raises(RuntimeError, match="the register did not arrive at block 1"):
        model.blocks[1](first * 1)


@torch.no_grad()
def test_a_forward_within_a_hook_of_another() -> None:
    model = patched()
    expected = model(images(1))

    def clone_after_another_forward(tokens: Tensor) -> Tensor:
        handle.remove()
        with hooked(model.blocks[1], lambda tokens: tokens.clone()), testreg.registers(model) as inner:
            model(images(2))
        assert len(inner) == 4
        return tokens.clone()

    handle = hooked(model.blocks[1], clone_after_another_forward)
    torch.testing.assert_close(model(images(1)), expected)


@torch.no_grad()
def test_a_forward_ends_as_it_began_though_its_state_is_replaced() -> None:
    model = build("timm_vit")
    clean = run(model, images())
    with_registers = run(testreg.patch(model, NEURONS), images())
    with ExitStack() as stack:

        def disable(tokens: Tensor) -> Tensor:
            stack.enter_context(testreg.disabled(model))
            return tokens.clone()

        with hooked(model.blocks[1], disable):
            torch.testing.assert_close(model(images()), with_registers)
        with hooked(model.blocks[1], lambda tokens: stack.close() or tokens.clone()):
            torch.testing.assert_close(model(images()), clean)


def test_threads_that_replace_do_not_meet() -> None:
    model = patched()
    with torch.no_grad():
        expected = {seed: model(images(seed)) for seed in range(4)}
    hooked(model.blocks[0], lambda tokens: tokens.clone())
    hooked(model.blocks[2], lambda tokens: tokens.clone())
    wrong: list[Any] = []

    @torch.no_grad()
    def work(seed: int) -> None:
        for _ in range(20):
            try:
                torch.testing.assert_close(model(images(seed)), expected[seed])
            except Exception as error:  # a thread would swallow it
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_a_forward_goes_on_in_another_thread() -> None:
    model, outputs = patched(), []
    x = model.norm_pre(model._pos_embed(model.patch_embed(images())))
    expected = model.blocks(x)
    halfway = model.blocks[1](model.blocks[0](x))
    thread = threading.Thread(target=lambda: outputs.append(model.blocks[3](model.blocks[2](halfway))))
    with torch.no_grad():
        thread.start()
        thread.join()
    torch.testing.assert_close(outputs[0], expected, rtol=1e-4, atol=1e-5)


# Nothing is left -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("how", ["whole", "replaced", "stopped early", "failed", "last of those that ran replaced"])
def test_no_activation_outlives_its_forward(how: str, grad: bool) -> None:
    model, left = patched(), []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        left.extend([weakref.ref(output), weakref.ref(output._testreg_carried)])

    for block in model.blocks[:2]:
        block.register_forward_hook(watch)
    with torch.set_grad_enabled(grad):
        if how in ("replaced", "last of those that ran replaced"):
            hooked(model.blocks[1], lambda tokens: tokens * 1)
        if how == "failed":
            with hooked(model.blocks[2], lambda tokens: 1 / 0), pytest.raises(ZeroDivisionError):
                model(images())
        elif how in ("stopped early", "last of those that ran replaced"):
            model.forward_intermediates(images(), indices=[1], stop_early=True, intermediates_only=True)
        else:
            model(images())
    gc.collect()
    assert len(left) == 4
    assert [each() for each in left] == [None] * 4


@pytest.mark.slow
def test_tokens_that_are_kept_until_the_interpreter_ends_say_nothing() -> None:
    program = f"""
import sys
sys.path[:0] = {[str(path) for path in (Path(__file__).parents[1], Path(__file__).parents[2] / "scripts")]}
import testreg, torch
from reference import build
model = testreg.patch(build("timm_vit"), {{1: [3]}})
tokens = model.blocks[0](torch.randn(1, 17, 48))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Exception ignored" not in done.stderr


@torch.no_grad()
def test_tokens_are_saved_without_what_rides_on_them() -> None:
    model = patched()
    tokens = activation(model, model.blocks[1], images(1))
    file = io.BytesIO()
    torch.save(tokens, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded.equal(tokens)
    with hooked(model.blocks[1], in_place(tokens.clone())):
        expected = model(images(2))
    for copied in (loaded, copy.deepcopy(tokens)):
        with hooked(model.blocks[1], lambda tokens, copied=copied: copied):
            torch.testing.assert_close(model(images(2)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [True, False])
@torch.no_grad()
def test_a_compiled_model_takes_what_hooks_return(fullgraph: bool) -> None:
    torch._dynamo.reset()
    model = patched()
    hooked(model.blocks[1], lambda tokens: tokens * 0.5)
    expected = model(images())
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    torch.testing.assert_close(compiled(images()), expected)
    assert running.compiled is None
    exported = torch.export.export(model, (images(),), strict=False).module()
    torch.testing.assert_close(exported(images()), expected)
    copy.deepcopy(model)


# Beside a forward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["zeros", "mean"])
def test_a_side_call_of_the_entry_block_leaves_its_tokens_as_they_are(start: str) -> None:
    model = patched(start=start)
    expected, entry = model(images()), 0 if start == "zeros" else 1

    def call_entry(module: nn.Module, args: Any, output: Tensor) -> None:
        with testreg.disabled(model):
            model.blocks[entry](output)

    model.blocks[2].register_forward_hook(call_entry)
    torch.testing.assert_close(model(images()), expected)


def test_recomputation_knows_its_mode_though_a_hook_replaces_the_first_tokens() -> None:
    model = testreg.patch(build("timm_vit"), {0: [3, 77], **NEURONS})
    model.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] * 1.0,))
    masks = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    masks[0, 0, 0], masks[1, 0, 3] = True, True

    def gradient(checkpointing: bool) -> Tensor:
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        with testreg.steered(model, masks[0]):
            out = model(images())
        with testreg.steered(model, masks[1]):
            out.square().sum().backward()
        return model.blocks[0].attn.qkv.weight.grad.clone()

    torch.testing.assert_close(gradient(True), gradient(False))


def test_a_lost_gradient_is_an_error_behind_a_hook_too() -> None:
    model = patched()
    model.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images())))
    tokens = checkpoint(model.blocks[0], tokens, use_reentrant=True)
    with pytest.raises(RuntimeError, match="the gradient did not arrive at block 1"):
        model.blocks[1](tokens)


def test_tokens_that_a_hook_detaches_in_place_have_detached_registers() -> None:
    model = patched()

    def detach(module: nn.Module, args: Any, output: Tensor) -> None:
        output.detach_()

    model.blocks[1].register_forward_hook(detach)
    model(images()).square().sum().backward()
    assert model.blocks[1].attn.qkv.weight.grad is None
    assert model.blocks[2].attn.qkv.weight.grad is not None


# Tools ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning:captum")
@pytest.mark.parametrize("family", ["timm_vit", "torchvision_vit"])
def test_captum_attributes_to_the_layers_of_a_patched_model(family: str) -> None:
    """Attributions of a block sum to what it changes in the output, registers held (completeness)."""
    attr = pytest.importorskip("captum.attr")
    model = patched(family).double()
    block, x = LAYOUTS[family].blocks(model)[1], images().double()
    cam = attr.LayerGradCam(model, block).attribute(x, target=3)
    assert cam.shape == (2, 1, 48)  # captum takes the tokens for channels
    layer = attr.LayerIntegratedGradients(model, block)
    attributions, gap = layer.attribute(x, target=3, n_steps=200, return_convergence_delta=True)
    assert attributions.shape == (2, 17, 48)
    assert gap.abs().max() < 0.1 * attributions.abs().sum((1, 2)).min()
    gradient = attr.LayerGradientXActivation(model, block).attribute(x, target=3)
    kept: list[Tensor] = []
    with block.register_forward_hook(lambda module, args, output: kept.append(output)):
        model(x)[:, 3].sum()
    with block.register_forward_hook(lambda module, args, output: kept.append(output)):
        expected = torch.autograd.grad(model(x)[:, 3].sum(), kept[-1])[0] * kept[-1]
    torch.testing.assert_close(gradient, expected)


def test_torchcam_draws_a_patched_model() -> None:
    """Grad-CAM takes the first axis, the tokens, for channels: the mean gradient of each weighs its activation."""
    methods = pytest.importorskip("torchcam.methods")
    model, kept = patched(), list[Tensor]()
    with model.blocks[2].register_forward_hook(lambda module, args, output: kept.append(output)):
        score = model(images(batch=1))[0, 3]
    gradient = torch.autograd.grad(score, kept[0])[0]
    expected = (gradient.mean(-1, keepdim=True) * kept[0]).sum(1).relu()
    hooks = len(model.blocks[2]._forward_hooks)
    with methods.GradCAM(model, target_layer=model.blocks[2], input_shape=(3, IMAGE, IMAGE)) as extractor:
        found = extractor(3, model(images(batch=1)), normalized=False)[0]
    torch.testing.assert_close(found, expected)
    assert len(model.blocks[2]._forward_hooks) == hooks
