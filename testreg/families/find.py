"""Finds the vision tower in a model, and the tower's parts, by the rows of the table of families."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from testreg.families.family import Family, Paths
from testreg.families.table import FAMILIES, REFUSED
from testreg.families.tower import Block, Mlp, Tower

COVERED = "https://testreg.github.io/testreg/covered"


def find_tower(model: nn.Module) -> Tower:
    """The vision tower of `model`: the model itself, or the vision transformer inside it (of a CLIP, VLM, classifier).

    Raises:
        TypeError: `model` is not a module, or a kind of module that cannot be patched (DataParallel, TorchScript).
        ValueError: the model has no tower, or several, or one that the method does not fit.
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
    towers = list(_towers(model, ""))
    if not towers:
        if reason := _refusal(model):
            raise ValueError(f"{type(model).__name__} cannot be patched: {reason}")
        raise ValueError(
            f"no supported vision tower in {type(model).__name__}: see {COVERED} for those that are. A family of your "
            "own is one row: testreg.add_family"
        )
    if len(towers) > 1:
        paths = ", ".join(repr(path) for path, _, _ in towers)
        raise ValueError(f"{type(model).__name__} holds several vision towers ({paths}): pass the one you mean")
    return _make_tower(*towers[0])


def _refusal(model: nn.Module) -> str:
    """Why the method does not fit a tower in the model; "" if the model has no tower of which that is known."""
    for module in model.modules():
        for base in type(module).__mro__:
            if reason := REFUSED.get(base.__name__):
                return f"in {base.__name__}, {reason}"
    return ""


def _towers(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, Family]]:
    """Yield the outermost modules that are a tower of some family, as (path, module, family)."""
    for family in FAMILIES:
        if _belongs_to_family(module, family):
            yield path, module, family
            return
    for name, child in module.named_children():
        yield from _towers(child, f"{path}.{name}" if path else name)


def _belongs_to_family(module: nn.Module, family: Family) -> bool:
    """Whether a module's class, or a base of it, has the name and library of the row, and the module its attributes."""
    names = {
        base.__name__ for base in type(module).__mro__ if family.library in (None, base.__module__.partition(".")[0])
    }
    return not names.isdisjoint(as_tuple(family.towers)) and all(
        find_part(module, path) is not None for path in as_tuple(family.requirements)
    )


def _make_tower(path: str, tower: nn.Module, family: Family) -> Tower:
    """The record of a tower, whose parts are where its family's row says.

    Raises:
        ValueError: a part that is needed is missing, or of a kind that is not supported.
    """
    container = find_part(tower, family.blocks)
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        raise ValueError(f"{type(tower).__name__} has no blocks at {' or '.join(as_tuple(family.blocks))}")
    blocks = tuple(_make_block(i, module, family) for i, module in enumerate(_in_order(container)))
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


def _in_order(container: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks in order. (facebookresearch/dinov2 nests them in lists, which Identity modules fill up.)"""
    for child in container.children():
        if isinstance(child, nn.ModuleList):
            yield from _in_order(child)
        elif not isinstance(child, nn.Identity):
            yield child


def _make_block(index: int, module: nn.Module, family: Family) -> Block:
    """The record of one block."""
    if torch.backends.mha.get_fastpath_enabled() and isinstance(module, nn.TransformerEncoderLayer):
        raise ValueError(
            f"block {index} is an nn.TransformerEncoderLayer, whose fast path bypasses the second linear: call "
            "torch.backends.mha.set_fastpath_enabled(False) first"
        )
    parallel = find_part(module, family.parallel)
    holders = [module] if parallel is None else list(parallel)
    return Block(
        module=module,
        mlps=tuple(_make_mlp(f"block {index} ({type(module).__name__})", holder, family) for holder in holders),
        attention=find_part(module, family.attention),
        bias=next(_existing_methods(module, family.bias), None),
    )


def _make_mlp(where: str, holder: nn.Module, family: Family) -> Mlp:
    """The record of an MLP in `holder`, a block or one of its parallel MLPs. `where` names the block in errors."""
    fused = find_part(holder, family.fused)
    paths = as_tuple(family.fc2) if fused is None else as_tuple(family.fused)
    parts = {path: part for path in paths if (part := find_part(holder, path)) is not None}
    linears = [part for part in parts.values() if hasattr(part, "in_features")]
    if not linears:
        raise ValueError(
            f"{where} has no second MLP linear at {' or '.join(as_tuple(family.fc2))}: its kind of MLP is not supported"
        )
    path, fc2 = next(iter(parts.items()))
    parent = path.rpartition(".")[0]
    # `module` stays None if the MLP cannot be run by itself: in transformers 4 it is spread over the modules
    # `intermediate` and `output`, and a mixture of experts also needs the choice of the expert.
    consumer = find_part(holder, family.consumers)
    module = find_part(holder, parent) if parent not in ("", "output") and consumer is None else None
    if any(base.__module__.startswith("xformers") for base in type(module).__mro__):
        raise ValueError(
            f"{where} uses xformers' fused SwiGLU, which bypasses the second linear: "
            "set the environment variable XFORMERS_DISABLED=1 before the model is built"
        )
    return Mlp(
        fc2=fc2,
        fc2_linear=linears[0],
        first=0 if fused is None else fused.out_features,
        module=module,
        scale=scale if isinstance(scale := find_part(holder, family.scale), nn.Parameter) else None,
        consumers=(fc2, *_consumers(consumer)),
    )


def _consumers(part: nn.Module | None) -> tuple[nn.Module, ...]:
    """The modules that get the hidden activation: the part itself, or its experts if it is a plain list of them."""
    if part is None:
        return ()
    return tuple(part) if type(part) is nn.ModuleList else (part,)


def _existing_methods(module: nn.Module, paths: Paths) -> Iterator[tuple[nn.Module, str]]:
    """Yield those of the methods that exist, as (module that has the method, the method's name)."""
    for path in as_tuple(paths):
        parent, _, name = path.rpartition(".")
        holder = find_part(module, parent)
        if hasattr(holder, name):
            yield holder, name


def as_tuple(paths: Paths) -> tuple[str, ...]:
    """The candidates of `Paths` as a tuple; a single name becomes a tuple of one."""
    return (paths,) if isinstance(paths, str) else paths


def find_part(root: nn.Module, paths: Paths) -> Any:
    """The attribute at the first path that exists; None if none does. An Identity counts as missing."""
    for path in as_tuple(paths):
        node: object = root
        for name in path.split("."):
            node = getattr(node, name, None)
        if node is not None and not isinstance(node, nn.Identity):
            return node
    return None
