"""Finds the activation function of a tower's MLPs, and models that compute another one than they were trained with.

OpenAI's CLIP was trained with QuickGELU, x * sigmoid(1.702 x). timm and open_clip also load its weights into
architectures with the exact GELU. These run without an error, but their outputs and their register neurons differ.
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
"""{activation: the classes that compute it in torch, timm, transformers, open_clip and OpenAI's CLIP}."""
_NAMES = {class_name: name for name, classes in _CLASSES.items() for class_name in classes}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
"""{activation: what an MLP is called in which it gates the other half of the hidden channels}."""
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
"""{checkpoint that was trained with QuickGELU: (fingerprint of its weights, {library: name of the right model})}. The
fingerprint recognises models that do not tell which checkpoint they hold."""


@dataclass(frozen=True)
class Mismatch:
    """A model that computes another activation than its checkpoint was trained with."""

    checkpoint: str
    own: str
    """The activation that the model computes, see `activation`."""
    trained_with: str
    """The activation that the checkpoint was trained with."""
    right: str
    """The name of the model in the same library that has the checkpoint and the right activation."""


def activation(tower: Tower) -> str | None:
    """The name of the activation function in a tower's MLPs: "gelu", "quick_gelu", "gelu_tanh", "swiglu", ...

    The name does not depend on the library. None if the function is not known, or not the same in all blocks.
    """
    names = {_activation(block, mlp) for block in tower.blocks for mlp in block.mlps}
    return names.pop() if len(names) == 1 else None


def _activation(block: Block, mlp: Mlp) -> str | None:
    """The name of the activation function in one MLP; None if it is not known."""
    if mlp.module is None:  # the MLP is no module: its linears and its activation are children of the block
        inside = set[nn.Module]() if block.attention is None else set(block.attention.modules())
        return _only_activation([module for module in block.module.modules() if module not in inside])
    name = _only_activation(list(mlp.module.modules()))
    if name is None and any("SwiGLU" in base.__name__ for base in type(mlp.module).__mro__):
        name = "silu"  # facebookresearch/dinov2 and dinov3 call it as a function, so there is no module to find
    linears: list[Any] = [part for part in mlp.module.children() if part is not mlp.fc2_linear]
    hidden = sum(getattr(part, "out_features", 0) for part in linears)
    if hidden == 2 * mlp.width:
        return _GATED.get(name or "")
    return name if hidden == mlp.width else None


def _only_activation(modules: list[nn.Module]) -> str | None:
    """The name of the activation among the modules; None if there is none, or more than one."""
    present = {_NAMES[type(module).__name__]: module for module in modules if type(module).__name__ in _NAMES}
    if len(present) != 1:
        return None
    name, module = present.popitem()
    return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else name


def mismatch_of(model: nn.Module, tower: Tower) -> Mismatch | None:
    """The mismatch between a model's activation and the one its checkpoint was trained with; None if none is known.

    The checkpoint is recognised by the names that the model has kept, which timm and open_clip are asked about, or by a
    fingerprint of its weights.
    """
    computed_activation = activation(tower)
    if computed_activation in (None, "quick_gelu"):
        return None
    assert computed_activation is not None
    for name in checkpoint_names(model):
        if right := _quickgelu_model(name):
            return Mismatch(name, computed_activation, "quick_gelu", right)
    weights = fingerprint(tower)
    for checkpoint, (expected, names) in _FINGERPRINTS.items():
        # All signs must agree: timm has fine-tuned versions of this checkpoint, which were trained with GELU.
        if agreement(expected, weights) == 1.0:
            library = type(tower.module).__module__.partition(".")[0]
            return Mismatch(checkpoint, computed_activation, "quick_gelu", names.get(library, names["open_clip"]))
    return None


def _quickgelu_model(name: str) -> str | None:
    """The name of the model that has the checkpoint `name` and QuickGELU; None unless it was trained with QuickGELU.

    timm and open_clip are asked if they are imported already, which they are if the model is theirs.
    """
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
