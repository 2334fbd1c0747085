"""Chest X-ray: two hospitals, and images of 16 bits."""

from datamodules.benchmarks.chest_xray import ChestXrayDataset
from tests.data import chest_xray


def test_one_hospital_can_be_chosen(prepared):
    dataset = ChestXrayDataset(str(prepared("chest_xray")), prefix="CHNCXR")
    assert list(dataset.images_of(0, "test")) == chest_xray.SHENZHEN


def test_16_bit_image_is_scaled_and_not_clipped(prepared):
    image = ChestXrayDataset(str(prepared("chest_xray"))).read_image(chest_xray.DEEP)
    assert 40 < image.float().mean() < 200
    assert image.unique().numel() > 20
