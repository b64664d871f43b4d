"""Attribute the outliers to MLP neurons, of all blocks at once, with one backward pass.

A neuron that triggers others writes little itself. By what it writes it would score next to nothing, and yet it causes
all that follows. Attribution patching (Nanda 2023; Syed et al., arXiv 2310.10348) counts both effects. It takes the
derivative of the outliers' excess norm with respect to a neuron's activation, times how far the activation at the
outlier is from that at normal patches. To first order, that is the excess which outliers would lose if the neuron
behaved at them as it does elsewhere.

The inputs of the triggers are causes as well, such as neurons for a flat background, which the whole network uses. To
move such a neuron would take it from all patches. So a second figure says how much of its activation is at outliers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from testreg.families import Tower
from testreg.measure.hooks import recording_outputs, replacing_inputs
from testreg.measure.outliers import Detection, autocast_off, check_finite, token_norms

MEMORY = 2**30  # bytes that the activations of one backward pass may take, roughly
TENSORS = 24  # tensors as wide as a token that a block keeps for the backward pass, roughly


@contextmanager
def recorded_graph(tower: Tower) -> Iterator[tuple[list[Tensor], list[list[Tensor]]]]:
    """Within the context, a forward can be differentiated. Two lists are filled: the tokens (B, T, C) after each block,
    and for each block the hidden activations (B, T, H) of its MLPs."""
    tokens: list[Tensor] = []
    hidden: list[list[Tensor]] = [[] for _ in tower.blocks]
    mlps = [(index, mlp) for index, block in enumerate(tower.blocks) for mlp in block.mlps]

    def differentiable(number: int, activation: Tensor) -> Tensor:
        if not activation.requires_grad:
            activation = activation.detach().requires_grad_()
        hidden[mlps[number][0]].append(activation)
        return activation

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        recording_outputs([block.module for block in tower.blocks], lambda index, out: tokens.append(out)),
        replacing_inputs([mlp.fc2 for _, mlp in mlps], differentiable),
    ):
        yield tokens, hidden


@dataclass(frozen=True)
class Attribution:
    """How far each neuron causes the outliers of B images, for L blocks of H neurons."""

    share: Tensor
    """(B, L, H): the share of the image's excess norm that the neuron makes, to first order, directly and through later
    blocks; zero for images without outliers."""
    energy_at_outliers: Tensor
    """(B, L, H): its squared activation, summed over the patches that are outliers after some block."""
    energy: Tensor
    """(B, L, H): the same over all patches; zero for images without outliers."""
    outlier: Tensor
    """(L, B, N): which patches are outliers after each block; none after blocks that the detection does not count."""


def attribution_of(tower: Tower, images: Tensor, detection: Detection, *, norms: Tensor | None = None) -> Attribution:
    """Attribute the outliers of images (B, 3, h, w) to neurons.

    The excess of a patch is how far its norm is above the normal one of its image (`OutlierRule.normal`), divided by
    the latter. An image's excess after a block is the sum over its outliers there. A neuron's share is the part of it
    that is due to the neuron's deviation from normal patches, averaged over the blocks with outliers that the detection
    counts.

    Images without outliers cost no more than a forward, and nothing at all if `norms` are given.

    Args:
        norms: the norms of the tokens (L, B, T), as `token_norms` gives them; None: they are measured.

    Raises:
        ValueError: norms are not finite; the model cannot be differentiated.
    """
    norms = token_norms(tower, images) if norms is None else norms
    check_finite(norms, images)
    outlier = counted_outliers(tower, images, norms, detection)
    share, energy_at_outliers, energy = torch.zeros(3, len(images), tower.depth, tower.mlp_width)
    attribution = Attribution(share, energy_at_outliers, energy, outlier)
    size = outlier.shape[-1] * tower.depth * tower.width
    per_batch = max(1, MEMORY // (4 * TENSORS * size))
    having = outlier.any(0).any(-1).cpu().nonzero().flatten()
    for part in having.split(per_batch) if len(having) else ():
        _attribute(tower, images[part], outlier[:, part], detection, attribution, part)
    return attribution


def counted_outliers(tower: Tower, images: Tensor, norms: Tensor, detection: Detection) -> Tensor:
    """Which patches (L, B, N) are outliers after each block; none after blocks that the detection does not count.

    Args:
        images: (B, 3, h, w).
        norms: the norms of their tokens, (L, B, T).
    """
    patches = tower.patches(images)
    outlier = detection.outliers(norms[..., : patches.stop], tower.num_prefix, tower.grid(images))[..., patches]
    return outlier & detection.counts(tower.depth).to(outlier.device)[:, None, None]


def _attribute(
    tower: Tower, images: Tensor, outlier: Tensor, detection: Detection, attribution: Attribution, rows: Tensor
) -> None:
    """Fill these rows (B,) of an attribution, of images (B, 3, h, w) that have outliers (L, B, N)."""
    with recorded_graph(tower) as (tokens, hidden):
        tower.run(images.clone())  # tensors that were made in inference mode cannot be differentiated
        patches = tower.patches(images)
        norms = torch.stack(
            [tower.arranged(each, images).float().norm(dim=-1)[:, patches] for each in tokens]
        )  # (L, B, N)
    if cut := [index for index, each in enumerate(tokens) if not each.requires_grad]:
        raise _not_differentiable(f"block {cut[0]} passes no gradient on")
    flat = [activation for of_block in hidden for activation in of_block]
    gradients = iter(_gradients(norms, _weight(norms.detach(), outlier, detection), flat))
    at = outlier.any(0)  # (B, N)
    image, patch = at.nonzero(as_tuple=True)
    normal = (~at).float() / (~at).sum(-1, keepdim=True).clamp(min=1)  # weights of the mean over normal patches
    weights = torch.stack([at.float(), at.any(-1, keepdim=True).expand_as(at).float()], 1)  # (B, 2, N)
    with autocast_off(at.device):
        for i, (block, activations) in enumerate(zip(tower.blocks, hidden, strict=True)):
            shares, energies = [], []
            for mlp, activation in zip(block.mlps, activations, strict=True):
                values, slopes = (
                    tower.arranged(each.detach(), images)[:, patches, mlp.first :]
                    for each in (activation, next(gradients))
                )  # (B, N, H)
                values = values.float()
                mean = normal.unsqueeze(1) @ values  # (B, 1, H)
                lost = slopes[image, patch].float() * (values[image, patch] - mean[image, 0])  # (n, H)
                shares.append(lost.new_zeros(len(images), lost.shape[-1]).index_add_(0, image, lost))
                energies.append(weights @ values.square())
            attribution.share[rows, i] = torch.cat(shares, -1).cpu()
            attribution.energy_at_outliers[rows, i], attribution.energy[rows, i] = (
                torch.cat(energies, -1).cpu().unbind(1)
            )


def _weight(norms: Tensor, outlier: Tensor, detection: Detection) -> Tensor:
    """Weights (L, B, N) for the norms of outliers; zero for all other patches.

    With these, the weighted sum of an image's norms is, up to a constant, its relative excess: the excess after a block
    divided by its present value, averaged over the blocks with outliers.
    """
    normal = detection.rule.normal(norms)
    excess = torch.where(outlier, norms / normal - 1, 0.0).sum(-1, keepdim=True)  # (L, B, 1)
    num_blocks = (excess > 0).sum(0, keepdim=True).clamp(min=1)
    return torch.where(outlier, 1 / (normal * excess.clamp(min=1e-12) * num_blocks), 0.0)


def _gradients(norms: Tensor, weight: Tensor, activations: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients of a weighted sum of norms with respect to activations; zeros for those that it does not use."""
    try:
        gradients = torch.autograd.grad(norms, activations, weight, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        raise _not_differentiable(str(error).splitlines()[0][:200]) from error
    return [torch.zeros_like(each) if grad is None else grad for each, grad in zip(activations, gradients, strict=True)]


def _not_differentiable(reason: str) -> ValueError:
    return ValueError(
        f"the model cannot be differentiated ({reason}): calibrate it before it is quantized or compiled, or with "
        "score='contribution'"
    )
