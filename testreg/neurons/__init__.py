"""Lists of register neurons: the ranked list (`ranked`), its JSON (`format`), and the bundled lists (`bundle`).

*Register neurons* are the MLP neurons that make outliers, patch tokens with huge norms.
"""

from testreg.neurons.bundle import AnyNeurons, BundledLists, bundled, resolve
from testreg.neurons.checkpoint import describe_model
from testreg.neurons.configs import config_folder
from testreg.neurons.ranked import Neuron, RegisterNeurons, UnverifiedNeuronsWarning, unscored
from testreg.records.calibration import Calibration
from testreg.records.options import MAX_REGISTERS

__all__ = [
    "MAX_REGISTERS",
    "AnyNeurons",
    "BundledLists",
    "Calibration",
    "Neuron",
    "RegisterNeurons",
    "UnverifiedNeuronsWarning",
    "bundled",
    "config_folder",
    "describe_model",
    "resolve",
    "unscored",
]
