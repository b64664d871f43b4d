"""Loads and patches the model that a command's arguments name."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from testreg.cli.invocation import Invocation
from testreg.cli.options import Loading, Patching

if TYPE_CHECKING:
    import torch

    from testreg.io.loading import LoadedModel
    from testreg.neurons import RegisterNeurons


def chosen_device(name: str | None) -> torch.device:
    """The device of that name; for None, the best that there is: cuda, then mps, then cpu."""
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name or best)


def load(invocation: Invocation, name: str, loading: Loading, device: torch.device | None = None) -> LoadedModel:
    """Load the model of that name, on `device`, or if that is None, on the device that the options say."""
    import torch

    from testreg.io.loading import load_model

    with invocation.waiting(f"loading {name}"):
        loaded = load_model(
            name,
            image_size=loading.image_size,
            device=device or chosen_device(loading.device),
            trust_remote_code=loading.trust_remote_code,
        )
        if loading.dtype is not None:
            loaded.model.to(getattr(torch, loading.dtype))
    return loaded


def check_drawn(loaded: LoadedModel) -> None:
    """Raise ValueError if a report cannot draw maps of the model."""
    from testreg.families import find_tower

    try:
        find_tower(loaded.model).check_runs()
    except ValueError as error:
        raise ValueError(f"leave --report and --figures out: {error}") from error


def patch(loaded: LoadedModel, patching: Patching) -> RegisterNeurons:
    """Patch the model, unless it is a patched checkpoint already, and return its register neurons."""
    from testreg import register
    from testreg.patching.state import patch_of

    if register.is_patched(loaded.model):
        if patching.neurons is not None:
            raise ValueError(f"{loaded.name} is a patched checkpoint already: leave --neurons out")
    else:
        register.patch(loaded.model, **asdict(patching))
    return patch_of(loaded.model).neurons
