"""torchvision's ViTs, and imitations of those that are not on PyPI: DINO, DINOv2, OpenAI's CLIP, RADIO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from imitations import clip, dinov2, radio
from torch import Tensor, nn

from coverage.registry import Architecture, images

TORCHVISION = {"vit_b_16": 16, "vit_b_32": 32, "vit_l_16": 16, "vit_l_32": 32, "vit_h_14": 14}
DINO = {"dino_vits16": 16, "dino_vits8": 8, "dino_vitb16": 16, "dino_vitb8": 8}
CLIP = {"clip ViT-B/32": 32, "clip ViT-B/16": 16, "clip ViT-L/14": 14, "clip ViT-L/14@336px": 14}
DINOV2: Mapping[str, Mapping[str, Any]] = {
    **{f"dinov2_vit{size}14": {} for size in "sbl"},
    **{f"dinov2_vit{size}14_reg": {"num_register_tokens": 4} for size in "sbl"},
    "dinov2_vitg14": {"swiglu": True},
    "dinov2_vitg14_reg": {"num_register_tokens": 4, "swiglu": True},
    "dinov2_vits14, block_chunks=2": {"chunks": 2},
    "dinov2_vitg14_reg, block_chunks=2": {"num_register_tokens": 4, "swiglu": True, "chunks": 2},
}
WIDTH, DEPTH, HEADS, SIDE = 32, 3, 2, 4
CONTEXT, VOCABULARY = 8, 64


def architectures() -> Iterator[Architecture]:
    """Yield torchvision's five models, then the imitations."""
    for name, patch in TORCHVISION.items():
        yield _architecture("torchvision", name, partial(_torchvision, patch), _run_torchvision, SIDE * patch)
    for name, patch in DINO.items():
        build = partial(dinov2.VisionTransformer, SIDE * patch, patch, WIDTH, DEPTH, HEADS)
        yield _architecture("hub", name, build, _run_dino, SIDE * patch)
    for name, options in DINOV2.items():
        yield _architecture("hub", name, partial(dinov2.DinoVisionTransformer, **options), _run_dinov2, dinov2.IMAGE)
    build = partial(radio.Radio, SIDE * 16, 16, WIDTH, DEPTH, HEADS)
    yield _architecture("hub", "radio", build, lambda model, batch: {"forward": model(batch)}, SIDE * 16)
    for name, patch in CLIP.items():
        yield _architecture("hub", name, partial(_clip, patch), _run_clip, SIDE * patch)


def _architecture(
    library: str, name: str, build: Callable[[], nn.Module], run: Callable[[Any, Tensor], Any], side: int
) -> Architecture:
    run_numbers: Callable[[nn.Module, Sequence[int]], Any] = lambda model, numbers: run(model, images(numbers, side))
    return Architecture(library, name, build, run_numbers)


def _torchvision(patch: int) -> nn.Module:
    sizes = {"image_size": SIDE * patch, "patch_size": patch, "hidden_dim": WIDTH, "mlp_dim": 4 * WIDTH}
    return torchvision.models.VisionTransformer(num_layers=DEPTH, num_heads=HEADS, num_classes=10, **sizes)


def _run_torchvision(model: Any, batch: Tensor) -> dict[str, Any]:
    """The logits, and the encoder's tokens, which users get by calling the steps of the forward themselves."""
    tokens = model._process_input(batch)
    tokens = torch.cat([model.class_token.expand(len(tokens), -1, -1), tokens], 1)
    return {"forward": model(batch), "encoder": model.encoder(tokens)}


def _run_dino(model: Any, batch: Tensor) -> dict[str, Any]:
    return {
        "forward": model(batch),
        "forward, other size": model(torch.cat([batch, batch.flip(-1)], -1)),
        "get_intermediate_layers": model.get_intermediate_layers(batch, n=2),
        "get_last_selfattention": model.get_last_selfattention(batch),
    }


def _run_dinov2(model: Any, batch: Tensor) -> dict[str, Any]:
    return {
        "forward": model(batch),
        "forward, is_training": model(batch, is_training=True),
        "forward_features": model.forward_features(batch),
        "get_intermediate_layers": model.get_intermediate_layers(batch, n=2),
        "get_intermediate_layers, reshape": model.get_intermediate_layers(batch, n=4, reshape=True),
    }


def _clip(patch: int) -> nn.Module:
    return clip.CLIP(clip.VisionTransformer(SIDE * patch, patch, WIDTH, DEPTH, HEADS), CONTEXT, VOCABULARY)


def _run_clip(model: Any, batch: Tensor) -> dict[str, Any]:
    texts = torch.arange(1, 2 * CONTEXT + 1).unflatten(0, (2, CONTEXT))
    return {
        "encode_image": model.encode_image(batch),
        "visual": model.visual(batch),
        "forward": model(batch, texts)[0],  # the other similarities are the same, transposed
    }
