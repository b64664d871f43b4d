"""The Vision Transformers of transformers: how those of the table are built and run."""

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
    """Every row, once for each of its classes."""
    for rows, build, run in (
        (VISION, _build, _run_model),
        (VLM, _build, _run_tower),
        (REFUSED, _build_refused, _run_refused),
    ):
        for row in rows:
            for model_class, name in row.each():
                yield Architecture("transformers", name, partial(build, model_class, row), partial(run, row))


def _build(name: str, row: Row) -> nn.Module:
    model_class = transformers_class(name)
    return model_class(small_config(model_class.config_class, row.config)).eval()


def _build_refused(name: str, row: Row) -> nn.Module:
    """The model at the library's own size, without storage: it is not run."""
    model_class = transformers_class(name)
    with torch.device("meta"):
        return model_class(model_class.config_class(**copy.deepcopy(row.config)))  # configs write into their settings


def _run_refused(row: Row, model: nn.Module, numbers: Sequence[int]) -> Mapping[str, Any]:
    raise AssertionError(f"{type(model).__name__} is no longer refused: its row belongs to those that are run")


def _run_model(row: Row, model: nn.Module, numbers: Sequence[int]) -> dict[str, Any]:
    """One pass as users run the model, and one with eager attention, which alone returns its weights.

    Every tensor in it has the images first. Left out are the outputs of a text tower, losses, stacks over the layers of
    a decoder, and hidden states that some models return unasked.
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
    """The tower's outputs under each implementation of attention, and the image features."""
    made, tower = row.inputs(numbers), tower_of(model)
    outputs: dict[str, Any] = {}
    for attention in ("eager", "sdpa") if model._supports_sdpa else ("eager",):
        try:
            model.set_attn_implementation(attention)
        except ValueError:  # in transformers 4 if a part has no such implementation
            continue
        weights = {"output_attentions": True} if "attentions" in row.extras and attention == "eager" else {}
        options = _accepted(tower, output_hidden_states=True, **weights)
        outputs[attention] = _by_image(tower(*made.tower, **options), row, numbers)
    if hasattr(model, "get_image_features"):
        outputs["features"] = _by_image(model.get_image_features(**made.arguments), row, numbers)
    return outputs


def _accepted(tower: nn.Module, **options: Any) -> dict[str, Any]:
    """Some towers of transformers 4 take no options at all."""
    known = inspect.signature(tower.forward).parameters
    kinds = {each.kind for each in known.values()}
    return {name: value for name, value in options.items() if name in known or inspect.Parameter.VAR_KEYWORD in kinds}


def _by_image(output: Any, row: Row, numbers: Sequence[int]) -> dict[str, Any]:
    """The outputs, so arranged that those of two images are the concatenation of those of each."""
    if not isinstance(output, Mapping):  # transformers 4 gives image features bare, in a list if they differ in number
        pair = row.shared and isinstance(output, tuple)  # with what is shared behind them
        output = {"pooler_output": output[0] if pair else output}
    outputs = {name: value for name, value in output.items() if name != row.shared}
    if isinstance(features := outputs.get("pooler_output"), (tuple, list)):
        outputs["pooler_output"] = _joined(features)
    if deepstack := outputs.get("deepstack_features"):
        outputs["deepstack_features"] = [_joined(layer) for layer in deepstack]
    weights = outputs.get("attentions")
    if weights and isinstance(weights[0], Tensor) and weights[0].ndim == 2:
        # Where attention returns no weights, transformers records its output in their place, before a block has it.
        del outputs["attentions"]
    if not row.packed:
        return outputs
    if weights := outputs.get("attentions"):
        outputs["attentions"] = [_joined(_segments(layer, numbers)) for layer in weights]
    return {name: _unpacked(value) for name, value in outputs.items()}


def _joined(parts: Any) -> Tensor:
    """The features of all images, which may differ in number, in a line."""
    return torch.cat([part.flatten() for part in tree_leaves(parts) if isinstance(part, Tensor)])


def _segments(weights: Any, numbers: Sequence[int]) -> Any:
    """The attention weights within each image, of one layer: the blocks on the diagonal of (1, heads, S, S)."""
    if not isinstance(weights, Tensor):
        return weights  # they come in segments
    lengths = [math.prod(GRIDS[number]) for number in numbers]
    prefix = (weights.shape[-1] - sum(lengths)) // len(lengths)
    lengths = [prefix + length for length in lengths]
    return [rows.split(lengths, -1)[i] for i, rows in enumerate(weights.split(lengths, -2))]


def _unpacked(value: Any) -> Any:
    """Drops the batch dimension of a packed sequence (1, S, C)."""
    if isinstance(value, (tuple, list)):
        return [_unpacked(part) for part in value]
    return value.squeeze(0) if isinstance(value, Tensor) and value.ndim > 2 else value
