"""testreg: takes the artefacts out of pretrained Vision Transformers at test time, without training."""

from testreg.neurons import RegisterNeurons
from testreg.register import disabled, is_patched, patch, unpatch

__all__ = ["RegisterNeurons", "disabled", "is_patched", "patch", "unpatch"]
