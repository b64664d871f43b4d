"""testreg: takes the artefacts out of pretrained Vision Transformers at test time, without training."""

import importlib
from typing import Any

_HOMES = {
    "Comparison": "report.comparison",
    "Diagnosis": "measure.diagnosis",
    "Family": "families",
    "ImmovableOutliersError": "calibration.errors",
    "NoOutliersError": "calibration.errors",
    "OutlierRule": "measure.outliers",
    "RegisterNeurons": "neurons",
    "StaticRegisters": "static",
    "UnverifiedNeuronsWarning": "neurons",
    "add_family": "families",
    "answer_attention": "measure.answers",
    "attention": "measure.maps",
    "bundled": "neurons",
    "calibrate": "calibration.calibrate",
    "compare": "report.comparison",
    "demo_model": "io.loading",
    "diagnose": "measure.diagnose",
    "disabled": "register",
    "extract": "measure.extraction",
    "features": "measure.maps",
    "fold": "extensions.static_parts",
    "hooks_without_registers": "extensions.hooks",
    "is_patched": "register",
    "load": "io.checkpoints",
    "load_model": "io.loading",
    "make_static": "measure.make_static",
    "patch": "register",
    "patched": "register",
    "registers": "register",
    "repair": "measure.repair",
    "save": "io.checkpoints",
    "steered": "extensions.steering",
    "strip_registers": "measure.maps",
    "unpatch": "register",
    "unrepair": "measure.repair",
}
"""The module of each public name. It is imported when the name is asked for, and not before."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = importlib.import_module("importlib.metadata").version(__name__)
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
