"""Where the outlier tokens of a model come from, and whether registers would move them: one pass over images."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from testreg.families import find_tower
from testreg.io.images import Images, ImageStream, batched
from testreg.io.preprocessing import OwnTransform, Transform
from testreg.io.processes import all_gather, rank, world_size
from testreg.io.progress import progress_bar
from testreg.measure.conclusion import conclude
from testreg.measure.diagnosis import Diagnosis
from testreg.measure.observation import observe
from testreg.measure.outliers import OutlierRule, Position
from testreg.neurons.notices import warn_of_activation


def diagnose(
    model: nn.Module,
    images: Images,
    *,
    transform: Transform | None = None,
    batch_size: int = 16,
    num_images: int | None = None,
    rule: OutlierRule | None = None,
    block: int | None = None,
    ignored: Collection[Position] = (),
    workers: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Diagnosis:
    """Measure the outlier tokens of `model` in one pass over `images`, and tell whether registers would move them.

    The processes of torch.distributed share the images: all must call this, and all get the same result.

    Example:
        >>> diagnosis = testreg.diagnose(model, "photos/", progress=False)
        >>> diagnosis.verdict
        'outliers from block 2 (MLP), ... % of patches, movable'
        >>> diagnosis.kind, diagnosis.outliers.block
        ('movable', 3)

    Args:
        model: a vision tower, or any model that contains one, on the device that it is on. A patched model is
            measured as it computes, without its registers: there should be no outliers left.
        images: a folder, a Dataset, or any iterable of PIL images or tensors, or of what the model's own processor
            returns (see `testreg.io.images.ImageStream`). Of a model for videos, clips.
        transform: PIL image -> tensor (3, h, w), or frames -> clip (frames, 3, h, w); None takes the preprocessing that
            the model's own library names.
        rule: which patches are outliers.
        block: the block after which the outliers are judged; None for the one where they stand out most.
        ignored: positions (row, column), of clips (time, row, column), that do not count as outliers, such as the fixed
            ones of another diagnosis.

    Raises:
        ValueError: an argument does not fit the model; no image could be read; norms are not finite.
    """
    tower = find_tower(model)
    rule = rule or OutlierRule()
    if block is not None and not 0 <= block < tower.depth:
        raise ValueError(f"block={block} is out of range: the model has {tower.depth} blocks")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    warn_of_activation(model, tower)
    stream = ImageStream(
        images, transform or OwnTransform(model), tower=tower, num_images=num_images, workers=workers, seed=seed
    )
    images_here = (image for _, image in stream.numbered(0, rank(), world_size()))
    batches = batched(images_here, batch_size, by_shape=tower.family.keeps_shape)
    with progress_bar("diagnosing", stream.length, progress) as bar:
        seen = observe(tower, batches, rule, ignored=ignored, on_images=bar.update)
    seen.unreadable_images = stream.num_skipped
    all_seen = all_gather(seen)
    if all(each.image_size is None for each in all_seen):
        skipped = sum(each.unreadable_images for each in all_seen)
        unreadable = f": all {skipped} were unreadable" if skipped else ""
        raise ValueError(f"no image could be read from {stream.source}{unreadable}")
    return conclude(model, all_seen, rule, block=block)
