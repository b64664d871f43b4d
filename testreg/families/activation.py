"""The activation function of a tower's MLPs, and of checkpoints that were trained with another one.

OpenAI's CLIP was trained with QuickGELU, x * sigmoid(1.702 x). timm and open_clip also load its weights into
architectures with the exact GELU, which run without an error, and are another network: of other outputs and neurons.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from testreg.families.fingerprint import agreement, checkpoint_names, fingerprint
from testreg.families.tower import Block, Mlp, Tower

_CLASSES = {
    "gelu": ("GELU", "GELUActivation"),
    "gelu_tanh": ("GELUTanh", "PytorchGELUTanh", "NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation"),
    "quick_gelu": ("QuickGELU", "QuickGELUActivation"),
    "silu": ("SiLU", "SiLUActivation"),
    "relu": ("ReLU",),
    "relu2": ("ReLUSquaredActivation",),
}
"""The classes of torch, timm, transformers, open_clip and OpenAI's CLIP, by the name of what they compute."""
_NAMES = {class_name: name for name, classes in _CLASSES.items() for class_name in classes}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
_FINGERPRINTS = {
    "OpenAI's CLIP ViT-B/16": (
        "2:opapZpmlmaapWWqkZmlWpVpFqllZmWmapaZqlWlqmZWlqpZWqWaZmZlaqVpllmZGWVqqaZZWWWamVqmlaWapplal",
        {
            "timm": "timm:vit_base_patch16_clip_quickgelu_224.openai",
            "open_clip": "open_clip:ViT-B-16-quickgelu/openai",
            "transformers": "hf:openai/clip-vit-base-patch16",
        },
    )
}
"""Checkpoints that were trained with QuickGELU, known by their weights where a model does not say its name, and the
name of the right model in each library."""


@dataclass(frozen=True)
class Mismatch:
    """A model that computes another activation than its checkpoint was trained with."""

    checkpoint: str
    own: str
    """The activation that the model computes."""
    trained_with: str
    right: str
    """The name of the model that computes this one, in the same library."""


def activation(tower: Tower) -> str | None:
    """What a tower's MLPs compute between their linears: "gelu", "quick_gelu", "gelu_tanh", "swiglu", ...

    The name is the same in all libraries. None if it is not known, or not the same in all blocks.
    """
    names = {_activation(block, mlp) for block in tower.blocks for mlp in block.mlps}
    return names.pop() if len(names) == 1 else None


def _activation(block: Block, mlp: Mlp) -> str | None:
    if mlp.module is None:  # the block itself holds the linears
        inside = set[nn.Module]() if block.attention is None else set(block.attention.modules())
        return _named([module for module in block.module.modules() if module not in inside])
    name = _named(list(mlp.module.modules()))
    if name is None and any("SwiGLU" in base.__name__ for base in type(mlp.module).__mro__):
        name = "silu"  # called as a function, in facebookresearch/dinov2 and dinov3
    linears: list[Any] = [part for part in mlp.module.children() if part is not mlp.fc2_linear]
    hidden = sum(getattr(part, "out_features", 0) for part in linears)
    if hidden == 2 * mlp.width:
        return _GATED.get(name or "")
    return name if hidden == mlp.width else None


def _named(modules: list[nn.Module]) -> str | None:
    """The one activation among the modules."""
    known = {_NAMES[type(module).__name__]: module for module in modules if type(module).__name__ in _NAMES}
    if len(known) != 1:
        return None
    name, module = known.popitem()
    return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else name


def mismatch_of(model: nn.Module, tower: Tower) -> Mismatch | None:
    """Where a model computes another activation than its checkpoint is known to want; None if nothing shows that.

    What timm and open_clip say of their checkpoints is asked of them, by the names that the model says.
    """
    own = activation(tower)
    if own in (None, "quick_gelu"):
        return None
    assert own is not None
    for name in checkpoint_names(model):
        if right := _quickgelu_model(name):
            return Mismatch(name, own, "quick_gelu", right)
    weights = fingerprint(tower)
    for checkpoint, (expected, names) in _FINGERPRINTS.items():
        # Every sign: timm's fine-tuned versions were trained with GELU.
        if agreement(expected, weights) == 1.0:
            library = type(tower.module).__module__.partition(".")[0]
            return Mismatch(checkpoint, own, "quick_gelu", names.get(library, names["open_clip"]))
    return None


def _quickgelu_model(name: str) -> str | None:
    """The name of the model with QuickGELU, if the checkpoint `name` is known to want it; asks the loaded library."""
    library, _, rest = name.partition(":")
    module: Any = sys.modules.get(library)
    if library == "timm" and module is not None and "." in rest:
        right = rest.replace("_clip_", "_clip_quickgelu_")
        return f"timm:{right}" if right != rest and module.models.is_model_pretrained(right) else None
    if library == "open_clip" and module is not None:
        arch, _, tag = rest.rpartition("/")
        if module.get_pretrained_cfg(arch, tag).get("quick_gelu"):
            return f"open_clip:{arch.removesuffix('-quickgelu')}-quickgelu/{tag}"
    return None
