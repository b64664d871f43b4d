"""The table: every family that testreg knows."""

from __future__ import annotations

import copyreg
from collections.abc import Callable

from testreg.families import open_clip, others, timm, transformers, transformers_vlm
from testreg.families.family import Family

FAMILIES: list[Family] = [
    *timm.FAMILIES,
    *transformers.FAMILIES,
    *transformers_vlm.FAMILIES,
    *open_clip.FAMILIES,
    *others.FAMILIES,
    *open_clip.VENDORED,  # behind the libraries' own: they go by the class name alone
    *others.VENDORED,
]
REFUSED = {**timm.REFUSED, **transformers.REFUSED, **transformers_vlm.REFUSED}
"""Class names of vision towers that the method does not fit, with the reason."""


def add_family(family: Family) -> None:
    """Let testreg patch, calibrate, save and load models of a family of your own.

    It goes before the families that testreg knows; one of the same name is replaced.

    Example:
        >>> testreg.add_family(testreg.Family(name="mine", towers="MyViT", blocks="blocks", fc2="mlp.2"))
    """
    FAMILIES[:] = [family, *(known for known in FAMILIES if known.name != family.name)]


def family_named(name: str) -> Family:
    """The row of this name. Raises KeyError if there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise KeyError(f"no family {name!r}: call testreg.add_family with its row before the model is unpickled")


def _pickled(family: Family) -> tuple[Callable[[str], Family], tuple[str]]:
    """A row holds functions, so that patched models are pickled and copied with its name."""
    return family_named, (family.name,)


copyreg.pickle(Family, _pickled)
