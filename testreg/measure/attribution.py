"""Attribute the outliers, patches with huge norms, to MLP neurons of all blocks with one backward pass.

Some neurons trigger others: they write little to the residual stream themselves, but cause what the others write. What
a neuron writes and what it triggers must both count. Attribution patching (Nanda 2023; Syed et al., arXiv 2310.10348)
does that. It takes the derivative of the outliers' *excess norm* (how far their norms are above normal) with respect to
a neuron's activation. This derivative is multiplied by how far the activation at the outlier is from the activation at
normal patches. To first order, the product is what the outliers would lose of their excess norm if the neuron were as
active at them as at normal patches.

What makes a trigger fire is a cause as well, such as a neuron for flat background, which the whole network needs. Such
a neuron must not be moved to a register. So a second figure tells how much of a neuron's activation is at outliers.

Shapes: L blocks with H neurons each; B images with T tokens each, N of which are patches.
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

MEMORY = 2**30  # roughly how many bytes the activations of one backward pass may take
TENSORS_PER_BLOCK = 24  # roughly how many tensors (B, T, C) a block keeps for the backward pass


@contextmanager
def recorded_graph(tower: Tower) -> Iterator[tuple[list[Tensor], list[list[Tensor]]]]:
    """Within the context, a forward can be differentiated, and fills two lists.

    The first has the tokens after each block, as the block returns them. The second has a list for each block, with the
    input of the second linear of each of its MLPs. `Tower.arranged` brings them into the form (B, T, channels). Some
    inputs have other channels in front of the neurons' hidden activations (`Mlp.first`).
    """
    tokens: list[Tensor] = []
    hidden: list[list[Tensor]] = [[] for _ in tower.blocks]
    mlps = [(index, mlp) for index, block in enumerate(tower.blocks) for mlp in block.mlps]

    def differentiable(number: int, activation: Tensor) -> Tensor:
        """Record the input of an MLP's second linear, and make sure that it has a gradient."""
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
    """How far each neuron causes the outliers of each image."""

    share: Tensor
    """The share of the image's excess norm that the neuron causes, to first order, directly and through later blocks,
    (B, L, H); zero for images without outliers."""
    energy_at_outliers: Tensor
    """The neuron's squared activation, summed over the patches that are outliers after at least one of the blocks that
    count, (B, L, H). These patches are the same for all neurons."""
    energy: Tensor
    """The neuron's squared activation, summed over all patches, (B, L, H); zero for images without outliers."""
    outlier: Tensor
    """Whether a patch is an outlier after each block, (L, B, N); False after blocks that the detection does not
    count."""


def attribution_of(tower: Tower, images: Tensor, detection: Detection, *, norms: Tensor | None = None) -> Attribution:
    """Attribute the outliers of images (B, 3, h, w) to neurons.

    The largest normal norm of an image after a block is median + k * 1.4826 * MAD of its patches' norms
    (`OutlierRule.normal`). The excess of a patch is how far its norm is above this largest normal norm, as a fraction
    of it. An image's excess after a block is the sum over its outliers after this block. A neuron's share is the part
    of the image's excess that comes from how far the neuron's activation at the outliers is from its activation at
    normal patches. It is averaged over the blocks after which the image has outliers that count.

    Images without outliers take a forward, or no time if `norms` are given.

    Args:
        norms: the norms of the tokens (L, B, T), as `token_norms` returns them; with None, they are measured.

    Raises:
        ValueError: norms are not finite; the model cannot be differentiated.
    """
    norms = token_norms(tower, images) if norms is None else norms
    check_finite(norms, images)
    outlier = counted_outliers(tower, images, norms, detection)
    share, energy_at_outliers, energy = torch.zeros(3, len(images), tower.depth, tower.mlp_width)
    attribution = Attribution(share, energy_at_outliers, energy, outlier)
    size = outlier.shape[-1] * tower.depth * tower.width
    batch_size = max(1, MEMORY // (4 * TENSORS_PER_BLOCK * size))
    with_outliers = outlier.any(0).any(-1).cpu().nonzero().flatten()  # the indices of images with outliers
    for rows in with_outliers.split(batch_size) if len(with_outliers) else ():
        _attribute(tower, images[rows], outlier[:, rows], detection, attribution, rows)
    return attribution


def counted_outliers(tower: Tower, images: Tensor, norms: Tensor, detection: Detection) -> Tensor:
    """Whether a patch is an outlier after each block, (L, B, N); False after blocks that the detection does not count.

    Args:
        images: (B, 3, h, w).
        norms: the norms of the images' tokens after each block, (L, B, T).
    """
    patches = tower.patches(images)
    outlier = detection.outliers(norms[..., : patches.stop], tower.num_prefix, tower.grid(images))[..., patches]
    return outlier & detection.counts(tower.depth).to(outlier.device)[:, None, None]


def _attribute(
    tower: Tower, images: Tensor, outlier: Tensor, detection: Detection, attribution: Attribution, rows: Tensor
) -> None:
    """Fill the rows of an attribution that belong to some images, which all have outliers.

    Args:
        images: (B, 3, h, w).
        outlier: whether a patch is an outlier, (L, B, N).
        rows: the index of each image in the attribution, (B,).
    """
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
    is_outlier = outlier.any(0)  # (B, N), after some block
    image, patch = is_outlier.nonzero(as_tuple=True)  # (n,) each, for n outliers
    is_normal = ~is_outlier
    of_mean = is_normal.float() / is_normal.sum(-1, keepdim=True).clamp(min=1)  # weights of the mean of normal patches
    # Weights by which squared activations are summed: over outliers, and over all patches.
    of_energies = torch.stack([is_outlier.float(), is_outlier.any(-1, keepdim=True).expand_as(of_mean).float()], 1)
    with autocast_off(of_mean.device):
        for i, (block, activations) in enumerate(zip(tower.blocks, hidden, strict=True)):
            shares, energies = [], []
            for mlp, activation in zip(block.mlps, activations, strict=True):
                values, slopes = (
                    tower.arranged(each.detach(), images)[:, patches, mlp.first :]
                    for each in (activation, next(gradients))
                )  # (B, N, H)
                values = values.float()
                mean = of_mean.unsqueeze(1) @ values  # (B, 1, H)
                lost = slopes[image, patch].float() * (values[image, patch] - mean[image, 0])  # (n, H)
                shares.append(lost.new_zeros(len(images), lost.shape[-1]).index_add_(0, image, lost))
                energies.append(of_energies @ values.square())  # (B, 2, H)
            attribution.share[rows, i] = torch.cat(shares, -1).cpu()
            attribution.energy_at_outliers[rows, i], attribution.energy[rows, i] = (
                torch.cat(energies, -1).cpu().unbind(1)
            )


def _weight(norms: Tensor, outlier: Tensor, detection: Detection) -> Tensor:
    """The weight (L, B, N) of each patch's norm in the sum that is differentiated; zero if the patch is no outlier.

    The weighted sum of an image's norms is, up to a constant, its relative excess. This is the excess after a block
    divided by its present value, averaged over the blocks with outliers.
    """
    normal = detection.rule.normal(norms)
    excess = torch.where(outlier, norms / normal - 1, 0.0).sum(-1, keepdim=True)  # (L, B, 1)
    num_blocks = (excess > 0).sum(0, keepdim=True).clamp(min=1)
    return torch.where(outlier, 1 / (normal * excess.clamp(min=1e-12) * num_blocks), 0.0)


def _gradients(norms: Tensor, weight: Tensor, activations: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradient of a weighted sum of norms with respect to each activation; zeros where the sum does not use it."""
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
