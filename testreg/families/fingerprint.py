"""Which checkpoint a model holds: by the names that it says, and by a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from testreg.families.tower import Tower


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


def fingerprint(tower: Tower) -> str:
    """A short hash that tells checkpoints apart, and is the same in every library that holds the checkpoint.

    It hashes the signs of 256 evenly spaced values of every block's second MLP linear: the matrices whose columns the
    neurons are, laid out alike in all libraries. Signs, because no rounding (fp16, bf16) changes them. Weights that
    are elsewhere, quantised or in shards (offloading, torchao, FSDP) have none that can be read: "unknown".
    """
    digest = hashlib.sha256()
    for mlp in (mlp for block in tower.blocks for mlp in block.mlps):
        weight: Any = getattr(mlp.fc2_linear, "weight", None)
        whole = type(weight) in (torch.Tensor, nn.Parameter) and weight.ndim == 2 and weight.is_floating_point()
        if not whole or weight.is_meta:
            return "unknown"
        flat = weight.detach().flatten()
        at = torch.arange(256) * (flat.numel() - 1) // 255
        digest.update(flat[at.to(flat.device)].signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
