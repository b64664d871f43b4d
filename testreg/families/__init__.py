"""Where each family of Vision Transformers keeps the parts that the method touches.

This package is the only place that names the modules of other libraries, and it imports none of them: a tower is
recognised by its class name. A new family is one row.
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
