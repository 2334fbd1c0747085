"""What has to hold after a fault, whatever it was."""

import json
import operator
import random
import shutil
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import safetensors.torch
import torch
from PIL import Image

from tests.faults.faults import Fault
from tests.faults.runs import SCENES, Case, Lab, Skipped


def numbers(case: Case) -> dict[str, Any]:
    """Everything that must be equal to an unbroken run's: scores, weights of the last epoch, prepared files."""
    if case.scene.name == "prepare":
        manifest = json.loads((case.run / "suim" / "manifest.json").read_text())
        return {name: manifest[name] for name in ("files", "lists", "counts", "rules")}
    if case.scene.name == "pretrain":
        return flat("backbone", safetensors.torch.load_file(case.run / "backbone.safetensors"))
    if case.scene.name == "predict":
        lines = [line.split(",") for line in (case.run / "results.csv").read_text().splitlines()]
        masks = {path.name: path.read_bytes() for path in case.run.glob("*.png")}
        return masks | {" ".join(line[:2]): line[2:5] for line in lines}
    jobs = {"sweep": [case.run / "0", case.run / "1"], "slurm": [case.run / "0"]}.get(case.scene.name, [case.run])
    found = {}
    for job in jobs:
        record = json.loads((job / "results.json").read_text())
        found |= {f"{job.name if len(jobs) > 1 else ''} {key}": record[key] for key in ("test", "baselines")}
        training = record["training"]["run"] if case.scene.name != "test" else str(case.trained)
        found |= flat(
            "last.ckpt", torch.load(Path(training) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        )
    return found


def flat(name: str, state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {f"{name} {key}": tensor.numpy().tobytes() for key, tensor in state.items()}


def differences(case: Case) -> list[str]:
    """How a run that ended well differs from the unbroken one."""
    try:
        here, there = numbers(case), numbers(case.lab.reference(case.scene.name))
    except (OSError, ValueError, KeyError) as error:
        return [f"ended well without its results: {error!r}"]
    same = close if case.scene.name == "features" else operator.eq
    wrong = [name for name in there if name not in here or not same(here[name], there[name])]
    return [f"{len(wrong)} other numbers than the unbroken run, e.g. {wrong[0]}"] if wrong else []


def close(here: Any, there: Any) -> bool:
    """Of weights and scores: whether they differ by rounding alone, which can move a few pixels."""
    if isinstance(here, bytes):
        kind = np.float32 if len(here) % 4 == 0 else np.uint8
        return np.allclose(np.frombuffer(here, kind), np.frombuffer(there, kind), atol=1e-3)
    return "miou" not in here or abs(here["miou"] - there["miou"]) < 2


def messages(case: Case, silent: bool) -> list[str]:
    """Each process that failed says so once, without a traceback.

    Args:
        silent: whether the fault killed the process, so that it cannot say anything. A process that a signal ended
            before it took signals itself is silent too: the exit code tells.
    """
    wrong = []
    for process, path in case.started:
        output = path.read_text(errors="replace")
        if process.returncode == 130 and case.scene.name == "sweep":
            output = output.replace("] Terminated (", "")  # its job, which shares the output, says how it ended
        told = sum(output.count(words) for words in ("Error: ", "] Terminated (", "Interrupted."))
        if last_line(output) == "KeyboardInterrupt" and ("init_import_site" in output or "run.py" not in output):
            continue  # Python itself, before it has read the first line of the run
        if process.returncode == 0 or ((silent or process.returncode < 0) and not told and "Traceback" not in output):
            continue
        if "Traceback" in output:
            wrong.append(f"traceback: {last_line(output)}")
        elif told != 1:
            wrong.append(f"{told} messages (exit code {process.returncode}): {last_line(output)}")
    return wrong


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def leftovers(case: Case, patience: float = 10) -> list[str]:
    """Processes of a run that has ended."""
    deadline = time.monotonic() + patience
    while (alive := case.family()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"process left: {' '.join(p.cmdline())[:80]}" for p in alive]


def torn(case: Case) -> list[str]:
    """Files under a final name that are not whole, except those that the fault itself damaged.

    A folder whose name ends in ".part" is not finished, whatever its files are called; none may be left after success.
    """
    outside = case.damaged | {case.data}
    paths = [p for p in case.folder.rglob("*") if p.is_file() and not outside & {p, *p.parents}]
    paths = [p for p in paths if not any(folder.suffix == ".part" for folder in p.parents)]
    return [f"half-written {path.relative_to(case.folder)}" for path in paths if not is_whole(path)]


def is_whole(path: Path) -> bool:
    try:
        match path.suffix:
            case ".json":
                json.loads(path.read_text())
            case ".ckpt":
                torch.load(path, weights_only=True)
                return zipfile.ZipFile(path).testzip() is None
            case ".safetensors":
                safetensors.torch.load_file(path)
            case ".png" | ".jpg" | ".bmp":
                Image.open(path).load()
    except FileNotFoundError:
        return True
    except Exception:
        return False
    return True


@dataclass
class Outcome:
    """What came of one injection.

    Attributes:
        place: (scene, phase).
        seconds: from the fault to the end of the run.
        code: its exit code.
        equal: whether the numbers were those of the unbroken run, at once or after the command was repeated.
        wrong: what should have been otherwise.
        skipped: why the fault could not be injected here.
    """

    fault: Fault
    place: tuple[str, str]
    seed: int
    seconds: float = 0.0
    code: int | None = None
    equal: bool = False
    wrong: list[str] = field(default_factory=list)
    skipped: str = ""

    def __str__(self) -> str:
        state = self.skipped or "; ".join(self.wrong) or "ok"
        where = "/".join(self.place)
        return f"{self.fault.name} in {where}, {self.seconds:.1f} s, code {self.code}, seed {self.seed}: {state}"


def attempt(fault: Fault, seed: int, lab: Lab) -> Outcome:
    """Injects a fault at the moment that `seed` determines, and checks everything."""
    source = random.Random(seed)
    place = source.choice(fault.places)
    outcome = Outcome(fault, place, seed)
    lab.reference(place[0])
    try:
        case = Case(SCENES[place[0]], place[1], lab.folder / f"{seed}", lab, source)
    except Skipped as reason:
        outcome.skipped = str(reason)
        return outcome
    steps = fault.inject(case)
    try:
        next(steps, None)
        case.start()
        present = case.reach_moment()
        begun = time.monotonic()
        with suppress(psutil.Error):  # the run may have ended before
            next(steps, None)
        bound = fault.bound if present else 0.0
        whole = case.wait(bound)
        outcome.seconds, outcome.code = time.monotonic() - begun, case.process.returncode
        if not whole:
            outcome.wrong += [f"not ended after {bound:.0f} s: {last_line(case.output)}"]
            case.end()
        outcome.wrong += messages(case, fault.silent or not whole) + leftovers(case) + torn(case)
        outcome.equal = all(process.returncode == 0 for process, _ in case.started)
        if not outcome.equal:
            case.end()
            next(steps, None)
            case.start(broken=False)
            outcome.equal = case.wait(300) and case.process.returncode == 0
            if not outcome.equal:
                outcome.wrong += [f"the repeated command failed: {last_line(case.output)}"]
        if outcome.equal:
            different = differences(case)
            outcome.equal, outcome.wrong = not different, outcome.wrong + different
            outcome.wrong += [f"{p.name} left after success" for p in case.folder.rglob("*.part") if p.is_dir()]
    except Skipped as reason:
        outcome.skipped = str(reason)
    finally:
        case.end()
        for _ in steps:  # whatever is left of the remedy
            pass
    if not outcome.wrong:
        shutil.rmtree(case.folder, ignore_errors=True)
    return outcome
