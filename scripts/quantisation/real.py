"""Real small numbers: the recipes of the docs, and the same quantisers without them."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import testreg
from quantisation.fake import PLAIN
from testreg.neurons import RegisterNeurons

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
Run = Callable[[Tensor], Tensor]
"""Images (B, 3, h, w) -> embeddings (B, D)."""


def torchao(others: Tensor) -> Callable[[nn.Module], Run]:
    """8 bits with one static scale for a tensor, symmetric, from `others`."""

    def quantise(model: nn.Module) -> Run:
        _recipe("int8_clip").quantise(model, others)
        return lambda images: model(images).image_embeds

    return quantise


def onnxruntime(model: nn.Module) -> Run:
    """8 bits with one dynamic scale for a tensor, asymmetric."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.onnx"
        _recipe("int8_onnx").export(model, file)
        session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


@torch.no_grad()
def embeddings(
    model: nn.Module, neurons: RegisterNeurons, images: Tensor, quantise: Callable[[nn.Module], Run], recipe: str
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """The embeddings (n, D) in float and quantised, image by image, by column."""
    found = {}
    for name, is_patched, keep in ((PLAIN, False, None), ("together", True, None), ("recipe", True, recipe)):
        made: Any = deepcopy(model)
        if is_patched:
            testreg.patch(made, neurons)
        own = torch.cat([made(image).image_embeds for image in images.split(1)])
        if keep is not None:
            _recipe(keep).keep_registers_apart(made, images[:1])
        run = quantise(made)
        found[name] = own, torch.cat([run(image) for image in images.split(1)])
    return found


def _recipe(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
