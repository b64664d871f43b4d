"""The bundled lists of register neurons, which come with the package, and the argument `neurons` of `testreg.patch`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from torch import nn

from testreg.families import checkpoint_names, compare_weights, find_tower, mismatch_of
from testreg.neurons.configs import bundled_file, bundled_names
from testreg.neurons.ranked import RegisterNeurons


class BundledLists(dict[str, RegisterNeurons]):
    """The bundled lists by name. Printed, they say which models they are for."""

    def __repr__(self) -> str:
        lines = []
        for name, neurons in self.items():
            checked = "verified" if neurons.verified else "not verified"
            lines.append(f"{name}  ({len(neurons)} neurons, {checked})")
            lines += [f"    {model}" for model in _models_of(neurons)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from testreg.display import html

        rows = [
            (name, len(each), "yes" if each.verified else "no", ", ".join(_models_of(each)))
            for name, each in self.items()
        ]
        return html([f"{len(self)} bundled lists of register neurons"], ("name", "neurons", "verified", "models"), rows)


def _models_of(neurons: RegisterNeurons) -> list[str]:
    """The names of the checkpoint that a list is for. A name is marked if `patch` takes the list for it by default."""
    default_for = set(neurons.model.get("default_for", ()))
    return [f"{name}{'  (default)' if name in default_for else ''}" for name in neurons.model.get("names", ())]


def bundled() -> BundledLists:
    """Read the bundled lists, which come with the package. Printed, they say which models they are for.

    Example:
        >>> lists = testreg.bundled()
        >>> print(lists)
        demo  (... neurons, verified)
            demo  (default)
        ...
        >>> lists["dinov2-vitl14-official-hub"].model["name"]
        'hub:facebookresearch/dinov2/dinov2_vitl14'
    """
    return BundledLists({name: RegisterNeurons.from_file(bundled_file(name), name) for name in bundled_names()})


AnyNeurons = RegisterNeurons | str | os.PathLike[str] | Mapping[int, Sequence[int]] | None
"""What `testreg.patch` takes as its neurons: a list, the path of its JSON, the name of a bundled list, a repository of
the Hugging Face Hub ("hf:ORG/NAME"), {block: [units]}, or None for the bundled list that is the model's default."""


def resolve(neurons: AnyNeurons, model: nn.Module) -> RegisterNeurons:
    """The list of register neurons that an argument of `patch` stands for.

    Raises:
        FileNotFoundError, TypeError, ValueError: there is no such list, or it is not valid.
    """
    if isinstance(neurons, RegisterNeurons):
        return neurons
    if isinstance(neurons, Mapping):
        return RegisterNeurons.from_blocks(neurons)
    if neurons is None:
        return _default_list(model)
    if not isinstance(neurons, str | os.PathLike):
        raise TypeError(
            "neurons must be a RegisterNeurons, a path, a bundled name, hf:ORG/NAME, {block: [units]} or None, "
            f"got {type(neurons).__name__}"
        )
    return RegisterNeurons.load(neurons)


def _default_list(model: nn.Module) -> RegisterNeurons:
    """The bundled list that is the default for a model's checkpoint.

    The checkpoint is recognised by the names that the model gives it, or else by its weights.

    Raises:
        ValueError: there is no such list.
    """
    lists, names = bundled(), checkpoint_names(model)
    defaults = [each for each in lists.values() if each.model.get("default_for")]
    for name in names:
        for candidate in defaults:
            if name in candidate.model["default_for"]:
                return candidate
    tower, class_name = find_tower(model), type(model).__name__
    published = [key for key, each in lists.items() if not set(names).isdisjoint(each.model.get("names", ()))]
    if (wrong := mismatch_of(model, tower)) is not None:
        raise ValueError(
            f"no default register neurons for this {class_name}: it computes {wrong.own}, but {wrong.checkpoint} was "
            f"trained with {wrong.trained_with}. Load {wrong.right} instead"
            + (f", or name one of the lists of this checkpoint: {', '.join(published)}" if published else "")
        )
    similarities = [
        (compare_weights(each.model["fingerprint"], tower), each) for each in defaults if "fingerprint" in each.model
    ]
    for wanted in ("same", "similar"):
        for similarity, candidate in similarities:
            if similarity == wanted:
                return candidate
    calibrate = "(testreg.calibrate, or `testreg calibrate MODEL --images DIR -o neurons.json`)"
    if published:
        raise ValueError(
            f"no default register neurons for this {class_name} ({', '.join(names)}): nothing shows that this "
            f"checkpoint needs any. Look with testreg.diagnose, and calibrate it {calibrate}, or name one of the "
            f"unverified lists that were published for it: {', '.join(published)}"
        )
    says = f"it says it is {', '.join(names)}" if names else "it does not say which checkpoint it is"
    shape = {"depth": tower.depth, "mlp_width": tower.mlp_width}
    if fitting := [key for key, each in lists.items() if shape.items() <= each.model.items()]:
        raise ValueError(
            f"no bundled register neurons for this {class_name}: {says}. If it holds the weights of one of these "
            f"lists, name it: {', '.join(fitting)}. Otherwise calibrate it {calibrate}"
        )
    raise ValueError(
        f"no bundled register neurons for this {class_name}: {says}. Calibrate it {calibrate}, or name a list from "
        "`testreg list`"
    )
