"""Recognises which checkpoint a model holds: by names that the model has kept, and by a fingerprint of its weights.

A fingerprint is the signs of a few hundred weights. It survives rounding and light fine-tuning.
"""

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
"""How two checkpoints compare. "similar": most signs agree, as after quantisation or light fine-tuning."""

SAMPLED = 256  # so many weights of a tower, or a few more, are in its fingerprint
SIMILAR = 0.9  # the share of signs that agree in "similar" weights; in unrelated checkpoints it is about a half
MIN_COMPARED = 32  # fewer weights that are zero in neither checkpoint are too few to compare
_VERSION = "2:"  # the start of every fingerprint
_UNKNOWN = "unknown"  # the fingerprint of weights that cannot be read


def checkpoint_names(model: nn.Module) -> list[str]:
    """The names under which `model` was loaded, e.g. ["timm:vit_base_patch14_dinov2.lvd142m"]; [] if it kept none.

    timm's models keep them in `pretrained_cfg`, those of transformers in `config.name_or_path`. Models of open_clip,
    torch.hub and torchvision keep none, unless `testreg.load_model` loaded them, which notes the name.
    """
    names: list[str] = []
    is_in_open_clip = False
    for module in model.modules():
        if isinstance(source := module.__dict__.get("testreg_source"), str):
            return [source]
        # open_clip builds timm towers without weights and loads its own: timm's name is then not the checkpoint's.
        is_in_open_clip |= type(module).__module__.partition(".")[0] == "open_clip"
        cfg = module.__dict__.get("pretrained_cfg")
        if isinstance(cfg, Mapping) and cfg.get("architecture") and not is_in_open_clip:
            names.append("timm:" + ".".join(filter(None, (cfg["architecture"], cfg.get("tag")))))
        name = getattr(getattr(module, "config", None), "_name_or_path", "")
        if isinstance(name, str) and name:
            names.append(f"hf:{name}")
    return list(dict.fromkeys(names))


def fingerprint(tower: Tower) -> str:
    """The signs of a few hundred weights, as text. It is the same in every library that has the checkpoint.

    The weights are from the second MLP linear of each block, whose layout is the same in all libraries, at the same
    indices in each block. A weight of zero counts as neither positive nor negative, since rounding may have made it
    zero. If weights cannot be read (offloaded, or in shards of FSDP), the fingerprint is "unknown".
    """
    mlps = [mlp for block in tower.blocks for mlp in block.mlps]
    count = -(-SAMPLED // len(mlps))
    signs = []
    for mlp in mlps:
        if (flat := _readable_weights(mlp.fc2_linear)) is None:
            return _UNKNOWN
        # Multiples of the golden ratio modulo 1 spread evenly over the matrix, whatever its shape.
        indices = torch.arange(count) * 0x9E3779B9 % 2**32 * flat.numel() >> 32
        signs.append(flat[indices.to(flat.device)].float().sign().cpu())
    flags = torch.stack([torch.cat(signs) > 0, torch.cat(signs) < 0], 1).numpy()
    return _VERSION + base64.b64encode(np.packbits(flags).tobytes()).decode()


def compare_weights(expected: str, tower: Tower) -> Likeness:
    """Whether a tower holds the checkpoint with the fingerprint `expected`.

    Fingerprints of version 1 are hashes of signs: they tell the same weights from others, but never find "similar"
    ones.
    """
    if re.fullmatch("[0-9a-f]{16}", expected):
        own_hash = _hash_of_version_1(tower)
        return "unknown" if own_hash == _UNKNOWN else "same" if own_hash == expected else "other"
    return compare_fingerprints(expected, fingerprint(tower))


def compare_fingerprints(one: str, other: str) -> Likeness:
    """How two fingerprints of version 2 compare, by the share of signs that agree."""
    share = agreement(one, other)
    if share is None:
        return "unknown"
    return "same" if one == other else "similar" if share >= SIMILAR else "other"


def agreement(one: str, other: str) -> float | None:
    """The share of signs that agree in two fingerprints, among weights that are zero in neither.

    0 if they have different lengths. None if they cannot be compared: one is unknown, or of another version, or nearly
    all weights are zero.
    """
    if (signs := _signs_of(one)) is None or (other_signs := _signs_of(other)) is None:
        return None
    if len(signs) != len(other_signs):
        return 0.0
    products = signs * other_signs
    compared = np.count_nonzero(products)
    return float(np.count_nonzero(products > 0) / compared) if compared >= MIN_COMPARED else None


def _readable_weights(linear: nn.Module) -> Tensor | None:
    """The weights of a linear, flat, dequantised if torchao has quantised them; None if they cannot be read."""
    weight: Any = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or weight.ndim != 2:
        return None
    weight = weight.detach()
    if type(weight).dequantize is not Tensor.dequantize:
        weight = weight.dequantize()
    return weight.flatten() if type(weight) is Tensor and weight.is_floating_point() else None


def _signs_of(text: str) -> np.ndarray | None:
    """The signs -1, 0 and 1 in a fingerprint of version 2; None if the text is something else."""
    if not text.startswith(_VERSION):
        return None
    try:
        flags = np.unpackbits(np.frombuffer(base64.b64decode(text.removeprefix(_VERSION), validate=True), np.uint8))
    except ValueError:  # not base64
        return None
    positive, negative = flags.reshape(-1, 2).T.astype(np.int8)
    return positive - negative


def _hash_of_version_1(tower: Tower) -> str:
    """The fingerprint of version 1: a hash of 256 signs of each second linear; "unknown" if weights cannot be read, or
    are quantised."""
    digest = hashlib.sha256()
    for linear in (mlp.fc2_linear for block in tower.blocks for mlp in block.mlps):
        flat = _readable_weights(linear)
        if flat is None or type(linear.weight) not in (Tensor, nn.Parameter):  # quantised weights have another hash
            return _UNKNOWN
        at = torch.arange(256) * (flat.numel() - 1) // 255
        digest.update(flat[at.to(flat.device)].signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
