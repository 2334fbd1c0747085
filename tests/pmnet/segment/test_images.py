"""Reading photos: with the fast decoder as with Pillow, whatever the JPEG is like."""

import io

import numpy as np
import pytest
from PIL import Image

from pmnet.errors import ImageError
from pmnet.segment import images
from pmnet.segment.images import ORIENTATION, load_image

SIDES = [(1, 1), (7, 9), (16, 16), (33, 50), (101, 67)]


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with noise: what JPEG loses differs from pixel to pixel."""
    source = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    wave = 128 + 100 * np.sin(np.stack([x / 7, y / 5, (x + y) / 11], -1))
    return Image.fromarray((wave + source.normal(0, 20, wave.shape)).clip(0, 255).astype(np.uint8))


def decoded(path) -> np.ndarray:
    return load_image(path).permute(1, 2, 0).numpy()


@pytest.fixture
def by_pillow(monkeypatch):
    """Counts the photos that are left to Pillow."""
    left, fast = [], images.fast

    def counted(content, image, turn):
        array = fast(content, image, turn)
        left.extend([image.format] if array is None else [])
        return array

    monkeypatch.setattr(images, "fast", counted)
    return left


@pytest.mark.parametrize("size", SIDES)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize(
    "options", [{"quality": 95}, {"quality": 20}, {"progressive": True}, {"restart_marker_rows": 1}]
)
def test_jpegs_have_pillows_pixels(size, subsampling, options, tmp_path, by_pillow) -> None:
    photo(*size).save(tmp_path / "a.jpg", subsampling=subsampling, **options)
    assert np.array_equal(decoded(tmp_path / "a.jpg"), np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB")))
    assert by_pillow == []


def test_jpegs_without_a_colour_transform_have_pillows_pixels(tmp_path) -> None:
    photo(40, 30).save(tmp_path / "a.jpg", keep_rgb=True)
    assert np.array_equal(decoded(tmp_path / "a.jpg"), np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_are_left_to_pillow(mode, tmp_path, by_pillow) -> None:
    photo(40, 30).convert(mode).save(tmp_path / "a.jpg")
    assert np.array_equal(decoded(tmp_path / "a.jpg"), np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB")))
    assert by_pillow == ["JPEG"]


def test_turned_photos_are_turned_unless_stored_pixels_are_wanted(tmp_path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photo(40, 30).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").shape == (3, 30, 40)
    assert load_image(tmp_path / "a.jpg", turn=False).shape == (3, 40, 30)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_jpegs_are_one_message(share, tmp_path) -> None:
    content = io.BytesIO()
    photo(101, 67).save(content, "JPEG")
    (tmp_path / "a.jpg").write_bytes(content.getvalue()[: int(share * len(content.getvalue()))])
    with pytest.raises(ImageError, match=r"a\.jpg cannot be read \(.*truncated"):
        load_image(tmp_path / "a.jpg")


def test_second_header_does_not_make_an_image_larger(tmp_path, by_pillow) -> None:
    """Pillow takes the size from the last header before the pixels, other decoders from the first."""
    content = io.BytesIO()
    photo(40, 30).save(content, "JPEG")
    data = content.getvalue()
    at = data.index(b"\xff\xc0")
    frame = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4])]
    larger = frame[:5] + (60_000).to_bytes(2) + (60_000).to_bytes(2) + frame[9:]
    (tmp_path / "a.jpg").write_bytes(data[:at] + larger + data[at:])
    with pytest.raises(ImageError):
        load_image(tmp_path / "a.jpg")
    assert by_pillow == ["JPEG"]
