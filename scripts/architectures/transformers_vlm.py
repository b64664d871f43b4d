"""The vision-language models of transformers, given what their processors make of two images.

A row of `ROWS` is a model, the path of its vision tower, and the kind of inputs it takes. The configurations are the
library's defaults, made small by `_tiny`: every switch of the vision tower stays as it is in the released models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, PretrainedConfig

from . import Absent, Architecture, image, images

SIDE = 4
"""Pixels along a patch."""
GRIDS = ((4, 8), (4, 4))
"""Rows and columns of patches of images 0 and 1, where a model takes images of several sizes."""
SMALL = {
    "hidden_size": 32,
    "embed_dim": 32,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "intermediate_size": 64,
    "mlp_dim": 64,
    "projection_dim": 32,
    "encoder_hidden_size": 32,
    "num_hidden_layers": 3,
    "depth": 3,
    "num_heads": 4,
    "num_attention_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "patch_size": SIDE,
    "image_size": 4 * SIDE,
    "vocab_size": 100,
    "vocab_size_per_layer_input": 100,
    "pad_token_id": 0,
    "image_token_id": 7,
    "image_token_index": 7,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 16,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "layers": 1,
    "ffn_dim": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}


class Inputs(NamedTuple):
    """What a processor makes of some images."""

    tower: tuple[Any, ...]
    """The arguments of the vision tower."""
    features: Mapping[str, Any]
    """The arguments of the model's get_image_features."""


@dataclass(frozen=True)
class Row:
    """A model, and how its vision tower is called."""

    name: str
    """The public class, and in brackets what is special about its configuration."""
    tower: str
    """Path of the vision tower in the model."""
    inputs: Callable[[Sequence[int]], Inputs]
    config: Mapping[str, Any] = field(default_factory=dict)
    """What the small configuration needs besides `SMALL`."""
    packed: bool = False
    """Whether the tower gives one sequence (1, S, C) with the tokens of all images."""
    shared: tuple[str, ...] = ()
    """Outputs that do not belong to any one image."""
    weights: bool = True
    """Whether the tower can be asked for its attention weights."""


def _tiny(config_class: type[PretrainedConfig], overrides: Mapping[str, Any]) -> PretrainedConfig:
    """The default configuration at the sizes of `SMALL`, and its parts likewise."""
    default = config_class()
    known = default.to_dict()
    values = {name: size for name, size in SMALL.items() if isinstance(known.get(name), int)} | dict(overrides)
    for name in config_class.sub_configs:
        part, changes = getattr(default, name, None), dict(overrides.get(name) or {})
        if "model_type" in changes:
            values[name] = _tiny(CONFIG_MAPPING[changes.pop("model_type")], changes).to_dict()
        elif isinstance(part, PretrainedConfig):
            given = getattr(getattr(config_class, "sub_configs_defaults", {}).get(name), "init_kwargs", {})
            values[name] = _tiny(
                type(part), {name: value for name, value in given.items() if _is_switch(name, value)} | changes
            ).to_dict()  # transformers 4 wants dictionaries
    return config_class(**values)


def _is_switch(name: str, value: Any) -> bool:
    """Whether a default that a model gives to a part of its configuration is anything but a size."""
    return name not in SMALL and not isinstance(value, dict)


def _patches(number: int, merge: int = 1) -> Tensor:
    """Image `number` as patches (N, 3, p, p); those that the model merges, `merge` x `merge` of them, in a row."""
    rows, columns = GRIDS[number]
    picture = image(number, rows * SIDE, columns * SIDE)
    grid = picture.reshape(3, rows // merge, merge, SIDE, columns // merge, merge, SIDE)
    return grid.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)


def _grid_thw(numbers: Sequence[int], merge: int = 1) -> Tensor:
    return torch.tensor([(1, *(size // merge for size in GRIDS[number])) for number in numbers])


def _positional(**features: Any) -> Inputs:
    """The tower takes what get_image_features takes, in the same order."""
    return Inputs(tuple(features.values()), features)


def _pixels(numbers: Sequence[int]) -> Inputs:
    return _positional(pixel_values=images(numbers, 4 * SIDE))


def _packed(numbers: Sequence[int], merge: int = 2, frames: int = 1, flat: bool = True) -> Inputs:
    """The patches of all images in one sequence (S, 3 * frames * p * p), as Qwen-VL and its kin take them."""
    pixels = torch.cat([_patches(number, merge) for number in numbers])
    if flat:
        pixels = pixels.unsqueeze(2).expand(-1, -1, frames, -1, -1).flatten(1)
    return _positional(pixel_values=pixels, image_grid_thw=_grid_thw(numbers))


_qwen = partial(_packed, frames=2)


def _radio(numbers: Sequence[int]) -> Inputs:
    packed = _packed(numbers, merge=1).features
    return _positional(pixel_values=packed["pixel_values"], image_grid_hw=packed["image_grid_thw"][:, 1:])


def _video_llama(numbers: Sequence[int]) -> Inputs:
    merge_sizes = torch.full((len(numbers),), 2)
    return _positional(**_packed(numbers).features, image_merge_sizes=merge_sizes)


def _paddle(numbers: Sequence[int]) -> Inputs:
    features = _packed(numbers, merge=1, flat=False).features
    return Inputs((features["pixel_values"][None], features["image_grid_thw"]), features)


def _inkling(numbers: Sequence[int]) -> Inputs:
    """Squares of 2 x 2 patches, channels last; the grid counts the squares."""
    squares = torch.cat([_patches(number, 2) for number in numbers]).unflatten(0, (-1, 2, 2))
    pixels = squares.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)
    return _positional(pixel_values=pixels, image_grid_thw=_grid_thw(numbers, 2))


def _minicpm(numbers: Sequence[int]) -> Inputs:
    """One strip of patches (1, 3, p, S * p) for all images."""
    strip = torch.cat([_patches(number) for number in numbers]).permute(1, 2, 0, 3).flatten(2)
    return _positional(pixel_values=strip[None], target_sizes=_grid_thw(numbers)[:, 1:])


def _canvas(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The images (B, 3, s, s), padded with zeros to a square, and which pixels (B, s, s) are theirs."""
    side = SIDE * max(max(grid) for grid in GRIDS)
    pixels = torch.zeros(len(numbers), 3, side, side)
    mask = torch.zeros(len(numbers), side, side, dtype=torch.bool)
    for row, number in enumerate(numbers):
        rows, columns = (SIDE * size for size in GRIDS[number])
        pixels[row, :, :rows, :columns] = image(number, rows, columns)
        mask[row, :rows, :columns] = True
    return pixels, mask


def _idefics(numbers: Sequence[int], mask_name: str = "pixel_attention_mask") -> Inputs:
    """Padded images; Aria has one for each sample, Idefics several."""
    pixels, mask = _canvas(numbers)
    tower = (pixels, mask[:, ::SIDE, ::SIDE].contiguous())
    if mask_name == "pixel_attention_mask":
        pixels, mask = pixels[:, None], mask[:, None]
    return Inputs(tower, {"pixel_values": pixels, mask_name: mask})


def _pixtral(numbers: Sequence[int]) -> Inputs:
    """Padded images, whose patches the tower packs (1, S, C)."""
    return _positional(pixel_values=_canvas(numbers)[0], image_sizes=_grid_thw(numbers)[:, 1:] * SIDE)


def _padded(numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Patches (B, N, p * p * 3) channels last, padded to N of the largest image; their rows and columns, else -1."""
    most = max(rows * columns for rows, columns in GRIDS)
    patches = [_patches(number).movedim(1, -1).flatten(1) for number in numbers]
    places = [torch.cartesian_prod(*map(torch.arange, GRIDS[number])) for number in numbers]
    stacked = torch.stack([pad(patch, (0, 0, 0, most - len(patch))) for patch in patches])
    positions = torch.stack([pad(place, (0, 0, 0, most - len(place)), value=-1) for place in places])
    return stacked, positions, (positions >= 0).all(-1)


def _siglip2(numbers: Sequence[int]) -> Inputs:
    pixels, _, mask = _padded(numbers)
    shapes = _grid_thw(numbers)[:, 1:]
    features = {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask.int()}
    return Inputs((pixels, mask.int(), shapes), features)


def _gemma4(numbers: Sequence[int]) -> Inputs:
    pixels, positions, _ = _padded(numbers)
    return _positional(pixel_values=pixels.sigmoid(), image_position_ids=positions.flip(-1))


def _flattened(numbers: Sequence[int]) -> Inputs:
    """Patches with their row and column, counted from 1, in front."""
    pixels, positions, mask = _padded(numbers)
    return _positional(flattened_patches=torch.cat([positions + 1, pixels], -1), attention_mask=mask.float())


def _tiles(numbers: Sequence[int]) -> Inputs:
    """An overview and tiles (B, tiles, 3, h, w) of each image, as LLaVA-NeXT takes them: two tiles in a row."""
    tiles = torch.stack([images((number, number + 2, number + 4), 4 * SIDE) for number in numbers])
    sizes = torch.tensor([(4 * SIDE, 8 * SIDE)] * len(numbers))
    return Inputs((tiles.flatten(0, 1),), {"pixel_values": tiles, "image_sizes": sizes})


def _nested(numbers: Sequence[int]) -> Inputs:
    """One tile for each image, (B, 1, 3, h, w)."""
    pixels = images(numbers, 4 * SIDE)
    return Inputs((pixels,), {"pixel_values": pixels[:, None]})


def _mllama(numbers: Sequence[int]) -> Inputs:
    """Up to four tiles for each image: image 0 has two in a row, image 1 a single one."""
    tiles = torch.zeros(len(numbers), 1, 4, 3, 4 * SIDE, 4 * SIDE)
    mask = torch.zeros(len(numbers), 1, 4, dtype=torch.long)
    for row, number in enumerate(numbers):
        count = 2 - number
        tiles[row, 0, :count] = images(range(number, number + count), 4 * SIDE)
        mask[row, 0, :count] = 1
    ratios = torch.tensor([[2 - number] for number in numbers])
    return _positional(pixel_values=tiles, aspect_ratio_ids=ratios, aspect_ratio_mask=mask)


def _molmo(numbers: Sequence[int]) -> Inputs:
    """Patches (B, N, p * p * 3), and the four patches of each image token."""
    patches = torch.stack([image(number, 4 * SIDE) for number in numbers])
    patches = patches.unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE).permute(0, 2, 3, 4, 5, 1).flatten(1, 2).flatten(2)
    windows = torch.arange(16 * len(numbers)).view(-1, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4)
    grids = torch.tensor([(2, 2, 0, 0)] * len(numbers))
    features = {"pixel_values": patches, "image_token_pooling": windows, "image_grids": grids}
    return Inputs((patches,), features)


def _instructed(numbers: Sequence[int]) -> Inputs:
    pixels = images(numbers, 4 * SIDE)
    return Inputs((pixels,), {"pixel_values": pixels, "qformer_input_ids": torch.full((len(numbers), 3), 7)})


def _docling(numbers: Sequence[int]) -> Inputs:
    pixels = images(numbers, 4 * SIDE)
    mask = torch.ones(len(numbers), 1, dtype=torch.bool)
    return Inputs((pixels,), {"pixel_values": pixels[:, None], "pixel_attention_mask": mask})


def _build(row: Row) -> nn.Module:
    name = row.name.partition("[")[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise Absent(f"transformers {transformers.__version__} has no {name}")
    return model_class(_tiny(model_class.config_class, row.config)).eval()


def _run(row: Row, model: nn.Module, numbers: Sequence[int]) -> dict[str, Any]:
    """The tower's outputs under each implementation of attention, and the image features."""
    inputs, tower = row.inputs(numbers), model.get_submodule(row.tower)
    outputs: dict[str, Any] = {}
    for attention in ("eager", "sdpa") if model._supports_sdpa else ("eager",):
        try:
            model.set_attn_implementation(attention)
        except ValueError:  # in transformers 4 if a part has no such implementation
            continue
        weights = {"output_attentions": True} if row.weights and attention == "eager" else {}
        options = _accepted(tower, output_hidden_states=True, **weights)
        outputs[attention] = _by_image(tower(*inputs.tower, **options), row, numbers)
    if hasattr(model, "get_image_features"):
        outputs["features"] = _by_image(model.get_image_features(**inputs.features), row, numbers)
    return outputs


def _accepted(tower: nn.Module, **options: Any) -> dict[str, Any]:
    """Some towers of transformers 4 take no options at all."""
    known = inspect.signature(tower.forward).parameters
    kinds = {each.kind for each in known.values()}
    return {name: value for name, value in options.items() if name in known or inspect.Parameter.VAR_KEYWORD in kinds}


def _by_image(output: Any, row: Row, numbers: Sequence[int]) -> dict[str, Any]:
    """The outputs, so arranged that those of two images are the concatenation of those of each."""
    if not isinstance(output, Mapping):  # transformers 4 gives image features bare, in a list if they differ in number
        output = {"pooler_output": output}
    outputs = {name: value for name, value in output.items() if name not in row.shared}
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
    lengths = [rows * columns for rows, columns in (GRIDS[number] for number in numbers)]
    prefix = (weights.shape[-1] - sum(lengths)) // len(lengths)
    lengths = [prefix + length for length in lengths]
    stops = list(accumulate(lengths))
    return [
        weights[..., stop - length : stop, stop - length : stop] for stop, length in zip(stops, lengths, strict=True)
    ]


def _unpacked(value: Any) -> Any:
    """Drops the batch dimension of a packed sequence (1, S, C)."""
    if isinstance(value, (tuple, list)):
        return [_unpacked(part) for part in value]
    return value.squeeze(0) if isinstance(value, Tensor) and value.ndim > 2 else value


NO_CLS = {"vision_feature_select_strategy": "full"}
TILED = {"image_grid_pinpoints": [[4 * SIDE, 8 * SIDE]]}
SQUARE = {"vision_config": {"image_size": 4 * SIDE, "patch_size": SIDE}}
WIDE = {"vision_config": {"image_size": 8 * SIDE}}
GEMMA4 = {"vision_config": {"model_type": "gemma4_vision", "pooling_kernel_size": 2}}
DEEPSTACK = {"vision_config": {"deepstack_visual_indexes": [0, 1]}}
WINDOWS = {"vision_config": {"window_size": 4 * SIDE, "fullatt_block_indexes": [1]}}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SLIDING = {"layer_types": ["sliding_attention"] * 3, "rope_parameters": {"sliding_attention": ROPE}}
SMALL_SAM = {"sam_config": {"downsample_channels": [32, 32]}}
ROWS = (
    Row("Blip2ForConditionalGeneration", "vision_model", _pixels),
    Row("Blip2ForImageTextRetrieval", "vision_model", _pixels),
    Row("InstructBlipForConditionalGeneration", "vision_model", _instructed),
    Row("InstructBlipVideoForConditionalGeneration", "vision_model", _pixels),
    Row("LlavaForConditionalGeneration", "model.vision_tower", _pixels),
    Row(
        "LlavaForConditionalGeneration[SigLIP]",
        "model.vision_tower",
        _pixels,
        {"vision_config": {"model_type": "siglip_vision_model"}} | NO_CLS,
    ),
    Row(
        "LlavaForConditionalGeneration[Pixtral]",
        "model.vision_tower",
        _pixtral,
        {"vision_config": {"model_type": "pixtral", "image_size": 32}} | NO_CLS,
        packed=True,
    ),
    Row("LlavaNextForConditionalGeneration", "model.vision_tower", _tiles, TILED),
    Row("LlavaNextVideoForConditionalGeneration", "model.vision_tower", _tiles, TILED),
    Row("LlavaOnevisionForConditionalGeneration", "model.vision_tower", _tiles, TILED),
    Row(
        "Granite4VisionForConditionalGeneration",
        "model.vision_tower",
        _tiles,
        TILED
        | {
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-2, 0]],
            "spatial_target_layers": [0, 1, 2, 2],
            "vision_config": {"hidden_size": 64},
        },
    ),
    Row("VideoLlavaForConditionalGeneration", "model.image_tower", _pixels),
    Row("VipLlavaForConditionalGeneration", "model.vision_tower", _pixels, {"vision_feature_layers": [-2, 1]}),
    Row("PaliGemmaForConditionalGeneration", "model.vision_tower", _pixels),
    Row("ColPaliForRetrieval", "vlm.vision_tower", _pixels),
    Row("PI0ForConditionalGeneration", "model.vlm.vision_tower", _pixels),
    Row("Gemma3ForConditionalGeneration", "model.vision_tower", _pixels, {"mm_tokens_per_image": 4}),
    Row("ShieldGemma2ForImageClassification", "model.model.vision_tower", _pixels),
    Row(
        "T5Gemma2ForConditionalGeneration",
        "model.encoder.vision_tower",
        _pixels,
        {"encoder": {"mm_tokens_per_image": 4}},
    ),
    Row("Gemma4ForConditionalGeneration", "model.vision_tower", _gemma4, GEMMA4),
    Row("EmbeddingGemma2Model", "vision_tower", _gemma4, GEMMA4),
    Row(
        "DiffusionGemmaForBlockDiffusion",
        "model.encoder.vision_tower",
        _gemma4,
        GEMMA4 | {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    ),
    Row("AyaVisionForConditionalGeneration", "model.vision_tower", _pixels),
    Row("Cohere2VisionForConditionalGeneration", "model.vision_tower", _pixels, {"alignment_intermediate_size": 64}),
    Row("InternVLForConditionalGeneration", "model.vision_tower", _pixels, SQUARE),
    Row("QianfanOCRForConditionalGeneration", "model.vision_tower", _pixels, SQUARE),
    Row("IdeficsForVisionText2Text", "model.vision_model", _pixels),
    Row("Idefics2ForConditionalGeneration", "model.vision_model", _idefics),
    Row("Idefics3ForConditionalGeneration", "model.vision_model", _idefics),
    Row("SmolVLMForConditionalGeneration", "model.vision_model", _idefics),
    Row(
        "AriaForConditionalGeneration",
        "model.vision_tower",
        partial(_idefics, mask_name="pixel_mask"),
        {"projector_patch_to_query_dict": {64: 4}},
    ),
    Row("GraniteDoclingForConditionalGeneration", "model.vision_model", _docling, DEEPSTACK),
    Row("ModernVBertForMaskedLM", "model.vision_model", _pixels),
    Row("ColModernVBertForRetrieval", "vlm.vision_model", _pixels),
    Row("UltraVBertForMaskedLM", "model.vision_model", _pixels),
    Row("PixtralVisionModel", "", _pixtral, {"image_size": 32}, packed=True),
    Row("Mistral3ForConditionalGeneration", "model.vision_tower", _pixtral, WIDE, packed=True),
    Row("MistralLarge4ForConditionalGeneration", "model.vision_tower", _pixtral, WIDE, packed=True),
    Row("LightOnOcrForConditionalGeneration", "model.vision_encoder", _pixtral, WIDE, packed=True),
    Row(
        "MllamaForConditionalGeneration",
        "model.vision_model",
        _mllama,
        {"vision_config": {"num_global_layers": 2, "intermediate_layers_indices": [0, 2], "vision_output_dim": 96}},
    ),
    Row(
        "Llama4ForConditionalGeneration",
        "vision_model",
        _pixels,
        {
            "vision_config": {
                "intermediate_size": 128,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
            "text_config": {"intermediate_size_mlp": 64},
        },
    ),
    Row(
        "Florence2ForConditionalGeneration",
        "model.vision_tower",
        _pixels,
        {
            "vision_config": {
                "depths": [1, 1],
                "embed_dim": [32, 32],
                "num_heads": [4, 4],
                "num_groups": [4, 4],
                "patch_size": [7, 3],
                "patch_stride": [4, 2],
                "patch_padding": [3, 1],
                "patch_prenorm": [False, True],
                "window_size": 2,
            }
        },
    ),
    Row("Lfm2VlForConditionalGeneration", "model.vision_tower", _siglip2),
    Row("Phi4MultimodalForCausalLM", "model.embed_tokens_extend.image_embed.img_processor", _idefics),
    Row("Qwen2VLForConditionalGeneration", "model.visual", _qwen),
    Row("ColQwen2ForRetrieval", "vlm.visual", _qwen),
    Row("Qwen2_5_VLForConditionalGeneration", "model.visual", _qwen, WINDOWS),
    Row("HyperCLOVAXVisionV2ForConditionalGeneration", "model.vision_model", _qwen, WINDOWS),
    Row("Exaone4_5_ForConditionalGeneration", "model.visual", _qwen, WINDOWS),
    Row("Qwen2_5OmniThinkerForConditionalGeneration", "model.visual", _qwen, WINDOWS),
    Row("Qwen3VLForConditionalGeneration", "model.visual", _qwen, DEEPSTACK),
    Row("Qwen3VLMoeForConditionalGeneration", "model.visual", _qwen, DEEPSTACK),
    Row("Qwen3OmniMoeThinkerForConditionalGeneration", "model.visual", _qwen, DEEPSTACK),
    Row("Qwen3_5ForConditionalGeneration", "model.visual", _qwen),
    Row("Qwen3_5MoeForConditionalGeneration", "model.visual", _qwen),
    Row("Qwen4ExpForConditionalGeneration", "model.visual", _qwen),
    Row("CohereCompassForConditionalGeneration", "model.visual", _qwen, DEEPSTACK | {"text_config": SLIDING}),
    Row("Cosmos3OmniForConditionalGeneration", "model.visual", _qwen, DEEPSTACK),
    Row(
        "Cosmos3EdgeForConditionalGeneration",
        "model.visual",
        _packed,
        {"text_config": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}},
    ),
    Row("Glm4vForConditionalGeneration", "model.visual", _qwen),
    Row("Glm4vMoeForConditionalGeneration", "model.visual", _qwen),
    Row("Glm46VForConditionalGeneration", "model.visual", _qwen),
    Row("Glm5NextForConditionalGeneration", "model.visual", _qwen),
    Row("GlmOcrForConditionalGeneration", "model.visual", _qwen),
    Row("GlmImageForConditionalGeneration", "model.visual", partial(_packed, merge=1)),
    Row(
        "Ernie4_5_VLMoeForConditionalGeneration",
        "model.vision_tower",
        _packed,
        {"text_config": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}},
    ),
    Row("PaddleOCRVLForConditionalGeneration", "model.visual", _paddle, packed=True),
    Row("VideoLlama3ForConditionalGeneration", "model.vision_model", _video_llama, packed=True),
    Row(
        "HunYuanVLForConditionalGeneration",
        "model.vision_tower",
        partial(_packed, merge=1),
        {"text_config": {"head_dim": 8}},
        packed=True,
    ),
    Row(
        "Kimi_K25ForConditionalGeneration",
        "model.vision_tower",
        partial(_packed, merge=1, flat=False),
        {"projection_hidden_size": 32},
    ),
    Row("MiniMaxM3SparseForConditionalGeneration", "model.vision_tower", _qwen, packed=True, shared=("pooler_output",)),
    Row(
        "MuseGlimmerForConditionalGeneration",
        "model.vision_tower",
        partial(_packed, merge=1, frames=2),
        {"projector_hidden_size": 32, "out_hidden_size": 128},
    ),
    Row(
        "MuseSparkForConditionalGeneration",
        "model.vision_tower",
        partial(_packed, merge=1, frames=2),
        {
            "projector_hidden_size": 32,
            "out_hidden_size": 128,
            "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 32], "depths": [1] * 4},
        },
    ),
    Row("Inkling2ForConditionalGeneration", "model.vision_tower", _inkling, packed=True),
    Row("Lfm3VlForConditionalGeneration", "model.vision_tower", _qwen, packed=True),
    Row(
        "Dots3NoteForConditionalGeneration",
        "model.vision_tower",
        _packed,
        {
            "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
            "vision_config": {"pyramid_num_routed": [-1, -1, 4], "adapter_in_dim": 32, "adapter_out_dim": 32},
        },
    ),
    Row("MiniCPMV4_6ForConditionalGeneration", "model.vision_tower", _minicpm, {"insert_layer_id": 1}, packed=True),
    Row("MiniCPMV4_7ForConditionalGeneration", "model.vision_tower", _minicpm, {"insert_layer_id": 1}, packed=True),
    Row("MiniCPMOcrForConditionalGeneration", "model.vision_tower", _minicpm, {"insert_layer_id": 1}, packed=True),
    Row(
        "NemotronH_Omni_Reasoning_V3",
        "vision_model",
        _radio,
        {"vision_hidden_size": 32, "projector_hidden_size": 32},
        packed=True,
    ),
    Row("Kosmos2ForConditionalGeneration", "vision_model", _pixels),
    Row(
        "Kosmos2_5ForConditionalGeneration",
        "vision_model",
        _flattened,
        {"vision_config": {"patch_embed_hidden_size": 48}},
    ),
    Row(
        "Pix2StructForConditionalGeneration",
        "encoder",
        _flattened,
        {"vision_config": {"patch_embed_hidden_size": 48, "d_kv": 8, "d_ff": 64}},
    ),
    Row(
        "JanusForConditionalGeneration",
        "model.vision_model",
        _pixels,
        {"vq_config": {"base_channels": 32, "channel_multiplier": [1], "num_embeddings": 16}},
    ),
    Row("DeepseekVLForConditionalGeneration", "model.vision_model", _pixels),
    Row("DeepseekVLHybridForConditionalGeneration", "model.vision_model", _pixels),
    Row(
        "DeepseekOcr2ForConditionalGeneration",
        "model.vision_tower",
        _pixels,
        {"text_config": {"mlp_layer_types": ["dense"] * 3}, "vision_config": SMALL_SAM},
    ),
    Row("UnlimitedOcrForConditionalGeneration", "model.vision_tower", _pixels, {"vision_config": SMALL_SAM}),
    Row("GotOcr2ForConditionalGeneration", "model.vision_tower", _pixels),
    Row("Ovis2ForConditionalGeneration", "model.vision_tower", _pixels, shared=("visual_indicator_features",)),
    Row(
        "PerceptionLMForConditionalGeneration",
        "model.vision_tower",
        _nested,
        {
            "vision_config": {
                "architecture": "vit_pe_core_tiny_patch16_384",
                "model_args": {"embed_dim": 32, "depth": 3, "num_heads": 4, "img_size": 16, "patch_size": 4},
            }
        },
        weights=False,
    ),
    Row("Step3p7ForConditionalGeneration", "model.vision_model", _pixels),
    Row(
        "Molmo2ForConditionalGeneration",
        "model.vision_tower",
        _molmo,
        {
            "vision_config": {"image_size": [16, 16], "num_position_embeddings": 16},
            "adapter_config": {"vision_feature_layer": [2, 1]},
        },
    ),
)


def architectures() -> Iterator[Architecture]:
    """Every row of `ROWS`."""
    for row in ROWS:
        yield Architecture("transformers", row.name, partial(_build, row), partial(_run, row))
