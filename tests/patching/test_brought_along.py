"""What people bring with them: hooks, adapters, replaced forwards, tools that trace, offload or split a model."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import slow_except
from reference import LAYOUTS, build, run
from tiny import IMAGE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import testreg

NEURONS = {1: [3, 77, 120], 2: [0, 64, 127]}


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(7))


def patched(family: str = "timm_vit", **options: Any) -> Any:
    return testreg.patch(build(family), NEURONS, **options)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# What hooks see of fc2 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["timm_vit", "hf_clip", "timm_eva02", "open_clip_sequence_first"])
def test_the_gradient_of_fc2_follows_from_what_its_hooks_see(family: str) -> None:
    """As per-sample gradients, K-FAC and Fisher statistics take it."""
    model, seen = patched(family), {}
    linear = testreg.families.find_tower(model).blocks[2].mlps[0].fc2_linear
    linear.register_forward_hook(lambda module, args, output: seen.update(hidden=args[0]))
    linear.register_full_backward_hook(lambda module, inputs, outputs: seen.update(gradient=outputs[0]))
    run(model, images()).square().sum().backward()
    hidden, gradient = seen["hidden"].flatten(0, -2), seen["gradient"].flatten(0, -2)
    torch.testing.assert_close(gradient.mT @ hidden, linear.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [True, False])
def test_hooks_on_fc2_and_in_front_of_it_see_the_same_with_gradients_and_without(grad: bool) -> None:
    model, seen = patched(), {}
    mlp = model.blocks[2].mlp
    model(images())
    mlp.fc2.register_forward_pre_hook(lambda module, args: seen.update(fc2=args[0]), prepend=True)
    mlp.act.register_forward_hook(lambda module, args, output: seen.update(act=output))
    with torch.set_grad_enabled(grad):
        model(images())
    assert not seen["fc2"][:, 1:17, NEURONS[2]].any()
    assert seen["act"][:, 1:17, NEURONS[2]].any()  # what was kept of the activation is not edited later
    assert seen["fc2"][:, 17, NEURONS[2]].all()


class Rotated(nn.Module):
    """As the adapters OFT, BOFT and HRA do: the wrapped linear gets a rotation of the activation."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.weight = linear, linear.weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        generator = torch.Generator().manual_seed(1)
        self.rotation = nn.Parameter(torch.linalg.qr(torch.randn(192, 192, generator=generator))[0])

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base_layer(hidden @ self.rotation)


def with_rotations(model: Any) -> Any:
    for block in model.blocks:
        block.mlp.fc2 = Rotated(block.mlp.fc2)
    return model


@pytest.mark.parametrize("grad", [True, False])
def test_neurons_are_moved_in_front_of_an_adapter_that_rotates_them(grad: bool) -> None:
    first, then = testreg.patch(with_rotations(build("timm_vit")), NEURONS), with_rotations(patched())
    with torch.set_grad_enabled(grad):
        expected = first(images())
        close(then(images()), expected)
        with testreg.disabled(first), testreg.disabled(then):
            plain = then(images())
            assert not torch.allclose(plain, expected, atol=1e-3)
            close(plain, first(images()))
        for block in then.blocks:
            block.mlp.fc2 = block.mlp.fc2.base_layer
        close(then(images()), patched()(images()))
    assert not any({"forward", "_call_impl"} & vars(module).keys() for module in testreg.unpatch(then).modules())


@pytest.mark.slow
def test_compilation_names_an_adapter_that_rotates() -> None:
    with pytest.raises(RuntimeError, match=r"wrapped in a Rotated .*or patch it last"):
        torch.compile(with_rotations(patched()), backend="eager", fullgraph=True)(images())


@pytest.mark.parametrize("kind", ["OFT", "BOFT", "HRA"])
def test_adapters_of_peft_that_rotate_get_what_they_get_if_they_were_there_first(kind: str) -> None:
    peft = pytest.importorskip("peft")

    def adapted(model: Any) -> Any:
        torch.manual_seed(0)
        config = getattr(peft, f"{kind}Config")(target_modules=["fc2"], init_weights=False)
        return peft.get_peft_model(model, config)

    first, then = testreg.patch(adapted(build("timm_vit")), NEURONS), adapted(patched())
    expected = first(images())
    close(then(images()), expected)
    with testreg.disabled(first):
        assert not torch.allclose(first(images()), expected, atol=1e-3)


# Replaced forwards ---------------------------------------------------------------------------------------------------


def block_by_hand(self: Any, tokens: Tensor, **kwargs: Any) -> Tensor:
    tokens = tokens + self.attn(self.norm1(tokens))
    return tokens + self.mlp(self.norm2(tokens))


def mlp_by_hand(self: Any, tokens: Tensor) -> Tensor:
    return F.linear(self.act(self.fc1(tokens)), self.fc2.weight, self.fc2.bias)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_forward_that_replaces_that_of_a_patched_block_is_an_error(index: int) -> None:
    model = patched()
    model.blocks[index].forward = types.MethodType(block_by_hand, model.blocks[index])
    with pytest.raises(RuntimeError, match=f"the forward of block {index}, .*patch the model last"):
        model(images())
    with testreg.disabled(model):
        close(model(images()), build("timm_vit")(images()))


@pytest.mark.parametrize("compiled", slow_except([False, True], False))
def test_an_mlp_that_does_not_call_fc2_is_an_error(compiled: bool) -> None:
    torch._dynamo.reset()
    model = patched()
    model.blocks[2].mlp.forward = types.MethodType(mlp_by_hand, model.blocks[2].mlp)
    forward = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(RuntimeError, match=r"block 2 does not call its second MLP linear"):
        forward(images())
    model.blocks[1].mlp.fc2.forward = types.MethodType(nn.Linear.forward, model.blocks[1].mlp.fc2)
    del model.blocks[2].mlp.forward
    close(model(images()), patched()(images()))  # a linear that is one still


def test_blocks_that_are_written_out_by_hand_warn_once() -> None:
    model, plain = patched(), build("timm_vit")

    def by_hand(model: Any) -> Tensor:
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images())))
        for block in model.blocks:
            tokens = block_by_hand(block, tokens)
        return model.forward_head(model.norm(tokens))

    with pytest.warns(UserWarning, match=r"block 1 was called outside of the block's own forward"):
        close(by_hand(model), plain(images()))
    close(by_hand(model), plain(images()))
    with testreg.disabled(patched()) as quiet:
        by_hand(quiet)


# What blocks give ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["hf_clip", "hf_vit"])
def test_returned_attention_is_part_of_the_graph(family: str) -> None:
    """Against a difference quotient: the weights between tokens, all else held."""
    model = build(family).double()
    model.set_attn_implementation("eager")
    testreg.patch(model, NEURONS)
    output = model(images().double(), output_attentions=True)
    loss = output.last_hidden_state.square().sum()
    gradients = torch.autograd.grad(loss, output.attentions)
    assert [tuple(each.shape) for each in gradients] == [(2, 4, 17, 17)] * 4
    block = LAYOUTS[family].blocks(model)[2]
    direction = torch.randn(2, 4, 17, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def at(step: float) -> Tensor:
        matmul = torch.matmul

        def moved(first: Tensor, second: Tensor) -> Tensor:
            if first.shape[-2:] == (18, 18) and inside:
                first = first.clone()
                first[..., :17, :17] += step * direction
            return matmul(first, second)

        inside: list[bool] = []
        handles = [
            block.register_forward_pre_hook(lambda module, args: inside.append(True)),
            block.register_forward_hook(lambda module, args, output: inside.clear()),
        ]
        with pytest.MonkeyPatch.context() as context:
            context.setattr(torch, "matmul", moved)
            found = model(images().double()).last_hidden_state.square().sum()
        for handle in handles:
            handle.remove()
        return found

    torch.testing.assert_close((gradients[2] * direction).sum(), (at(1e-3) - at(-1e-3)) / 2e-3, rtol=3e-3, atol=0)


@pytest.mark.parametrize("family", ["timm_vit", "hf_clip", "open_clip"])
@torch.no_grad()
def test_hidden_states_between_blocks_are_contiguous(family: str) -> None:
    model, seen = patched(family), list[Tensor]()
    for block in LAYOUTS[family].blocks(model):
        block.register_forward_hook(
            lambda m, a, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
    run(model, images(3))
    assert all(each.is_contiguous() for each in seen)
    assert len(seen) == 4


@pytest.mark.parametrize("kind", [list, tuple])
@torch.no_grad()
def test_blocks_that_give_several_tensors_of_tokens(kind: Any) -> None:
    model = build("timm_vit")
    expected = testreg.patch(model, NEURONS)(images())
    testreg.unpatch(model)
    forward = type(model.blocks[0]).forward
    for block in model.blocks:
        block.forward = lambda x, own=block: kind([forward(own, x), x * 1, "more"])
    testreg.patch(model, NEURONS)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images())))
    for block in model.blocks:
        tokens, entered, more = block(tokens)
        assert tokens.shape == entered.shape == (2, 17, 48)
        assert more == "more"
    close(model.forward_head(model.norm(tokens)), expected)


# Between blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_a_loop_by_hand_may_edit_tokens_in_place_but_not_replace_them(grad: bool) -> None:
    model = patched()
    scale = torch.tensor(0.5, requires_grad=True)
    results = []
    for hooked in (True, False):
        handles = [block.register_forward_hook(lambda m, a, out: out * scale) for block in model.blocks if hooked]
        with torch.set_grad_enabled(grad):
            x = model.norm_pre(model._pos_embed(model.patch_embed(images())))
            for block in model.blocks:
                x = block(x)
                x = x if hooked else x.mul_(scale)
        for handle in handles:
            handle.remove()
        results.append([x, *(torch.autograd.grad(x.square().sum(), [scale]) if grad else [])])
    torch.testing.assert_close(results[1], results[0])
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"arrive at block 1: .*in a forward hook"):
        model.blocks[1](model.blocks[0](x) * scale)


@pytest.mark.parametrize("family", ["timm_vit", "open_clip_sequence_first"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_edits_in_place_count_without_gradients(family: str, batch: int, context: Any) -> None:
    model = patched(family)
    block = testreg.families.find_tower(model).blocks[1].module

    def replace_memory(module: nn.Module, args: Any, out: Tensor) -> None:
        out.data = out.data * 0.5

    results = []
    for edit in (lambda m, a, out: out * 0.5, lambda m, a, out: out.mul_(0.5), replace_memory):
        handle = block.register_forward_hook(edit)
        with context():
            results.append(run(model, images(batch)))
        handle.remove()
    with context():
        unedited = run(model, images(batch))
    close(results[1], results[0])
    close(results[2], results[0])
    assert not torch.allclose(unedited, results[0], atol=1e-3)


@torch.no_grad()
def test_a_block_called_twice_on_the_same_tokens_gives_the_same() -> None:
    model = patched()
    x = model.norm_pre(model._pos_embed(model.patch_embed(images(1))))
    x = model.blocks[1](model.blocks[0](x))
    close(model.blocks[2](x), model.blocks[2](x))


def test_a_trunk_whose_tokens_are_detached_says_what_to_do() -> None:
    model = patched()
    x = model.norm_pre(model._pos_embed(model.patch_embed(images())))
    trunk = model.blocks[1](model.blocks[0](x))
    middle = trunk.detach().requires_grad_()
    del trunk
    with pytest.raises(RuntimeError, match=r"did not arrive at block 2: .*do not detach it in between"):
        model.blocks[2](middle)


@torch.no_grad()
def test_images_that_leave_the_batch_are_named() -> None:
    model = patched()
    x = model.norm_pre(model._pos_embed(model.patch_embed(images())))
    x = model.blocks[1](model.blocks[0](x))
    with pytest.raises(RuntimeError, match=r"block 1 handed on .*Where images leave the batch"):
        model.blocks[2](x[:1])


def test_offloaded_inputs_of_gradient_checkpointing_are_named() -> None:
    model = patched()
    x = model.norm_pre(model._pos_embed(model.patch_embed(images())))
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach().clone(), lambda packed: packed):
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"recomputed from an input that was saved elsewhere \(save_on_cpu"):
        x.square().sum().backward()


# Compiled, traced, split ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_hooks_that_replace_what_a_compiled_block_gives() -> None:
    torch._dynamo.reset()
    model = patched()
    model.blocks[1].register_forward_hook(lambda module, args, output: output * 0.5)
    expected = model(images())
    model.blocks[1].compile(backend="eager")
    close(model(images()), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_traces_with_gradients() -> None:
    model = patched()
    traced = torch.jit.trace(model, images(), check_trace=False)
    close(traced(images(3)), model(images(3)))


def split(fc1: nn.Module) -> Callable[[], None]:
    """As a device of a tensor-parallel MLP sees it: half of the channels."""
    return fc1.register_forward_hook(lambda module, args, output: output[..., :96]).remove


def test_a_replaced_forward_that_is_called_without_its_block_is_an_error() -> None:
    model = patched()
    block = model.blocks[1]
    block.forward = type(block).forward.__get__(block)
    with pytest.raises(RuntimeError, match=r"the forward of block 1, .*was replaced again"):
        block.forward(torch.randn(2, 17, 48))
    with testreg.disabled(model):
        block.forward(torch.randn(2, 17, 48))


def test_tensor_parallel_mlps_are_refused_by_name() -> None:
    model = patched()
    split(model.blocks[1].mlp.fc1)
    with pytest.raises(NotImplementedError, match=r"block 1 got 96 of 192 channels .*tensor parallel, DTensor"):
        model(images())
