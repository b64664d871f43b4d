"""Why a model is left as it is. Imports nothing, so that the command line starts at once."""


class NoOutliersError(Exception):
    """The model shows no outlier tokens on these images: there is nothing to fix."""


class ImmovableOutliersError(Exception):
    """The model has outliers that registers do not move: at fixed positions, or not made by MLP neurons."""
