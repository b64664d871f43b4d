"""Towers that take clips, packed patches or tiles are diagnosed, calibrated and patched: planted ones, by what their
processors make of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from planting import plant
from tiny import HF, build
from torch import Tensor, nn

import testreg
from testreg.families import find_tower
from testreg.measure.hooks import recording_inputs, recording_outputs
from testreg.measure.observation import far_queries, neighbour_cosine
from testreg.measure.sampling import SampledAttention

FRAMES, IMAGES = 4, 40
GENERATOR = 0


def noise(*shape: int) -> Tensor:
    """Images (..., 3, h, w) of noise, whose patches are of different brightness."""
    generator = torch.Generator().manual_seed(GENERATOR)
    light = torch.randn(*shape[:-3], 1, shape[-2] // 16, shape[-1] // 16, generator=generator)
    light = light.repeat_interleave(16, -2).repeat_interleave(16, -1)
    return 0.5 * torch.randn(shape, generator=generator) + light


def clips() -> Tensor:
    """Clips (B, frames, 3, h, w) whose frames come in pairs: the brightness of a patch is that of both."""
    return noise(IMAGES, FRAMES // 2, 3, 64, 64).repeat_interleave(2, 1)


def qwen(depth: int = 4) -> nn.Module:
    config = transformers.Qwen2VLConfig().vision_config
    config.depth, config.embed_dim, config.num_heads, config.hidden_size, config.patch_size = depth, 48, 4, 48, 16
    return transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(config)


def siglip2() -> nn.Module:
    sizes = {name: value for name, value in HF.items() if name != "image_size"}
    return transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes, num_patches=16))


def idefics3() -> nn.Module:
    config = type(transformers.Idefics3Config().vision_config)(**HF)
    return transformers.models.idefics3.modeling_idefics3.Idefics3VisionTransformer(config)


def vivit() -> nn.Module:
    sizes = {name: value for name, value in HF.items() if name != "patch_size"}
    return transformers.VivitModel(transformers.VivitConfig(**sizes, num_frames=FRAMES, tubelet_size=[2, 16, 16]))


def patches_of(images: Tensor) -> dict[str, Any]:
    """What Qwen2-VL's processor makes of images that it neither resizes nor normalises."""
    processor = transformers.Qwen2VLImageProcessor(patch_size=16, do_resize=False, do_rescale=False, do_normalize=False)
    made = processor(images=list(images), return_tensors="pt")
    return {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}


def padded_patches_of(images: Tensor) -> dict[str, Any]:
    """What SigLIP 2's processor makes of them, padded to 20 patches."""
    squares = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    shapes = torch.tensor([[4, 4]]).expand(len(images), 2)
    return {"pixel_values": nn.functional.pad(squares, (0, 0, 0, 4)), "spatial_shapes": shapes}


def as_pixels(images: Tensor) -> dict[str, Any]:
    return {"pixel_values": images}


def in_tiles(images: Tensor) -> dict[str, Any]:
    """Two tiles of each picture."""
    return {
        "pixel_values": images.unflatten(0, (-1, 2)),
        "pixel_attention_mask": torch.ones(len(images) // 2, 2, 64, 64),
    }


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[[Tensor], dict[str, Any]]]


def pictures() -> Tensor:
    return noise(IMAGES, 3, 64, 64)


CASES: dict[str, Case] = {
    "VideoMAE": (
        lambda: transformers.VideoMAEModel(transformers.VideoMAEConfig(**HF, num_frames=FRAMES)),
        clips,
        as_pixels,
    ),
    "ViViT": (vivit, clips, as_pixels),
    "X-CLIP": (
        lambda: transformers.XCLIPVisionModel(transformers.XCLIPVisionConfig(**HF, num_frames=FRAMES)),
        clips,
        lambda made: as_pixels(made.flatten(0, 1)),  # its processor gives the frames of all clips in a row
    ),
    "Qwen2-VL": (qwen, pictures, patches_of),
    "SigLIP 2": (siglip2, pictures, padded_patches_of),
    "Idefics 3": (idefics3, pictures, in_tiles),
}


@pytest.mark.parametrize("name", CASES)
def test_planted_neurons_are_found_by_what_the_processor_makes(name: str) -> None:
    make, images_of, processed = CASES[name]
    torch.manual_seed(0)
    model, images = make().eval(), images_of()
    planted = plant(model, images, outlier_fraction=0.05)
    inputs = processed(images)
    found = testreg.diagnose(model, inputs, progress=False)
    assert found.images == IMAGES
    assert found.kind == "movable"
    assert found.outliers is not None
    assert (found.outliers.onset_block, found.outliers.onset_part) == (2, "MLP")
    neurons = testreg.calibrate(model, inputs, held_out=16, progress=False)
    assert {block: sorted(units) for block, units in neurons.by_block().items()} == {
        block: sorted(units) for block, units in planted.neurons.items()
    }
    assert neurons.calibration.verified_at[0].effect.remaining == 0
    with testreg.patched(model, neurons.by_block()):
        assert testreg.diagnose(model, inputs, progress=False).kind == "none"


def test_a_position_of_a_clip_has_a_time() -> None:
    """A patch whose position embedding stands out, in the second pair of frames."""
    torch.manual_seed(0)
    model: Any = vivit().eval()
    images = clips()[:10]
    plant(model, images, num_neurons=0)
    with torch.no_grad():
        model.embeddings.position_embeddings[0, 1 + 16 + 4 + 2] += 40
    found = testreg.diagnose(model, images, progress=False)
    assert found.num_frames == FRAMES
    assert found.outliers is not None
    assert found.outliers.positions == [(1, 1, 2)]
    assert [each.position for each in found.embedding_positions] == [(1, 1, 2)]
    assert "10 clips of 4 frames at 64 x 64" in repr(found)
    assert any(note.startswith("Time 1, row 1, column 2 is an outlier") for note in found.notes)
    without = testreg.diagnose(model, images, ignored=[(1, 1, 2)], progress=False)
    assert without.outliers is None
    assert testreg.diagnose(model, images, ignored=[(0, 1, 2), (1, 2)], progress=False).outliers is not None


def test_neighbours_in_space_and_time() -> None:
    """Of 2 x 2 x 2 patches, each has three neighbours, one of them in time."""
    patches = torch.tensor([1.0, 0.0]).repeat(1, 8, 1)
    patches[0, 0] = torch.tensor([0.0, 1.0])
    found = neighbour_cosine(patches, patches.norm(dim=-1), (2, 2, 2))[0]
    expected = torch.ones(8)
    expected[0] = 0
    expected[[1, 2, 4]] = 2 / 3
    torch.testing.assert_close(found, expected)
    far = far_queries(torch.tensor([0, 1, 13]), (3, 2, 2), 1)  # no patch, the first, and one behind the last
    assert far[0].all()
    assert far[2].all()
    assert far[1].tolist() == [False] * 8 + [True] * 4


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize(
    "make", [qwen, lambda: transformers.PixtralVisionModel(transformers.PixtralVisionConfig(**HF | {"image_size": 96}))]
)
def test_packed_images_are_arranged_as_each_alone(make: Callable[[], nn.Module], registers: int) -> None:
    """Tokens and attention of a batch are those of each image alone, and patches lie row by row."""
    torch.manual_seed(0)
    model: Any = make().eval()
    tower = find_tower(model)
    images = noise(3, 3, 64, 96)
    if registers:
        testreg.patch(model, {1: [3], 2: [7]}, num_registers=registers)

    def seen(batch: Tensor) -> tuple[Tensor, Tensor]:
        tokens: list[Tensor] = []
        weights: list[Tensor] = []
        attention = SampledAttention(tower, batch, lambda block, given, *others: weights.append(given))
        blocks = [each.module for each in tower.blocks]
        with (
            recording_inputs(blocks, lambda index, entered: attention.begin(index)),
            recording_outputs(blocks, lambda index, left: (attention.end(), tokens.append(left))),
            attention,
        ):
            tower.run(batch)
        return tower.arranged(tokens[1], batch), torch.stack(weights)

    together, attention = seen(images)
    assert together.shape == (3, 24, tower.width)
    assert attention.shape[-1] == 24 + registers
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    for i in range(3):
        alone, own = seen(images[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(attention[:, i : i + 1], own, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_patches_of_packed_images_lie_row_by_row() -> None:
    """A patch that alone is bright is, in front of the blocks, where the grid says."""
    tower = find_tower(qwen(2).eval())
    images = torch.zeros(1, 3, 64, 96)
    images[:, :, 16:32, 48:64] = 5  # row 1, column 3 of 4 x 6
    given: list[Tensor] = []
    with tower.blocks[0].module.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    ):
        tower.run(images)
    assert int(tower.arranged(given[0], images)[0].norm(dim=-1).argmax()) == 1 * 6 + 3


def test_maps_of_clips_and_packed_images_are_refused() -> None:
    for name, message in (("VideoMAE", r"but clips \(B, 4, 3, h, w\)"), ("Qwen2-VL", "packs them in one sequence")):
        make, images_of, _ = CASES[name]
        model = make().eval()
        for draw in (testreg.features, testreg.attention):
            with pytest.raises(ValueError, match=f"takes no batch of images .*{message}.* draws no maps"):
                draw(model, images_of())


def test_images_of_several_shapes_are_calibrated_on() -> None:
    """Packed patches of 4 x 4 and 4 x 6 in one go."""
    torch.manual_seed(0)
    model = qwen().eval()
    wide = noise(IMAGES, 3, 64, 96)
    plant(model, wide, outlier_fraction=0.05)
    made = [patches_of(wide[:6]), patches_of(noise(6, 3, 64, 64))]
    assert testreg.diagnose(model, made, progress=False).images == 12


def test_what_a_packed_video_shows_at_one_time_is_an_image() -> None:
    """Two pairs of frames and three, of 4 x 4 patches; each pair is embedded as in the whole video."""
    torch.manual_seed(0)
    model: Any = qwen(2).eval()
    tower = find_tower(model)
    pixels, grid = torch.randn(5 * 16, 3 * 2 * 16 * 16), torch.tensor([[2, 4, 4], [3, 4, 4]])
    inputs = {"pixel_values_videos": pixels, "video_grid_thw": grid}
    apart = tower.separate(inputs)
    assert [tuple(image.shape) for image in apart] == [(2, 3, 64, 64)] * 5
    seen: list[Tensor] = []
    with torch.no_grad(), model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output)):
        model(pixels, grid)
        tower.run(torch.stack(apart))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    assert testreg.diagnose(model, inputs, progress=False).images == 5


def test_plain_towers_are_not_changed() -> None:
    tower = find_tower(build("hf_vit"))
    tokens, images = torch.randn(2, 17, 48), torch.zeros(2, 3, 64, 64)
    assert tower.arranged(tokens, images) is tokens
