"""Sound files of every kind that the project reads, small; damage starts from them."""

import base64
import gzip
import io
import json
import pickle
import tarfile
import tempfile
import warnings
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from scipy.io import savemat

from datamodules.benchmarks.coco import CLASSES
from pmnet import PMNet, SmallBackbone
from pmnet.segment import Segmenter, classfile
from pmnet.segment.recipe import assembled
from pmnet.training.module import FewShotModule

SIDE = 24


def pixels(channels: int = 3) -> np.ndarray:
    """(24, 24, channels) uint8."""
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, channels), np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@cache
def images() -> list[bytes]:
    """One file of every format that Pillow writes and reads, and the common ones in all their modes."""
    rgb = Image.fromarray(pixels())
    grey, deep = rgb.convert("L"), Image.fromarray(pixels(1)[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        saved(rgb, "JPEG", exif=exif),
        saved(rgb, "JPEG", progressive=True),
        saved(rgb.convert("CMYK"), "JPEG"),
        saved(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)]),
        saved(rgb, "WEBP"),
        saved(rgb.convert("RGBA"), "WEBP", lossless=True, exif=exif),
        *(saved(image, "PNG") for image in (rgb, grey, deep, rgb.convert("P"), rgb.convert("RGBA"), rgb.convert("1"))),
        *(saved(image, "BMP") for image in (rgb, grey, rgb.convert("1"))),
        *(saved(image, "TIFF") for image in (rgb, deep, grey.convert("F"), rgb.convert("CMYK"))),
        *(saved(rgb, "TIFF", compression=c) for c in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
    ]
    Image.init()
    for kind in sorted(set(Image.SAVE) & set(Image.OPEN)):
        try:
            files.append(saved(rgb, kind))
        except (OSError, ValueError, KeyError, AttributeError):
            continue  # this format holds no colours, or its library is not installed
    return files


@cache
def masks() -> list[bytes]:
    """Index masks and black and white masks."""
    index = Image.fromarray((np.indices((SIDE, SIDE)).sum(0) // 8 % 3).astype(np.uint8))
    palette = index.convert("P")
    palette.putpalette([v for i in range(256) for v in (i, 255 - i, 7 * i % 256)])
    black_and_white = index.point(lambda v: 255 * (v > 0))
    colours = Image.fromarray((pixels() > 127).astype(np.uint8) * 255)
    pngs = (index, palette, black_and_white, colours, black_and_white.convert("1"))
    return [*(saved(mask, "PNG") for mask in pngs), saved(colours, "BMP"), saved(index, "TIFF"), saved(palette, "GIF")]


@cache
def coco_annotations() -> list[Any]:
    """Content of a COCO annotation file: polygons, a crowd, and a compressed crowd."""
    box = [2.0, 2.0, 20.0, 2.0, 20.0, 20.0, 2.0, 20.0]
    crowd = {"counts": [100, 50, SIDE * SIDE - 150], "size": [SIDE, SIDE]}
    packed = {"counts": "\\24d0000000000T;", "size": [SIDE, SIDE]}
    segments = [[box], [box, box[::-1]], crowd, packed]
    return [
        {
            "images": [{"id": i, "file_name": f"COCO_{i:012d}.jpg", "height": SIDE, "width": SIDE} for i in range(2)],
            "annotations": [
                {"id": k, "image_id": k % 2, "category_id": k + 1, "segmentation": s} for k, s in enumerate(segments)
            ],
            "categories": [{"id": c + 1, "name": name} for c, name in enumerate(CLASSES)],
        }
    ]


@cache
def own_annotations() -> dict[str, list[Any]]:
    """Contents of json files about one image, a.jpg or b.jpg, as tools write them: format -> contents."""
    mark = base64.b64encode(saved(Image.fromarray(np.full((6, 6), 255, np.uint8)), "PNG")).decode()
    points = {
        "polygon": [[2, 2], [20.5, 2], [20, 20]],
        "rectangle": [[3, 3], [9, 9]],
        "circle": [[12, 12], [15, 12]],
        "line": [[1, 1], [9, 20]],
        "linestrip": [[1, 1], [9, 20], [20, 20]],
        "point": [[5, 5]],
        "mask": [[10, 10], [15, 15]],
        "rotation": [[2, 2], [8, 4], [6, 9]],
    }
    shapes = [
        {"label": "cat" if k % 2 else "dog", "points": drawn, "shape_type": kind, "group_id": None, "flags": {}}
        | ({"mask": mark} if kind == "mask" else {})
        for k, (kind, drawn) in enumerate(points.items())
    ]
    labelme = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": "a.jpg", "imageData": None}
    labelme |= {"imageHeight": SIDE, "imageWidth": SIDE}
    embedded = labelme | {"imagePath": "absent.jpg", "imageData": base64.b64encode(images()[0]).decode()}
    (of_coco,) = coco_annotations()
    of_coco = of_coco | {
        "images": [of_coco["images"][k] | {"file_name": name} for k, name in enumerate(("a.jpg", "b.jpg"))],
        "annotations": [each | {"bbox": [2, 2, 18, 18], "iscrowd": 0} for each in of_coco["annotations"]],
    }
    return {"labelme": [labelme, embedded], "coco": [of_coco]}


@cache
def own_texts() -> dict[str, list[bytes]]:
    """Text files beside one's own images."""
    return {
        "yolo": [b"0 0.1 0.1 0.9 0.1 0.9 0.9\n1 .2 .2 .4 .2 .4 .4 .2 .4\n\n", b"1 0.5 0.5 1 0.5 1 1\r\n"],
        "data.yaml": [b"path: .\nnames:\n  0: cat\n  1: dog\n", b"nc: 2\nnames: [cat, 'guinea pig']\n"],
        "labelmap": [
            b"# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:255,0,0::\ndog:0,255,255:head,tail:run\n",
            b"background 0 0 0\ncat 255 0 0\ndog 0 255 255\n",
        ],
        "csv": [b"Pixel Value, Class\n0, background\n1, cat\n2, dog\n"],
    }


def colour_mask() -> bytes:
    """In the colours of `own_texts()["labelmap"]`."""
    index = np.indices((SIDE, SIDE)).sum(0) // 8 % 3
    return saved(Image.fromarray(np.array([[0, 0, 0], [255, 0, 0], [0, 255, 255]], np.uint8)[index]), "PNG")


@cache
def head_recipes() -> list[Any]:
    """What the metadata of a head say."""
    kept = dict(module().network.backbone.provenance.as_dict())
    backbone = {"_target_": "pmnet.SmallBackbone", "weights": "quickstart"}
    parts = {"model": {"_target_": "pmnet.PMNet"}, "backbone": backbone}
    return [parts | {"image_size": [64, 64], "needs": kept, "training": {"dataset": "synthetic"}}]


def head_file(recipe: Any) -> bytes:
    """A head in a .safetensors file, as runs and releases hold it."""
    network = module().network
    state = {name: value for name, value in network.state_dict().items() if name in network.saved()}
    return safetensors.torch.save(state, {"pmnet": json.dumps(recipe)})


@cache
def class_file_parts() -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors of a class file of two classes, and what its metadata say."""
    recipe = head_recipes()[0] | {"model": {"_target_": "pmnet.Prototype"}, "name": "x"}
    segmenter = Segmenter(assembled(recipe, {}), "cpu")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:15, 4:15] = 1
    segmenter.fit({name: [(Image.fromarray(pixels()), mask)] for name in ("cat", "dog")})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        segmenter.save(path)
        return safetensors.torch.load_file(path), classfile.described(path)


def class_file(recipe: Any) -> bytes:
    return safetensors.torch.save(class_file_parts()[0], {"pmnet": json.dumps(recipe)})


@cache
def matlab() -> list[bytes]:
    truth = {"Segmentation": pixels(1)[..., 0] % 21, "Boundaries": np.zeros((20, 1)), "CategoriesPresent": [1, 2]}
    files = []
    for options in ({"do_compression": True}, {"do_compression": False}):
        file = io.BytesIO()
        savemat(file, {"GTcls": truth}, **options)
        files.append(file.getvalue())
    return files


def coco_pickle() -> dict[int, list[str]]:
    """One of HSNet's pickled lists."""
    return {c: [f"train2014/COCO_train2014_{i:012d}.jpg" for i in range(c, c + 3)] for c in range(3)}


def lists() -> dict[str, Any]:
    """The lists of each benchmark, as plain values."""
    return {
        "chest_xray": {"lung": ["a", "b"]},
        "coco": {part: {str(c): [9, 16] for c in range(80)} for part in ("trn", "val")},
    }


@cache
def text_lists() -> dict[str, list[bytes]]:
    return {
        "pascal": [b"2007_000033__01\n2007_000061__04\n2009_000001__20\n"],
        "fss": [b"abacus\nbus\nab_wheel\n"],
        "isic": [b"ID,Class\nISIC_0000000,nevus\nISIC_0000001,melanoma\n"],
        "classes": [b"cat\ndog\nguinea pig\n", "\ufeffkatt\r\nöl\r\n".encode()],
    }


@cache
def module() -> FewShotModule:
    with warnings.catch_warnings(action="ignore"):
        return FewShotModule(PMNet(SmallBackbone("quickstart")), [3, 5], torch.nn.CrossEntropyLoss(), torch.optim.SGD)


@cache
def checkpoints() -> list[Any]:
    """What Lightning saves: the weights, the setting of the training, the states of callbacks and optimiser."""
    content: dict[str, Any] = {"state_dict": dict(module().state_dict()), "epoch": 1, "global_step": 16}
    module().on_save_checkpoint(content)
    content["record"] = {"dataset": "synthetic", "base_classes": ["cat", "dog"], "fold": 0, "splits": "all"}
    best = {"monitor": "val/miou", "best_model_score": torch.tensor(41.5), "best_model_path": "best.ckpt"}
    content["callbacks"] = {"ModelCheckpoint{'monitor': 'val/miou'}": best}
    content["optimizer_states"] = [{"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}]
    return [content]


@cache
def tensor_files() -> list[bytes]:
    state = {"conv1.weight": torch.ones(2, 3, 3, 3), "fc": {"bias": torch.arange(4), "name": "x"}}
    return [torch_saved(state), torch_saved(state, _use_new_zipfile_serialization=False)]


def torch_saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


@cache
def safetensors_files() -> list[bytes]:
    state = {"conv1.weight": torch.ones(2, 3, 3, 3), "fc.bias": torch.arange(4)}
    return [safetensors.torch.save(state, {"source": "made here"})]


MEMBERS = {
    "x/images/1.jpg": b"1" * 700,
    "x/images/2.jpg": bytes(range(256)) * 4,
    "x/readme.txt": b"read me",
    "x/" + "long " * 40 + "/3.jpg": b"3",
}


@cache
def zips() -> list[bytes]:
    return [zipped(MEMBERS, method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)]


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


@cache
def tars() -> list[bytes]:
    """Plain tar files of both formats; the compressed ones are made from damaged plain ones."""
    return [tarred(MEMBERS, form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]


def tarred(
    members: dict[str, bytes], form: int = tarfile.GNU_FORMAT, link: tuple[str, str, bytes] | None = None
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo(link[0])
            member.linkname, member.type = link[1:]
            file.addfile(member)
    return buffer.getvalue()


@cache
def overrides() -> list[bytes]:
    """Lists of Hydra overrides, one a line."""
    return [
        b"dataset=synthetic\nfold=2\nshot=5",
        b"dataset=folder\ndataset.root=/data/own\ndataset.folds=[[cat,dog],[bus]]\nepisodes.image_size=[64,96]",
        b"dataset=pascal\n+target=fss\nmodel=hsnet\n~logger\n++seed=3\noptimizer.lr=1e-4\nbackbone=resnet50",
        b"experiment=quickstart\nckpt='a=b, c'\n+extra={a:1,b:[x,y],c:{d:null}}\nname=\"${oc.env:HOME}/x\"",
    ]


@cache
def settings() -> list[bytes]:
    """YAML files of a folder that --config-dir names."""
    return [
        b"# @package _global_\ndefaults:\n  - override /dataset: synthetic\n  - _self_\nseed: 3\n"
        b"episodes:\n  image_size: 64\n  workers: 0\n",
        b"# @package _global_\nbase: &base {lr: 1.0e-3, betas: [0.9, 0.999]}\nother:\n  <<: *base\n"
        b'  name: "x ${seed}"\n  text: |\n    two\n    lines\n',
    ]


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def as_json_gz(value: Any) -> bytes:
    return gzip.compress(as_json(value), mtime=0)


def pickles() -> list[bytes]:
    return [pickle.dumps(coco_pickle(), protocol) for protocol in (0, 2, 4, 5)]
