"""Registers whose states are constants (arXiv 2506.08010, A.2): the register neurons are silent, and nothing is moved.

There are two forms, which have the same effect on the patches. Each block gets constant tokens; or, where attention is
nn.MultiheadAttention, it attends to a constant key and value beside those of the tokens, as with `bias_k` and `bias_v`.

Shapes: B images, T tokens of each, R registers, C width, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testreg.families import Block, Tower, find_tower
from testreg.patching.override import Override, Part
from testreg.patching.state import STATE, Patch, patch_of

M = TypeVar("M", bound=nn.Module)

KEY, VALUE = "testreg_bias_k", "testreg_bias_v"  # buffers of an nn.MultiheadAttention: (1, 1, C)


def static_parts(tower: Tower, patch: Patch) -> Iterator[Part]:
    """The parts to put on each block so that its registers are constants; none if they are not.

    Raises:
        ValueError: the model has no place for this form.
    """
    static = patch.static
    if static is None:
        return
    entered = list(zip(tower.blocks, static.states, strict=True))[patch.entry_block :]
    for block, state in entered:
        weight = next(each for each in block.module.parameters() if each.is_floating_point())
        here = state.to(weight.device, tower.dtype)
        if static.form == "token":
            yield Constant(block.module, STATE, here)
        else:
            attention = _attention(tower, block, static.num_registers)
            for name, value in key_and_value(tower, block, attention, here).items():
                yield Constant(attention, name, value)
            yield AttentionBias(attention, patch)


def _attention(tower: Tower, block: Block, num_registers: int) -> nn.MultiheadAttention:
    """The attention of a block; raises ValueError if it has no place for a bias."""
    attentions = [each for each in block.module.modules() if isinstance(each, nn.MultiheadAttention)]
    fix = "take static registers of form='token'"
    if len(attentions) != 1 or type(attentions[0]).forward is not nn.MultiheadAttention.forward:
        raise ValueError(
            f"{type(tower.module).__name__} ({tower.family.name}) does not attend with nn.MultiheadAttention, which "
            f"alone has a place for a bias: {fix}"
        )
    (attention,) = attentions
    if attention.bias_k is not None or attention.add_zero_attn or "forward" in attention.__dict__:
        raise ValueError(f"attention of {type(tower.module).__name__} has a bias, or another forward, already: {fix}")
    if num_registers > 1:
        raise ValueError(f"attention has a place for one register, not for {num_registers}: {fix}")
    return attention


@torch.no_grad()
def key_and_value(tower: Tower, block: Block, attention: nn.MultiheadAttention, state: Tensor) -> dict[str, Tensor]:
    """The key and the value (1, 1, C), heads joined, that attention computes from a register (1, C)."""
    got: dict[str, Tensor] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        got.update(zip(("query", "key", "value"), args, strict=False), **kwargs)

    handle = attention.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with tower.evaluating():
            block.module(state.unsqueeze(0))
    finally:
        handle.remove()
    if attention.in_proj_weight is None:
        weights: Sequence[Tensor] = (attention.k_proj_weight, attention.v_proj_weight)
    else:
        weights = attention.in_proj_weight.chunk(3)[1:]
    biases = (None, None) if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)[1:]
    parts = zip((KEY, VALUE), (got["key"], got["value"]), weights, biases, strict=True)
    return {name: F.linear(tokens, weight, bias) for name, tokens, weight, bias in parts}


@dataclass(eq=False)
class Constant:
    """A tensor that a module holds while it is patched: it moves with the module, and is not in its state_dict."""

    module: nn.Module
    name: str
    value: Tensor

    def install(self) -> None:
        self.module.register_buffer(self.name, self.value, persistent=False)

    def installed(self) -> bool:
        return self.name in self.module._buffers

    def remove(self) -> None:
        delattr(self.module, self.name)


@dataclass(eq=False)
class AttentionBias(Override):
    """An nn.MultiheadAttention that attends to one more key and value, as if it were made with `add_bias_kv`."""

    patch: Patch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mode = self.patch.current_mode
        if not mode.is_patched or mode.target is not None:
            return self.original(*args, **kwargs)
        biased: Any = _Biased(self.module)
        out, weights = nn.MultiheadAttention.forward(biased, *args, **kwargs)
        return out, None if weights is None else weights[..., :-1]


@torch.no_grad()
def fold(model: M) -> M:
    """Write static registers of the form "bias" into the weights, so that the model no longer needs testreg.

    Attention gets parameters `bias_k` and `bias_v`, two more entries for each block in the state_dict. The columns of
    fc2 that read register neurons become zero. This cannot be undone.

    Returns:
        The same object, no longer patched.

    Raises:
        RuntimeError: the model is not patched.
        ValueError: the weights cannot express the patch: it has no static registers of form="bias", the neurons are
            not silent on all tokens (zero="all"), or there is a norm between the neurons and fc2.

    Example:
        >>> from torchvision.models import VisionTransformer
        >>> vit = VisionTransformer(64, 16, num_layers=4, num_heads=4, hidden_dim=48, mlp_dim=192).eval()
        >>> options = {"neurons": {2: [5, 77]}, "zero": "all"}
        >>> static = testreg.make_static(vit, images, form="bias", progress=False, **options)
        >>> folded = testreg.fold(testreg.patch(vit, static=static, **options))
        >>> folded.encoder.layers[2].self_attention.bias_k.shape
        torch.Size([1, 1, 48])
    """
    patch, tower = patch_of(model), find_tower(model)
    if patch.static is None or patch.static.form != "bias":
        raise ValueError('only static registers of form="bias" can be folded: patch the model with these')
    if patch.zero != "all":
        raise ValueError('weights cannot tell CLS from patches: patch the model with zero="all"')
    silent = [each for i, units in patch.neurons.by_block().items() for each in tower.blocks[i].units_by_mlp(units)]
    if any(mlp.fc2 is not mlp.fc2_linear for mlp, _ in silent):
        raise ValueError("a norm between the neurons and fc2 sees that they are silent, which weights cannot say")
    biased = [each.module for each in patch.overrides if isinstance(each, AttentionBias)]
    biases = [(module, getattr(module, KEY), getattr(module, VALUE)) for module in biased]
    patch.remove()
    for module, key, value in biases:
        module.bias_k, module.bias_v = nn.Parameter(key), nn.Parameter(value)
    for mlp, units in silent:
        mlp.fc2_linear.weight[:, [mlp.first + unit for unit in units.values()]] = 0
    return model


class _Biased:
    """Stands for an nn.MultiheadAttention in its forward, and has the bias that is not in its state_dict."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.bias_k = getattr(module, KEY)
        self.bias_v = getattr(module, VALUE)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
