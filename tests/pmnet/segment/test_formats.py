"""Annotations as tools write them, against other programs and the same masks in other formats."""

import base64
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from pmnet.errors import SettingError
from pmnet.segment.formats import read_folder, supports_of
from pmnet.segment.formats.raster import Runs, fill

SIZE = (60, 80)


def photo(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path)


def box(top, left, bottom, right, value=1):
    index = np.zeros(SIZE, np.uint8)
    index[top:bottom, left:right] = value
    return index


CORNERS = [10, 5, 30, 5, 30, 25, 10, 25]  # x, y of box(5, 10, 25, 30)


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_as_pycocotools(seed):
    coco = pytest.importorskip("pycocotools.mask")
    random = np.random.default_rng(seed)
    size = tuple(random.integers(1, 90, 2).tolist())
    mask = (random.random(size) < random.random()).astype(np.uint8)
    index = np.zeros(size, np.uint8)
    Runs(coco.encode(np.asfortranarray(mask))["counts"].decode(), size).paint(index, 1)
    assert np.array_equal(index, mask)


@pytest.mark.parametrize("seed", range(20))
def test_polygons_as_pillow_but_for_the_edge(seed):
    random = np.random.default_rng(seed)
    angles = np.sort(random.random(8) * 2 * np.pi)
    ring = np.stack([40 + 45 * np.cos(angles), 30 + 35 * np.sin(angles)], 1)  # partly outside
    index, image = np.zeros(SIZE, np.uint8), Image.new("L", SIZE[::-1])
    fill(index, ring, 1)
    ImageDraw.Draw(image).polygon([tuple(point) for point in ring - 0.5], fill=1)
    edge = Image.new("L", SIZE[::-1])
    ImageDraw.Draw(edge).line([tuple(point) for point in [*(ring - 0.5), ring[0] - 0.5]], fill=1, width=3)
    assert not ((index != np.array(image)) & (np.array(edge) == 0)).any()


def write_coco(root, segmentation, path="annotations/instances_default.json"):
    photo(root / "images" / "sub" / "a.jpg")
    content = {
        "images": [{"id": 7, "file_name": "sub/a.jpg", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [{"id": 5, "image_id": 7, "category_id": 90, "iscrowd": 0, "segmentation": segmentation}],
    }
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(json.dumps(content))


def test_coco_polygons_and_counts_as_cvat_lays_them_out(tmp_path):
    flat = box(5, 10, 25, 30).ravel(order="F")
    counts = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]).tolist()
    for number, segmentation in enumerate(([CORNERS], {"size": list(SIZE), "counts": counts})):
        write_coco(tmp_path / str(number), segmentation)
        (image,) = read_folder(tmp_path / str(number))
        assert image.classes == ("cat", "dog")
        assert np.array_equal(image.masks(), box(5, 10, 25, 30, 2))


def test_coco_boxes_alone_are_one_message(tmp_path):
    write_coco(tmp_path, [])
    with pytest.raises(SettingError, match=r"instances_default\.json.*annotation 5.*only a box"):
        read_folder(tmp_path)


@pytest.mark.parametrize("sides", [{}, {"height": float(SIZE[0]), "width": float(SIZE[1])}], ids=["none", "floats"])
def test_coco_sizes_as_other_tools_write_them(tmp_path, sides):
    write_coco(tmp_path, [CORNERS])
    path = tmp_path / "annotations" / "instances_default.json"
    content = json.loads(path.read_text())
    content["images"] = [{"id": 7, "file_name": "sub/a.jpg"} | sides]
    path.write_text(json.dumps(content))
    (image,) = read_folder(tmp_path)
    assert np.array_equal(image.masks(), box(5, 10, 25, 30, 2))


def test_labelme_file_apart_from_its_image(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    shapes = [{"label": "cat", "points": np.reshape(CORNERS, (-1, 2)).tolist(), "shape_type": "polygon"}]
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.json").write_text(json.dumps({"imagePath": "a.jpg", "shapes": shapes}))
    (image,) = read_folder(tmp_path)
    assert image.image == tmp_path / "images" / "a.jpg"
    assert np.array_equal(image.masks(), box(5, 10, 25, 30))


@pytest.mark.parametrize("png", [None, "", base64.b64encode(b"no image").decode()])
def test_labelme_mask_that_is_damaged_is_one_message(tmp_path, png):
    photo(tmp_path / "a.jpg")
    shapes = [{"label": "cat", "points": [[1, 1], [9, 9]], "shape_type": "mask", "mask": png}]
    (tmp_path / "a.json").write_text(json.dumps({"imagePath": "a.jpg", "shapes": shapes}))
    with pytest.raises(SettingError, match=r"a\.json.*mask is damaged"):
        read_folder(tmp_path)[0].masks()


def test_labelme_with_and_without_an_image_file(tmp_path):
    photo(tmp_path / "a.jpg")
    data = base64.b64encode((tmp_path / "a.jpg").read_bytes()).decode()
    (tmp_path / "a.jpg").unlink()
    shapes = [
        {"label": "cat", "points": [[10, 5], [30, 25]], "shape_type": "rectangle"},
        {"label": "dog", "points": [[60, 40], [60, 50]], "shape_type": "circle"},
    ]
    content = {"imagePath": "..\\a.jpg", "imageHeight": None, "imageWidth": None, "imageData": data, "shapes": shapes}
    (tmp_path / "a.json").write_text(json.dumps(content))
    (image,) = read_folder(tmp_path)
    y, x = np.ogrid[: SIZE[0], : SIZE[1]]
    disc = np.hypot(x + 0.5 - 60, y + 0.5 - 40) <= 10
    assert image.pixels().shape == (3, *SIZE)
    assert np.array_equal(image.masks(), np.where(disc, 2, box(5, 10, 25, 30)))
    assert {name: len(pairs) for name, pairs in supports_of(tmp_path).items()} == {"cat": 1, "dog": 1}


def test_yolo_polygons_and_boxes(tmp_path):
    photo(tmp_path / "images" / "train" / "a.jpg")
    (tmp_path / "data.yaml").write_text("names:\n  0: cat\n  1: dog\n")
    label = tmp_path / "labels" / "train" / "a.txt"
    label.parent.mkdir(parents=True)
    shares = np.array(CORNERS).reshape(-1, 2) / SIZE[::-1]
    label.write_text("1 " + " ".join(map(str, shares.ravel())) + "\n")
    (image,) = read_folder(tmp_path)
    assert image.classes == ("cat", "dog")
    assert np.array_equal(image.masks(), box(5, 10, 25, 30, 2))
    label.write_text("1 0.5 0.5 0.2 0.2\n")
    with pytest.raises(SettingError, match=r"a\.txt: line 1 .*box"):
        read_folder(tmp_path)[0].masks()


@pytest.mark.parametrize("names", ["labels/classes.txt", "mine.yaml"])
def test_yolo_names_where_tools_put_them(tmp_path, names):
    photo(tmp_path / "images" / "a.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.1 0.1 0.9 0.1 0.9 0.9\n")
    (tmp_path / names).write_text("names: [cat]\n" if names.endswith("yaml") else "cat\n")
    assert read_folder(tmp_path)[0].classes == ("cat",)


@pytest.mark.parametrize("kind", ["jpeg", "smooth", "white first"])
@pytest.mark.parametrize("named", [False, True])
def test_black_and_white_masks_that_are_not_quite(tmp_path, kind, named):
    """Grey at edges, as JPEG and smoothing leave it, or a palette of white and black, in this order."""
    photo(tmp_path / "images" / "a.jpg")
    (tmp_path / "masks").mkdir()
    mask = Image.fromarray(box(5, 10, 25, 30, 255))
    if kind == "jpeg":
        mask.save(tmp_path / "masks" / "a.jpg", quality=60)
    elif kind == "smooth":
        mask.filter(ImageFilter.GaussianBlur(1)).save(tmp_path / "masks" / "a.png")
    else:
        mask = Image.fromarray(1 - box(5, 10, 25, 30))
        mask.putpalette([255] * 3 + [0] * 3)
        mask.save(tmp_path / "masks" / "a.png")
    if named:
        (tmp_path / "classes.txt").write_text("cat\n")
    (image,) = read_folder(tmp_path)
    assert image.classes == ("cat" if named else tmp_path.name,)
    assert (image.masks() != box(5, 10, 25, 30)).sum() <= 4  # the corners, rounded


def test_greys_that_mean_classes_are_not_smoothing(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    (tmp_path / "masks").mkdir()
    index = box(5, 10, 25, 30, 255)
    for number, value in enumerate((50, 100, 150, 200)):
        index[30 + 5 * number : 35 + 5 * number, 10:40] = value
    Image.fromarray(index).save(tmp_path / "masks" / "a.png")
    with pytest.raises(SettingError, match=r"no .*classes\.txt.*up to 200"):
        read_folder(tmp_path)


def test_names_of_classes_above_train_and_val(tmp_path):
    for split in ("train", "val"):
        photo(tmp_path / split / "img" / f"{split}.jpg")
        (tmp_path / split / "masks").mkdir()
        Image.fromarray(box(5, 10, 25, 30, 2)).save(tmp_path / split / "masks" / f"{split}.png")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    images = read_folder(tmp_path)
    assert [image.classes for image in images] == [("cat", "dog")] * 2
    assert all(np.array_equal(image.masks(), box(5, 10, 25, 30, 2)) for image in images)


def test_mask_of_a_photo_as_stored_names_the_turn(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "images" / "a.jpg", exif=exif)
    Image.fromarray(box(5, 10, 25, 30)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(SettingError, match=r"60x80.*EXIF orientation"):
        read_folder(tmp_path)[0].masks()


def test_roboflow_masks(tmp_path):
    photo(tmp_path / "train" / "a.jpg")
    Image.fromarray(box(5, 10, 25, 30, 4)).save(tmp_path / "train" / "a_mask.png")
    (tmp_path / "train" / "_classes.csv").write_text("Pixel Value, Class\n0, background\n4, cat\n")
    for root in (tmp_path, tmp_path / "train"):
        (image,) = read_folder(root)
        assert image.classes == ("cat",)
        assert np.array_equal(image.masks(), box(5, 10, 25, 30))


def test_several_formats_in_a_folder_are_one_message(tmp_path):
    write_coco(tmp_path, [CORNERS])
    (tmp_path / "masks").mkdir()
    with pytest.raises(SettingError, match=r"several formats: COCO json .* and masks"):
        read_folder(tmp_path)


@pytest.mark.parametrize("name", ["voc_palette", "colour_masks", "coco_json"])
def test_real_photos_have_the_same_masks_in_all_formats(shared, name):
    root = shared / "data" / "import_formats"
    for image in read_folder(root / name):
        values = np.array(Image.open(root / "voc_palette" / "SegmentationClass" / f"{image.name}.png"))
        assert np.array_equal(image.masks(), np.where(values == 255, 0, values) if name == "coco_json" else values)
