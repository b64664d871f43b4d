"""Where each family of Vision Transformers keeps the parts that the method touches.

This is the only file that names the modules of other libraries, and it imports none of them: a tower is recognised by
its class name. A new family is one row of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """One row of the table. Paths are dotted attribute names; of several candidates the first that exists is used."""

    name: str
    library: str | None
    """Top-level package that defines the class; None where the code is vendored (torch.hub) and any package will do."""
    towers: tuple[str, ...]
    """Class names of the vision tower: the module that is called with images and owns the blocks."""
    blocks: tuple[str, ...]
    """The ModuleList or Sequential of blocks, in the tower."""
    down: tuple[str, ...]
    """The MLP's second linear, in a block; or the norm in front of it. Its *input* channels are the neurons."""
    up: tuple[str, ...]
    """The MLP's first linear, in a block."""
    query_key: tuple[str, ...]
    """Attention's input projections, in a block: one packed weight (3C, C), or the weights of query and key."""
    num_heads: tuple[str, ...]
    patch_embed: tuple[str, ...]
    """The convolution that makes patches into tokens, in the tower: its stride is the patch size."""
    prefix: Callable[[Any], int]
    """Number of tokens in front of the patches (CLS, distillation and trained register tokens)."""
    scale: tuple[str, ...] = ()
    """LayerScale vector on the MLP's output, in a block."""
    entry_norm: tuple[str, ...] = ()
    """Norm between the embedding and the first block, in the tower: the zero token passes through it too."""
    attention: tuple[str, ...] = ()
    """Attention module, in a block, if it may return its weights (B, heads, T, T) as the second of its outputs."""
    batch_first: Callable[[Any], bool] = lambda tower: True
    """False where blocks see (T, B, C)."""
    beside: Mapping[str, Callable[[Any, int], Any]] = field(default_factory=dict)
    """Arguments of a block that hold a row for each patch (rotary embeddings): how they get rows for R registers."""
    run_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the tower's forward must be told to take images of any size."""


def _unrotated(cosine: Tensor, sine: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rotations (..., N, D) of the patches, and `count` identities behind them: a register has no position."""
    ones = torch.ones_like(cosine[..., :1, :]).expand(*cosine.shape[:-2], count, -1)
    return torch.cat([cosine, ones], -2), torch.cat([sine, torch.zeros_like(ones)], -2)


def _timm_rope(rope: Tensor, count: int) -> Tensor:
    sine, cosine = rope.chunk(2, -1)
    cosine, sine = _unrotated(cosine, sine, count)
    return torch.cat([sine, cosine], -1)


def _hf_rope(position_embeddings: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    return _unrotated(*position_embeddings, count)


_TIMM_VIT = Family(
    name="timm VisionTransformer",
    library="timm",
    towers=("VisionTransformer",),
    blocks=("blocks",),
    down=("mlp.norm", "mlp.fc2", "mlp_out_proj"),
    up=("mlp.fc1",),
    query_key=("attn.qkv.weight",),
    num_heads=("attn.num_heads",),
    patch_embed=("patch_embed.proj",),
    prefix=lambda tower: tower.num_prefix_tokens,
    scale=("ls2.gamma",),
    entry_norm=("norm_pre",),
)
_HF_VIT = Family(
    name="transformers ViT",
    library="transformers",
    towers=("ViTModel",),
    blocks=("layers", "encoder.layer"),
    down=("mlp.fc2", "output.dense"),
    up=("mlp.fc1", "intermediate.dense"),
    query_key=("attention.q_proj.weight", "attention.k_proj.weight"),
    num_heads=("attention.num_attention_heads", "attention.num_heads"),
    patch_embed=("embeddings.patch_embeddings.projection",),
    prefix=lambda tower: 1,
    attention=("attention.attention", "attention"),
    run_kwargs={"interpolate_pos_encoding": True},
)
_HF_DINOV2 = replace(
    _HF_VIT,
    name="transformers Dinov2",
    towers=("Dinov2Model", "Dinov2Backbone"),
    blocks=("encoder.layer",),
    down=("mlp.down_proj", "mlp.weights_out", "mlp.fc2"),
    up=("mlp.fc1",),
    scale=("layer_scale2.lambda1",),
    run_kwargs={},  # interpolates by itself
)
_HF_CLIP = Family(
    name="transformers CLIP",
    library="transformers",
    towers=("CLIPVisionModel", "CLIPVisionTransformer"),
    blocks=("encoder.layers", "vision_model.encoder.layers"),
    down=("mlp.fc2",),
    up=("mlp.fc1",),
    query_key=("self_attn.q_proj.weight", "self_attn.k_proj.weight"),
    num_heads=("self_attn.num_heads",),
    patch_embed=("embeddings.patch_embedding", "vision_model.embeddings.patch_embedding"),
    prefix=lambda tower: 1,
    entry_norm=("pre_layrnorm", "vision_model.pre_layrnorm"),  # spelled so in transformers
    attention=("self_attn",),
    run_kwargs={"interpolate_pos_encoding": True},
)

FAMILIES = (
    _TIMM_VIT,
    replace(_TIMM_VIT, name="timm Eva", towers=("Eva",), scale=("gamma_2",), beside={"rope": _timm_rope}),
    _HF_VIT,
    replace(_HF_VIT, name="transformers DeiT", towers=("DeiTModel",), prefix=lambda tower: 2),
    _HF_CLIP,
    replace(
        _HF_CLIP,
        name="transformers SigLIP",
        towers=("SiglipVisionModel", "SiglipVisionTransformer"),
        prefix=lambda tower: 0,
        entry_norm=(),
    ),
    _HF_DINOV2,
    replace(
        _HF_DINOV2,
        name="transformers Dinov2WithRegisters",
        towers=("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        prefix=lambda tower: 1 + tower.config.num_register_tokens,
    ),
    replace(
        _HF_DINOV2,
        name="transformers DINOv3ViT",
        towers=("DINOv3ViTModel", "DINOv3ViTBackbone"),
        blocks=("model.layer", "layer"),
        down=("mlp.down_proj",),
        up=("mlp.up_proj",),
        patch_embed=("embeddings.patch_embeddings",),
        prefix=lambda tower: 1 + tower.config.num_register_tokens,
        beside={"position_embeddings": _hf_rope},
    ),
    Family(
        name="open_clip VisionTransformer",
        library="open_clip",
        towers=("VisionTransformer",),
        blocks=("transformer.resblocks",),
        down=("mlp.ln", "mlp.c_proj"),
        up=("mlp.c_fc",),
        query_key=("attn.in_proj_weight",),
        num_heads=("attn.num_heads",),
        patch_embed=("conv1",),
        prefix=lambda tower: 1,
        scale=("ls_2.gamma",),
        entry_norm=("ln_pre",),
        batch_first=lambda tower: tower.transformer.batch_first,
    ),
    Family(
        name="torchvision VisionTransformer",
        library="torchvision",
        towers=("VisionTransformer",),
        blocks=("encoder.layers",),
        down=("mlp.3",),
        up=("mlp.0",),
        query_key=("self_attention.in_proj_weight",),
        num_heads=("self_attention.num_heads",),
        patch_embed=("conv_proj",),
        prefix=lambda tower: 1,
    ),
    Family(
        name="facebookresearch/dinov2",
        library=None,
        towers=("DinoVisionTransformer",),
        blocks=("blocks",),
        down=("mlp.w3", "mlp.fc2"),
        up=("mlp.fc1",),
        query_key=("attn.qkv.weight",),
        num_heads=("attn.num_heads",),
        patch_embed=("patch_embed.proj",),
        prefix=lambda tower: 1 + tower.num_register_tokens,
        scale=("ls2.gamma",),
    ),
)


@dataclass(frozen=True)
class Block:
    """One transformer block of a tower, with the parts of it that the method touches."""

    module: nn.Module
    down: nn.Module
    """Takes the hidden activation (B, T, H): the second linear, or the norm in front of it."""
    down_linear: nn.Linear
    """The second linear itself: `weight[:, unit]` is what a neuron writes."""
    mlp: nn.Module | None
    """The MLP that holds `down` and maps (..., C) to (..., C); None where the block keeps no such module."""
    scale: nn.Parameter | None
    attention: nn.Module | None


@dataclass(frozen=True)
class Tower:
    """A vision tower found in a model: `family` applied to `module`."""

    family: Family
    path: str
    """Name of the tower inside the model that was searched; "" if it is the model."""
    module: nn.Module
    blocks: tuple[Block, ...]
    num_prefix: int
    """P, the tokens in front of the patches."""
    embedding: nn.Conv2d
    """Makes patches into tokens."""
    entry_norm: nn.Module | None
    token_dim: int
    """The sequence dimension of what the blocks see: 1 for (B, T, C), 0 for (T, B, C)."""

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def mlp_width(self) -> int:
        """H, the number of neurons of a block's MLP."""
        return self.blocks[0].down_linear.in_features

    def run(self, images: Tensor) -> Any:
        """The tower's own output for images (B, 3, h, w), which are brought to its device and dtype."""
        weight = self.embedding.weight
        return self.module(images.to(weight.device, weight.dtype), **self.family.run_kwargs)

    def batch_first(self, tokens: Tensor) -> Tensor:
        """What the blocks see, or a part of it, as (B, T, ...): a view."""
        return tokens.transpose(0, 1) if self.token_dim == 0 else tokens

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images (..., h, w)."""
        rows, columns = self.embedding.stride
        return images.shape[-2] // rows, images.shape[-1] // columns


def find_tower(model: nn.Module) -> Tower:
    """The vision tower of `model`: the model itself, or the one inside it (of CLIP, a VLM, a classifier).

    Raises:
        TypeError: `model` is no module, or one that cannot be patched (DataParallel, TorchScript).
        ValueError: no tower, or more than one, or a tower whose parts are not where its family keeps them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, nn.DataParallel):
            raise TypeError(
                "nn.DataParallel copies modules in a way that cannot be patched: "
                "pass its .module, and use DistributedDataParallel for several GPUs"
            )
        if type(module).__module__.startswith("torch.jit"):
            raise TypeError("TorchScript modules cannot be patched: patch the Python model (and use torch.compile)")
    found = list(_towers(model, ""))
    if not found:
        known = ", ".join(family.name for family in FAMILIES)
        raise ValueError(
            f"no supported vision tower in {type(model).__name__}. Supported families: {known}. "
            "A family of your own is one row of testreg.families.FAMILIES"
        )
    if len(found) > 1:
        paths = ", ".join(repr(path) for path, _, _ in found)
        raise ValueError(f"{type(model).__name__} holds several vision towers ({paths}): pass the one you mean")
    return _resolve(*found[0])


def _towers(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, Family]]:
    """The outermost modules that a family recognises, as (path, module, family)."""
    for family in FAMILIES:
        if any(
            base.__name__ in family.towers and family.library in (None, base.__module__.partition(".")[0])
            for base in type(module).__mro__
        ):
            yield path, module, family
            return
    for name, child in module.named_children():
        yield from _towers(child, f"{path}.{name}" if path else name)


def _resolve(path: str, tower: nn.Module, family: Family) -> Tower:
    container = find_part(tower, family.blocks)
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        raise ValueError(f"{type(tower).__name__} has no blocks at {' or '.join(family.blocks)}")
    blocks = tuple(_block(i, module, family) for i, module in enumerate(_flatten(container)))
    if not blocks:
        raise ValueError(f"{type(tower).__name__} has no blocks left")
    if len({block.down_linear.in_features for block in blocks}) > 1:
        raise ValueError(f"{type(tower).__name__} has MLPs of different widths, which is not supported")
    return Tower(
        family=family,
        path=path,
        module=tower,
        blocks=blocks,
        num_prefix=family.prefix(tower),
        embedding=find_part(tower, family.patch_embed),
        entry_norm=find_part(tower, family.entry_norm),
        token_dim=1 if family.batch_first(tower) else 0,
    )


def _flatten(container: nn.Module) -> Iterator[nn.Module]:
    """The blocks in order. facebookresearch/dinov2 nests them in chunks padded with Identity (for FSDP)."""
    for child in container.children():
        if isinstance(child, nn.ModuleList):
            yield from _flatten(child)
        elif not isinstance(child, nn.Identity):
            yield child


def _block(index: int, module: nn.Module, family: Family) -> Block:
    parts = {path: part for path in family.down if (part := find_part(module, (path,))) is not None}
    linears = [part for part in parts.values() if hasattr(part, "in_features")]
    if not linears:
        raise ValueError(
            f"block {index} ({type(module).__name__}) has no second MLP linear at {' or '.join(family.down)}: "
            "its kind of MLP is not supported"
        )
    path, down = next(iter(parts.items()))
    parent = path.rpartition(".")[0]
    # transformers 4 spreads the MLP over `intermediate` and `output`: there is no module to run on a few tokens.
    mlp = find_part(module, (parent,)) if parent not in ("", "output") else None
    if any(base.__module__.startswith("xformers") for base in type(mlp).__mro__):
        raise ValueError(
            f"block {index} uses xformers' fused SwiGLU, which bypasses the second linear: "
            "set the environment variable XFORMERS_DISABLED=1 before the model is built"
        )
    return Block(
        module=module,
        down=down,
        down_linear=linears[0],
        mlp=mlp,
        scale=find_part(module, family.scale),
        attention=find_part(module, family.attention),
    )


def find_part(root: nn.Module, paths: Sequence[str]) -> Any:
    """What the first existing path leads to; an Identity stands for a part that was left out."""
    for path in paths:
        node: object = root
        for name in path.split("."):
            node = getattr(node, name, None)
        if node is not None and not isinstance(node, nn.Identity):
            return node
    return None


def checkpoint_names(model: nn.Module) -> list[str]:
    """The names under which `model` says it was loaded, e.g. ["timm:vit_base_patch14_dinov2.lvd142m"]; maybe none.

    timm keeps them in `pretrained_cfg`, transformers in `config.name_or_path`. open_clip and torch.hub models say
    nothing; `testreg.load_model` notes the name it was given.
    """
    names: list[str] = []
    silent = False
    for module in model.modules():
        if isinstance(source := module.__dict__.get("testreg_source"), str):
            return [source]
        # open_clip builds its timm towers without weights: what timm says of them is not what was loaded.
        silent |= type(module).__module__.partition(".")[0] == "open_clip"
        cfg = module.__dict__.get("pretrained_cfg")
        if isinstance(cfg, Mapping) and cfg.get("architecture") and not silent:
            names.append("timm:" + ".".join(filter(None, (cfg["architecture"], cfg.get("tag")))))
        name = getattr(getattr(module, "config", None), "_name_or_path", "")
        if isinstance(name, str) and name:
            names.append(f"hf:{name}")
    return list(dict.fromkeys(names))
