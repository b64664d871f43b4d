"""The vision-language models of transformers, given what their processors make of two images.

The configurations are the library's defaults, made small by `small_config`: every switch of the vision tower stays as
it is in the released models.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves

from coverage import transformers_small
from coverage.registry import Architecture, image, images, padded_patches
from coverage.transformers_small import SIDE, TIMM, Settings, build

GRIDS = ((4, 8), (4, 4))
"""Rows and columns of patches of images 0 and 1, where a model takes images of several sizes."""


class Inputs(NamedTuple):
    """What a processor makes of some images."""

    tower: tuple[Any, ...]
    """The arguments of the vision tower."""
    features: Mapping[str, Any]
    """The arguments of the model's get_image_features."""


# What the processors make of images -----------------------------------------------------------------------------------


def _picture(number: int) -> Tensor:
    """The image (3, h, w) of this number, where a model takes images of several sizes."""
    return image(number, *(SIDE * size for size in GRIDS[number]))


def _patches(number: int, merge: int = 1) -> Tensor:
    """Image `number` as patches (N, 3, p, p); those that the model merges, `merge` x `merge` of them, in a row."""
    rows, columns = GRIDS[number]
    grid = _picture(number).reshape(3, rows // merge, merge, SIDE, columns // merge, merge, SIDE)
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
    side = SIDE * max(map(max, GRIDS))
    pictures = [_picture(number) for number in numbers]
    pixels = torch.stack([pad(each, (0, side - each.shape[2], 0, side - each.shape[1])) for each in pictures])
    return pixels, (pixels != 0).any(1)


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
    """As `padded_patches`, to the length of image 0 in every batch."""
    pixels, positions, mask = padded_patches([_picture(number) for number in (*numbers, 0)], SIDE)
    return pixels[:-1], positions[:-1], mask[:-1]


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
    counts = torch.tensor([[2 - number] for number in numbers])
    tiles = [pad(images(range(number, 2), 4 * SIDE), (*[0] * 7, 2 + number)) for number in numbers]
    mask = (torch.arange(4) < counts).long()
    return _positional(
        pixel_values=torch.stack(tiles)[:, None], aspect_ratio_ids=counts, aspect_ratio_mask=mask[:, None]
    )


def _molmo(numbers: Sequence[int]) -> Inputs:
    """Patches (B, N, p * p * 3), and the four patches of each image token."""
    patches, _, _ = padded_patches(images(numbers, 4 * SIDE), SIDE)
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


@dataclass(frozen=True)
class Row(transformers_small.Row):
    """Models that take the same inputs."""

    inputs: Callable[[Sequence[int]], Inputs] = _pixels
    packed: bool = False
    """Whether the tower gives one sequence (1, S, C) with the tokens of all images."""
    shared: str = ""
    """An output that does not belong to any one image."""
    weights: bool = True
    """Whether the tower can be asked for its attention weights."""


# Building and running -------------------------------------------------------------------------------------------------


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
    lengths = [math.prod(GRIDS[number]) for number in numbers]
    prefix = (weights.shape[-1] - sum(lengths)) // len(lengths)
    lengths = [prefix + length for length in lengths]
    return [rows.split(lengths, -1)[i] for i, rows in enumerate(weights.split(lengths, -2))]


def _unpacked(value: Any) -> Any:
    """Drops the batch dimension of a packed sequence (1, S, C)."""
    if isinstance(value, (tuple, list)):
        return [_unpacked(part) for part in value]
    return value.squeeze(0) if isinstance(value, Tensor) and value.ndim > 2 else value


# The rows -------------------------------------------------------------------------------------------------------------


def _vision(settings: Settings | None = None, **more: Any) -> Settings:
    """Settings of the vision tower."""
    return {"vision_config": {**(settings or {}), **more}}


TILED = {"image_grid_pinpoints": [[4 * SIDE, 8 * SIDE]]}
GRANITE = {"downsample_rate": "1/2", "deepstack_layer_map": [[-2, 0]], "spatial_target_layers": [0, 1, 2, 2]}
GEMMA4 = _vision(model_type="gemma4_vision", pooling_kernel_size=2)
EXPERTS = {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}}
NO_CLS = {"vision_feature_select_strategy": "full"}
DEEPSTACK = _vision(deepstack_visual_indexes=[0, 1])
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SLIDING = {"layer_types": ["sliding_attention"] * 3, "rope_parameters": {"sliding_attention": ROPE}}
MLLAMA = _vision(num_global_layers=2, intermediate_layers_indices=[0, 2], vision_output_dim=96)
MLLAMA |= {"text_config": {"rope_scaling": ROPE}}  # transformers 4 has no default
LLAMA4 = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
LLAMA4 = _vision(LLAMA4, intermediate_size=128) | {"text_config": {"intermediate_size_mlp": 64}}
JANUS = {"vq_config": {"base_channels": 32, "channel_multiplier": [1], "num_embeddings": 16}}
PERCEPTION = _vision(architecture="vit_pe_core_tiny_patch16_384", model_args=TIMM)
MOLMO = _vision(image_size=[16, 16], num_position_embeddings=16) | {"adapter_config": {"vision_feature_layer": [2, 1]}}
_tile = partial(_pixels, tiled=True)
_masked_tile = partial(_tile, pixel_attention_mask=torch.ones(1, 1).bool())
_single = partial(_packed, merge=1)


def _mrope(*section: int) -> Settings:
    return {"text_config": {"rope_parameters": ROPE | {"mrope_section": section}}}


ROWS = (
    Row("Blip2* InstructBlipVideo* Llava* PaliGemma* AyaVision* DeepseekVL* DeepseekVLHybrid*"),
    Row("Kosmos2* Step3p7* PI0* Blip2ForImageTextRetrieval IdeficsForVisionText2Text"),
    Row("ColPaliForRetrieval ShieldGemma2ForImageClassification"),
    Row("ModernVBertForMaskedLM ColModernVBertForRetrieval UltraVBertForMaskedLM"),
    Row("InstructBlip*", inputs=partial(_pixels, qformer_input_ids=torch.full((1, 3), 7))),
    Row("Llava*[SigLIP]", _vision(model_type="siglip_vision_model") | NO_CLS),
    Row("Llava*[Pixtral]", _vision(model_type="pixtral", image_size=32) | NO_CLS, _pixtral, packed=True),
    Row("LlavaNext* LlavaNextVideo* LlavaOnevision*", TILED, _tiles),
    Row("Granite4Vision*", _vision(hidden_size=64) | TILED | GRANITE, _tiles),
    Row("VipLlava*", {"vision_feature_layers": [-2, 1]}),
    Row("Gemma3*", {"mm_tokens_per_image": 4}),
    Row("T5Gemma2*", {"encoder": {"mm_tokens_per_image": 4}}),
    Row("Gemma4* EmbeddingGemma2Model", GEMMA4, _gemma4),
    Row("DiffusionGemmaForBlockDiffusion", GEMMA4 | EXPERTS, _gemma4),
    Row("Cohere2Vision*", {"alignment_intermediate_size": 64}),
    Row("InternVL* QianfanOCR*", _vision(image_size=4 * SIDE, patch_size=SIDE)),
    Row("Idefics2* Idefics3* SmolVLM*", inputs=_idefics),
    Row("Aria*", {"projector_patch_to_query_dict": {64: 4}}, partial(_idefics, mask_name="pixel_mask")),
    Row("GraniteDocling*", DEEPSTACK, _masked_tile),
    Row("PixtralVisionModel", {"image_size": 32}, _pixtral, packed=True),
    Row("Mistral3* MistralLarge4* LightOnOcr*", _vision(image_size=8 * SIDE), _pixtral, packed=True),
    Row("Mllama*", MLLAMA, _mllama),
    Row("Llama4*", LLAMA4, _llama4),
    Row("Lfm2Vl*", inputs=siglip2),
    Row("Qwen2VL* ColQwen2ForRetrieval Qwen3_5* Qwen3_5Moe* Qwen4Exp*", inputs=_qwen),
    Row("Glm4v* Glm4vMoe* Glm46V* Glm5Next* GlmOcr*", inputs=_qwen),
    Row("Qwen3VL* Qwen3VLMoe* Qwen3OmniMoeThinker* Cosmos3Omni*", DEEPSTACK, _qwen),
    Row("CohereCompass*", DEEPSTACK | {"text_config": SLIDING}, _qwen),
    Row("Cosmos3Edge*", _mrope(2, 1, 1), _packed),
    Row("Ernie4_5_VLMoe*", _mrope(1, 1, 2), _packed),
    Row("GlmImage*", inputs=_single),
    Row("PaddleOCRVL*", inputs=_paddle, packed=True),
    Row("VideoLlama3*", inputs=_video_llama, packed=True),
    Row("HunYuanVL*", {"text_config": {"head_dim": 8}}, _single, packed=True),
    Row("Kimi_K25*", {"projection_hidden_size": 32}, partial(_single, flat=False)),
    Row("MiniMaxM3Sparse*", inputs=_qwen, packed=True, shared="pooler_output"),
    Row("Inkling2*", inputs=_inkling, packed=True),
    Row("NemotronH_Omni_Reasoning_V3", {"vision_hidden_size": 32, "projector_hidden_size": 32}, _radio, packed=True),
    Row("Kosmos2_5*", _vision(patch_embed_hidden_size=48), flattened),
    Row("Pix2Struct*", _vision(patch_embed_hidden_size=48, d_kv=8, d_ff=64), flattened),
    Row("Janus*", JANUS),
    Row("UnlimitedOcr*", _vision(sam_config={"downsample_channels": [32, 32]})),
    Row("Ovis2*", shared="visual_indicator_features"),
    Row("PerceptionLM*", PERCEPTION, _tile, weights=False),
    Row("Molmo2*", MOLMO, _molmo),
)


def rows() -> Iterator[tuple[str, str, Row]]:
    """Class, name of the architecture, and row, of each class in `ROWS`."""
    return ((*names, row) for row in ROWS for names in row.each())


def architectures() -> Iterator[Architecture]:
    for model_class, name, row in rows():
        yield Architecture("transformers", name, partial(build, model_class, row.config), partial(_run, row))
