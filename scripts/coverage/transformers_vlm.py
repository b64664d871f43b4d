"""The vision-language models of transformers, given what their processors make of two images.

The configurations are the library's defaults, made small by `small_config`: every switch of the vision tower stays as
it is in the released models.
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

from coverage.registry import Architecture, image, images, transformers_class

Settings = Mapping[str, Any]

SIDE = 4
"""Pixels along a patch."""
GRIDS = ((4, 8), (4, 4))
"""Rows and columns of patches of images 0 and 1, where a model takes images of several sizes."""
SIZES = (
    (0, "pad_token_id"),
    (1, "layers encoder_layers decoder_layers"),
    (2, "num_experts_per_tok"),
    (3, "depth num_hidden_layers"),
    (4, "num_heads num_attention_heads attention_heads encoder_attention_heads decoder_attention_heads"),
    (4, "num_key_value_heads num_experts num_local_experts n_routed_experts"),
    (7, "image_token_id image_token_index"),
    (8, "head_dim"),
    (16, "moe_intermediate_size"),
    (32, "hidden_size embed_dim out_hidden_size text_hidden_size projection_dim encoder_hidden_size d_model"),
    (64, "intermediate_size mlp_dim encoder_ffn_dim decoder_ffn_dim ffn_dim max_position_embeddings"),
    (100, "vocab_size vocab_size_per_layer_input"),
    (SIDE, "patch_size"),
    (4 * SIDE, "image_size"),
)
SMALL = {name: size for size, names in SIZES for name in names.split()}


class Inputs(NamedTuple):
    """What a processor makes of some images."""

    tower: tuple[Any, ...]
    """The arguments of the vision tower."""
    features: Mapping[str, Any]
    """The arguments of the model's get_image_features."""


@dataclass(frozen=True)
class Row:
    """Models that take the same inputs."""

    models: str
    """Public classes, with a space between; * stands for ForConditionalGeneration. Behind them, in brackets, what sets
    this row apart from others of the classes."""
    inputs: Callable[[Sequence[int]], Inputs]
    vision: Settings = field(default_factory=dict)
    """What the configuration of the vision tower needs besides `SMALL`."""
    config: Settings = field(default_factory=dict)
    """What the rest of the configuration needs."""
    packed: bool = False
    """Whether the tower gives one sequence (1, S, C) with the tokens of all images."""
    shared: str = ""
    """An output that does not belong to any one image."""
    weights: bool = True
    """Whether the tower can be asked for its attention weights."""


# What the processors make of images -----------------------------------------------------------------------------------


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


def _pixels(numbers: Sequence[int], tiled: bool = False, **rows: Tensor) -> Inputs:
    """Squares (B, 3, h, w); some models take tiles of each image, here a single one, and one of `rows` for each."""
    pixels = images(numbers, 4 * SIDE)
    extras = {name: row.expand(len(numbers), -1) for name, row in rows.items()}
    return Inputs((pixels,), {"pixel_values": pixels[:, None] if tiled else pixels, **extras})


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


def siglip2(numbers: Sequence[int]) -> Inputs:
    pixels, _, mask = _padded(numbers)
    shapes = _grid_thw(numbers)[:, 1:]
    features = {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask.int()}
    return Inputs((pixels, mask.int(), shapes), features)


def _gemma4(numbers: Sequence[int]) -> Inputs:
    pixels, positions, _ = _padded(numbers)
    return _positional(pixel_values=pixels.sigmoid(), image_position_ids=positions.flip(-1))


def flattened(numbers: Sequence[int]) -> Inputs:
    """Patches with their row and column, counted from 1, in front."""
    pixels, positions, mask = _padded(numbers)
    return _positional(flattened_patches=torch.cat([positions + 1, pixels], -1), attention_mask=mask.float())


def _tiles(numbers: Sequence[int]) -> Inputs:
    """An overview and tiles (B, tiles, 3, h, w) of each image, as LLaVA-NeXT takes them: two tiles in a row."""
    tiles = torch.stack([images((number, number + 2, number + 4), 4 * SIDE) for number in numbers])
    sizes = torch.tensor([(4 * SIDE, 8 * SIDE)] * len(numbers))
    return Inputs((tiles.flatten(0, 1),), {"pixel_values": tiles, "image_sizes": sizes})


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


def _llama4(numbers: Sequence[int]) -> Inputs:
    inputs = _pixels(numbers)
    if not transformers.__version__.startswith("4."):
        return inputs
    unused = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}  # but transformers 4 wants them
    return Inputs(inputs.tower, {**inputs.features, **unused})


# Building and running -------------------------------------------------------------------------------------------------


def small_config(config_class: type[PretrainedConfig], overrides: Settings) -> PretrainedConfig:
    """The default configuration at the sizes of `SMALL`, and its parts likewise."""
    default = config_class()
    known = default.to_dict()
    values = {name: size for name, size in SMALL.items() if isinstance(known.get(name), int)} | dict(overrides)
    for name in default.sub_configs:
        part, changes = getattr(default, name, None), dict(overrides.get(name) or {})
        if "model_type" in changes:
            values[name] = small_config(CONFIG_MAPPING[changes.pop("model_type")], changes).to_dict()
        elif isinstance(part, PretrainedConfig):
            given = getattr(getattr(config_class, "sub_configs_defaults", {}).get(name), "init_kwargs", {})
            # Of what the model gives to this part, all that is not a size stays.
            switches = {key: value for key, value in given.items() if key not in SMALL and not isinstance(value, dict)}
            values[name] = small_config(type(part), switches | changes).to_dict()  # transformers 4 wants dictionaries
    return config_class(**values)


def _build(name: str, row: Row) -> nn.Module:
    model_class, vision = transformers_class(name), {"vision_config": row.vision} if row.vision else {}
    return model_class(small_config(model_class.config_class, {**vision, **row.config})).eval()


def tower_of(model: nn.Module) -> nn.Module:
    """The vision tower of a model, which may be the model itself."""
    if isinstance(model, transformers.Pix2StructForConditionalGeneration):
        return model.encoder
    names = ("vision_tower", "vision_model", "vision_encoder", "visual")
    paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in names]
    return model.get_submodule(min(paths, key=lambda path: path.count("."), default=""))


def _run(row: Row, model: nn.Module, numbers: Sequence[int]) -> dict[str, Any]:
    """The tower's outputs under each implementation of attention, and the image features."""
    inputs, tower = row.inputs(numbers), tower_of(model)
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


# The rows -------------------------------------------------------------------------------------------------------------

TILED = {"image_grid_pinpoints": [[4 * SIDE, 8 * SIDE]]}
SQUARE = {"image_size": 4 * SIDE, "patch_size": SIDE}
GEMMA4 = {"model_type": "gemma4_vision", "pooling_kernel_size": 2}
NO_CLS = {"vision_feature_select_strategy": "full"}
DEEPSTACK = {"deepstack_visual_indexes": [0, 1]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SLIDING = {"layer_types": ["sliding_attention"] * 3, "rope_parameters": {"sliding_attention": ROPE}}
SMALL_SAM = {"sam_config": {"downsample_channels": [32, 32]}}
LLAMA4 = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
TIMM = {"embed_dim": 32, "depth": 3, "num_heads": 4, "img_size": 16, "patch_size": 4}


def _mrope(*section: int) -> Settings:
    return {"text_config": {"rope_parameters": ROPE | {"mrope_section": section}}}


ROWS = (
    Row("Blip2* InstructBlipVideo* Llava* PaliGemma* AyaVision* DeepseekVL* DeepseekVLHybrid*", _pixels),
    Row("Kosmos2* Step3p7* PI0* Blip2ForImageTextRetrieval IdeficsForVisionText2Text", _pixels),
    Row("ColPaliForRetrieval ShieldGemma2ForImageClassification", _pixels),
    Row("ModernVBertForMaskedLM ColModernVBertForRetrieval UltraVBertForMaskedLM", _pixels),
    Row("InstructBlip*", partial(_pixels, qformer_input_ids=torch.full((1, 3), 7))),
    Row("Llava*[SigLIP]", _pixels, {"model_type": "siglip_vision_model"}, NO_CLS),
    Row("Llava*[Pixtral]", _pixtral, {"model_type": "pixtral", "image_size": 32}, NO_CLS, packed=True),
    Row("LlavaNext* LlavaNextVideo* LlavaOnevision*", _tiles, config=TILED),
    Row(
        "Granite4Vision*",
        _tiles,
        {"hidden_size": 64},
        TILED | {"downsample_rate": "1/2", "deepstack_layer_map": [[-2, 0]], "spatial_target_layers": [0, 1, 2, 2]},
    ),
    Row("VipLlava*", _pixels, config={"vision_feature_layers": [-2, 1]}),
    Row("Gemma3*", _pixels, config={"mm_tokens_per_image": 4}),
    Row("T5Gemma2*", _pixels, config={"encoder": {"mm_tokens_per_image": 4}}),
    Row("Gemma4* EmbeddingGemma2Model", _gemma4, GEMMA4),
    Row(
        "DiffusionGemmaForBlockDiffusion",
        _gemma4,
        GEMMA4,
        {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    ),
    Row("Cohere2Vision*", _pixels, config={"alignment_intermediate_size": 64}),
    Row("InternVL* QianfanOCR*", _pixels, SQUARE),
    Row("Idefics2* Idefics3* SmolVLM*", _idefics),
    Row("Aria*", partial(_idefics, mask_name="pixel_mask"), config={"projector_patch_to_query_dict": {64: 4}}),
    Row("GraniteDocling*", partial(_pixels, tiled=True, pixel_attention_mask=torch.ones(1, 1).bool()), DEEPSTACK),
    Row("PixtralVisionModel", _pixtral, config={"image_size": 32}, packed=True),
    Row("Mistral3* MistralLarge4* LightOnOcr*", _pixtral, {"image_size": 8 * SIDE}, packed=True),
    Row(
        "Mllama*",
        _mllama,
        {"num_global_layers": 2, "intermediate_layers_indices": [0, 2], "vision_output_dim": 96},
        {"text_config": {"rope_scaling": {"rope_type": "default", "rope_theta": 1e4}}},  # transformers 4 has no default
    ),
    Row("Llama4*", _llama4, LLAMA4 | {"intermediate_size": 128}, {"text_config": {"intermediate_size_mlp": 64}}),
    Row("Lfm2Vl*", siglip2),
    Row("Qwen2VL* ColQwen2ForRetrieval Qwen3_5* Qwen3_5Moe* Qwen4Exp*", _qwen),
    Row("Glm4v* Glm4vMoe* Glm46V* Glm5Next* GlmOcr*", _qwen),
    Row("Qwen3VL* Qwen3VLMoe* Qwen3OmniMoeThinker* Cosmos3Omni*", _qwen, DEEPSTACK),
    Row("CohereCompass*", _qwen, DEEPSTACK, {"text_config": SLIDING}),
    Row("Cosmos3Edge*", _packed, config=_mrope(2, 1, 1)),
    Row("Ernie4_5_VLMoe*", _packed, config=_mrope(1, 1, 2)),
    Row("GlmImage*", partial(_packed, merge=1)),
    Row("PaddleOCRVL*", _paddle, packed=True),
    Row("VideoLlama3*", _video_llama, packed=True),
    Row("HunYuanVL*", partial(_packed, merge=1), config={"text_config": {"head_dim": 8}}, packed=True),
    Row("Kimi_K25*", partial(_packed, merge=1, flat=False), config={"projection_hidden_size": 32}),
    Row("MiniMaxM3Sparse*", _qwen, packed=True, shared="pooler_output"),
    Row("Inkling2*", _inkling, packed=True),
    Row(
        "NemotronH_Omni_Reasoning_V3",
        _radio,
        config={"vision_hidden_size": 32, "projector_hidden_size": 32},
        packed=True,
    ),
    Row("Kosmos2_5*", flattened, {"patch_embed_hidden_size": 48}),
    Row("Pix2Struct*", flattened, {"patch_embed_hidden_size": 48, "d_kv": 8, "d_ff": 64}),
    Row(
        "Janus*", _pixels, config={"vq_config": {"base_channels": 32, "channel_multiplier": [1], "num_embeddings": 16}}
    ),
    Row("UnlimitedOcr*", _pixels, SMALL_SAM),
    Row("Ovis2*", _pixels, shared="visual_indicator_features"),
    Row(
        "PerceptionLM*",
        partial(_pixels, tiled=True),
        {"architecture": "vit_pe_core_tiny_patch16_384", "model_args": TIMM},
        weights=False,
    ),
    Row(
        "Molmo2*",
        _molmo,
        {"image_size": [16, 16], "num_position_embeddings": 16},
        {"adapter_config": {"vision_feature_layer": [2, 1]}},
    ),
)


def rows() -> Iterator[tuple[str, str, Row]]:
    """Class, name of the architecture, and row, of each class in `ROWS`."""
    for row in ROWS:
        names, bracket, variant = row.models.replace("*", "ForConditionalGeneration").partition("[")
        yield from ((name, name + bracket + variant, row) for name in names.split())


def architectures() -> Iterator[Architecture]:
    for model_class, name, row in rows():
        yield Architecture("transformers", name, partial(_build, model_class, row), partial(_run, row))
