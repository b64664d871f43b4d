"""Tiny random models of every supported family: 4 blocks, 48 channels, 192 neurons, patches of 16 pixels."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import open_clip
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from testreg.demo.run import PHOTOGRAPHS, crops
from testreg.io.decoding import open_image
from testreg.io.packing import PackedImage
from testreg.io.sources import image_paths

TIMM_RECORDS = tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 31)  # the arguments that made a model
TIMM_1_0_26 = timm.__version__ == "1.0.26"
TORCH_2_9 = torch.__version__.startswith("2.9.")
TRANSFORMERS_4 = transformers.__version__.startswith("4.")
SPREAD_MLP = ("hf_vit", "hf_deit") if TRANSFORMERS_4 else ()  # whose MLPs are no modules of their own
DEPTH, WIDTH, MLP_WIDTH, PATCH, IMAGE = 4, 48, 192, 16, 64
NEURONS = {1: [3, 77, 150], 2: [0, 64, 191]}

TIMM = {"img_size": IMAGE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4}
HF = {
    "hidden_size": WIDTH,
    "intermediate_size": MLP_WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
HF_DINOV2 = {key: value for key, value in HF.items() if key != "intermediate_size"}
HF_TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 16,
}


def _open_clip(**vision: object) -> nn.Module:
    return open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg={
            "image_size": IMAGE,
            "patch_size": PATCH,
            "width": WIDTH,
            "layers": DEPTH,
            "head_width": 12,
            **vision,
        },
        text_cfg={"context_length": 16, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2},
    )


def _open_clip_sequence_first() -> nn.Module:
    model = _open_clip()
    model.visual.transformer.batch_first = False
    for block in model.visual.transformer.resblocks:
        block.attn.batch_first = False
    return model


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "timm_vit": lambda: timm.create_model("vit_base_patch16_224", num_classes=10, **TIMM),
    "timm_deit_distilled": lambda: timm.create_model("deit_base_distilled_patch16_224", num_classes=10, **TIMM),
    "timm_clip": lambda: timm.create_model("vit_base_patch16_clip_224", num_classes=10, **TIMM),
    "timm_siglip": lambda: timm.create_model("vit_base_patch16_siglip_224", **TIMM),
    "timm_dinov2": lambda: timm.create_model("vit_base_patch14_dinov2", **TIMM),
    "timm_dinov2_reg4": lambda: timm.create_model("vit_base_patch14_reg4_dinov2", **TIMM),
    "hf_vit": lambda: transformers.ViTModel(transformers.ViTConfig(**HF)),
    "hf_deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**HF)),
    "hf_clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF)),
    "hf_siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF)),
    "hf_dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**HF_DINOV2)),
    "hf_dinov2_swiglu": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**HF_DINOV2, use_swiglu_ffn=True)),
    "hf_dinov2_registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**HF_DINOV2)
    ),
    "hf_dinov3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**HF, num_register_tokens=4, layerscale_value=0.5)
    ),
    "open_clip": lambda: _open_clip(),
    "open_clip_sequence_first": _open_clip_sequence_first,
    "torchvision_vit": lambda: torchvision.models.VisionTransformer(
        image_size=IMAGE,
        patch_size=PATCH,
        num_layers=DEPTH,
        num_heads=4,
        hidden_dim=WIDTH,
        mlp_dim=MLP_WIDTH,
        num_classes=10,
    ),
}


def built_once(build: Callable[..., Any]) -> Callable[..., Any]:
    """`build`, which copies the model that it built before, in half the time; random numbers go on as if it built."""

    @functools.cache
    @torch.inference_mode(False)
    def first(*args: Any) -> tuple[Any, Tensor]:
        return build(*args), torch.get_rng_state()

    @functools.wraps(build)
    def copied(name: str, seed: int = 0) -> Any:
        model, state = first(name, seed)
        torch.set_rng_state(state)
        return copy.deepcopy(model)

    return copied


@built_once
def fresh(name: str, seed: int = 0) -> nn.Module:
    """The tiny model of a family as its library initialises it, in eval mode: what planting starts from."""
    torch.manual_seed(seed)
    return BUILDERS[name]().eval()


@built_once
def build(name: str, seed: int = 0) -> nn.Module:
    """The tiny model of a family, in eval mode, with weights large enough that blocks matter."""
    model = fresh(name, seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "gamma" in key or "lambda" in key:
                parameter.fill_(0.5)
            elif parameter.ndim == 1 and "norm" not in key and "ln_" not in key and "bias" in key:
                parameter.normal_(std=0.1)
            elif parameter.ndim == 2 and parameter.shape[0] > 1 and "embed" not in key:
                parameter.normal_(std=1.2 / parameter.shape[1] ** 0.5)
    return model


def photograph_crops() -> Tensor:
    """45 crops (3, 64, 64) of the photographs that come with the package, for planting.

    Their histograms are equalised, so that one threshold of brightness finds a few patches in each.
    """
    images = [tv.equalize(tv.pil_to_tensor(open_image(path))) for path in image_paths(PHOTOGRAPHS)]
    whole = torch.stack([tv.resize(image, [192, 192], antialias=True) for image in images]).float() / 127.5 - 1
    return crops(whole, 64, 64)


def packed(images: Iterable[Tensor]) -> list[PackedImage]:
    return [PackedImage.of(image) for image in images]


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


DUPLICATES = (copy.deepcopy, through_pickle, through_torch_save)
