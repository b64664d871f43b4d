"""The model that the arguments name, on its device, and patched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from testreg.cli.running import Run

if TYPE_CHECKING:
    import torch

    from testreg.io.loading import LoadedModel
    from testreg.neurons import RegisterNeurons


def chosen_device(name: str | None) -> torch.device:
    """The device that was asked for, or the best there is."""
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name or best)


def load(
    run: Run,
    name: str,
    device: torch.device,
    *,
    image_size: int | None,
    dtype: str | None,
    trust_remote_code: bool,
) -> LoadedModel:
    """The model of that name."""
    import torch

    from testreg.io.loading import load_model

    with run.waiting(f"loading {name}"):
        loaded = load_model(name, image_size=image_size, device=device, trust_remote_code=trust_remote_code)
        if dtype is not None:
            loaded.model.to(getattr(torch, dtype))
    return loaded


def check_drawn(loaded: LoadedModel) -> None:
    """Raise ValueError unless a report can draw maps of the model."""
    from testreg.families import find_tower

    try:
        find_tower(loaded.model).check_runs()
    except ValueError as error:
        raise ValueError(f"leave --report and --figures out: {error}") from error


def patch_with(loaded: LoadedModel, neurons: str | None, **options: Any) -> RegisterNeurons:
    """Patch the model with these options of `testreg.patch`, unless it is a patched checkpoint already; returns its
    register neurons."""
    from testreg.patching.state import patch_of
    from testreg.register import is_patched, patch

    if is_patched(loaded.model):
        if neurons is not None:
            raise ValueError(f"{loaded.name} is a patched checkpoint already: leave --neurons out")
    else:
        patch(loaded.model, neurons, **options)
    return patch_of(loaded.model).neurons
