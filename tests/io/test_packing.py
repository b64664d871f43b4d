"""Images that take a quarter of their memory, value for value."""

import pytest
import torch

from testreg.io.packing import PackedImage

MEAN, STD = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_image_of_8_bits_is_kept_a_byte_a_value(dtype):
    pixels = torch.randint(0, 256, (3, 40, 60), generator=torch.Generator().manual_seed(0))
    image = ((pixels / 255 - MEAN[:, None, None]) / STD[:, None, None]).to(dtype)
    packed = PackedImage.of(image)
    assert packed.rows.dtype is torch.uint8
    assert packed.rows.shape == (3, 40, 60)
    assert packed.image.dtype is dtype
    assert torch.equal(packed.image, image)


def test_an_image_of_more_values_is_kept_as_it_is():
    image = torch.randn(3, 17, 16, generator=torch.Generator().manual_seed(0))  # 272 values in each channel
    assert PackedImage.of(image).image is image
    few = image.clone()
    few[:, 0] = 1.0  # 257
    assert PackedImage.of(few).image is few
    few[:, 1, 0] = 1.0  # 256
    assert PackedImage.of(few).rows.dtype is torch.uint8
    assert torch.equal(PackedImage.of(few).image, few)
