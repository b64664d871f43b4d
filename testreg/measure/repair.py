"""Remove outliers at fixed positions, which position embeddings make and no neurons: these embeddings are replaced.

The embeddings of a grid of positions vary smoothly. One that stands out, with a norm many times that of the others, is
replaced by the mean of its neighbours, in the weights themselves. So nothing is computed in addition, and a tower that
interpolates its position embeddings to other sizes interpolates repaired ones.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testreg.families import PositionEmbedding, Tower, find_tower, position_embedding
from testreg.measure.diagnosis import positions_in_words
from testreg.measure.outliers import OutlierRule

M = TypeVar("M", bound=nn.Module)

_REPAIR = "_testreg_repair"  # attribute of a repaired tower
_log = logging.getLogger("testreg")


@dataclass(frozen=True)
class _Repair:
    """What `repair` did to a tower; kept on it until `unrepair`."""

    numbers: Tensor
    """Which positions were replaced, (n,)."""
    former: Tensor
    """Their own embeddings, (n, C)."""
    put: Tensor
    """The embeddings that were put in their place, (n, C)."""


def standing_out(embedding: PositionEmbedding) -> Tensor:
    """Which positions (N,) have an embedding that stands out: the rule for outliers, applied to their norms."""
    norms = embedding.patches.float().norm(dim=-1)
    return norms > OutlierRule().limit(norms)


def positions_of(numbers: Tensor, embedding: PositionEmbedding) -> list[tuple[int, int]]:
    """Rows and columns of positions, by their numbers."""
    return [divmod(number, embedding.grid[1]) for number in numbers.tolist()]


def repair(model: M) -> M:
    """Replace position embeddings that stand out by the mean of their neighbours, in place.

    They make outliers at fixed positions, which registers do not move; `diagnose` says whether a model has any. An
    embedding stands out if its norm exceeds the limit of `OutlierRule` among those of all positions. Its neighbours are
    the eight around it, without those that stand out themselves. The weights are changed, and no key of the state_dict:
    every way to save the model keeps the repair. `patch` and `repair` go in any order; calibrate the repaired model.

    A network may use such a position as a sink of attention, and need it: compare its outputs before and after.

    Example:
        >>> with torch.no_grad():
        ...     _ = model.pos_embed[0, 6].mul_(300)
        >>> testreg.diagnose(model, images, progress=False).notes[-1]
        'A position embedding of norm ..., ... x the median, stands out at (1, 1) of 4 x 4: testreg.repair(model) ...'
        >>> repaired = testreg.repair(model)

    Returns:
        The same object.

    Raises:
        TypeError, ValueError: the model has no position embeddings that testreg knows, or none that stands out. Nothing
            has been changed then.
        RuntimeError: the model is repaired already.
    """
    tower = find_tower(model)
    name = f"{type(tower.module).__name__} ({tower.family.name})"
    if is_repaired(tower):
        raise RuntimeError("the model is already repaired: testreg.unrepair(model) undoes it")
    embedding = position_embedding(tower)
    if embedding is None:
        raise ValueError(
            f"{name} has no learned position embeddings of a grid of patches that testreg can read, so that there is "
            "nothing to repair. In a family of your own, testreg.Family(positions=...) says where they are"
        )
    where = standing_out(embedding)
    if not where.any():
        norms = embedding.patches.float().norm(dim=-1)
        raise ValueError(
            f"no position embedding of {name} stands out (the largest norm is {norms.max() / norms.median():.2f} x the "
            "median), so that there is nothing to repair: testreg.diagnose(model, images) says where outliers come from"
        )
    numbers = where.nonzero().flatten()
    former = embedding.patches[numbers].clone()
    on_grid = (embedding.patches.float().unflatten(0, embedding.grid), where.unflatten(0, embedding.grid))
    embedding.replace(numbers, filled(*on_grid).flatten(0, 1)[numbers])
    record = _Repair(numbers, former, embedding.patches[numbers].clone())
    vars(tower.module)[_REPAIR] = record
    rows, columns = embedding.grid
    _log.info(
        "repaired %s: position embeddings at %s of %d x %d are the mean of their neighbours",
        name,
        positions_in_words(positions_of(numbers, embedding)),
        rows,
        columns,
    )
    return model


def unrepair(model: M) -> M:
    """Undo `repair`; the model is then bit for bit what it was. Returns the same object.

    A model that was saved after the repair, and loaded, is an ordinary model with other weights: load the original.

    Example:
        >>> with torch.no_grad():
        ...     _ = model.pos_embed[0, 6].mul_(300)
        >>> testreg.unrepair(testreg.repair(model)) is model
        True

    Raises:
        RuntimeError: the model is not repaired, or its embeddings were changed since.
    """
    tower = find_tower(model)
    embedding = position_embedding(tower)
    if embedding is None or not is_repaired(tower):
        raise RuntimeError(
            "the model is not repaired, or its position embeddings were changed since (training, load_state_dict), so "
            "that the former ones no longer belong to it: load the original model"
        )
    record: _Repair = vars(tower.module)[_REPAIR]
    embedding.replace(record.numbers, record.former)
    delattr(tower.module, _REPAIR)
    return model


def is_repaired(tower: Tower) -> bool:
    """Whether `repair` replaced position embeddings of a tower, and what it put in their place is still there."""
    record: _Repair | None = vars(tower.module).get(_REPAIR)
    embedding = position_embedding(tower)
    if record is None or embedding is None:
        return False
    here = embedding.patches[record.numbers.to(embedding.patches.device)]
    return torch.equal(here, record.put.to(here))


def filled(values: Tensor, where: Tensor) -> Tensor:
    """Values (h, w, C) on a grid, replaced where the mask `where` (h, w) is true.

    Each of these gets the mean of those of its eight neighbours where the mask is false. If it is true at all of them,
    it gets the mean of the neighbours that were replaced before it.
    """
    known, replaced = ~where, values.movedim(-1, 0) * ~where  # (C, h, w)
    window = values.new_ones(1, 1, 3, 3)
    while not known.all():
        count = F.conv2d(known[None, None].to(values), window, padding=1)[0]
        total = F.conv2d(replaced.unsqueeze(1), window, padding=1).squeeze(1)
        reached = ~known & (count[0] > 0)
        replaced = torch.where(reached, total / count.clamp(min=1), replaced)
        known = known | reached
    return replaced.movedim(0, -1)
