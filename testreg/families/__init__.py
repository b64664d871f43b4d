"""Where each family of Vision Transformers keeps its blocks, MLPs and the other parts that testreg needs.

A *tower* is the vision transformer inside a model, e.g. CLIP's image encoder. A *family* is a kind of tower, described
by one `Family`, a row of the table. This package alone knows where other libraries keep the modules of a tower. It
imports none of these libraries: a tower is recognised by the name of its class.
"""

from testreg.families.activation import Mismatch, activation, mismatch_of
from testreg.families.extend import MASKS, extend_bias
from testreg.families.family import Family
from testreg.families.find import find_part, find_tower
from testreg.families.fingerprint import checkpoint_names, compare_fingerprints, compare_weights, fingerprint
from testreg.families.positions import PositionEmbedding, position_embedding
from testreg.families.table import FAMILIES, add_family
from testreg.families.tower import Block, Grid, Mlp, Tower

__all__ = [
    "FAMILIES",
    "MASKS",
    "Block",
    "Family",
    "Grid",
    "Mismatch",
    "Mlp",
    "PositionEmbedding",
    "Tower",
    "activation",
    "add_family",
    "checkpoint_names",
    "compare_fingerprints",
    "compare_weights",
    "extend_bias",
    "find_part",
    "find_tower",
    "fingerprint",
    "mismatch_of",
    "position_embedding",
]
