"""Reads clips for models that take videos: from folders of frames, from animations, and from frames in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from testreg.files import regular_file
from testreg.io.decoding import FORMATS, decoded
from testreg.io.names import CLIP_KINDS
from testreg.io.sources import image_paths, is_named_as_image, listed_paths

if TYPE_CHECKING:
    from PIL.Image import Image

ANIMATIONS = frozenset({".gif", ".webp"})  # suffixes of files that may hold several frames
MAKING_THEM = "ffmpeg -i video.mp4 clips/video/%05d.jpg"  # how to make a folder of frames from a video


def clip_paths(clips: str) -> list[Path]:
    """The paths of the clips in a folder (sub-folders that hold frames, and animations), or those in a list (.txt).

    Raises:
        FileNotFoundError, ValueError: the folder or list does not exist, or has no clip.
    """
    folder = Path(clips)
    if clips.startswith("hf-dataset:") or clips.endswith(".tar"):
        raise ValueError(f"clips are not read from {clips}: give {CLIP_KINDS}")
    if folder.suffix.lower() == ".txt" and not folder.is_dir():
        return listed_paths(folder, Path.exists)
    paths = image_paths(folder)
    animations = [path for path in paths if path.suffix.lower() in ANIMATIONS and is_animation(path)]
    frames = [path for path in paths if path not in set(animations)]
    clips_of_frames = {path.parent for path in frames} - {folder}
    if not animations and not clips_of_frames:
        raise ValueError(
            f"{clips} holds {len(frames)} single images, and the model takes clips: give {CLIP_KINDS} ({MAKING_THEM})"
        )
    return sorted([*animations, *clips_of_frames])


def is_animation(path: Path) -> bool:
    """Whether an image file has several frames. True for an unreadable file, so that reading it reports the error."""
    from PIL import Image

    try:
        with Image.open(regular_file(path), formats=FORMATS) as image:
            return getattr(image, "n_frames", 1) > 1
    except OSError:
        return True


def read_clip(clip: Any, num_frames: int) -> list[Image]:
    """Read `num_frames` frames of a clip, evenly spaced in time.

    Args:
        clip: a folder of frames in the order of their names, an animation, a list of images, or uint8 pixels: an array
            (frames, h, w, 3) or a tensor (frames, 3, h, w).

    Raises:
        OSError: the clip is not readable, or has fewer than two frames.
        ValueError: `clip` is of another type.
    """
    if isinstance(clip, str | os.PathLike) and not Path(clip).is_dir():
        return _frames_of_animation(Path(clip), num_frames)
    frames: Sequence[Any]
    if isinstance(clip, str | os.PathLike):
        frames = [path for path in sorted(Path(clip).iterdir()) if is_named_as_image(path)]
    elif isinstance(clip, list | tuple) or (isinstance(clip, Tensor | np.ndarray) and clip.ndim == 4):
        frames = clip  # type: ignore[assignment]
    else:
        raise ValueError(f"the model takes clips, and not {type(clip).__name__}: give {CLIP_KINDS}")
    return [decoded(frames[number]) for number in middle_frames(len(frames), num_frames, clip)]


def _frames_of_animation(path: Path, num_frames: int) -> list[Image]:
    """Frames of a .gif or .webp, evenly spaced in time."""
    from PIL import Image, ImageSequence

    with Image.open(regular_file(path), formats=FORMATS) as image:
        numbers = middle_frames(getattr(image, "n_frames", 1), num_frames, path)
        # A frame of a GIF may only store what changed since the one before it, so all frames are read in order.
        frames = {i: each.convert("RGB") for i, each in enumerate(ImageSequence.Iterator(image)) if i in numbers}
    return [frames[number] for number in numbers]


def middle_frames(length: int, count: int, clip: Any = "a clip") -> list[int]:
    """The indices of `count` frames: those in the middle of `count` equal parts of a clip of `length` frames.

    Clips of fewer than `count` frames repeat frames. `clip` is named in the error.

    Raises:
        OSError: the clip has fewer than two frames.
    """
    if length < 2:
        name = clip if isinstance(clip, str | os.PathLike) else f"a {type(clip).__name__}"
        raise OSError(f"{name} has {length} frames, which is no clip")
    return [(2 * part + 1) * length // (2 * count) for part in range(count)]
