"""Finding the vision tower of a model, and its parts, by the rows of the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from testreg.families.family import Family, Paths, find_part, listed
from testreg.families.table import FAMILIES, REFUSED


@dataclass(frozen=True)
class Mlp:
    """An MLP of a block."""

    fc2: nn.Module
    """Takes the hidden activation (B, T, H): the second linear, or the norm in front of it."""
    fc2_linear: nn.Linear
    """The second linear itself."""
    first: int
    """Input channel of `down` that is neuron 0: above 0 if attention's output (C) comes in front."""
    module: nn.Module | None
    """Holds `down` and maps (..., C) to (..., C); None where the block keeps no such module."""
    scale: nn.Parameter | None
    consumers: tuple[nn.Module, ...]
    """Whatever takes the hidden activation as its first argument: `down`, and in a mixture the experts."""

    @property
    def width(self) -> int:
        """H, the number of neurons."""
        return self.fc2_linear.in_features - self.first

    @property
    def columns(self) -> Tensor:
        """(C, H): `columns[:, unit]` is what a neuron writes, before LayerScale."""
        weight = self.fc2_linear.weight
        return weight[:, self.first :] if self.first else weight


@dataclass(frozen=True)
class Block:
    """One transformer block of a tower, with the parts of it that the method touches."""

    module: nn.Module
    mlps: tuple[Mlp, ...]
    """One; or several side by side, whose neurons are numbered through."""
    attention: nn.Module | None
    bias: tuple[nn.Module, str] | None
    """Module and name of the method that makes a relative position bias, if there is one."""

    @property
    def width(self) -> int:
        return sum(mlp.width for mlp in self.mlps)


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
    embedding: nn.Conv2d | nn.Linear | None
    """The convolution that makes patches into tokens, if there is one."""
    entry_norm: nn.Module | None
    sequence_first: bool
    """Whether the blocks see (T, B, C)."""

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def mlp_width(self) -> int:
        """H, the number of neurons of a block."""
        return self.blocks[0].width

    def run(self, images: Tensor) -> Any:
        """What the tower gives for images (B, 3, h, w), which are brought to its device and dtype.

        Raises:
            ValueError: it does not take a batch of images.
        """
        if self.family.run is None:
            raise ValueError(
                f"{type(self.module).__name__} ({self.family.name}) takes no batch of images (B, 3, h, w), so testreg "
                "cannot run it by itself: neither calibrate nor draw it. It can be patched with given neurons"
            )
        return self.family.run(self.module, images.to(self.device, self.dtype))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block the tower is in eval mode."""
        training = {module: module.training for module in self.module.modules()}
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(training[self.module])
            for module, was_training in training.items():  # a part of it may have been frozen
                module.training = was_training

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        """The one that meets the images first: a tower may be of mixed precision."""
        if self.embedding is not None:
            return self.embedding.weight
        return next(each for each in self.module.parameters() if each.is_floating_point())

    def batch_first(self, tokens: Tensor) -> Tensor:
        """What the blocks see, or a part of it, as (B, T, ...): a view."""
        return tokens.transpose(0, 1) if self.sequence_first else tokens

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        if self.family.patch_size is not None:
            return self.family.patch_size(self.module)
        if not isinstance(self.embedding, nn.Conv2d):
            raise ValueError(f"the row of {self.family.name} says neither patch_embed, a convolution, nor patch_size")
        rows, columns = self.embedding.stride
        return rows, columns

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images (..., h, w)."""
        height, width = images.shape[-2:]
        if self.family.grid is not None:
            return self.family.grid(self.module, height, width)
        rows, columns = self.patch_size
        return height // rows, width // columns

    def patches(self, images: Tensor) -> slice:
        """The tokens that are patches, without prefix and registers."""
        rows, columns = self.grid(images)
        return slice(self.num_prefix, self.num_prefix + rows * columns)


def find_tower(model: nn.Module) -> Tower:
    """The vision tower of `model`: the model itself, or the one inside it (of CLIP, a VLM, a classifier).

    Raises:
        TypeError: `model` is no module, or one that cannot be patched (DataParallel, TorchScript).
        ValueError: no tower, or more than one, or a tower that the method does not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, nn.DataParallel):
            raise TypeError(
                "nn.DataParallel copies modules in a way that cannot be patched: "
                "pass its .module, and use DistributedDataParallel for several GPUs"
            )
        if isinstance(module, torch.fx.GraphModule):
            raise TypeError("traced modules cannot be patched: patch the Python model, then trace or export it")
        if type(module).__module__.startswith("torch.jit"):
            raise TypeError("TorchScript modules cannot be patched: patch the Python model (and use torch.compile)")
    found = list(_towers(model, ""))
    if not found:
        if reason := _refusal(model):
            raise ValueError(f"{type(model).__name__} cannot be patched: {reason}")
        raise ValueError(
            f"no supported vision tower in {type(model).__name__}: the README lists those that are. A family of your "
            "own is one row: testreg.add_family"
        )
    if len(found) > 1:
        paths = ", ".join(repr(path) for path, _, _ in found)
        raise ValueError(f"{type(model).__name__} holds several vision towers ({paths}): pass the one you mean")
    return _resolve(*found[0])


def _refusal(model: nn.Module) -> str:
    """Why the method does not fit a tower of the model that is known for that; "" if there is none."""
    for module in model.modules():
        for base in type(module).__mro__:
            if reason := REFUSED.get(base.__name__):
                return f"in {base.__name__}, {reason}"
    return ""


def _towers(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, Family]]:
    """The outermost modules that a family recognises, as (path, module, family)."""
    for family in FAMILIES:
        if _is_of(module, family):
            yield path, module, family
            return
    for name, child in module.named_children():
        yield from _towers(child, f"{path}.{name}" if path else name)


def _is_of(module: nn.Module, family: Family) -> bool:
    names = {
        base.__name__ for base in type(module).__mro__ if family.library in (None, base.__module__.partition(".")[0])
    }
    return not names.isdisjoint(listed(family.towers)) and all(
        find_part(module, mark) is not None for mark in listed(family.requirements)
    )


def _resolve(path: str, tower: nn.Module, family: Family) -> Tower:
    container = find_part(tower, family.blocks)
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        raise ValueError(f"{type(tower).__name__} has no blocks at {' or '.join(listed(family.blocks))}")
    blocks = tuple(_block(i, module, family) for i, module in enumerate(_flatten(container)))
    if not blocks:
        raise ValueError(f"{type(tower).__name__} has no blocks left")
    if len({block.width for block in blocks}) > 1:
        raise ValueError(f"{type(tower).__name__} has MLPs of different widths, which is not supported")
    return Tower(
        family=family,
        path=path,
        module=tower,
        blocks=blocks,
        num_prefix=family.prefix if isinstance(family.prefix, int) else family.prefix(tower),
        embedding=find_part(tower, family.patch_embed),
        entry_norm=find_part(tower, family.entry_norm),
        sequence_first=family.sequence_first(tower),
    )


def _flatten(container: nn.Module) -> Iterator[nn.Module]:
    """The blocks in order. facebookresearch/dinov2 nests them in chunks padded with Identity (for FSDP)."""
    for child in container.children():
        if isinstance(child, nn.ModuleList):
            yield from _flatten(child)
        elif not isinstance(child, nn.Identity):
            yield child


def _block(index: int, module: nn.Module, family: Family) -> Block:
    if torch.backends.mha.get_fastpath_enabled() and isinstance(module, nn.TransformerEncoderLayer):
        raise ValueError(
            f"block {index} is an nn.TransformerEncoderLayer, whose fast path bypasses the second linear: call "
            "torch.backends.mha.set_fastpath_enabled(False) first"
        )
    parallel = find_part(module, family.parallel)
    holders = [module] if parallel is None else list(parallel)
    return Block(
        module=module,
        mlps=tuple(_mlp(f"block {index} ({type(module).__name__})", holder, family) for holder in holders),
        attention=find_part(module, family.attention),
        bias=next(_methods(module, family.bias), None),
    )


def _mlp(where: str, holder: nn.Module, family: Family) -> Mlp:
    fused = find_part(holder, family.fused)
    paths = listed(family.fc2) if fused is None else listed(family.fused)
    parts = {path: part for path in paths if (part := find_part(holder, path)) is not None}
    linears = [part for part in parts.values() if hasattr(part, "in_features")]
    if not linears:
        raise ValueError(
            f"{where} has no second MLP linear at {' or '.join(listed(family.fc2))}: its kind of MLP is not supported"
        )
    path, down = next(iter(parts.items()))
    parent = path.rpartition(".")[0]
    # transformers 4 spreads the MLP over `intermediate` and `output`: there is no module to run on a few tokens.
    reader = find_part(holder, family.consumers)
    # Nor can a mixture of experts be run on a few tokens, without the choice of expert.
    module = find_part(holder, parent) if parent not in ("", "output") and reader is None else None
    if any(base.__module__.startswith("xformers") for base in type(module).__mro__):
        raise ValueError(
            f"{where} uses xformers' fused SwiGLU, which bypasses the second linear: "
            "set the environment variable XFORMERS_DISABLED=1 before the model is built"
        )
    return Mlp(
        fc2=down,
        fc2_linear=linears[0],
        first=0 if fused is None else fused.out_features,
        module=module,
        scale=scale if isinstance(scale := find_part(holder, family.scale), nn.Parameter) else None,
        # transformers 4 calls the experts one by one.
        consumers=(down, *(reader if type(reader) is nn.ModuleList else () if reader is None else (reader,))),
    )


def _methods(module: nn.Module, paths: Paths) -> Iterator[tuple[nn.Module, str]]:
    for path in listed(paths):
        parent, _, name = path.rpartition(".")
        owner = find_part(module, parent)
        if hasattr(owner, name):
            yield owner, name


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
