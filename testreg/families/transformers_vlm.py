"""The rows for vision-language models of transformers. Many take images of different sizes: padded, tiled, or packed.

Packed: all images of a batch are one long sequence of tokens, and attention stays within each image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from testreg.families.extend import (
    PACKED,
    extend_cu_seqlens,
    extend_max_length,
    extend_rope,
    extend_token_mask,
    packed,
    unchanged,
)
from testreg.families.family import STAGES, WINDOWS, run_plainly
from testreg.families.inputs import merged_order, pack_patches, separate_packed_patches, separate_sizes
from testreg.families.layout import Layout
from testreg.families.transformers import BLIP, CLIP, SIGLIP, VIT


def _extend_complex_rope(rotations: Tensor, layout: Layout) -> Tensor:
    """Extend rotary embeddings, complex numbers (T, 1, D/2), to the registers."""
    return layout.extend(rotations, -3, 1.0)


def _extend_positions(positions: Tensor, layout: Layout) -> Tensor:
    """Extend the row and column (B, T, 2) of each patch to the registers, which get 0.

    The value does not matter: blocks read from it only which tokens are padding (-1).
    """
    return layout.extend(positions, -2, 0)


def _layout_with_cls_last(tower: Any, default_layout: Layout, arguments: Mapping[str, Any]) -> Layout:
    """The layout of Llama 4, whose CLS token comes after the patches."""
    num_tokens = len(arguments["freqs_ci"])
    token = torch.arange(num_tokens + default_layout.num_registers, device=arguments["freqs_ci"].device)
    return default_layout.replace(patches=(token < num_tokens - 1).unsqueeze(0))


def _layout_of_tiles(tower: Any, default_layout: Layout, arguments: Mapping[str, Any]) -> Layout:
    """The layout of Mllama: the tiles of an image in a row, each with a CLS token, its patches, and padding.

    The mask only keeps padding from attending to padding, so it is here read in another way than that of other
    families.
    """
    mask = arguments["attention_mask"]  # (B, 1, T, T)
    num_patches = (tower.config.image_size // tower.config.patch_size) ** 2
    place = torch.arange(mask.shape[-1], device=mask.device) % (mask.shape[-1] // tower.config.max_num_tiles)
    patches = (place >= 1) & (place <= num_patches)
    hides = mask < 0
    return default_layout.replace(
        valid=default_layout.extend(~hides.any((1, 2)), -1, True),
        patches=default_layout.extend(patches.unsqueeze(0), -1, False),
    )


def _layout_by_mask(tower: Any, default_layout: Layout, arguments: Mapping[str, Any]) -> Layout:
    """The layout of Pixtral, which packs images in a sequence of S tokens.

    A mask (1, 1, S, S) keeps attention within each image; with flash attention, `cu_seq_lens_q` has the images' ends.
    """
    if (ends := arguments.get("cu_seq_lens_q")) is not None:
        return default_layout.replace(lengths=ends.diff().tolist())
    mask = arguments.get("attention_mask")
    if mask is None and arguments.get("position_ids") is not None:
        raise NotImplementedError("Pixtral under flash attention needs transformers 5: use sdpa or eager attention")
    if mask is None:
        return default_layout
    starts = (mask[0, 0] >= 0).int().argmax(-1)  # (S,): the first token that each token attends to: its image's first
    return default_layout.replace(lengths=starts.unique_consecutive(return_counts=True)[1].tolist())


def _run_on_packed_patches(tower: Any, images: Tensor) -> Any:
    """Run Qwen2-VL or a similar tower, which takes the pixels of all patches in one sequence, and each image's grid."""
    return tower(*pack_patches(tower.config, images))


_PACKED = replace(
    SIGLIP,
    name="transformers PaddleOCR-VL",
    towers="PaddleOCRVisionModel",
    blocks="vision_model.encoder.layers",
    patch_embed="vision_model.embeddings.patch_embedding",
    layout=packed,
    block_arguments=PACKED,
    run=None,
)
_ERNIE = replace(
    _PACKED,
    name="transformers Ernie 4.5 VL",
    towers="Ernie4_5_VLMoeVisionTransformerPretrainedModel",
    blocks="blocks",
    patch_embed="patch_embed.proj",
    attention="attn",
)
_QWEN = replace(
    _ERNIE,
    name="transformers Qwen2-VL",
    towers="Qwen2VisionTransformerPretrainedModel",
    takes="packed images",
    keeps_shape=True,
    separate=separate_packed_patches,
    order=merged_order,
    run=_run_on_packed_patches,
)

FAMILIES = (
    replace(
        BLIP,
        name="transformers BLIP-2",
        towers=("Blip2VisionModel", "InstructBlipVisionModel", "InstructBlipVideoVisionModel"),
    ),
    replace(CLIP, name="transformers Idefics", towers="IdeficsVisionTransformer"),
    replace(
        VIT,
        name="transformers InternVL",
        towers=("InternVLVisionModel", "QianfanOCRVisionModel"),
        scale="lambda_2",
        run=run_plainly,
    ),
    replace(SIGLIP, name="transformers Janus", towers="JanusVisionModel"),
    replace(
        SIGLIP,
        name="transformers Idefics3",
        towers=(
            *("Idefics2VisionTransformer", "Idefics3VisionTransformer", "SmolVLMVisionTransformer"),
            "GraniteDoclingVisionModel",
        ),
        run=run_plainly,
    ),
    replace(
        SIGLIP,
        name="transformers Ovis2",
        towers="Ovis2VisionModel",
        blocks="transformer.encoder.layers",
        fc2="ffn.down_proj",
        patch_embed="transformer.embeddings.patch_embedding",
        attention="attention",
        run=run_plainly,
    ),
    replace(SIGLIP, name="transformers Molmo2", towers="Molmo2VisionModel", blocks="layers", patch_embed=(), run=None),
    replace(
        CLIP,
        name="transformers Unlimited-OCR",
        towers="UnlimitedOcrVisionModel",
        blocks="vision_encoder.encoder.layers",
        entry_norm="vision_encoder.pre_layrnorm",
        patch_embed=(),  # its patches come from a SAM and a convolutional network
        run=None,
    ),
    replace(
        CLIP,
        name="transformers Step3",
        towers="Step3p7VisionModel",
        blocks="layers",
        prefix=0,
        scale="lambda_2",
        block_arguments={"position_embeddings": extend_rope},
        run=run_plainly,
    ),
    replace(
        CLIP,
        name="transformers Llama 4",
        towers="Llama4VisionModel",
        blocks="model.layers",
        prefix=0,
        patch_embed=(),
        entry_norm="layernorm_pre",
        layout=_layout_with_cls_last,
        block_arguments={"freqs_ci": _extend_complex_rope},
        run=None,
    ),
    replace(
        CLIP,
        name="transformers Mllama",
        towers="MllamaVisionModel",
        blocks="transformer.layers",  # not those of `global_transformer` behind them, which add other tokens
        prefix=0,
        patch_embed="patch_embedding",
        entry_norm="layernorm_pre",
        layout=_layout_of_tiles,
        run=None,
    ),
    replace(
        SIGLIP,
        name="transformers Gemma 4",
        towers="Gemma4VisionModel",
        fc2=("mlp.down_proj", "mlp.down_proj.linear"),
        patch_embed=(),
        block_arguments={"position_embeddings": extend_rope, "position_ids": _extend_positions},
        run=None,
    ),
    replace(
        VIT,
        name="transformers Kosmos-2.5",
        towers="Kosmos2_5VisionModel",
        blocks="encoder.layer",
        fc2="mlp.wo",
        prefix=0,
        patch_embed=(),
        run=None,
    ),
    replace(
        SIGLIP,
        name="transformers Pixtral",
        towers="PixtralVisionModel",
        blocks="transformer.layers",
        fc2="feed_forward.down_proj",
        patch_embed="patch_conv",
        entry_norm="ln_pre",
        attention="attention",
        layout=_layout_by_mask,
        block_arguments={
            "attention_mask": extend_token_mask,
            "position_embeddings": extend_rope,
            **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), extend_cu_seqlens),
            **dict.fromkeys(("max_length_q", "max_length_k"), extend_max_length),
            "position_ids": unchanged,  # in transformers 4, only flash attention reads it
        },
        takes="packed images",
        keeps_shape=True,
        separate=separate_sizes,
        run=run_plainly,
    ),
    _PACKED,
    replace(
        _PACKED,
        name="transformers VideoLLaMA 3",
        towers=("VideoLlama3VisionModel", "Cosmos3EdgeVisionModel"),
        blocks="encoder.layers",
        patch_embed="embeddings.patch_embedding",
    ),
    replace(
        _PACKED,
        name="transformers HunYuan-VL",
        towers="HunYuanVLVisionTransformer",
        blocks="layers",
        patch_embed="embeddings.patch_embedding",
    ),
    replace(
        _PACKED,
        name="transformers MiniMax-M3-VL",
        towers="MiniMaxM3VLVisionModel",
        blocks="layers",
        patch_embed="embeddings.proj",
        entry_norm="pre_layrnorm",
    ),
    replace(
        _PACKED,
        name="transformers Inkling 2",
        towers="Inkling2VisionModel",
        blocks="layers",
        prefix=1,
        scale="lambda_2",
        patch_embed=(),
        entry_norm="pre_layernorm",
    ),
    _ERNIE,
    replace(
        _ERNIE,
        name="transformers Kimi-K2.5",
        towers="Kimi_K25VisionModel",
        blocks="layers",
    ),
    _QWEN,
    replace(
        _QWEN,
        name="transformers Qwen3-VL",
        towers=(
            *("Qwen3VLVisionModel", "Qwen3VLMoeVisionModel", "Qwen3OmniMoeVisionEncoder", "Qwen3_5VisionModel"),
            *("Qwen3_5MoeVisionModel", "Qwen4ExpVisionModel", "CohereCompassVisionModel"),
        ),
        fc2="mlp.linear_fc2",
    ),
    replace(
        _QWEN,
        name="transformers GLM-4V",
        towers=(
            *("Glm4vVisionModel", "Glm4vMoeVisionModel", "GlmOcrVisionModel", "Glm5NextVisionModel"),
            "GlmImageVisionModel",
        ),
        fc2=("mlp.down_proj", "mlp.fc2"),
    ),
)

# Why the method does not fit Qwen2.5-VL.
FOUR_GLOBAL_BLOCKS = (
    "attention stays within windows in all blocks but four (7, 15, 23 and 31): in these the image needs one register, "
    "in the others each window would need its own, and the method does not say how one is made of the others"
)
REFUSED = {
    **dict.fromkeys(("Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5OmniVisionEncoder"), FOUR_GLOBAL_BLOCKS),
    **dict.fromkeys(("Exaone4_5_VisionModel", "MuseGlimmerVisionModel", "MuseSparkVisionModel"), WINDOWS),
    **dict.fromkeys(("GotOcr2VisionEncoder", "PPFormulaNetVisionEncoder", "SLANeXtVisionEncoder"), WINDOWS),
    **dict.fromkeys(("MiniCPMV4_6VisionModel", "MiniCPMV4_7VisionModel", "MiniCPMOcrVisionModel"), STAGES),
    "Florence2VisionBackbone": STAGES,
    "Lfm3VlVisionModel": "most blocks are convolutions over the grid of patches, where a register has no place",
    "Dots3NoteVisionModel": "the last blocks are mixtures of experts, which have no second linear to take neurons from",
    "Phi4MultimodalVisionModel": "attention is causal where no image is padded, which hides a register behind them",
}
