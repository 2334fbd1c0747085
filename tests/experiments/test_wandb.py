"""If W&B cannot be reached, rejects the key or fails, the training continues and logs one warning."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path

import pytest
import wandb
import yaml

from experiments.loggers import finish
from experiments.wandb_logger import WandbLogger
from tests.conftest import ROOT, TINY, command, results, run
from tests.wandb_files import runs_in

pytestmark = pytest.mark.slow
KEY = "0123456789" * 4


class Refusal(BaseHTTPRequestHandler):
    """Answers like a server that does not know the key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"errors": [{"message": "invalid api key"}]}')

    do_GET = do_POST

    def log_message(self, *args) -> None: ...


@pytest.fixture
def refusing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Acceptance(BaseHTTPRequestHandler):
    """Answers the requests by which wandb checks a server: the user, and the start of a run."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(errors="replace")
        answer = json.dumps({"data": self.data(asked)}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def data(self, asked: str) -> dict:
        if "upsertBucket" in asked:
            project = {"id": "p", "name": "pmnet", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": "run", "displayName": "run", "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        return {
            "viewer": {"id": "v", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}},
            "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []},
            **dict.fromkeys(("model", "project", "entity")),
        }

    do_GET = do_PUT = do_POST

    def log_message(self, *args) -> None: ...


def test_connection_lost_in_mid_training(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Acceptance)
    serving = get_context("fork").Process(target=server.serve_forever)
    serving.start()
    server.socket.close()
    setting = [*TINY, "trainer.max_epochs=6", "episodes.per_epoch=40", "logger=wandb", "logger.finish_timeout=5"]
    process = subprocess.Popen(
        command(*setting, f"hydra.run.dir={tmp_path}"), cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_API_KEY": KEY, "HOME": str(tmp_path),
                          "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.time() + 120
    while not (tmp_path / "checkpoints" / "last.ckpt").exists() and time.time() < deadline:
        time.sleep(0.02)
    serving.kill()
    began_online = list((tmp_path / "wandb").glob("run-*"))
    output = process.communicate(timeout=300)[0]
    assert began_online, output
    assert process.returncode == 0, output
    assert "wandb sync" in output
    assert "Traceback" not in output
    assert results(tmp_path)["training"]["epochs"] <= 6


@pytest.mark.parametrize("variable", [{"WANDB_BASE_URL": "foo"}, {"WANDB_MODE": "junk"}])
def test_settings_that_wandb_refuses(variable: dict[str, str], tmp_path: Path) -> None:
    done = run_with(tmp_path, **variable)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("W&B failed") == 1, output
    assert "Traceback" not in output
    assert results(tmp_path / "run")["test"]


def test_wandb_that_is_turned_off_stays_off(tmp_path: Path) -> None:
    done = run_with(tmp_path, WANDB_MODE="disabled", WANDB_API_KEY="")
    assert done.returncode == 0, done.stderr
    assert "W&B" not in done.stdout + done.stderr
    assert not list((tmp_path / "run").rglob("*.wandb"))


def test_summary_has_the_baselines_even_if_nothing_was_trained(tmp_path: Path) -> None:
    """The record of a method that learns nothing has empty "training" and "checkpoint"."""
    scores = {"miou": 31.5, "fb_iou": 52.25, "iou_per_class": {"cat": 31.5}}
    baselines = {"all_foreground": {**scores, "miou": 20.0}, "nearest": {**scores, "fb_iou": 60.5}}
    record = {"setting": {}, "test": scores, "baselines": baselines, "training": {}, "checkpoint": {}}
    (tmp_path / "results.json").write_text(json.dumps(record))
    logger = WandbLogger(str(tmp_path), offline=True, checkpoint=True, project="pmnet")
    try:
        logger.log_results(record, tmp_path)
        finish(0)
    finally:
        wandb.teardown()  # only now the file is complete; and programs that later tests start would use this service
    assert not logger.failed
    (run,) = runs_in(tmp_path)
    logged = {name: value for name, value in run.summary.items() if name.startswith("test/")}
    assert logged == {
        "test/miou": 31.5, "test/fb_iou": 52.25, "test/iou/cat": 31.5,
        "test/baselines/all_foreground/miou": 20.0, "test/baselines/all_foreground/fb_iou": 52.25,
        "test/baselines/nearest/miou": 31.5, "test/baselines/nearest/fb_iou": 60.5,
    }  # fmt: skip
    assert not run.artifacts


def run_with(tmp_path: Path, **environment: str):
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": KEY}
    setting = [*TINY, "trainer.max_epochs=1", "logger=wandb", "logger.init_timeout=6", f"hydra.run.dir={tmp_path}/run"]
    return run(*setting, env=home | environment)


def is_kept_offline(tmp_path: Path, done) -> None:
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("The run is kept offline; upload it later: wandb sync") == 1, output
    assert "Traceback" not in output
    (kept,) = [r for r in runs_in(tmp_path / "run") if "test/miou" in r.summary]
    assert kept.summary["test/miou"] == results(tmp_path / "run")["test"]["miou"]


def test_server_that_does_not_answer(tmp_path: Path) -> None:
    is_kept_offline(tmp_path, run_with(tmp_path, WANDB_BASE_URL="http://127.0.0.1:9"))


def test_rejected_key(tmp_path: Path, refusing: str) -> None:
    is_kept_offline(tmp_path, run_with(tmp_path, WANDB_BASE_URL=refusing))


def test_malformed_key(tmp_path: Path) -> None:
    is_kept_offline(tmp_path, run_with(tmp_path, WANDB_API_KEY="short"))


def test_wandb_that_dies_in_mid_training(tmp_path: Path) -> None:
    setting = [*TINY, "trainer.max_epochs=6", "episodes.per_epoch=40", "logger=wandb", "logger.offline=true"]
    process = subprocess.Popen(
        command(*setting, f"hydra.run.dir={tmp_path}"), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.time() + 120
    while not (tmp_path / "checkpoints" / "last.ckpt").exists() and time.time() < deadline:
        time.sleep(0.02)
    (service,) = services_of(process.pid)
    os.kill(service, signal.SIGKILL)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert output.count("W&B failed") == 1, output
    assert "Traceback" not in output
    assert results(tmp_path)["training"]["epochs"] <= 6
    assert sum(line.startswith("5,") for line in (tmp_path / "metrics.csv").read_text().splitlines()) >= 1


def services_of(pid: int) -> list[int]:
    children = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=True
    )
    return [int(line.split()[0]) for line in children.stdout.splitlines() if "wandb-core" in line]


class Leading(Acceptance):
    """Leads a search as W&B's server does: gives an agent its trials in turn, and has the first of them stopped."""

    sweep: str  # the content of its file
    folder: Path
    trials: list[dict]
    begun: list[str]

    def data(self, asked: str) -> dict:
        if "SweepWithRuns" in asked:
            return {"project": {"sweep": {"config": self.sweep, "runs": {"edges": []}}}}
        if "CreateAgent" in asked:
            return {"createAgent": {"agent": {"id": "agent"}}}
        if "mutation Heartbeat" in asked:
            commands = self.commands(json.loads(json.loads(asked)["variables"]["runState"]))
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}
        if "CreateRunFiles" in asked:
            return {"createRunFiles": {"uploadHeaders": [], "files": []}}
        data = super().data(asked)
        if "upsertBucket" in data:
            data["upsertBucket"]["bucket"]["name"] = json.loads(asked)["variables"]["name"]
            self.begun.append(data["upsertBucket"]["bucket"]["name"])
        return data

    def commands(self, running: dict[str, str]) -> list[dict]:
        if not running:
            return [self.trials.pop(0) if self.trials else {"type": "exit"}]
        first = self.folder / "one"
        stoppable = (first / "checkpoints" / "last.ckpt").exists() and not (first / "results.json").exists()
        return [{"type": "stop", "run_id": "one"}] if "one" in running and len(self.trials) == 2 and stoppable else []


def test_search_that_wandb_leads(tmp_path: Path) -> None:
    """`wandb agent` with the documented file; a trial that is stopped and started again goes on in its run."""
    sweep = yaml.safe_load((ROOT / "docs/examples/wandb_sweep.yaml").read_text())
    replaced = {"dataset=pascal": [*TINY, "trainer.max_epochs=40", "logger.finish_timeout=5", "reuse=false"]}
    replaced |= {"fold=0": [], "validation=fss": [], "${interpreter}": [sys.executable]}
    command = [part for given in sweep["command"] for part in replaced.get(given, [given])]
    sweep["command"] = [part.replace("outputs/trials", str(tmp_path)) for part in command]
    one, two = ({"optimizer.lr": {"value": lr}, "model.dropout": {"value": 0.3}} for lr in (0.0125, 0.00025))
    trials = [("run", "one", one), ("resume", "one", one), ("run", "two", two)]

    Leading.sweep, Leading.folder, Leading.begun = yaml.dump(sweep), tmp_path, []
    Leading.trials = [{"type": kind, "run_id": i, "program": "run.py", "args": args} for kind, i, args in trials]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Leading)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path)}
    place |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": KEY}
    done = subprocess.run(
        [Path(sys.executable).with_name("wandb"), "agent", "me/pmnet/search"],
        cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
        env=os.environ | place | {"OMP_NUM_THREADS": "1", "WANDB_AGENT_REPORT_INTERVAL": "1"},
    )  # fmt: skip
    server.shutdown()
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "Traceback" not in output, output
    assert "Ignoring" not in output, output
    for name, told in (("one", one), ("two", two)):
        record = results(tmp_path / name)
        assert record["config"]["optimizer"]["lr"] == told["optimizer.lr"]["value"]
        assert record["training"]["epochs"] <= 40
        assert (tmp_path / name / "wandb-run-id").read_text() == name
    assert set(Leading.begun) == {"one", "two"}
    assert (tmp_path / "one" / "metrics-1.csv").exists()  # the part before the stop
    assert len(list((tmp_path / "one" / "wandb").glob("run-*-one"))) == 2


def test_jobs_without_wandb_do_not_import_it() -> None:
    """It takes more than half a second."""
    check = "import sys, experiments.run.job; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
