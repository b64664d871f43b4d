"""The patched forward of every family, written out by hand from the weights alone.

It shares no code with testreg: an explicit register token in the sequence, attention and MLP as matrix products, and
the shift as loops over images, neurons and tokens. Only the embedding is the model's own.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import tiny
import torch
import transformers
from imitations import dinov2
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

HEADS = 4
Affine = tuple[Tensor, Tensor]  # weight, bias


@dataclass(frozen=True)
class Layout:
    """What there is to know about a tiny model, independently of testreg.families."""

    read: Callable[[Any], Block]
    blocks: Callable[[Any], Sequence[nn.Module]]
    prefix: int = 1
    entry_norm: Callable[[Any], nn.LayerNorm] | None = None
    sequence_first: bool = False
    mlp_width: int = tiny.MLP_WIDTH
    rope: Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None = None
    """Cosine and sine (N, D) of the patches' rotations."""
    interleaved: bool = False
    """Pairs of channels that are rotated together lie side by side, not half a head apart."""


@dataclass(frozen=True)
class Block:
    """The weights of one block."""

    norm1: nn.LayerNorm
    qkv: Sequence[Affine]
    out: Affine
    norm2: nn.LayerNorm
    hidden: Callable[[Tensor], Tensor]
    """From the normed tokens to the MLP's hidden activation."""
    fc2: Affine
    scale1: Tensor | float = 1.0
    scale2: Tensor | float = 1.0
    middle_norm: nn.LayerNorm | None = None
    """Between the hidden activation and the second linear."""
    parallel: bool = False
    """Attention and MLP read the same normed tokens."""


def affine(linear: Any) -> Affine:
    return linear.weight, torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias


def apply(x: Tensor, weights: Affine) -> Tensor:
    return x @ weights[0].T + weights[1]


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def mlp(fc1: nn.Module, activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: activation(apply(x, affine(fc1)))


def swiglu(gate: Affine, up: Affine) -> Callable[[Tensor], Tensor]:
    return lambda x: silu(apply(x, gate)) * apply(x, up)


def halves(linear: Any) -> list[Affine]:
    return list(zip(linear.weight.chunk(2), linear.bias.chunk(2), strict=True))


def thirds(weight: Tensor, bias: Tensor) -> list[Affine]:
    return list(zip(weight.chunk(3), bias.chunk(3), strict=True))


def part(root: nn.Module, *paths: str) -> Any:
    """What the first existing path leads to: transformers names its modules anew now and then."""
    for path in paths[:-1]:
        try:
            return operator.attrgetter(path)(root)
        except AttributeError:
            pass
    return operator.attrgetter(paths[-1])(root)


def read_timm(block: Any) -> Block:  # and dinov2, which timm follows
    gated = hasattr(block.mlp, "w3")
    return Block(
        norm1=block.norm1,
        qkv=thirds(*affine(block.attn.qkv)),
        out=affine(block.attn.proj),
        norm2=block.norm2,
        hidden=swiglu(*halves(block.mlp.w12)) if gated else mlp(block.mlp.fc1, gelu),
        fc2=affine(block.mlp.w3 if gated else block.mlp.fc2),
        scale1=getattr(block.ls1, "gamma", 1.0),
        scale2=getattr(block.ls2, "gamma", 1.0),
        middle_norm=block.mlp.norm if isinstance(getattr(block.mlp, "norm", None), nn.LayerNorm) else None,
    )


def read_timm_parallel(block: Any) -> Block:
    weight, bias = affine(block.in_proj)
    return Block(
        norm1=block.in_norm,
        qkv=thirds(weight[tiny.MLP_WIDTH :], bias[tiny.MLP_WIDTH :]),
        out=affine(block.attn_out_proj),
        norm2=block.in_norm,
        hidden=lambda x: gelu(apply(x, (weight[: tiny.MLP_WIDTH], bias[: tiny.MLP_WIDTH]))),
        fc2=affine(block.mlp_out_proj),
        scale1=block.ls.gamma,
        scale2=block.ls.gamma,
        parallel=True,
    )


def read_timm_eva(block: Any) -> Block:
    attention, gated = block.attn, hasattr(block.mlp, "fc1_g")
    if attention.qkv is None:
        qkv = [affine(attention.q_proj), affine(attention.k_proj), affine(attention.v_proj)]
    else:
        qkv = thirds(*affine(attention.qkv))
    return Block(
        norm1=block.norm1,
        qkv=qkv,
        out=affine(attention.proj),
        norm2=block.norm2,
        hidden=swiglu(affine(block.mlp.fc1_g), affine(block.mlp.fc1_x)) if gated else mlp(block.mlp.fc1, gelu),
        fc2=affine(block.mlp.fc2),
        scale1=1.0 if block.gamma_1 is None else block.gamma_1,
        scale2=1.0 if block.gamma_2 is None else block.gamma_2,
        middle_norm=block.mlp.norm if isinstance(block.mlp.norm, nn.LayerNorm) else None,
    )


def timm_rope(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    sine, cosine = model.rope.get_embed(shape=(images.shape[2] // tiny.PATCH,) * 2).chunk(2, -1)
    return cosine, sine


def hf_qkv(attention: Any) -> list[Affine]:
    names = (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value"))
    return [affine(part(attention, *each)) for each in names]


def read_hf_vit(block: Any) -> Block:
    return Block(
        norm1=block.layernorm_before,
        qkv=hf_qkv(block.attention),
        out=affine(part(block.attention, "o_proj", "output.dense")),
        norm2=block.layernorm_after,
        hidden=mlp(part(block, "mlp.fc1", "intermediate.dense"), gelu),
        fc2=affine(part(block, "mlp.fc2", "output.dense")),
    )


def read_hf_dino(block: Any) -> Block:
    parts = block.mlp
    if hasattr(parts, "gate_proj"):
        hidden, fc2 = swiglu(affine(parts.gate_proj), affine(parts.up_proj)), parts.down_proj
    elif hasattr(parts, "weights_in"):  # Dinov2 in transformers 4
        hidden, fc2 = swiglu(*halves(parts.weights_in)), parts.weights_out
    elif hasattr(parts, "up_proj"):  # DINOv3
        hidden, fc2 = mlp(parts.up_proj, gelu), parts.down_proj
    else:
        hidden, fc2 = mlp(parts.fc1, gelu), parts.fc2
    return Block(
        norm1=block.norm1,
        qkv=hf_qkv(block.attention),
        out=affine(part(block.attention, "o_proj", "output.dense")),
        norm2=block.norm2,
        hidden=hidden,
        fc2=affine(fc2),
        scale1=block.layer_scale1.lambda1,
        scale2=block.layer_scale2.lambda1,
    )


def hf_rope(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    return model.rope_embeddings(images)


def read_hf_clip(block: Any, activation: Callable[[Tensor], Tensor] = quick_gelu) -> Block:
    attention = block.self_attn
    return Block(
        norm1=block.layer_norm1,
        qkv=hf_qkv(attention),
        out=affine(attention.out_proj),
        norm2=block.layer_norm2,
        hidden=mlp(block.mlp.fc1, activation),
        fc2=affine(block.mlp.fc2),
    )


def read_hf_siglip(block: Any) -> Block:
    return read_hf_clip(block, gelu_tanh)


def read_open_clip(block: Any, activation: Callable[[Tensor], Tensor] = gelu) -> Block:
    return Block(
        norm1=block.ln_1,
        qkv=thirds(block.attn.in_proj_weight, block.attn.in_proj_bias),
        out=affine(block.attn.out_proj),
        norm2=block.ln_2,
        hidden=mlp(block.mlp.c_fc, activation),
        fc2=affine(block.mlp.c_proj),
        middle_norm=getattr(block.mlp, "ln", None),
    )


def read_torchvision(block: Any) -> Block:
    return Block(
        norm1=block.ln_1,
        qkv=thirds(block.self_attention.in_proj_weight, block.self_attention.in_proj_bias),
        out=affine(block.self_attention.out_proj),
        norm2=block.ln_2,
        hidden=mlp(block.mlp[0], gelu),
        fc2=affine(block.mlp[3]),
    )


def chunked_blocks(model: Any) -> list[nn.Module]:
    return [block for chunk in model.blocks for block in chunk if not isinstance(block, nn.Identity)]


def hf_vit_blocks(model: Any) -> nn.ModuleList:
    return part(model, "layers", "encoder.layer")


def hf_clip_blocks(model: Any) -> nn.ModuleList:
    return part(model, "encoder.layers", "vision_model.encoder.layers")


def hf_dinov3_blocks(model: Any) -> nn.ModuleList:
    return part(model, "model.layer", "layer")


LAYOUTS = {
    "timm_vit": Layout(read_timm, lambda m: m.blocks),
    "timm_deit_distilled": Layout(read_timm, lambda m: m.blocks, prefix=2),
    "timm_clip": Layout(read_timm, lambda m: m.blocks, entry_norm=lambda m: m.norm_pre),
    "timm_siglip": Layout(read_timm, lambda m: m.blocks, prefix=0),
    "timm_dinov2": Layout(read_timm, lambda m: m.blocks),
    "timm_dinov2_reg4": Layout(read_timm, lambda m: m.blocks, prefix=5),
    "hf_vit": Layout(read_hf_vit, hf_vit_blocks),
    "hf_deit": Layout(read_hf_vit, hf_vit_blocks, prefix=2),
    "hf_clip": Layout(
        read_hf_clip, hf_clip_blocks, entry_norm=lambda m: part(m, "pre_layrnorm", "vision_model.pre_layrnorm")
    ),
    "hf_siglip": Layout(read_hf_siglip, hf_clip_blocks, prefix=0),
    "hf_dinov2": Layout(read_hf_dino, lambda m: m.encoder.layer),
    "hf_dinov2_swiglu": Layout(read_hf_dino, lambda m: m.encoder.layer, mlp_width=128),
    "hf_dinov2_registers": Layout(read_hf_dino, lambda m: m.encoder.layer, prefix=5),
    "open_clip": Layout(read_open_clip, lambda m: m.visual.transformer.resblocks, entry_norm=lambda m: m.visual.ln_pre),
    "open_clip_sequence_first": Layout(
        read_open_clip,
        lambda m: m.visual.transformer.resblocks,
        entry_norm=lambda m: m.visual.ln_pre,
        sequence_first=True,
    ),
    "torchvision_vit": Layout(read_torchvision, lambda m: m.encoder.layers),
    "hf_dinov3": Layout(read_hf_dino, hf_dinov3_blocks, prefix=5, rope=hf_rope),
    "hf_dinov3_gated": Layout(read_hf_dino, hf_dinov3_blocks, prefix=5, rope=hf_rope),
    "timm_dinov3": Layout(read_timm_eva, lambda m: m.blocks, prefix=5, rope=timm_rope),
    "timm_eva02": Layout(read_timm_eva, lambda m: m.blocks, mlp_width=128, rope=timm_rope, interleaved=True),
    "timm_eva_without_rope": Layout(read_timm_eva, lambda m: m.blocks),
    "timm_mlp_norm": Layout(read_timm, lambda m: m.blocks),
    "timm_parallel": Layout(read_timm_parallel, lambda m: m.blocks),
    "open_clip_mlp_norm": Layout(
        read_open_clip, lambda m: m.visual.transformer.resblocks, entry_norm=lambda m: m.visual.ln_pre
    ),
    "dinov2": Layout(read_timm, lambda m: m.blocks),
    "dinov2_chunked_swiglu_reg4": Layout(read_timm, chunked_blocks, prefix=5),
}

# Variants within a family, beside those of tiny.py.
_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "timm_mlp_norm": lambda: timm.create_model("vit_base_patch16_224", scale_mlp_norm=True, **tiny.TIMM),
    "timm_parallel": lambda: timm.create_model(
        "vit_base_patch16_224", block_fn=ParallelScalingBlock, init_values=0.5, **tiny.TIMM
    ),
    "open_clip_mlp_norm": lambda: tiny._open_clip(block_type="custom", scale_fc=True),
    "hf_dinov3_gated": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**tiny.HF, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu")
    ),
    "timm_dinov3": lambda: timm.create_model("vit_base_patch16_dinov3", init_values=0.5, **tiny.TIMM),
    "timm_eva02": lambda: timm.create_model("eva02_base_patch14_224", **tiny.TIMM),
    "timm_eva_without_rope": lambda: timm.create_model("eva_giant_patch14_224", mlp_ratio=4, **tiny.TIMM),
    "dinov2": lambda: dinov2.DinoVisionTransformer(),
    "dinov2_chunked_swiglu_reg4": lambda: dinov2.DinoVisionTransformer(num_register_tokens=4, swiglu=True, chunks=2),
}


@tiny.built_once
def build(name: str, seed: int = 0) -> Any:
    """A tiny model in eval mode, with weights such that every block, bias and norm matters."""
    if name in tiny.BUILDERS:
        model = tiny.build(name, seed)
    else:
        torch.manual_seed(seed)
        model = _BUILDERS[name]().eval()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.2 / module.in_features**0.5)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.normal_(mean=1.0, std=0.2)
                module.bias.normal_(std=0.2)
    return model


class BlockOutputs(list[Tensor]):
    """Within the `with` block, the tokens (B, T, C) that leave each block of the model, and `entry`, those before."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.layout, self.model = LAYOUTS[name], model

    def __enter__(self) -> BlockOutputs:
        blocks = self.layout.blocks(self.model)
        self.handles = [block.register_forward_hook(self._leave) for block in blocks]
        self.handles.append(blocks[0].register_forward_pre_hook(self._enter))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _batch_first(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(0, 1) if self.layout.sequence_first else tokens

    def _enter(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.entry = self._batch_first(args[0])

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.append(self._batch_first(output if isinstance(output, Tensor) else output[0]))


def run(model: Any, images: Tensor) -> Tensor:
    """The vision tower's main output."""
    output = getattr(model, "visual", model)(images)
    return output if isinstance(output, Tensor) else output.last_hidden_state


def block_outputs(name: str, model: nn.Module, images: Tensor) -> BlockOutputs:
    """What the model itself computes, patched or not."""
    with BlockOutputs(name, model) as outputs:
        run(model, images)
    return outputs


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    """(..., N, D): each pair of channels turned by its angle."""
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    else:
        turned = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)
    return x * cosine + turned * sine


def attend(x: Tensor, block: Block, turn: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Tensor, Tensor]:
    """The attention's output and its weights (B, heads, T, T); `turn` puts positions into queries and keys."""
    images, tokens, width = x.shape
    q, k, v = (apply(x, w).reshape(images, tokens, HEADS, width // HEADS).transpose(1, 2) for w in block.qkv)
    scores = turn(q) @ turn(k).transpose(2, 3) / math.sqrt(width // HEADS)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return apply((weights @ v).transpose(1, 2).reshape(images, tokens, width), block.out), weights


def silent(value: Tensor, zero: str) -> Tensor:
    """What becomes of a neuron's value on a patch."""
    at_rest = zero == "firing" and value <= 0
    return value.clamp(min=-0.28) if at_rest else torch.zeros_like(value)


def shift_by_hand(
    hidden: Tensor,
    owners: Mapping[int, int | None],
    *,
    num_registers: int,
    num_prefix: int,
    max_over: str,
    zero: str,
) -> Tensor:
    """Algorithm 2 for one block; `owners` says which register holds each unit, None: all of them."""
    images, tokens, _ = hidden.shape
    moved = hidden.clone()
    for image in range(images):
        for unit, owner in owners.items():
            candidates = [unit] if max_over == "neuron" else list(owners)
            peak = max((hidden[image, t, u] for t in range(tokens) for u in candidates), key=lambda value: abs(value))
            for token in range(tokens):
                register = token - (tokens - num_registers)
                if register >= 0 and owner in (None, register):
                    moved[image, token, unit] = peak
                elif register >= 0:
                    moved[image, token, unit] = 0
                elif token >= num_prefix or zero == "all":
                    moved[image, token, unit] = silent(hidden[image, token, unit], zero)
    return moved


def steer_by_hand(
    hidden: Tensor, units: Sequence[int], target: Tensor, *, num_prefix: int, max_over: str, zero: str
) -> Tensor:
    """The peak of each unit at the patches that `target` (B, N) names, and nothing at the others."""
    images, tokens, _ = hidden.shape
    moved = hidden.clone()
    for image in range(images):
        for unit in units:
            candidates = [unit] if max_over == "neuron" else units
            peak = max((hidden[image, t, u] for t in range(tokens) for u in candidates), key=lambda value: abs(value))
            for token in range(tokens):
                if token >= num_prefix:
                    at_rest = silent(hidden[image, token, unit], zero)
                    moved[image, token, unit] = peak if target[image, token - num_prefix] else at_rest
                elif zero == "all":
                    moved[image, token, unit] = 0
    return moved


def mean_patch(patches: Tensor) -> Tensor:
    """The mean (B, 1, C) of the patches (B, N, C) of each image, at their mean norm."""
    mean = patches.sum(1, keepdim=True) / patches.shape[1]
    mean_norm = patches.square().sum(-1).sqrt().sum(1) / patches.shape[1]
    return mean / mean.square().sum(-1, keepdim=True).sqrt() * mean_norm[:, None, None]


def forward_by_hand(
    name: str,
    model: nn.Module,
    images: Tensor,
    ranking: Sequence[tuple[int, int]],
    *,
    num_registers: int = 1,
    split_neurons: bool = False,
    max_over: str = "neuron",
    zero: str | None = None,
    target: Tensor | None = None,
    start: str = "zeros",
    static: Tensor | None = None,
    attentions: list[Tensor] | None = None,
) -> list[Tensor]:
    """The tokens that leave each block of the *unpatched* `model`, had it registers; (block, unit) in rank order.

    `target` (B, N) says which patches take the place of the register, `static` (L, R, C) what registers enter each
    block. With `start`="mean" they enter the first block that has neurons. `attentions` is given the weights of each
    block, register included.
    """
    layout = LAYOUTS[name]
    zero = zero or {"zeros": "patches", "mean": "firing"}[start]
    if target is not None:
        num_registers = 0
    x = block_outputs(name, model, images).entry
    registers = torch.zeros(len(images), num_registers, x.shape[-1], dtype=x.dtype)
    if layout.entry_norm is not None:
        registers = registers + layout.entry_norm(model).bias  # what a LayerNorm makes of zeros
    entry, num_tokens = 0, x.shape[1]
    if start == "mean":
        entry, registers = min(block for block, _ in ranking), registers[:, :0]
    x = torch.cat([x, registers], dim=1)

    def turn(heads: Tensor) -> Tensor:
        if layout.rope is None:
            return heads
        prefix, patches, register = heads.split(
            [layout.prefix, num_tokens - layout.prefix, heads.shape[2] - num_tokens], 2
        )
        return torch.cat([prefix, rotate(patches, *layout.rope(model, images), layout.interleaved), register], 2)

    outputs = []
    for index, module in enumerate(layout.blocks(model)):
        block = layout.read(module)
        if start == "mean" and index == entry:
            x = torch.cat([x, *[mean_patch(x[:, layout.prefix :])] * num_registers], dim=1)
        if static is not None and index >= entry:
            x = torch.cat([x[:, :num_tokens], static[index].expand(len(x), -1, -1)], dim=1)
        attended, weights = attend(layer_norm(x, block.norm1), block, turn)
        if attentions is not None:
            attentions.append(weights)
        after_attention = x + attended * block.scale1
        hidden = block.hidden(layer_norm(x if block.parallel else after_attention, block.norm2))
        units = [unit for at, unit in ranking if at == index]
        owners = {
            unit: rank % max(num_registers, 1) if split_neurons else None
            for rank, (at, unit) in enumerate(ranking)
            if at == index
        }
        if target is not None:
            hidden = steer_by_hand(hidden, units, target, num_prefix=layout.prefix, max_over=max_over, zero=zero)
        elif static is not None:
            hidden = hidden.clone()
            before = hidden.clone()
            for image, unit in itertools.product(range(len(hidden)), units):
                for token in range(0 if zero == "all" else layout.prefix, hidden.shape[1]):
                    hidden[image, token, unit] = silent(before[image, token, unit], zero)
        elif owners:
            hidden = shift_by_hand(
                hidden,
                owners,
                num_registers=num_registers,
                num_prefix=layout.prefix,
                max_over=max_over,
                zero=zero,
            )
        if block.middle_norm is not None:
            hidden = layer_norm(hidden, block.middle_norm)
        x = after_attention + apply(hidden, block.fc2) * block.scale2
        outputs.append(x[:, :num_tokens])
    return outputs
