"""A method in a folder or a repository of the Hugging Face hub: model.safetensors, and README.md, the model card.

Segmenter.from_pretrained("outputs/exported")
Segmenter.from_pretrained("name/repository", download=True)
segmenter.push_to_hub("name/repository")
"""

import json
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import safetensors.torch

from pmnet.errors import SettingError, WeightsError
from pmnet.files import read_file
from pmnet.replacing import replacing
from pmnet.segment import classfile
from pmnet.segment.recipe import FLOORS, Built, build, located
from pmnet.version import VERSION

WEIGHTS, CARD = "model.safetensors", "README.md"


class Hub(ABC):
    """What lets a Segmenter be loaded from a folder or a repository, and be written there."""

    recipe: dict[str, Any]
    method: Any

    @classmethod
    @abstractmethod
    def load(cls, source: str | Path, device: str = "auto", keep_aspect: bool | None = None) -> Self:
        """See `Segmenter.load`."""

    @classmethod
    def from_pretrained(
        cls, source: str | Path, revision: str | None = None, download: bool = False, device: str = "auto"
    ) -> Self:
        """Loads a method from a folder or a repository of the Hugging Face hub.

        Args:
            source: a folder with model.safetensors, or "owner/name" of a repository.
            revision: a branch, tag or commit of the repository; None takes its main branch.
            download: fetch model.safetensors if it is not on this machine yet.
            device: "auto", or the name of a torch device.

        Raises:
            WeightsError: the file is not here, or cannot be fetched.
            CheckpointError: the file does not say how its method is built, or does not fit.
        """
        return cls.load(weights_of(source, revision, download), device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model.safetensors and README.md: the method, without any supports."""
        write(Built(self.method, self.recipe), Path(folder))

    def push_to_hub(self, repository: str, private: bool = True, message: str = "Upload of a head for pmnet") -> str:
        """Uploads the method to the Hugging Face hub, without any supports; asks for a login as huggingface_hub does.

        Args:
            repository: "owner/name"; created if it does not exist.
            private: whether only its owner sees a repository that this creates.
            message: of the commit.

        Returns:
            The address of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.create_repo(repository, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
        return str(done)


def weights_of(source: str | Path, revision: str | None, download: bool) -> Path:
    """The path of model.safetensors. Arguments and errors as in `Hub.from_pretrained`."""
    if Path(source).is_dir():
        if not (Path(source) / WEIGHTS).is_file():
            raise WeightsError(f"There is no {WEIGHTS} in {Path(source).absolute()}.")
        return Path(source) / WEIGHTS
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), WEIGHTS, revision=revision, local_files_only=not download))
    except HFValidationError as error:
        raise WeightsError(f"There is no folder {source}, and no repository can have this name.") from error
    except LocalEntryNotFoundError as error:
        remedy = "Check the connection." if download else "Pass download=True to fetch it from the Hugging Face hub."
        raise WeightsError(f"{WEIGHTS} of {source} is not on this machine. {remedy}") from error
    except Exception as error:  # no such repository, no permission, no connection
        raise WeightsError(f"{source} cannot be fetched from the Hugging Face hub: {error}") from error


def built_with_facts(source: str | Path, licence: str | None = None) -> Built:
    """Builds a method; its recipe says what it was trained on ("training") and its licence ("licence"), if known.

    Args:
        source: see `recipe.build`; a class file gives its method.
        licence: overrides that of the file.
    """
    built = classfile.read(Path(source))[0] if classfile.is_one(source) else build(source)
    facts: dict[str, Any] = {"licence": licence} if licence else {}
    if str(source) not in FLOORS and (path := located(source)).suffix != ".safetensors":
        record = read_file(path)[0].get("record") or {}
        facts_kept = ("dataset", "task", "fold", "splits", "base_classes", "started_from")
        kept = {name: record[name] for name in facts_kept if name in record}
        facts |= {"training": kept} if kept else {}
    return Built(built.method, built.recipe | facts)


def write(built: Built, folder: Path) -> None:
    """Writes model.safetensors and README.md. Of the backbone, only its name and hash are written.

    Raises:
        SettingError: the backbone's weights are a file of this machine, which others do not have.
    """
    recipe = {**built.recipe, "version": VERSION}
    recipe["backbone"] = {name: value for name, value in recipe["backbone"].items() if name != "download"}
    if "/" in str(recipe["backbone"].get("weights", "")):
        raise SettingError(
            f"The backbone's weights are {recipe['backbone']['weights']}, a file of this machine, so nobody else could "
            "load the head. Use a class file (pmnet segment --save) or --format onnx."
        )
    state = built.method.state_dict()
    tensors = {name: state[name].cpu().contiguous() for name in sorted(built.method.saved())}
    with replacing(folder / WEIGHTS) as part:  # save_file would hide the file from other users
        part.write_bytes(safetensors.torch.save(tensors, {"pmnet": json.dumps(recipe)}))
    with replacing(folder / CARD) as part:
        part.write_text(card(recipe, sum(tensor.numel() for tensor in tensors.values())), encoding="utf-8")


def card(recipe: Mapping[str, Any], values: int) -> str:
    """The model card in Markdown.

    Args:
        recipe: of the method.
        values: number of values in its tensors.
    """
    front = ["library_name: pmnet", "pipeline_tag: image-segmentation", "tags: [few-shot-segmentation]"]
    if recipe.get("licence"):
        front.append(f"license: {identifier(recipe['licence'])}")
    needs, (height, width) = recipe["needs"], recipe["image_size"]
    options = {name: value for name, value in recipe["model"].items() if name != "_target_"}
    facts = {
        "method": recipe["model"]["_target_"] + (f", {json.dumps(options)}" if options else ""),
        "values": f"{values:,}",
        "backbone": f"{needs['backbone']}, weights {needs['weights']} ({needs['source']}), not in this file",
        "sha256 of the backbone's weights": needs["sha256"],
        "image size": f"{height} x {width}",
        "trained on": trained_on(recipe.get("training")),
        "licence": recipe.get("licence", "not stated"),
        "written by": f"pmnet {recipe['version']}",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        "---\n" + "\n".join(front) + f"\n---\n\n# {recipe['name']}\n\nSegments an image by one or a few examples.\n\n"
        f"| | |\n| --- | --- |\n{rows}\n\n"
        "```python\nfrom pmnet import Segmenter\n\n"
        'segmenter = Segmenter.from_pretrained("owner/name", download=True)\n'
        'segmenter.fit([("cow1.jpg", "cow1_mask.png")])\nresult = segmenter.predict("field.jpg")\n```\n'
    )


def identifier(licence: str) -> str:
    """The hub's name of a licence, if the text begins with one.

    Example:
        >>> identifier("MIT. The training images are not in this file."), identifier("Ask us first.")
        ('mit', 'other')
    """
    first = licence.split(". ")[0].removesuffix(".")
    return first.lower() if re.fullmatch(r"[\w.-]+", first) else "other"


def trained_on(record: Any) -> str:
    """One line on the training data."""
    if not isinstance(record, dict):
        return str(record or "not stated")
    facts = {"fold": "fold", "task": "task", "splits": "splits"}
    line = [str(record.get("dataset", ""))] + [f"{word} {record[n]}" for n, word in facts.items() if n in record]
    classes = record.get("base_classes") or record.get("classes") or []
    return "; ".join(filter(None, [*line, f"classes: {', '.join(map(str, classes))}" if classes else ""]))
