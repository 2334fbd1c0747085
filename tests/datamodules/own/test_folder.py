import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.errors import DatasetError
from datamodules.own.folder import FolderDataset
from pmnet.errors import ImageError
from pmnet.segment.formats import UNDERSTOOD
from pmnet.segment.formats.pairs import NAMES
from pmnet.segment.images import load_image
from tests.data.folder import write_by_class, write_indexed


def read(root, folds=3, min_area=0.01, **options):
    return FolderDataset(str(root), folds=folds, min_area=min_area, **options)


def save(path, array, mode=None):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)


def error_of(action):
    with pytest.raises((DatasetError, ImageError)) as caught:
        action()
    return str(caught.value)


# What is read


def test_folder_with_index_masks_is_read_as_written(tmp_path):
    data = read(write_indexed(tmp_path, classes=["cat", "dog", "bus"], suffix=".png"))
    assert data.classes == ["cat", "dog", "bus"]
    for name in ("000", "011"):
        assert np.array_equal(data.read_index(name), np.array(Image.open(tmp_path / "masks" / f"{name}.png")))
        pixels = np.array(Image.open(tmp_path / "images" / f"{name}.png"))
        assert np.array_equal(data.read_image(name), pixels.transpose(2, 0, 1))
        assert data.read_image(name).dtype == data.read_index(name).dtype == torch.uint8


def test_images_of_a_class_are_those_that_show_it(tmp_path):
    data = read(write_indexed(tmp_path, classes=3, images_per_class=2))
    assert data.images_of(0, "test") == data.images_of(0, "train") == ["000", "002", "003", "005"]
    assert data.images_of(2, "test") == ["001", "002", "004", "005"]


def test_folder_per_class_is_read_as_written(tmp_path):
    data = read(write_by_class(tmp_path, classes=["dog", "cat", "bus"], images_per_class=3))
    assert data.classes == ["bus", "cat", "dog"]
    assert data.images_of(1, "train") == ["cat/1", "cat/2", "cat/3"]
    mask = np.array(Image.open(tmp_path / "cat" / "2.png"))
    assert np.array_equal(data.read_index("cat/2"), np.where(mask == 255, 2, 0))
    assert np.array_equal(data.read_mask("cat/2", 1), mask == 255)
    assert not data.read_mask("cat/2", 0).any()
    assert data.read_image("cat/2").shape == (3, 48, 64)


def test_hidden_folders_are_not_classes(tmp_path):
    write_by_class(tmp_path, classes=["cat", "dog", ".thumbnails"])
    assert read(tmp_path).classes == ["cat", "dog"]


def test_read_mask_keeps_255_as_ignore(tmp_path):
    data = read(write_indexed(tmp_path, classes=3))
    index = data.read_index("001").numpy()
    mask = data.read_mask("001", 1).numpy()
    assert set(np.unique(mask)) == {0, 1, 255}
    assert np.array_equal(mask == 255, index == 255)
    assert np.array_equal(mask == 1, index == 2)


def test_palette_masks_are_read_by_value_not_by_colour(tmp_path):
    path = write_indexed(tmp_path, classes=3) / "masks" / "000.png"
    values = np.array(Image.open(path))
    palette = Image.fromarray(values, mode="P")
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    palette.save(path)
    assert Image.open(path).mode == "P"
    assert np.array_equal(read(tmp_path).read_index("000"), values)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0, 1, 1, 0], [0, 1, 1, 0]),
        ([0, 127, 128, 255], [0, 0, 1, 1]),
        ([0, 255, 255, 0], [0, 1, 1, 0]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_binary_masks_by_threshold_128_or_as_0_and_1(tmp_path, values, expected):
    write_by_class(tmp_path, classes=3)
    save(tmp_path / "class01" / "1.jpg", np.zeros((1, len(values)), np.uint8))
    save(tmp_path / "class01" / "1.png", np.array([values], np.uint8))
    assert read(tmp_path).read_mask("class01/1", 1).tolist() == [expected]


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P"])
def test_binary_masks_of_any_mode_mean_the_same(tmp_path, mode):
    data = read(write_by_class(tmp_path, classes=3))
    path = tmp_path / "class02" / "3.png"
    before = data.read_mask("class02/3", 2)
    save(path, np.array(Image.open(path)), mode)
    assert Image.open(path).mode == mode
    assert torch.equal(read(tmp_path).read_mask("class02/3", 2), before)
    assert before.any()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_grey_index_masks_with_several_channels_are_read_by_value(tmp_path, mode):
    data = read(write_indexed(tmp_path, classes=3))
    path = tmp_path / "masks" / "000.png"
    before = data.read_index("000")
    save(path, np.array(Image.open(path)), mode)
    assert Image.open(path).mode == mode
    again = read(tmp_path)
    assert torch.equal(again.read_index("000"), before)
    assert again.images_of(0, "test") == data.images_of(0, "test")


@pytest.mark.parametrize(
    "array, expected",
    [
        (np.array([[0, 100, 255]], np.uint8), [0, 100, 255]),
        (np.array([[0, 100 * 256 + 7, 65535]], np.uint16), [0, 100, 255]),
        (np.array([[[0] * 3 + [9], [100] * 3 + [0], [255] * 3 + [255]]], np.uint8), [0, 100, 255]),
    ],
    ids=["grey", "16 bits", "RGBA"],
)
def test_images_of_other_modes_become_8_bit_rgb(tmp_path, array, expected):
    save(tmp_path / "a.png", array)
    image = load_image(tmp_path / "a.png")
    assert image.dtype == torch.uint8
    assert image.tolist() == [[expected]] * 3


def test_images_are_turned_as_exif_says(tmp_path):
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:, :8] = 250  # left in the file; 6 = "turn clockwise to show": on top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = load_image(tmp_path / "a.jpg")
    assert image.shape == (3, 32, 16)
    assert image[:, :7].min() > 200
    assert image[:, 9:].max() < 50


def test_mask_must_fit_the_turned_image(tmp_path):
    write_indexed(tmp_path, classes=3, size=(48, 64))
    path, exif = tmp_path / "images" / "000.jpg", Image.Exif()
    exif[0x0112] = 6
    Image.open(path).rotate(90, expand=True).save(path, exif=exif)
    assert Image.open(path).size == (48, 64)
    assert read(tmp_path).read_image("000").shape == (3, 48, 64)


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"])
def test_image_formats(tmp_path, suffix):
    data = read(write_indexed(tmp_path, classes=3, images_per_class=2, suffix=suffix))
    assert len(data.images_of(0, "test")) == 4


# Black and white masks in images/ and masks/


def write_black_and_white(root, mode="L", white=255, **options):
    """One class, 0 and `white` in every mask, no classes.txt; returns root."""
    write_indexed(root, classes=["thing"], neighbours=False, **options)
    (root / "classes.txt").unlink()
    for path in (root / "masks").iterdir():
        save(path, np.where(np.array(Image.open(path)) == 1, white, 0).astype(np.uint8), mode)
    return root


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("names", ["", "widget\n"])
def test_black_and_white_masks_are_one_class(tmp_path, mode, names):
    truth = {}
    for path in (write_indexed(tmp_path / "thing", classes=["thing"], neighbours=False) / "masks").iterdir():
        truth[path.stem] = np.array(Image.open(path)) == 1
    write_black_and_white(tmp_path / "thing", mode)
    if names:
        (tmp_path / "thing" / "classes.txt").write_text(names)
    data = read(tmp_path / "thing")
    assert data.classes == [names.strip() or "thing"]
    assert data.images_of(0, "test") == sorted(truth)
    for name, mask in truth.items():
        assert np.array_equal(data.read_index(name), mask)
        assert np.array_equal(data.read_mask(name, 0), mask)


def test_black_and_white_masks_of_real_photos(shared):
    root = shared / "data" / "import_formats" / "binary"
    data = read(root)
    assert data.classes == ["binary"]
    assert len(data.images_of(0, "test")) == 12
    for name in data.images_of(0, "test"):
        assert np.array_equal(data.read_index(name), np.array(Image.open(root / "masks" / f"{name}.png")) == 255)


def test_empty_masks_among_black_and_white_ones_stay_empty(tmp_path):
    write_black_and_white(tmp_path)
    save(tmp_path / "masks" / "001.png", np.zeros((48, 64), np.uint8))
    data = read(tmp_path)
    assert data.images_of(0, "test") == ["000", "002", "003"]
    assert not data.read_index("001").any()


def test_masks_of_0_and_1_without_classes_txt_are_one_class(tmp_path):
    data = read(write_black_and_white(tmp_path / "thing", white=1))
    assert data.classes == ["thing"]
    assert data.images_of(0, "test") == ["000", "001", "002", "003"]


def test_255_stays_ignore_if_another_value_occurs(tmp_path):
    data = read(write_indexed(tmp_path, classes=["thing"], neighbours=False))
    assert set(data.read_index("000").unique().tolist()) == {0, 1, 255}
    path = tmp_path / "masks" / "001.png"
    save(path, np.where(np.array(Image.open(path)), 255, 0).astype(np.uint8))
    assert read(tmp_path).images_of(0, "test") == ["000", "002", "003"]


def test_black_and_white_masks_of_several_classes(tmp_path):
    (write_black_and_white(tmp_path) / "classes.txt").write_text("cat\ndog\n")
    message = error_of(lambda: read(tmp_path))
    assert str(tmp_path / "masks") in message
    assert "only the values 0 and 255" in message
    assert "2 classes in classes.txt" in message
    assert "min_area" not in message


# Classes, folds and splits


@pytest.mark.parametrize("classes, folds", [(6, 3), (11, 4), (7, 2), (5, 5), (4, 1)])
def test_folds_by_number_are_consecutive_parts_of_nearly_one_size(tmp_path, classes, folds):
    data = read(write_indexed(tmp_path, classes=classes, images_per_class=1, size=(32, 32)), folds=folds)
    assert [list(f) for f in data.folds] == [p.tolist() for p in np.array_split(np.arange(classes), folds)]
    assert [c for fold in data.folds for c in fold] == list(range(classes))
    assert max(map(len, data.folds)) - min(map(len, data.folds)) <= 1
    for fold in range(folds):
        assert sorted(data.base_classes(fold) + data.novel_classes(fold)) == list(range(classes))


def test_folds_by_name(tmp_path):
    data = read(write_indexed(tmp_path, classes=["cat", "dog", "bus", "car"]), folds=[["bus", "cat"], ["dog"]])
    assert data.novel_classes(0) == [2, 0]
    assert data.base_classes(0) == [1, 3]
    assert data.novel_classes(1) == [1]
    assert data.base_classes(1) == [0, 2, 3]


def test_fold_all_trains_and_tests_on_every_class(tmp_path):
    data = read(write_indexed(tmp_path, classes=4))
    assert data.base_classes("all") == data.novel_classes("all") == [0, 1, 2, 3]


@pytest.mark.parametrize("min_area", [0.0, 0.01, 0.2])
def test_min_area_counts_as_numpy_does(tmp_path, min_area):
    write_indexed(tmp_path, classes=4, images_per_class=3, size=(40, 50))
    random = np.random.default_rng(0)
    areas = [1, 19, 20, 21, 399, 400, 401]  # 20 is 1% and 400 is 20% of the 2,000 pixels
    for path in sorted((tmp_path / "masks").iterdir()):
        values = np.repeat([1, 2, 3, 4], random.choice(areas, 4))[:2000]
        save(path, random.permutation(np.pad(values, (0, 2000 - len(values)))).astype(np.uint8).reshape(40, 50))
    data = read(tmp_path, min_area=min_area)
    for class_id in range(4):
        expected = []
        for path in sorted((tmp_path / "masks").iterdir()):
            count = int((np.array(Image.open(path)) == class_id + 1).sum())
            if count and count / 2000 >= min_area:
                expected.append(path.stem)
        assert data.images_of(class_id, "test") == expected
    assert 0 < sum(len(data.images_of(c, "test")) for c in range(4)) <= 48


def test_min_area_zero_leaves_out_images_without_the_class(tmp_path):
    data = read(write_by_class(tmp_path, classes=3), min_area=0.0)
    save(tmp_path / "class00" / "2.png", np.zeros((48, 64), np.uint8))
    assert "class00/2" in data.images_of(0, "test")
    assert read(tmp_path, min_area=0.0).images_of(0, "test") == ["class00/1", "class00/3", "class00/4"]


def test_test_fraction_holds_the_last_images_apart(tmp_path):
    data = read(write_indexed(tmp_path, classes=3, images_per_class=4), test_fraction=0.25)
    train, test = ({n for c in range(3) for n in data.images_of(c, s)} for s in ("train", "test"))
    assert test == {"009", "010", "011"}
    assert train == {f"{i:03d}" for i in range(9)}


def test_test_fraction_holds_the_last_images_of_each_class_folder_apart(tmp_path):
    data = read(write_by_class(tmp_path, classes=3, images_per_class=5), test_fraction=0.4)
    assert data.images_of(1, "train") == ["class01/1", "class01/2", "class01/3"]
    assert data.images_of(1, "test") == ["class01/4", "class01/5"]


@pytest.mark.parametrize("write", [write_indexed, write_by_class])
def test_test_fraction_that_rounds_to_no_image_never_tests_on_training_images(tmp_path, write):
    data = read(write(tmp_path, classes=3, images_per_class=2), test_fraction=0.05)
    for class_id in range(3):
        assert not set(data.images_of(class_id, "train")) & set(data.images_of(class_id, "test"))


def test_camvid_works_as_it_is(shared):
    data = read(shared / "data" / "camvid", folds=4)
    assert len(data.classes) == 11
    assert [data.classes[c] for c in data.novel_classes(0)] == ["sky", "building", "pole"]
    assert data.images(data.novel_classes(0), "test", shot=5)
    assert data.images(data.base_classes(0), "train", shot=1)


# Bad input: what is wrong, where, and what to do


def test_missing_root_says_what_to_set():
    message = error_of(lambda: FolderDataset(None, folds=3, min_area=0.01))
    assert "dataset.root=" in message
    assert "experiment=quickstart" in message


def test_root_that_does_not_exist(tmp_path):
    message = error_of(lambda: read(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in message
    assert "dataset.root" in message


def test_error_for_an_empty_folder_describes_the_layouts(tmp_path):
    message = error_of(lambda: read(tmp_path))
    assert str(tmp_path) in message
    assert UNDERSTOOD in message


def test_empty_images_folder(tmp_path):
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    message = error_of(lambda: read(tmp_path))
    assert str(tmp_path / "images") in message
    assert NAMES in message


@pytest.mark.parametrize("write, taken, left", [(write_indexed, "masks/003.png", "images/003.jpg"),
                                                (write_indexed, "images/003.jpg", "masks/003.png"),
                                                (write_by_class, "class01/2.png", "class01/2.jpg"),
                                                (write_by_class, "class01/2.jpg", "class01/2.png")])  # fmt: skip
def test_file_without_its_partner(tmp_path, write, taken, left):
    (write(tmp_path) / taken).unlink()
    message = error_of(lambda: read(tmp_path))
    assert f"{tmp_path / left} has no partner" in message
    assert "(1 such files" in message
    assert NAMES in message


@pytest.mark.parametrize("write, name", [(write_indexed, "images/002.jpg"), (write_by_class, "class00/2.jpg")])
def test_truncated_jpeg(tmp_path, write, name):
    path = write(tmp_path) / name
    path.write_bytes(path.read_bytes()[:-200])
    message = error_of(lambda: read(tmp_path))
    assert str(path) in message
    assert "truncated" in message
    assert "Replace" in message


@pytest.mark.parametrize("content", [b"not an image\n", b""])
@pytest.mark.parametrize("name", ["images/002.jpg", "masks/002.png"])
def test_text_named_as_an_image(tmp_path, name, content):
    path = write_indexed(tmp_path) / name
    path.write_bytes(content)
    message = error_of(lambda: read(tmp_path))
    assert str(path) in message
    assert "Replace" in message


@pytest.mark.parametrize("write, name", [(write_indexed, "masks/002.png"), (write_by_class, "class00/2.png")])
def test_mask_of_another_size(tmp_path, write, name):
    path = write(tmp_path) / name
    Image.open(path).resize((32, 40)).save(path)
    message = error_of(lambda: read(tmp_path))
    assert str(path) in message
    assert "32x40" in message
    assert "64x48" in message
    assert "same size" in message


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_mask_of_colours_is_not_an_index_mask(tmp_path, mode):
    path = write_indexed(tmp_path) / "masks" / "002.png"
    colours = np.random.default_rng(0).integers(0, 256, (256, 3)).astype(np.uint8)
    save(path, colours[np.array(Image.open(path))], mode)
    message = error_of(lambda: read(tmp_path))
    assert str(path) in message
    assert f"mode {mode}" in message
    assert "one channel" in message


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_mask_is_not_an_index_mask(tmp_path, mode):
    path = write_indexed(tmp_path) / "masks" / "002.png"
    mask = Image.open(path).convert(mode)
    mask.putalpha(100)
    mask.save(path)
    assert f"mode {mode}" in error_of(lambda: read(tmp_path))


def test_16_bit_index_mask_with_values_beyond_255(tmp_path):
    path = write_indexed(tmp_path) / "masks" / "002.png"
    save(path, np.full((48, 64), 300, np.uint16))
    message = error_of(lambda: read(tmp_path))
    assert str(path) in message
    assert "8 bits" in message


@pytest.mark.parametrize("value", [7, 254])
def test_value_beyond_classes_txt(tmp_path, value):
    path = write_indexed(tmp_path, classes=6) / "masks" / "002.png"
    values = np.array(Image.open(path))
    values[0, 0] = value
    save(path, values)
    message = error_of(lambda: read(tmp_path))
    assert str(path) in message
    assert f"the value {value}" in message
    assert "classes.txt names only 6" in message


def test_index_mask_saved_as_jpeg(tmp_path):
    path = write_indexed(tmp_path) / "masks" / "002.png"
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()
    message = error_of(lambda: read(tmp_path))
    assert str(path.with_suffix(".jpg")) in message
    assert "JPEG changes values: save masks as PNG" in message


def test_no_classes_txt(tmp_path):
    (write_indexed(tmp_path) / "classes.txt").unlink()
    message = error_of(lambda: read(tmp_path))
    assert str(tmp_path / "classes.txt") in message
    assert "one class name per line" in message
    assert "values up to 6" in message


@pytest.mark.parametrize("text", ["", "cat\ncat\n", "\n".join(f"c{i}" for i in range(255))])
def test_classes_txt_that_names_none_one_twice_or_too_many(tmp_path, text):
    (write_indexed(tmp_path) / "classes.txt").write_text(text)
    message = error_of(lambda: read(tmp_path))
    assert str(tmp_path / "classes.txt") in message
    assert "1 to 254" in message


def test_blank_line_within_classes_txt_does_not_shift_the_values(tmp_path):
    (write_indexed(tmp_path, classes=3) / "classes.txt").write_text("cat\n\ndog\nbus\n")
    assert str(tmp_path / "classes.txt") in error_of(lambda: read(tmp_path))


def test_blank_lines_at_the_end_of_classes_txt_are_allowed(tmp_path):
    (write_indexed(tmp_path, classes=3) / "classes.txt").write_text("cat\ndog\nbus\n\n\n")
    assert read(tmp_path).classes == ["cat", "dog", "bus"]


@pytest.mark.parametrize("fold", [3, -1, 100])
def test_fold_out_of_range(tmp_path, fold):
    data = read(write_indexed(tmp_path), folds=3)
    for choose in (data.base_classes, data.novel_classes):
        message = error_of(lambda choose=choose: choose(fold))
        assert "folds 0 to 2" in message
        assert f"not {fold}" in message
        assert "fold.index=" in message


def test_folds_that_name_an_unknown_class(tmp_path):
    write_indexed(tmp_path, classes=["cat", "dog", "bus"])
    message = error_of(lambda: read(tmp_path, folds=[["cat"], ["horse"]]))
    assert "dataset.folds" in message
    assert "'horse'" in message
    assert "cat, dog, bus" in message


# Files that change while a run uses them


@pytest.mark.parametrize("which", ["images", "masks"])
@pytest.mark.parametrize("how", ["replaced", "edited", "deleted"])
def test_file_that_changes_in_mid_run_is_named(tmp_path, which, how):
    """Otherwise a part of the training would see other pixels than the rest, and nothing would tell."""
    data = read(write_indexed(tmp_path, suffix=".png"))
    fingerprint, path, other = data.fingerprint(), tmp_path / which / "000.png", tmp_path / which / "003.png"
    reader = data.read_image if which == "images" else data.read_index
    before = reader("001")
    if how == "replaced":
        os.replace(other, path)
    elif how == "edited":
        Image.open(path).rotate(90, expand=False).save(path)
    else:
        path.unlink()
    message = error_of(lambda: reader("000"))
    assert str(path) in message
    assert ("No such image" if how == "deleted" else "changed while") in message
    assert torch.equal(reader("001"), before)
    assert data.fingerprint() == fingerprint != (read(tmp_path).fingerprint() if how == "edited" else "")


def test_labels_that_go_in_mid_run_are_named(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.txt").write_text("0 0.1 0.1 0.9 0.1 0.9 0.9\n")
    (tmp_path / "classes.txt").write_text("cat\n")
    data = read(tmp_path, folds=1)
    (tmp_path / "a.txt").unlink()
    assert str(tmp_path / "a.txt") in error_of(lambda: data.read_index("a"))


def test_annotations_in_memory_may_change_on_disk(tmp_path):
    """labelme's shapes are read once, so that a run can go on while somebody draws the next ones."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    shape = {"label": "cat", "points": [[2, 2], [20, 2], [20, 20]], "shape_type": "polygon"}
    content = {"shapes": [shape], "imagePath": "a.jpg", "imageData": None, "imageHeight": 32, "imageWidth": 32}
    (tmp_path / "a.json").write_text(json.dumps(content))
    data = read(tmp_path, folds=1)
    before = data.read_index("a")
    (tmp_path / "a.json").write_text("{}")
    assert before.any()
    assert torch.equal(data.read_index("a"), before)
