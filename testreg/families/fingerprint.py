"""Which checkpoint a model holds: by the names that it says, and by a fingerprint of its weights."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from testreg.families.tower import Tower

Likeness = Literal["same", "similar", "other", "unknown"]
"""How the weights of two checkpoints compare: "similar" ones are the same, quantised or lightly fine-tuned."""

SAMPLED = 256  # weights of a tower, at least
SIMILAR = 0.9  # of the signs; two checkpoints that have nothing to do with each other agree on half of them
MIN_COMPARED = 32  # weights that are zero in neither checkpoint: fewer tell nothing
_VERSION = "2:"
_UNKNOWN = "unknown"


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
    """The signs of a few hundred weights as text, the same in every library that holds the checkpoint.

    The weights are of every block's second MLP linear, the matrix whose columns the neurons are, which is laid out
    alike in all libraries; the places are the same in each block. A weight that is zero has no sign: rounding may have
    made it so. Weights that are elsewhere or in shards (offloading, FSDP) cannot be read: "unknown".
    """
    mlps = [mlp for block in tower.blocks for mlp in block.mlps]
    count = -(-SAMPLED // len(mlps))
    signs = []
    for mlp in mlps:
        if (flat := _readable(mlp.fc2_linear)) is None:
            return _UNKNOWN
        # Multiples of the golden ratio, modulo 1: the places lie evenly, whatever the shape of the matrix.
        places = torch.arange(count) * 0x9E3779B9 % 2**32 * flat.numel() >> 32
        signs.append(flat[places.to(flat.device)].float().sign().cpu())
    flags = torch.stack([torch.cat(signs) > 0, torch.cat(signs) < 0], 1).numpy()
    return _VERSION + base64.b64encode(np.packbits(flags).tobytes()).decode()


def compare_weights(expected: str, tower: Tower) -> Likeness:
    """Whether a tower holds the checkpoint whose fingerprint is `expected`, by the share of signs that agree.

    Weights that are zero in either are left out. Fingerprints before version 2 were hashes: they find the very same
    weights, and nothing similar.
    """
    if re.fullmatch("[0-9a-f]{16}", expected):
        own = _hash(tower)
        return "unknown" if own == _UNKNOWN else "same" if own == expected else "other"
    return compare_fingerprints(expected, fingerprint(tower))


def compare_fingerprints(one: str, other: str) -> Likeness:
    """The same, of two fingerprints of version 2."""
    share = agreement(one, other)
    if share is None:
        return "unknown"
    return "same" if one == other else "similar" if share >= SIMILAR else "other"


def agreement(one: str, other: str) -> float | None:
    """The share of signs that agree, of the weights that are zero in neither: rounding alone leaves it at 1.

    None if they cannot be compared: one is unknown, or of another version, or nearly all weights are zero.
    """
    if (signs := _signs(one)) is None or (other_signs := _signs(other)) is None:
        return None
    if len(signs) != len(other_signs):
        return 0.0
    products = signs * other_signs
    compared = np.count_nonzero(products)
    return float(np.count_nonzero(products > 0) / compared) if compared >= MIN_COMPARED else None


def _readable(linear: nn.Module) -> Tensor | None:
    """All weights of a linear, flat, dequantised where torchao quantised them; None if they cannot be read."""
    weight: Any = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or weight.ndim != 2:
        return None
    weight = weight.detach()
    if type(weight).dequantize is not Tensor.dequantize:
        weight = weight.dequantize()
    return weight.flatten() if type(weight) is Tensor and weight.is_floating_point() else None


def _signs(text: str) -> np.ndarray | None:
    """The signs -1, 0 and 1 that a fingerprint of version 2 holds; None if it is none."""
    if not text.startswith(_VERSION):
        return None
    try:
        flags = np.unpackbits(np.frombuffer(base64.b64decode(text.removeprefix(_VERSION), validate=True), np.uint8))
    except ValueError:  # not base64
        return None
    positive, negative = flags.reshape(-1, 2).T.astype(np.int8)
    return positive - negative


def _hash(tower: Tower) -> str:
    """The fingerprint as testreg wrote it before version 2: a hash of 256 signs of each second linear."""
    digest = hashlib.sha256()
    for linear in (mlp.fc2_linear for block in tower.blocks for mlp in block.mlps):
        flat = _readable(linear)
        if flat is None or type(linear.weight) not in (Tensor, nn.Parameter):  # of quantised weights it is another
            return _UNKNOWN
        at = torch.arange(256) * (flat.numel() - 1) // 255
        digest.update(flat[at.to(flat.device)].signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
