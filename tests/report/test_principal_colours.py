"""Features as colours: one basis for all images without the outliers, and a background that is told apart."""

from __future__ import annotations

import torch
from sklearn.decomposition import PCA
from torch import Tensor

from testreg.report.map_figures import principal_colours


def scene() -> tuple[Tensor, Tensor]:
    """Features (3, 6, 6, 8) of a background and an object in its middle, which differ most of all; and where it is."""
    generator = torch.Generator().manual_seed(0)
    features = 1 + 0.1 * torch.randn(3, 6, 6, 8, generator=generator, dtype=torch.float64)
    is_object = torch.zeros(3, 6, 6, dtype=torch.bool)
    is_object[:, 2:5, 2:4] = True
    features[..., 0] += 3 * is_object
    return features, is_object


def test_colours_are_the_principal_components_of_the_patches_that_are_no_outliers() -> None:
    features, _ = scene()
    with_outlier = features.clone()
    with_outlier[1, 0, 0] *= 30
    found, second = principal_colours([features, with_outlier])
    fitted = torch.cat([features.flatten(0, 2), with_outlier.flatten(0, 2)[torch.arange(108) != 36]])
    scores = torch.from_numpy(PCA(3).fit(fitted.numpy()).transform(features.flatten(0, 2).numpy()))
    colours = found.flatten(0, 2)
    for i in range(3):
        inside = (colours[:, i] > 0) & (colours[:, i] < 1)
        assert inside.sum() > 90
        assert torch.corrcoef(torch.stack([colours[inside, i], scores[inside, i]]))[0, 1].abs() > 0.99999
    same = torch.arange(108) != 36
    torch.testing.assert_close(second.flatten(0, 2)[same], colours[same])


def test_the_background_is_where_the_borders_lie() -> None:
    features, is_object = scene()
    (found,) = principal_colours([features], foreground=True)
    assert not found[~is_object].any()
    assert found[is_object].any(-1).float().mean() > 0.9
    (mirrored,) = principal_colours([-features], foreground=True)  # whatever the sign of the component
    assert not mirrored[~is_object].any()
