"""Real runs in a folder of their own: their commands, their phases, and every process that they start."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from experiments.sweep.jobs import quoted
from tests import slurm as cluster
from tests.conftest import ROOT, TINY
from tests.data import suim
from tests.data.folder import write_indexed

PATCHED = Path(__file__).parent / "patched"
IMAGES = [*TINY, "dataset=folder", "dataset.folds=2", "trainer.max_epochs=3", "trainer.cache=null"]
PRETRAIN = (
    "experiment=pretrain_backbone dataset=folder dataset.folds=2 episodes.image_size=64 trainer=cpu "
    "trainer.max_epochs=3 episodes.workers=0 pretrain.batch_size=2 pretrain.images_per_epoch=8"
).split()


class Skipped(Exception):
    """The fault cannot be injected on this machine."""


@dataclass(frozen=True)
class Scene:
    """A kind of run.

    Attributes:
        name: of the kind.
        phases: that the run goes through, in order.
        words: the command after `python`, of a case's folder.
        like: the scene whose unbroken run has the same numbers.
    """

    name: str
    phases: tuple[str, ...]
    words: Callable[["Case"], list[str]]
    like: str = ""


SCENES: dict[str, Scene] = {}


def scene(name: str, *phases: str, like: str = "") -> Callable[[Callable], Callable]:
    def register(words: Callable[["Case"], list[str]]) -> Callable:
        SCENES[name] = Scene(name, phases, words, like or name)
        return words

    return register


TRAINING = ("start", "training", "validation", "checkpoint", "test", "panels")


def run_py(case: "Case", *words: str) -> list[str]:
    return ["run.py", *words, f"dataset.root={quoted(case.data)}", f"hydra.run.dir={quoted(case.run)}", *case.extra]


@scene("train", *TRAINING, like="shared")
def train(case: "Case") -> list[str]:
    return run_py(case, *IMAGES, "reuse=false")


@scene("workers", *TRAINING, like="shared")
def workers(case: "Case") -> list[str]:
    return run_py(case, *IMAGES, "reuse=false", "episodes.workers=2")


@scene("images", *TRAINING, like="shared")
def images(case: "Case") -> list[str]:
    return run_py(case, *IMAGES, "reuse=false", f"episodes.cache={quoted(case.folder / 'images')}")


@scene("features", *TRAINING)
def features(case: "Case") -> list[str]:
    """Features differ in the last bits with the batch they are computed in, so these numbers are only close."""
    kept = ["trainer.cache={_target_: pmnet.FeatureCache, host_gb: 0, folder: '%s'}" % (case.folder / "features")]
    return run_py(case, *IMAGES[:-1], "reuse=false", *kept)


@scene("shared", *TRAINING, "waiting")
def shared(case: "Case") -> list[str]:
    return run_py(case, *IMAGES, f"trainings={quoted(case.folder / 'trainings')}")


@scene("test", "start", "test", "panels", like="shared")
def test(case: "Case") -> list[str]:
    return run_py(case, *IMAGES, "mode=test", f"ckpt={quoted(case.trained)}")


@scene("ddp", "start", "training", "validation", "checkpoint", "test")
def ddp(case: "Case") -> list[str]:
    return run_py(case, *IMAGES, "reuse=false", "trainer=ddp", "trainer.accelerator=cpu")


@scene("pretrain", "start", "training", "checkpoint")
def pretrain(case: "Case") -> list[str]:
    return run_py(case, *PRETRAIN)


@scene("sweep", "start", "training", "validation", "test", "panels")
def sweep(case: "Case") -> list[str]:
    jobs = ["-m", "shot=1,5", f"hydra.sweep.dir={quoted(case.run)}", "hydra.sweep.subdir=${hydra.job.num}"]
    return run_py(case, *jobs, *IMAGES, f"trainings={quoted(case.folder / 'trainings')}")


@scene("slurm", "training", "validation", "test", like="shared")
def slurm(case: "Case") -> list[str]:
    jobs = ["-m", "launcher=slurm_cpu", f"hydra.sweep.dir={quoted(case.run)}", "hydra.sweep.subdir=${hydra.job.num}"]
    return run_py(case, *jobs, *IMAGES, "reuse=false")


@scene("predict", "start", "photos")
def predict(case: "Case") -> list[str]:
    supports = case.lab.supports
    folders = ["--support", str(supports), "--images", str(case.data / "images"), "--out", str(case.run)]
    return ["-m", "pmnet", "segment", "--head", "nearest", *folders, "--coco"]


@scene("prepare", "start", "verifying", "manifest")
def prepare(case: "Case") -> list[str]:
    return ["-m", "datamodules.prepare", "suim", "--source", str(case.data), "--root", str(case.run)]


@dataclass
class Case:
    """One run of a scene in `folder`, into which a fault is injected; and its repetition.

    Attributes:
        phase: in which the fault is injected.
        lab: has the unbroken runs.
        random: source of the moment and of what is damaged.
        patches: what `patched/sitecustomize.py` breaks.
        env: variables of the environment to set, or to remove (None).
        extra: further words of the command.
        damaged: files that the fault itself has damaged.
        started: the processes of the present attempt and the files of their output; the first is the run.
    """

    scene: Scene
    phase: str
    folder: Path
    lab: "Lab"
    random: random.Random
    patches: dict = field(default_factory=dict)
    env: dict[str, str | None] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    damaged: set[Path] = field(default_factory=set)
    started: list[tuple[psutil.Popen, Path]] = field(default_factory=list)
    attempt: int = 0

    def __post_init__(self) -> None:
        self.run, self.data = self.folder / "run", self.folder / "data"
        self.trained = self.lab.reference("shared").run if self.scene.name == "test" else self.run
        self.folder.mkdir(parents=True)
        if self.scene.name == "slurm":
            self.lab.start_slurm()
        if self.scene.name == "prepare":
            suim.write(self.data)
        else:
            self.data = self.lab.data  # one folder for all: its path is part of a training's fingerprint

    @property
    def process(self) -> psutil.Popen:
        """The run itself."""
        return self.started[0][0]

    @property
    def output(self) -> str:
        return "".join(path.read_text(errors="replace") for _, path in self.started)

    @property
    def marks(self) -> list[tuple[float, int, str]]:
        """Of the present attempt: time, process and phase."""
        path = self.folder / f"marks-{self.attempt}"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        marks = [(float(line[0]), int(line[1]), line[2]) for line in lines if len(line) == 3]
        if "Waiting for the same training" in self.output and marks:
            marks.append((marks[0][0], marks[0][1], "waiting"))
        return marks

    def start(self, broken: bool = True) -> None:
        """Starts an attempt.

        Args:
            broken: whether with the environment and the patches of the fault.
        """
        self.attempt += 1
        self.started = []
        self.beside(broken)

    def beside(self, broken: bool = True) -> None:
        """Starts the command, once more if it runs already."""
        faults = {"marks": str(self.folder / f"marks-{self.attempt}"), "patches": self.patches if broken else {}}
        env: dict[str, str | None] = {
            **os.environ,
            "COLUMNS": "300",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(PATCHED),
            "FAULTS": json.dumps(faults, ensure_ascii=False),
            **(self.env if broken else {}),
        }
        path = self.folder / f"output-{self.attempt}-{len(self.started)}.txt"
        with path.open("w") as output:
            process = psutil.Popen(
                [sys.executable, *self.scene.words(self)],
                cwd=ROOT,
                env={name: value for name, value in env.items() if value is not None},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.started.append((process, path))

    def until(self, reached: Callable[[], bool], timeout: float = 240) -> bool:
        """Waits; False if the run ended before.

        Raises:
            TimeoutError: neither happened.
        """
        deadline = time.monotonic() + timeout
        while not reached():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.scene.name} did not reach {self.phase}:\n{self.output}")
            time.sleep(0.005)
        return True

    def reach_moment(self) -> bool:
        """Waits for a random moment of the phase, in a random epoch; False if the run ended before."""
        lengths = self.lab.reference(self.scene.name).lengths(self.phase)
        nth = self.random.randrange(len(lengths))
        if not self.until(lambda: sum(phase == self.phase for _, _, phase in self.marks) > nth):
            return False
        end = time.monotonic() + self.random.uniform(0, lengths[nth])
        return self.until(lambda: time.monotonic() > end)

    def lengths(self, phase: str) -> list[float]:
        """How long each part of a phase took, in seconds."""
        marks = [(at, name) for at, process, name in self.marks if name != "start" or process == self.marks[0][1]]
        following = [at for at, _ in marks[1:]] + [marks[-1][0] + 1]
        return [end - at for (at, name), end in zip(marks, following, strict=True) if name == phase] or [2.0]

    def wait(self, timeout: float) -> bool:
        """Whether every process that was started ends in time."""
        deadline = time.monotonic() + timeout
        try:
            for process, _ in self.started:
                process.wait(max(0, deadline - time.monotonic()))
        except psutil.TimeoutExpired:
            return False
        return True

    def family(self) -> list[psutil.Process]:
        """Every process alive that this case's commands have started, wherever it has gone: by its environment."""
        return [process for process in psutil.process_iter() if belongs(process, str(self.folder / "marks-"))]

    def workers(self) -> list[psutil.Process]:
        """Processes that read images: forks of the main process, with its command."""
        with suppress(psutil.Error):
            own = self.process.cmdline()
            return [p for p in self.process.children() if p.cmdline() == own and "LOCAL_RANK" not in p.environ()]
        return []

    def ranks(self) -> list[psutil.Process]:
        """The processes that train together: the main process and those that it started for it."""
        with suppress(psutil.Error):
            return [self.process, *(p for p in self.process.children() if "LOCAL_RANK" in p.environ())]
        return [self.process]

    def environment(self, name: str) -> str:
        """A variable of the process that has reached the latest phase."""
        return psutil.Process(self.marks[-1][1]).environ()[name]

    def end(self) -> None:
        """Kills what is left."""
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.wait(10)


class Lab:
    """A folder for all cases, and the unbroken runs with which they are compared, made where they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made, self.making = folder, dict[str, Case](), threading.RLock()
        self.data, self.supports = write_indexed(folder / "data"), write_indexed(folder / "supports", 2, 1)
        self.daemons = ExitStack()
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell's background job ignores it, and its runs too

    def start_slurm(self) -> None:
        """A cluster on this machine, until the harness ends; where there is none, Skipped says why."""
        if why := cluster.why_not():
            raise Skipped(why)
        with self.making:
            if "SLURM_CONF" not in os.environ:
                self.daemons.enter_context(cluster.running(self.folder / "slurm"))

    def reference(self, scene: str) -> Case:
        """The unbroken run of a scene, or of the scene that has the same numbers."""
        return self.state(SCENES[scene].like, "whole")

    def state(self, scene: str, name: str) -> Case:
        """A case whose run was left "whole", or "interrupted" after its second epoch."""
        with self.making:
            if f"{scene} {name}" not in self.made:
                case = Case(SCENES[scene], name, self.folder / f"{scene}-{name}", self, random.Random(0))
                case.start()
                if name == "interrupted":
                    case.until(lambda: (case.run / "checkpoints" / "previous.ckpt").exists())
                    case.end()
                elif not case.wait(300) or case.process.returncode:
                    raise RuntimeError(f"The unbroken run of {scene} failed:\n{case.output}")
                self.made[f"{scene} {name}"] = case
            return self.made[f"{scene} {name}"]

    def copy_state(self, case: Case, name: str) -> None:
        """Copies what a run has left to the folder of another case, as if it had been left there."""
        state = self.state(case.scene.name, name)
        for part in ("run", "trainings", "features", "images", "data"):
            if (state.folder / part).exists():
                shutil.copytree(state.folder / part, case.folder / part, symlinks=True, dirs_exist_ok=True)
        for path in [*case.run.glob("*.json"), *case.folder.glob("trainings/*.json")]:
            path.write_text(path.read_text().replace(str(state.folder), str(case.folder)))


def belongs(process: psutil.Process, text: str) -> bool:
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and text in process.environ().get("FAULTS", "")
    except psutil.Error:
        return False
