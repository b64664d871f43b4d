"""Diagnose a model in one pass over images: does it have outliers, where do they come from, can registers remove them?

*Outliers* are patch tokens with huge norms. *Registers* are extra tokens; moving the activations of certain MLP neurons
onto them removes outliers that these neurons make.
"""

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
    """Measure the outliers of `model` in one pass over `images`, and tell whether registers can remove them.

    The processes of torch.distributed share the images: all must call this function, and all get the same result.

    Example:
        >>> diagnosis = testreg.diagnose(model, "photos/", progress=False)
        >>> diagnosis.verdict
        'outliers from block 2 (MLP), ... % of patches, movable'
        >>> diagnosis.kind, diagnosis.outliers.block
        ('movable', 3)

    Args:
        model: a vision tower, or any model that contains one. It is run on the device that it is on. A patched model is
            measured with its registers at work, but the registers themselves are not measured: it should have no
            outliers left.
        images: a folder, a Dataset, or any iterable of PIL images or tensors, or of what the model's processor returns
            (see `testreg.io.images.ImageStream`). A model for videos takes clips in place of images.
        transform: a function PIL image -> tensor (3, h, w), or frames -> clip (frames, 3, h, w); None takes the
            preprocessing that the model's library names.
        batch_size: how many images are run at once.
        num_images: how many images are read, at most; None reads all.
        rule: decides which patches are outliers; None uses `testreg.OutlierRule()`.
        block: the block (0-based) whose outliers are judged; None takes the block after which they stand out most.
        ignored: positions (row, column), in clips (time, row, column), at which patches never count as outliers, such
            as the fixed positions of another diagnosis.
        workers: how many processes decode images; with 0, this process decodes them.
        seed: the seed of the order in which images are read.
        progress: whether to show a progress bar.

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
        observations = observe(tower, batches, rule, ignored=ignored, on_images=bar.update)
    observations.unreadable_images = stream.num_skipped
    of_processes = all_gather(observations)
    if all(each.image_size is None for each in of_processes):
        skipped = sum(each.unreadable_images for each in of_processes)
        unreadable = f": all {skipped} were unreadable" if skipped else ""
        raise ValueError(f"no image could be read from {stream.source}{unreadable}")
    return conclude(model, of_processes, rule, block=block)
