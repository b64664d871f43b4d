"""Clips as models for videos take them, and what processors of transformers make of images and clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny import HF
from torch import Tensor, nn

from testreg.families import find_tower
from testreg.io.clips import clip_paths, middle_frames, read_clip
from testreg.io.images import ImageStream
from testreg.io.sources import check_images

FRAMES = 4


def videomae() -> nn.Module:
    return transformers.VideoMAEModel(transformers.VideoMAEConfig(**HF, num_frames=FRAMES)).eval()


def frame(brightness: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (brightness,) * 3)


def brightness(frames: Any) -> Tensor:
    """A transform that makes each frame a pixel of its own."""
    return torch.stack([torch.full((3, 1, 1), each.getpixel((0, 0))[0] / 100) for each in frames])


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Eight frames in a folder, an animation of three, and a photograph beside them."""
    (tmp_path / "a").mkdir()
    for i in range(8):
        frame(10 * i).save(tmp_path / "a" / f"{i:02}.png")
    frame(100).save(tmp_path / "b.gif", save_all=True, append_images=[frame(110), frame(120)])
    frame(1).save(tmp_path / "photo.png")
    return tmp_path


def test_frames_are_spaced_evenly() -> None:
    assert middle_frames(8, 4) == [1, 3, 5, 7]
    assert middle_frames(3, 4) == [0, 1, 1, 2]
    assert middle_frames(4, 4) == [0, 1, 2, 3]
    with pytest.raises(OSError, match=r"a\.gif has 1 frames, which is no clip"):
        middle_frames(1, 4, Path("a.gif"))


def test_a_folder_of_clips(clips: Path) -> None:
    assert [path.name for path in clip_paths(str(clips))] == ["a", "b.gif"]
    stream = ImageStream(str(clips), brightness, tower=find_tower(videomae()))
    found = {round(100 * float(clip[0, 0, 0, 0])): clip for _, clip in stream.numbered()}
    assert (100 * found[10][:, 0, 0, 0]).round().tolist() == [10, 30, 50, 70]
    assert (100 * found[100][:, 0, 0, 0]).round().tolist() == [100, 110, 110, 120]


def test_a_list_of_clips(clips: Path) -> None:
    (clips / "clips.txt").write_text("# two\nb.gif\na\n")
    assert [path.name for path in clip_paths(str(clips / "clips.txt"))] == ["b.gif", "a"]
    check_images(clips / "clips.txt")  # the command line asks this before the model is known
    (clips / "clips.txt").write_text("c.gif\n")
    with pytest.raises(FileNotFoundError, match=r"there is no .*c\.gif"):
        clip_paths(str(clips / "clips.txt"))


def test_photographs_are_no_clips(clips: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds 8 single images, and the model takes clips: give a folder of clips.*ffmpeg"
    ):
        clip_paths(str(clips / "a"))
    with pytest.raises(ValueError, match=r"clips are not read from x\.tar"):
        clip_paths("x.tar")
    with pytest.raises(ValueError, match="the model takes clips, and not Image"):
        read_clip(frame(1), FRAMES)


def test_clips_in_memory_are_the_same_in_each_form() -> None:
    frames = [frame(10 * i) for i in range(8)]
    pixels = np.stack([np.asarray(each) for each in frames])  # (frames, h, w, 3)
    tower, made = find_tower(videomae()), brightness(frames[1::2])
    forms: list[Any] = [
        [frames, frames],
        [pixels, pixels],
        [torch.from_numpy(pixels).permute(0, 3, 1, 2)] * 2,
        torch.stack([made, made]),
        [(made, 0), (made, 1)],
        {"pixel_values": torch.stack([made, made])},
        [{"pixel_values": made[None]}, {"pixel_values": made}],
        torch.utils.data.DataLoader([{"pixel_values": made}] * 2, batch_size=2),
    ]
    for form in forms:
        found = [clip for _, clip in ImageStream(form, brightness, tower=tower).numbered()]
        assert len(found) == 2
        for clip in found:
            assert torch.equal(clip, made)


def test_clips_of_another_length_and_images_are_refused() -> None:
    tower = find_tower(videomae())
    for images, message in (
        ([torch.zeros(3, 3, 8, 8)], r"clip 0 of list is .*takes float tensors \(4, 3, h, w\)"),
        (torch.zeros(2, 3, 8, 8), r"takes no batch of images \(B, 3, h, w\), but clips \(B, 4, 3, h, w\)"),
    ):
        with pytest.raises(ValueError, match=message):
            list(ImageStream(images, tower=tower).numbered())


def qwen() -> Any:
    config = transformers.Qwen2VLConfig().vision_config
    config.depth, config.embed_dim, config.num_heads, config.hidden_size, config.patch_size = 2, 32, 4, 32, 4
    return transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(config).eval()


def siglip2() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**sizes, patch_size=4, num_patches=16)
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["Qwen2-VL", "SigLIP 2"])
def test_what_packed_and_padded_processors_return_is_taken_apart(name: str) -> None:
    """The tower embeds the same patches of the images as of the processor's output itself."""
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 255, (16, width, 3), np.uint8)) for width in (24, 16)]
    if name == "Qwen2-VL":
        model = qwen()
        inputs = transformers.Qwen2VLImageProcessor(patch_size=4, do_resize=False)(images=images, return_tensors="pt")
        arguments = [inputs["image_grid_thw"]]
    else:
        model = siglip2()
        processor = transformers.Siglip2ImageProcessor(patch_size=4, max_num_patches=24)
        inputs = processor(images=images, return_tensors="pt")
        arguments = [inputs["pixel_attention_mask"], inputs["spatial_shapes"]]
    tower, given = find_tower(model), list[Tensor]()
    embedding: Any = tower.embedding
    with embedding.register_forward_pre_hook(lambda module, args: given.append(args[0].squeeze(0))):
        model(inputs["pixel_values"], *arguments)
        for _, image in ImageStream(inputs, tower=tower).numbered():
            tower.run(image[None])
    whole, *apart = given
    if name == "SigLIP 2":
        whole = whole[inputs["pixel_attention_mask"].bool()]  # without padding
    assert len(apart) == 2
    torch.testing.assert_close(torch.cat(apart), whole)


def test_tiles_are_images_of_their_own() -> None:
    clip = find_tower(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF)))
    tiles = torch.arange(1.0, 5).view(2, 2, 1, 1, 1).expand(2, 2, 3, 8, 8).clone()
    tiles[1, 1] = 0  # fills up
    found = [float(image[0, 0, 0]) for _, image in ImageStream({"pixel_values": tiles}, tower=clip).numbered()]
    assert found == [1, 2, 3]
    mask = torch.ones(2, 2, 8, 8)
    mask[0, 1, :, 4:] = 0
    mask[1, 1] = 0
    inputs = {"pixel_values": tiles, "pixel_attention_mask": mask}
    assert [tuple(image.shape) for image in clip.separate(inputs)] == [(3, 8, 8), (3, 8, 4), (3, 8, 8)]
    padded = {"pixel_values": torch.ones(2, 3, 8, 8), "image_sizes": [[8, 4], [4, 8]]}
    pixtral = find_tower(transformers.PixtralVisionModel(transformers.PixtralVisionConfig(**HF)))
    assert [tuple(image.shape) for image in pixtral.separate(padded)] == [(3, 8, 4), (3, 4, 8)]
