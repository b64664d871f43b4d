"""testreg: takes the artefacts out of pretrained Vision Transformers at test time, without training."""

from testreg import interrupts  # noqa: F401, I001 - the first, since the others take seconds

from testreg.calibrate import ImmovableOutliersError, NoOutliersError, calibrate
from testreg.checkpoint import load, save
from testreg.diagnose import Diagnosis, diagnose
from testreg.families import Family, add_family
from testreg.models import demo_model, load_model
from testreg.neurons import RegisterNeurons, UnverifiedNeuronsWarning
from testreg.outliers import OutlierRule
from testreg.register import disabled, is_patched, patch, registers, unpatch

__all__ = [
    "Diagnosis",
    "Family",
    "ImmovableOutliersError",
    "NoOutliersError",
    "OutlierRule",
    "RegisterNeurons",
    "UnverifiedNeuronsWarning",
    "add_family",
    "calibrate",
    "demo_model",
    "diagnose",
    "disabled",
    "is_patched",
    "load",
    "load_model",
    "patch",
    "registers",
    "save",
    "unpatch",
]
