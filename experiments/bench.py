"""Times PMNet against the bare backbone and against a plain implementation of the same formulas.

python -m experiments.bench
python -m experiments.bench model=hsnet

The first command writes `benchmarks/<machine>.json`, `.md` and `.png`. Each program runs in its own process with its
own memory; the programs take turns. Times are medians, after a round to warm up; what takes more than 10 seconds is
timed once. "x floor" is the time divided by that of the backbone's forward passes, a lower bound on run time; "x plain"
is the time divided by that of the plain implementation. Memory is the peak of a step above the peak of the backbone's
forward passes.

The second one takes settings of `run.py`. It times any method beside its own backbone's forward passes, and prints a
table.
"""

import argparse
import logging
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tabulate import tabulate

from experiments.files import write_json

ROOT = Path(__file__).parents[1]
PROGRAMS = ("backbone", "pmnet", "plain")
LONG = 10  # seconds; what takes longer is timed once
WIDTH = 110  # of the table where the output is no terminal
FORKS = multiprocessing.get_context("forkserver")  # each program has memory of its own, but imports are made once
FORKS.set_forkserver_preload(["torch", "torchvision", "pmnet"])


@dataclass(frozen=True)
class Work:
    """One call to time: a test batch, or a training step."""

    name: str
    shots: int = 1
    batch: int = 1
    size: int = 384
    train: bool = False
    precision: str = "float32"  # or bfloat16, under autocast
    seen: bool = False  # the supports were processed before: a further query
    classes: int = 1  # of a further query, each with its supports


TABLE = [
    Work("1 shot"),
    Work("5 shots", shots=5),
    Work("1 shot, bfloat16", precision="bfloat16"),
    Work("training step, 4 episodes", batch=4, train=True),
    Work("next query, 1 support seen", seen=True),
    Work("next query, 5 supports seen", shots=5, seen=True),
]
ON_GPU = [
    Work(f"{shots} shot{'s' * (shots > 1)}, {precision}, batch {batch}", shots, batch, precision=precision)
    for batch in (1, 16)
    for shots in (1, 5)
    for precision in ("float32", "bfloat16")
] + [
    Work(f"training step, {precision}, 36 episodes", 1, 36, train=True, precision=precision)
    for precision in ("float32", "bfloat16")
]
CURVES = {
    "shots": [Work(str(k), shots=k) for k in (1, 2, 3, 5, 7, 10, 15, 20)],
    "size": [Work(str(size), size=size) for size in (256, 384, 512, 640, 768, 1024)],
    "classes": [Work(str(c), seen=True, classes=c) for c in (1, 2, 5, 10, 20)],
    "batch": [Work(str(b), batch=b) for b in (1, 2, 4, 8)],
}


# One program, in its own process


def serve(program: str, device: str, caller: Connection) -> None:
    """Answers each `Work` with its seconds and bytes."""
    logging.disable(logging.WARNING)  # of random weights
    run = PROGRAM[program](device)
    while True:
        caller.send(run(caller.recv()))


def measured(device: str, passes: Callable[[], Any], rest: Callable[[Any], Any]) -> dict[str, float]:
    """Seconds of the passes and in all, and the bytes by which the peak exceeds that of the passes alone."""
    reset_peak(device)
    start = clock(device)
    features = passes()
    middle, of_passes = clock(device), peak(device)
    rest(features)
    return {"seconds": clock(device) - start, "backbone": middle - start, "bytes": max(0, peak(device) - of_passes)}


def clock(device: str) -> float:
    """Seconds, after the device has finished its work."""
    import torch

    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def reset_peak(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """Peak memory in bytes; 0 if the system does not report it."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def images(work: Work, device: str) -> tuple[Any, Any, Any]:
    """Random queries (B, 3, H, W), supports (B, K, 3, H, W) and support masks (B, K, H, W)."""
    import torch

    random = torch.Generator().manual_seed(0)
    B, K, side = work.batch, work.shots, work.size
    query, support = torch.randn(B, 3, side, side, generator=random), torch.randn(B, K, 3, side, side, generator=random)
    masks = (torch.rand(B, K, side, side, generator=random) < 0.3).float()
    return query.to(device), support.to(device), masks.to(device)


def bare_backbone(device: str) -> Callable[[Work], dict[str, float]]:
    """torchvision's ResNet-50: one forward pass for the queries and one for the supports that are not seen yet."""
    import torch
    import torchvision

    network = torchvision.models.resnet50(weights=None).eval().to(device)

    @torch.inference_mode()
    def run(work: Work) -> dict[str, float]:
        query, support, _ = images(work, device)
        of_supports = () if work.seen else (support.flatten(0, 1),)
        return measured(device, lambda: [network(x) for x in (query, *of_supports)], lambda features: None)

    return run  # float32 in every row


def pmnet(device: str) -> Callable[[Work], dict[str, float]]:
    from pmnet import PMNet, ResNetBackbone

    network = PMNet(ResNetBackbone("resnet50", weights="none")).to(device)

    def seen(query: Any, support: Any, masks: Any) -> Any:
        known = network.see(support, masks)
        return (
            lambda: network.backbone_pass(query, network.query_reads),
            lambda feats: network.head.segment(feats, known, query.shape[-2:]),
        )

    return whole(network, network.features, network.head, seen, device)


def plain(device: str) -> Callable[[Work], dict[str, float]]:
    """`tests/pmnet/methods/plain_network.py` on the same backbone, in PyTorch's default memory format."""
    import torch

    import pmnet.methods.pmnet.network

    sys.path.insert(0, str(ROOT))
    from tests.pmnet.methods.plain_network import plain_network_head

    pmnet.methods.pmnet.network.keep_freed_memory = lambda: False  # type: ignore[assignment]
    network = pmnet.methods.pmnet.network.PMNet(pmnet.ResNetBackbone("resnet50", weights="none")).to(device)
    network.backbone.to(memory_format=torch.contiguous_format)

    @torch.no_grad()
    def features(query: Any, support: Any, support_masks: Any) -> Any:
        apart = network.backbone(query, network.reads), network.backbone(support.flatten(0, 1), network.reads)
        return network.chosen(*apart, support, support_masks)

    def head(*arguments: Any) -> Any:
        return plain_network_head(network.head, *arguments)

    def seen(query: Any, support: Any, masks: Any) -> Any:
        _, of_supports = features(query, support, masks)
        return (
            lambda: network.backbone(query, network.query_reads),
            lambda feats: head(feats, of_supports, masks),
        )

    return whole(network, features, head, seen, device)


def whole(network: Any, features: Any, head: Any, seen: Any, device: str) -> Callable[[Work], dict[str, float]]:
    """Both forward passes and the head; in a training step also the gradients of the head's parameters.

    Args:
        seen: processes supports; returns the pass and the head of a further query.
    """
    import torch

    def run(work: Work) -> dict[str, float]:
        query, support, masks = images(work, device)
        network.train(work.train)

        def passes() -> Any:
            return features(query, support, masks)

        def rest(found: Any) -> None:
            logits = head(*found, masks)
            if work.train:
                torch.nn.functional.cross_entropy(logits.float(), masks[:, 0].long()).backward()
                network.zero_grad()

        low = torch.autocast(device, torch.bfloat16, enabled=work.precision == "bfloat16")
        with low, torch.inference_mode(not work.train):
            if not work.seen:
                return measured(device, passes, rest)
            of_query, of_class = seen(query, support, masks)
            return measured(device, of_query, lambda feats: [of_class(feats) for _ in range(work.classes)])

    return run


PROGRAM = {"backbone": bare_backbone, "pmnet": pmnet, "plain": plain}


# Any method


def method(settings: list[str], shots: int, device: str) -> tuple[str, Callable[[], dict[str, float]]]:
    """A description of the method that the settings compose, and its test of one episode, with random weights."""
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["backbone.weights=none", *settings])
    network = instantiate(cfg.model, backbone=instantiate(cfg.backbone)).to(device).eval()
    side = cfg.episodes.image_size
    height, width = (side, side) if isinstance(side, int) else side
    query, support, masks = images(Work("", shots=shots, size=max(height, width)), device)
    query, support, masks = (x[..., :height, :width] for x in (query, support, masks))
    network.check(query, support, masks)

    @torch.inference_mode()
    def run() -> dict[str, float]:
        def rest(passed: Any) -> None:
            network.head.predict(*network.chosen(*passed, support, masks), masks)

        return measured(device, lambda: network.passes(query, support, network.reads), rest)

    return f"{type(network).__name__}, {network.backbone.provenance.backbone}, {height}x{width}", run


def of_method(settings: list[str], device: str, rounds: int) -> tuple[str, list[list[str]]]:
    """The method in words, and rows for `METHOD_HEADERS`. The first round warms up and is not counted."""
    rows = []
    for shots in (1, 5):
        title, run = method(settings, shots, device)
        first, *timed = [run() for _ in range(rounds + 1)]
        floor, whole_run = (statistics.median(f[part] for f in timed) for part in ("backbone", "seconds"))
        numbers = floor, whole_run, whole_run / floor, first["bytes"] / 1e9
        rows.append([f"{shots} shot{'s' * (shots > 1)}", *(f"{number:.2f}" for number in numbers)])
    return title, rows


METHOD_HEADERS = ["", "backbone, s", "method, s", "x backbone", "GB above it"]


# All programs, taking turns


class Served:
    """A program running in its own process, called with one `Work` at a time."""

    def __init__(self, program: str, device: str) -> None:
        self.program, (self.channel, theirs) = program, FORKS.Pipe()
        self.process = FORKS.Process(target=serve, args=(program, device, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, work: Work) -> dict[str, float]:
        try:
            self.channel.send(work)
            return self.channel.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            why = f"signal {-code} ended it, perhaps for lack of memory" if code < 0 else "its error is above"
            raise SystemExit(f"The program {self.program!r} failed at {work.name!r}: {why}.") from None

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def in_turn(work: Work, programs: list[str], device: str, rounds: int, console: Console) -> dict[str, dict[str, float]]:
    """Median seconds of each program. The first round is a warm-up, which also measures the memory of a new process.

    A program that takes longer than `LONG` is timed once.
    """
    served = {name: Served(name, device) for name in programs}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    with console.status(work.name):
        for _ in range(rounds + 1):
            for name, run in served.items():
                if len(found[name]) < 2 or found[name][0]["seconds"] < LONG:
                    found[name].append(run(work))
    for run in served.values():
        run.end()
    return {
        name: {"seconds": statistics.median(f["seconds"] for f in timed), "bytes": first["bytes"], "times": len(timed)}
        for name, (first, *timed) in found.items()
    }


def table(device: str) -> list[Work]:
    """The rows of a device; on a CPU without fast kernels in bfloat16, those in float32."""
    from pmnet.processor import has_bfloat16

    if device != "cpu":
        return ON_GPU
    return [work for work in TABLE if work.precision == "float32" or has_bfloat16()]


def programs_of(work: Work) -> list[str]:
    """All programs, but for the plain one where it needs more than 10 GB, or would see the supports again."""
    return [program for program in PROGRAMS if program != "plain" or (work.size <= 640 and not work.seen)]


def against(command: str, rounds: int, console: Console) -> float:
    """Median seconds of another command: the last word of its output if that is a number, else its run time."""
    taken = []
    with console.status(command):
        for _ in range(rounds):
            start = time.perf_counter()
            done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, text=True, check=False)
            whole_run = time.perf_counter() - start
            if done.returncode:
                raise SystemExit(f"--against: {command} failed with exit code {done.returncode}.")
            word = done.stdout.split()[-1] if done.stdout.split() else ""
            taken.append(float(word) if re.fullmatch(r"\d+(\.\d*)?(e-?\d+)?", word) else whole_run)
    return statistics.median(taken)


def rows_of(found: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    """Table rows from work -> program -> seconds and bytes; columns as in `HEADERS`."""
    rows = []
    for name, by in found.items():
        floor, ours = (by[program]["seconds"] for program in ("backbone", "pmnet"))
        theirs = by["plain"]["seconds"] if "plain" in by else None
        beside = ["", ""] if theirs is None else [f"{theirs:.2f}", f"{ours / theirs:.2f}"]
        memory = [f"{by[p]['bytes'] / 1e9:.2f}" if p in by and by[p]["bytes"] else "" for p in ("pmnet", "plain")]
        rows.append([name, f"{floor:.2f}", f"{ours:.2f}", beside[0], f"{ours / floor:.2f}", beside[1], *memory])
    return rows


HEADERS = ["", "floor (float32), s", "PMNet, s", "plain, s", "x floor", "x plain", "PMNet, GB", "plain, GB"]


def draw(curves: dict[str, dict[str, dict[str, dict[str, float]]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 3.2), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for program in PROGRAMS:
            seconds = {int(point): by[program]["seconds"] for point, by in points.items() if program in by}
            axes.plot(list(seconds), list(seconds.values()), marker="o", label=program)
        axes.set(
            xlabel={"size": "image side in pixels", "batch": "episodes per batch"}.get(name, name), ylabel="seconds"
        )
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def machine(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def shown(title: str, headers: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title)
    for header in headers:
        table.add_column(header, justify="right" if header else "left", no_wrap=not header)
    for row in rows:
        table.add_row(*row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser("python -m experiments.bench", description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", help="model=... and other settings of run.py: times only that method")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; their median is reported (default: 3)")
    parser.add_argument("--curves", action="store_true", help="also over shots, sides, classes and batches")
    parser.add_argument("--against", metavar="CMD", help="another command to time in the same run")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="output folder (default: benchmarks)")
    arguments = parser.parse_args()
    import torch
    import torchvision

    if arguments.device != "cpu" and not torch.accelerator.is_available():
        parser.error(f"--device {arguments.device}: PyTorch finds no such device. Use --device cpu.")
    if arguments.settings and arguments.curves:
        parser.error("--curves times PMNet: leave out model=... and other settings.")
    console, device, rounds = Console(), arguments.device, arguments.rounds
    if not console.is_terminal:
        console.width = WIDTH
    if arguments.settings:
        title, rows = of_method(arguments.settings, device, rounds)
        console.print(shown(f"{title}, {machine(device)}", METHOD_HEADERS, rows))
        if arguments.against:
            console.print(f"{arguments.against}: {against(arguments.against, rounds, console):.2f} s")
        return
    record: dict[str, Any] = {
        "machine": machine(device),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
        "rounds": rounds,
        "table": {work.name: in_turn(work, programs_of(work), device, rounds, console) for work in table(device)},
    }
    setting = f"{record['machine']}, PyTorch {torch.__version__}, ResNet-50 at 384x384"
    title = f"{setting}, medians of {rounds}; timed once above {LONG} s"
    rows = rows_of(record["table"])
    console.print(shown(title, HEADERS, rows))
    if arguments.against:
        record["against"] = {"command": arguments.against, "seconds": against(arguments.against, rounds, console)}
        console.print(f"{arguments.against}: {record['against']['seconds']:.2f} s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    base = arguments.out / re.sub(r"[^a-z0-9]+", "-", record["machine"].lower()).strip("-")
    if arguments.curves:
        record["curves"] = {
            name: {work.name: in_turn(work, programs_of(work), device, max(1, rounds // 2), console) for work in works}
            for name, works in CURVES.items()
        }
        draw(record["curves"], base.with_suffix(".png"))
    write_json(base.with_suffix(".json"), record)
    base.with_suffix(".md").write_text(
        f"{title}\n\n{tabulate(rows, HEADERS, tablefmt='github', disable_numparse=True)}\n"
    )
    console.print(f"Wrote {base}.json")


if __name__ == "__main__":
    main()
