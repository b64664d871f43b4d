"""Builds and runs the Vision Transformers of transformers that the table (transformers_table.py) lists."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from coverage.registry import Architecture
from coverage.transformers_inputs import GRIDS
from coverage.transformers_small import Row, small_config, transformers_class
from coverage.transformers_table import REFUSED, VISION, VLM


def architectures() -> Iterator[Architecture]:
    """Yield an architecture for each class of each row."""
    for rows, build, run in (
        (VISION, _build, _run_model),
        (VLM, _build, _run_tower),
        (REFUSED, _build_refused, _run_refused),
    ):
        for row in rows:
            for model_class, name in row.each():
                yield Architecture("transformers", name, partial(build, model_class, row), partial(run, row))


def _build(name: str, row: Row) -> nn.Module:
    """The small model of a row."""
    model_class = transformers_class(name)
    return model_class(small_config(model_class.config_class, row.config)).eval()


def _build_refused(name: str, row: Row) -> nn.Module:
    """The model in the library's default size. It has no storage (device meta), since it is not run."""
    model_class = transformers_class(name)
    with torch.device("meta"):
        return model_class(
            model_class.config_class(**copy.deepcopy(row.config))
        )  # a copy, since configs change their settings


def _run_refused(row: Row, model: nn.Module, numbers: Sequence[int]) -> Mapping[str, Any]:
    """Nothing refused may be run: this is an error in the table."""
    raise AssertionError(f"{type(model).__name__} is no longer refused: its row belongs to those that are run")


def _run_model(row: Row, model: nn.Module, numbers: Sequence[int]) -> dict[str, Any]:
    """The outputs as users get them, and those with eager attention, which is the only one that returns its weights.

    Every tensor has the images in its first dimension. Outputs of a text tower, losses, outputs stacked over a
    decoder's layers, and hidden states that were not asked for are left out.
    """
    arguments = row.inputs(numbers).arguments
    outputs = {"usual": model(**arguments, output_hidden_states="hidden_states" in row.extras)}
    if "attentions" in row.extras:
        usual = model.config._attn_implementation
        model.set_attn_implementation("eager")
        outputs["eager"] = model(**arguments, output_attentions=True)
        model.set_attn_implementation(usual)
    other = {"text", "loss", "intermediate", "hidden_states", "attentions"} - set(row.extras)
    return {
        name: {key: value for key, value in output.items() if not any(word in key for word in other)}
        for name, output in outputs.items()
    }


def tower_of(model: nn.Module) -> nn.Module:
    """The vision tower of a model, which may be the model itself."""
    if isinstance(model, transformers.Pix2StructForConditionalGeneration):
        return model.encoder
    names = ("vision_tower", "vision_model", "vision_encoder", "visual")
    paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in names]
    return model.get_submodule(min(paths, key=lambda path: path.count("."), default=""))


def _run_tower(row: Row, model: nn.Module, numbers: Sequence[int]) -> dict[str, Any]:
    """The tower's outputs with each implementation of attention, and the image features."""
    inputs_, tower = row.inputs(numbers), tower_of(model)
    outputs: dict[str, Any] = {}
    for attention in ("eager", "sdpa") if model._supports_sdpa else ("eager",):
        try:
            model.set_attn_implementation(attention)
        except ValueError:  # transformers 4 raises it if a part has no such implementation
            continue
        weights = {"output_attentions": True} if "attentions" in row.extras and attention == "eager" else {}
        options = _accepted(tower, output_hidden_states=True, **weights)
        outputs[attention] = _by_image(tower(*inputs_.tower, **options), row, numbers)
    if hasattr(model, "get_image_features"):
        outputs["features"] = _by_image(model.get_image_features(**inputs_.arguments), row, numbers)
    return outputs


def _accepted(tower: nn.Module, **options: Any) -> dict[str, Any]:
    """Those of the options that the tower's forward takes. (Some towers of transformers 4 take none.)"""
    parameters_ = inspect.signature(tower.forward).parameters
    kinds = {each.kind for each in parameters_.values()}
    return {
        name: value for name, value in options.items() if name in parameters_ or inspect.Parameter.VAR_KEYWORD in kinds
    }


def _by_image(output: Any, row: Row, numbers: Sequence[int]) -> dict[str, Any]:
    """The outputs, arranged so that those for two images are the concatenation of those for each image."""
    if not isinstance(output, Mapping):  # transformers 4 returns image features as a tensor or a list
        pair = row.shared and isinstance(output, tuple)  # (image features, the output that images share)
        output = {"pooler_output": output[0] if pair else output}
    outputs = {name: value for name, value in output.items() if name != row.shared}
    if isinstance(features := outputs.get("pooler_output"), (tuple, list)):
        outputs["pooler_output"] = _concatenated(features)
    if deepstack := outputs.get("deepstack_features"):
        outputs["deepstack_features"] = [_concatenated(layer) for layer in deepstack]
    weights = outputs.get("attentions")
    if weights and isinstance(weights[0], Tensor) and weights[0].ndim == 2:
        # If attention returns no weights, transformers records attention's output in their place: no public output.
        del outputs["attentions"]
    if not row.packed:
        return outputs
    if weights := outputs.get("attentions"):
        outputs["attentions"] = [_concatenated(_segments(layer, numbers)) for layer in weights]
    return {name: _without_batch_dimension(value) for name, value in outputs.items()}


def _concatenated(parts: Any) -> Tensor:
    """The features of all images, flattened and concatenated, since images may have different numbers of features."""
    return torch.cat([part.flatten() for part in tree_leaves(parts) if isinstance(part, Tensor)])


def _segments(weights: Any, numbers: Sequence[int]) -> Any:
    """The attention weights of a layer within each image: the diagonal blocks of (1, heads, S, S)."""
    if not isinstance(weights, Tensor):
        return weights  # they are one tensor for each image already
    lengths = [math.prod(GRIDS[number]) for number in numbers]
    prefix = (weights.shape[-1] - sum(lengths)) // len(lengths)
    lengths = [prefix + length for length in lengths]
    return [rows.split(lengths, -1)[i] for i, rows in enumerate(weights.split(lengths, -2))]


def _without_batch_dimension(value: Any) -> Any:
    """Packed sequences (1, S, C) in an output without their batch dimension."""
    if isinstance(value, (tuple, list)):
        return [_without_batch_dimension(part) for part in value]
    return value.squeeze(0) if isinstance(value, Tensor) and value.ndim > 2 else value
