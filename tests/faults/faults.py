"""The faults. Each is a generator: what is before its first `yield` happens before the run starts, what follows it
happens at a random moment of a phase, and what follows a second `yield` is the remedy before the command is repeated.
"""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
from filelock import FileLock

from tests.faults.runs import SCENES, Case, Skipped

Steps = Iterator[None]
SIGNAL, OTHER = 10.0, 60.0  # seconds in which a run has to end


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: of the fault.
        places: (scene, phase) pairs, of which one is chosen at random.
        inject: the steps.
        bound: seconds in which the run has to end after the fault.
        silent: whether it kills the process that would say what happened.
    """

    name: str
    places: tuple[tuple[str, str], ...]
    inject: Callable[[Case], Steps]
    bound: float = OTHER
    silent: bool = False


FAULTS: list[Fault] = []


def fault(name: str, *places: str, bound: float = OTHER, silent: bool = False) -> Callable[[Callable], Callable]:
    """Registers a fault; a place is "scene/phase" or "scene", which means each of its phases except "waiting"."""

    def register(inject: Callable[[Case], Steps]) -> Callable:
        pairs = [place.partition("/")[::2] for place in places]
        every = [
            (scene, p) for scene, phase in pairs for p in ([phase] if phase else SCENES[scene].phases) if p != "waiting"
        ]
        every += [(scene, phase) for scene, phase in pairs if phase == "waiting"]
        FAULTS.append(Fault(name, tuple(every), inject, bound, silent))
        return inject

    return register


# Signals


def send(number: int) -> Callable[[Case], Steps]:
    def inject(case: Case) -> Steps:
        lock = hold_training(case) if case.phase == "waiting" else None
        yield
        case.process.send_signal(number)
        yield
        if lock:
            lock.release()

    return inject


def hold_training(case: Case) -> FileLock:
    """Another job trains the same setting: its lock is taken."""
    entry = next((case.lab.reference("shared").folder / "trainings").glob("*.json"))
    (case.folder / "trainings").mkdir()
    lock = FileLock(case.folder / "trainings" / f"{entry.stem}.lock")
    lock.acquire()
    return lock


EVERYWHERE = ("train", "workers", "shared/waiting", "test", "pretrain", "ddp", "sweep", "prepare", "predict")
for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    fault(each.name, *EVERYWHERE, bound=SIGNAL)(send(each))
fault("kill -9", *EVERYWHERE, bound=SIGNAL, silent=True)(send(signal.SIGKILL))


@fault("kill -9 of the second process", "ddp/training", "ddp/validation", "ddp/test")
def kill_rank(case: Case) -> Steps:
    yield
    case.ranks()[-1].kill()


@fault("kill -9 of a worker", "workers/training", "workers/validation", "workers/test")
def kill_worker(case: Case) -> Steps:
    yield
    for worker in case.workers()[:1]:
        worker.kill()


@fault("a worker frozen for good", "workers/training", "workers/validation", "workers/test")
def freeze_worker(case: Case) -> Steps:
    """With `episodes.timeout` set to 20 seconds; the default is 300."""
    case.extra = ["episodes.timeout=20"]
    yield
    for worker in case.workers()[:1]:
        with suppress(psutil.NoSuchProcess):
            worker.suspend()


def pause(process: psutil.Process, seconds: float) -> None:
    """Frozen, and thawed later."""
    with suppress(psutil.NoSuchProcess):
        process.suspend()
        time.sleep(seconds)
        process.resume()


@fault("SIGSTOP, then SIGCONT", "train", "workers", "prepare", "predict")
def stop_main(case: Case) -> Steps:
    yield
    pause(case.process, 2)


@fault("SIGSTOP, then SIGCONT of the second process", "ddp/training", "ddp/test")
def stop_rank(case: Case) -> Steps:
    yield
    pause(case.ranks()[-1], 2)


@fault("second process frozen for good", "ddp/training", "ddp/validation")
def freeze_rank(case: Case) -> Steps:
    """With the timeout of the process group set to 10 seconds; the default is the backend's half hour."""
    case.extra = [TIMEOUT]
    yield
    with suppress(psutil.NoSuchProcess):
        case.ranks()[-1].suspend()
    yield
    case.extra = []


TIMEOUT = (
    "trainer.strategy={_target_: lightning.pytorch.strategies.DDPStrategy, "
    "timeout: {_target_: datetime.timedelta, seconds: 10}}"
)


# Resources


def limit(case: Case, what: int, value: int) -> None:
    with suppress(ProcessLookupError):
        resource.prlimit(case.process.pid, what, (value, value))


@fault("files limited in size, as by a quota", "train", "images", "pretrain", "prepare", "predict")
def quota(case: Case) -> Steps:
    yield
    limit(case, resource.RLIMIT_FSIZE, case.random.choice([20_000, 100_000, 1_000_000]))


@fault("64 open files", "train", "workers", "ddp/start", "prepare", "predict")
def few_files(case: Case) -> Steps:
    yield
    limit(case, resource.RLIMIT_NOFILE, 64)


@fault("memory of a worker limited", "workers/training", "workers/test")
def little_memory(case: Case) -> Steps:
    """With `episodes.timeout` set to 20 seconds, as a worker may wait forever for a thread that could not start."""
    case.extra = ["episodes.timeout=20"]
    yield
    for worker in case.workers()[:1]:
        with suppress(psutil.Error, ProcessLookupError):
            size = worker.memory_info().vms
            resource.prlimit(worker.pid, resource.RLIMIT_AS, (size, size))


def mount(place: Path, size: str) -> None:
    """A small disk at `place`, which only this thread and what it starts can see."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
        raise Skipped("needs root: mounts a small disk")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)


@fault("disk full", "train", "features", "images", "shared", "pretrain", "prepare", "predict")
def full_disk(case: Case) -> Steps:
    disk = case.folder / (case.scene.name if case.scene.name in ("features", "images") else "run")
    mount(disk, "64m")
    yield
    with suppress(OSError), (disk / "filler").open("wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - case.random.choice([0, 8192, 1_000_000]))))
    yield
    (disk / "filler").unlink(missing_ok=True)


@fault("disk full, with W&B", "train")
def full_disk_with_wandb(case: Case) -> Steps:
    case.extra = ["logger=wandb", "logger.offline=true", "logger.finish_timeout=5"]
    yield from full_disk(case)


@fault("/dev/shm of 8 MB", "workers/start")
def little_shared_memory(case: Case) -> Steps:
    mount(Path("/dev/shm"), "8m")
    with open("/dev/shm/filler", "wb") as file:
        file.write(bytes(case.random.choice([0, 7_900_000, 8 * 2**20])))
    yield
    yield
    subprocess.run(["umount", "/dev/shm"], check=True)


@fault("folder becomes read-only", "train", "images", "pretrain", "prepare", "predict")
def read_only(case: Case) -> Steps:
    """A disk that the kernel has remounted read-only after an error."""
    mount(case.run, "64m")
    yield
    for words in (["--bind", case.run], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *words, case.run], check=True)
    yield
    subprocess.run(["umount", "--lazy", case.run], check=True)


# Files


def flip(path: Path, case: Case) -> None:
    """Changes 1 to 8 random bits."""
    content = bytearray(path.read_bytes())
    for _ in range(case.random.randint(1, 8)):
        content[case.random.randrange(len(content))] ^= 1 << case.random.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, case: Case) -> None:
    os.truncate(path, case.random.randrange(path.stat().st_size))


def damage(how: Callable[[Path, Case], None], pattern: str, state: str) -> Callable[[Case], Steps]:
    """Brings the folder into a state, damages one of its files, and repeats the command."""

    def inject(case: Case) -> Steps:
        case.lab.copy_state(case, state)
        chosen = case.random.choice(sorted(case.folder.glob(pattern)))
        how(chosen, case)
        case.damaged.add(chosen)
        yield
        yield
        if chosen.stem == "best":  # what the message asks for: train again
            shutil.rmtree(case.run)
        chosen.unlink(missing_ok=True)

    return inject


for how in (flip, truncate):
    name = {"flip": "bits flipped in", "truncate": "truncated:"}[how.__name__]
    for file in ("last.ckpt", "previous.ckpt", "best.ckpt"):
        fault(f"{name} {file}", "train/start")(damage(how, f"run/checkpoints/{file}", "interrupted"))
    for file in ("results.json", "training.json"):
        fault(f"{name} {file}", "shared/start")(damage(how, f"run/{file}", "whole"))
    fault(f"{name} the entry of a shared training", "shared/start")(damage(how, "trainings/*.json", "whole"))
    fault(f"{name} the feature cache", "features/start")(damage(how, "features/*/*.safetensors", "interrupted"))
    fault(f"{name} the image cache", "images/start")(damage(how, "images/*.npy", "interrupted"))


@fault("truncated: results.csv", "predict/start")
def results_truncated(case: Case) -> Steps:
    """As a kill in the middle of a line leaves it."""
    case.lab.copy_state(case, "whole")
    truncate(case.run / "results.csv", case)
    yield


@fault("lock files with bytes in them", "shared/start")
def dirty_locks(case: Case) -> Steps:
    case.lab.copy_state(case, "interrupted")
    for lock in case.folder.glob("trainings/*.lock"):
        lock.write_bytes(case.random.randbytes(64))
    yield


def prepared(case: Case, how: Callable[[Path, Case], None], pattern: str) -> Steps:
    case.lab.copy_state(case, "whole")
    chosen = case.random.choice(sorted((case.run / "suim").glob(pattern)))
    how(chosen, case)
    case.damaged.add(chosen)
    yield
    yield
    shutil.rmtree(case.run / "suim")  # what the message asks for: move the folder away


for how in (flip, truncate):
    for what in ("manifest.json", "splits/*.json", "images/*.jpg"):
        name = f"{'bits flipped in' if how is flip else 'truncated:'} {what} of a prepared folder"
        fault(name, "prepare/start")(lambda case, how=how, what=what: prepared(case, how, what))


def of_image(case: Case, how: Callable[[Path, Case], None]) -> Steps:
    """A random image, in mid-run; restored for the repetition."""
    case.data = Path(shutil.copytree(case.data, case.folder / "data"))
    chosen = case.random.choice(sorted((case.data / "images").iterdir()))
    content = chosen.read_bytes()
    yield
    how(chosen, case)
    yield
    chosen.unlink(missing_ok=True)
    chosen.write_bytes(content)


@fault("image truncated", "train/training", "workers/validation", "predict/photos")
def image_truncated(case: Case) -> Steps:
    return of_image(case, truncate)


@fault("image deleted", "train/training", "workers/training", "workers/validation", "train/test", "predict/photos")
def image_deleted(case: Case) -> Steps:
    return of_image(case, lambda path, case: path.unlink())


@fault("image replaced by text", "train/training", "workers/test", "predict/photos")
def image_replaced(case: Case) -> Steps:
    return of_image(case, lambda path, case: path.write_text("<html>404</html>"))


@fault("image becomes a folder", "train/training", "workers/validation")
def image_unreadable(case: Case) -> Steps:
    def become(path: Path, case: Case) -> None:
        path.unlink()
        path.mkdir()

    case.data = Path(shutil.copytree(case.data, case.folder / "data"))
    chosen = case.random.choice(sorted((case.data / "images").iterdir()))
    content = chosen.read_bytes()
    yield
    become(chosen, case)
    yield
    chosen.rmdir()
    chosen.write_bytes(content)


# Slurm


def asked_of_slurm(*command: str) -> Callable[[Case], Steps]:
    def inject(case: Case) -> Steps:
        yield
        job = case.environment("SLURM_JOB_ID")
        subprocess.run([*command, job], check=True, stdout=subprocess.DEVNULL)

    return inject


fault("Slurm: the job is warned (USR1)", "slurm", bound=240)(asked_of_slurm("scancel", "--signal=USR1"))
fault("Slurm: the job is requeued", "slurm", bound=240)(asked_of_slurm("scontrol", "requeue"))
fault("Slurm: the job is cancelled", "slurm")(asked_of_slurm("scancel"))


@fault("Slurm: kill -9 of the job", "slurm", silent=True)
def kill_job(case: Case) -> Steps:
    yield
    psutil.Process(case.marks[-1][1]).kill()


# Company


@fault("a second run in the same folder", "train", "shared", "pretrain")
def two_runs(case: Case) -> Steps:
    yield
    case.beside()


@fault("a second preparation of the same dataset", "prepare")
def two_preparations(case: Case) -> Steps:
    yield
    case.beside()


# The machine


@fault("locks refused (ENOLCK)", "shared/start", "images/start", "prepare/start")
def no_locks(case: Case) -> Steps:
    case.patches["locks"] = True
    yield
    yield
    case.patches.clear()


@fault("clock set back by a day", "shared/start", "ddp/start", "prepare/start")
def clock(case: Case) -> Steps:
    case.patches["clock"] = 86_400
    yield


@fault("NaN in the backbone's features", "features/start")
def nan_features(case: Case) -> Steps:
    case.patches["nan"] = True
    yield
    yield
    shutil.rmtree(case.run)  # trained from the start: the weights of a step may have met no NaN


@fault("infinite loss", "train/start")
def infinite_loss(case: Case) -> Steps:
    case.extra = ["optimizer.lr=1e30"]
    yield
    yield
    case.extra = []
    shutil.rmtree(case.run)


@fault("LC_ALL=C", "train/start", "prepare/start", "predict/start")
def plain_locale(case: Case) -> Steps:
    case.env |= {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    yield


@fault("no HOME", "train/start", "workers/start", "predict/start")
def no_home(case: Case) -> Steps:
    case.env |= {"HOME": None, "XDG_CACHE_HOME": None, "USER": None, "LOGNAME": None}
    yield


@fault("umask 077", "train/start", "prepare/start", "predict/start")
def umask(case: Case) -> Steps:
    case.patches["umask"] = 0o077
    yield


@fault("folder with an odd name", "train/start", "shared/start", "ddp/start", "prepare/start", "predict/start")
def odd_folder(case: Case) -> Steps:
    case.run = case.folder / case.random.choice(["a b", "lr=1, a=[2]", 'it\'s "so"', "Prüfung", "$x", "(a){b}%"])
    yield


# Weights & Biases


def wandb(case: Case, server: type | None, seconds: float = 0) -> Steps:
    """Answers of a server: none, too late, or a refusal."""
    from tests.experiments.test_wandb import KEY

    address = "http://127.0.0.1:9"
    if server:
        served = ThreadingHTTPServer(("127.0.0.1", 0), server)
        threading.Thread(target=served.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{served.server_port}"
    case.extra = ["logger=wandb", "logger.init_timeout=5", "logger.finish_timeout=5"]
    case.env |= {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": address, "HOME": str(case.folder)}
    yield


@fault("W&B: its process is killed", "train/training", "train/test")
def wandb_killed(case: Case) -> Steps:
    case.extra = ["logger=wandb", "logger.offline=true", "logger.finish_timeout=5"]
    yield
    for process in case.process.children(recursive=True):
        with suppress(psutil.Error):
            if "wandb" in process.name():
                process.kill()


@fault("W&B: nothing listens", "train/start")
def wandb_dead(case: Case) -> Steps:
    return wandb(case, None)


@fault("W&B: refuses the key", "train/start")
def wandb_refuses(case: Case) -> Steps:
    from tests.experiments.test_wandb import Refusal

    return wandb(case, Refusal)


@fault("W&B: never answers", "train/start")
def wandb_slow(case: Case) -> Steps:
    class Slow(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            time.sleep(120)

        do_GET = do_POST

    return wandb(case, Slow)
