"""Compares testreg with hooks that keep all activations, and with a checkout of the paper's released code.

The released code cannot be installed: `--against FOLDER` takes a checkout of github nickjiang2378/test-time-registers
(commit 860df43). Its folder `shared` works for any model, if it is told which modules' outputs to record or change, how
to run the model, and how to preprocess. That is done here for timm's models.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

import testreg
from benchmark.calibration import rank
from benchmark.measuring import Row, compared, cpu_seconds, in_own_process, in_turns, peak_memory
from benchmark.models import build, neurons, one_more_token, random_images, twin
from testreg.io.images import ImageStream

SHARED = ("algorithms", "hook_manager")  # the modules of the checkout that are used
NUM_IMAGES = 64
THRESHOLD = 3.0  # a patch is an outlier if its norm is above so many times the median of its image


def against(args: argparse.Namespace) -> Iterator[Row]:
    """Compare patched forwards of one image, and passes that rank neurons on 64 images, each in a new process."""
    released = None if args.against is None else modules_of(args.against)
    plain = build(args, torch.float32)
    forwards = {
        "plain": plain,
        "testreg": testreg.patch(twin(plain), neurons(plain)),
        **({} if released is None else {"released": patched_by(released, twin(plain), neurons(plain))}),
        "noise": twin(plain),
    }
    image = random_images(1, plain)
    with torch.inference_mode():
        sides = {side: functools.partial(model, image) for side, model in forwards.items()}
        yield {"forward": "one image", **compared(in_turns(sides, args.device, args.repeats))}
    passes = [side for side in PASSES if side != "released" or released is not None]
    with tempfile.TemporaryDirectory() as folder:
        for index, picture in enumerate(random_images(NUM_IMAGES, plain)):
            tv.to_pil_image(picture.cpu()).save(Path(folder, f"{index}.png"))
        plain_s = 0.0
        for side in passes:
            seconds, peak = in_own_process(measure_pass, args, side, Path(folder))
            plain_s = plain_s or seconds
            ratio = round(seconds / plain_s, 2)
            yield {"pass": f"{side:27}", "cpu_s": round(seconds, 1), "ratio": ratio, "peak_MiB": round(peak)}


def measure_pass(args: argparse.Namespace, side: str, images: Path) -> tuple[float, float]:
    """The CPU seconds of a pass, and the peak memory of its process in MiB."""
    model = build(args, torch.float32, with_outliers=True)
    return cpu_seconds(PASSES[side], model, images, args), peak_memory(args.device)


def plain_pass(model: nn.Module, images: Path, args: argparse.Namespace) -> None:
    """Run plain forwards of all images."""
    stream = ImageStream(images, tensor_of).numbered()
    with torch.inference_mode():
        for _, image in stream:
            model(image.unsqueeze(0).to(args.device))


def testreg_pass(model: nn.Module, images: Path, args: argparse.Namespace, *, score: str) -> None:
    """Rank neurons with testreg."""
    rank(model, images, transform=tensor_of, score=score)


def tensor_of(picture: Image.Image) -> Tensor:
    """A PIL image as a tensor (3, h, w) in [0, 1]."""
    return tv.to_dtype(tv.pil_to_tensor(picture), torch.float32, scale=True)


# ---- hooks that keep all activations --------------------------------------------------------------------------------


def scores_by_hooks(model: nn.Module, images: Path, args: argparse.Namespace) -> Tensor:
    """The mean |activation| (L, H) at outliers in a timm model, by hooks that copy all activations to NumPy.

    Like the released code, it runs one image at a time, and keeps the attention maps, block outputs and hidden
    activations of all blocks. It stands for programs of that kind, and is not the released code.
    """
    kept: dict[str, list[np.ndarray]] = {"maps": [], "outputs": [], "hidden": []}
    for block in with_attention_maps(model).blocks:
        for name, module in (("maps", block.attn.attn_drop), ("outputs", block), ("hidden", block.mlp.act)):
            module.register_forward_hook(lambda _, inputs, output, to=kept[name]: to.append(output.cpu().numpy()))
    scores = []
    for _, image in ImageStream(images, tensor_of).numbered():
        with torch.no_grad():
            model(image.unsqueeze(0).to(args.device))
        norms = np.linalg.norm(kept["outputs"][-1][0], axis=-1)  # (T,)
        are_outliers = norms > THRESHOLD * np.median(norms)
        if are_outliers.any():
            scores.append(np.abs(np.concatenate(kept["hidden"])[:, are_outliers]).mean(1))
        for arrays in kept.values():
            arrays.clear()
    return torch.from_numpy(np.mean(scores, axis=0))


def with_attention_maps(model: nn.Module) -> nn.Module:
    """Switch off fused attention in `model`, in place, so that it computes attention maps. Returns the model."""
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


# ---- the released code ----------------------------------------------------------------------------------------------


def modules_of(folder: Path) -> dict[str, ModuleType]:
    """Import the modules of a checkout that are used: {name: module}.

    Raises:
        SystemExit: the folder is not such a checkout.
    """
    looked_for = " and ".join(f"shared/{name}.py" for name in SHARED)
    missing = [name for name in SHARED if not (folder / "shared" / f"{name}.py").is_file()]
    if missing:
        raise SystemExit(
            f"--against {folder}: {'it has no shared/' + missing[0] + '.py' if folder.is_dir() else 'no such folder'}; "
            f"looked for a checkout of github nickjiang2378/test-time-registers, which has {looked_for}"
        )
    sys.path.insert(0, str(folder.resolve()))
    try:
        return {name: importlib.import_module(f"shared.{name}") for name in SHARED}
    finally:
        sys.path.pop(0)


def manager_of(released: dict[str, ModuleType], model: nn.Module) -> Any:
    """The checkout's hook manager for a timm model."""

    class Manager(released["hook_manager"].HookManager):
        def num_layers(self) -> int:
            return len(model.blocks)

        def layer_output_component(self, layer: int) -> nn.Module:
            return model.blocks[layer]

        def neuron_activation_component(self, layer: int) -> nn.Module:
            return model.blocks[layer].mlp.act

        def attn_post_softmax_component(self, layer: int) -> nn.Module:
            return model.blocks[layer].attn.attn_drop

    return Manager(model)


def patched_by(released: dict[str, ModuleType], model: nn.Module, neurons: dict[int, list[int]]) -> nn.Module:
    """Patch `model` with one register by the checkout's hooks, which only change the first image of a batch."""
    manager = manager_of(released, one_more_token(model))
    manager.reinit(mode=released["hook_manager"].HookMode.INTERVENE)
    manager.intervene_register_neurons(num_registers=1, neurons_to_ablate=neurons)
    manager.finalize()
    return model


def released_pass(model: nn.Module, images: Path, args: argparse.Namespace) -> list[tuple[int, int, float]]:
    """The checkout's ranking of neurons as (block, unit, score), beginning with the best."""
    released = modules_of(args.against)

    def run(model: nn.Module, image: Tensor) -> Tensor:
        with torch.no_grad():
            return model(image)

    state = {
        "model": with_attention_maps(model),
        "hook_manager": manager_of(released, model),
        "run_model": run,
        "preprocess": tensor_of,
        "num_layers": len(model.blocks),
        "num_neurons_per_layer": model.blocks[0].mlp.fc2.in_features,
    }
    threshold = outlier_norm(model, images, args)
    return released["algorithms"].find_register_neurons(
        state, str(images), register_norm_threshold=threshold, device=args.device, processed_image_cnt=NUM_IMAGES
    )


def outlier_norm(model: nn.Module, images: Path, args: argparse.Namespace) -> float:
    """The norm after the last block above which a patch of the first image is an outlier."""
    _, image = next(ImageStream(images, tensor_of).numbered())
    with torch.no_grad():
        norms = model.forward_intermediates(image.unsqueeze(0).to(args.device), output_fmt="NLC")[1][-1].norm(dim=-1)
    return THRESHOLD * norms.median().item()


PASSES: dict[str, Callable[[nn.Module, Path, argparse.Namespace], object]] = {
    "plain forwards": plain_pass,
    "testreg, score activation": functools.partial(testreg_pass, score="activation"),
    "testreg, score attribution": functools.partial(testreg_pass, score="attribution"),
    "hooks keep all activations": scores_by_hooks,
    "released": released_pass,
}
