"""The errors that say why a model has no register neurons.

This file imports nothing, so that the command line starts quickly.
"""


class NoOutliersError(Exception):
    """The model shows no outlier tokens on these images: there is nothing to fix."""


class ImmovableOutliersError(Exception):
    """The model has outliers that registers cannot remove: they lie at fixed positions, or no MLP neurons make them."""
