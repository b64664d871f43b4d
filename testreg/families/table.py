"""The table of all families that testreg knows."""

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
    *open_clip.VENDORED,  # last, since these rows ask for no library, and libraries have classes of these names too
    *others.VENDORED,
]
REFUSED = {**timm.REFUSED, **transformers.REFUSED, **transformers_vlm.REFUSED}
"""{class name of a vision tower that the method does not fit: the reason}."""


def add_family(family: Family) -> None:
    """Let testreg patch, calibrate, save and load models of a family that it does not know.

    Your family is tried before those that testreg knows, and replaces one of the same name.

    Example:
        >>> testreg.add_family(testreg.Family(name="mine", towers="MyViT", blocks="blocks", fc2="mlp.2"))
    """
    FAMILIES[:] = [family, *(known for known in FAMILIES if known.name != family.name)]


def family_named(name: str) -> Family:
    """The family of this name. Raises KeyError if there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise KeyError(f"no family {name!r}: call testreg.add_family with its row before the model is unpickled")


def _pickle_by_name(family: Family) -> tuple[Callable[[str], Family], tuple[str]]:
    """How pickle writes a family: as its name, since a row holds functions, which cannot be pickled."""
    return family_named, (family.name,)


copyreg.pickle(Family, _pickle_by_name)
