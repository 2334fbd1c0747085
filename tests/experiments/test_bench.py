"""The benchmark on one small `Work`. No test depends on the speed of the machine."""

import sys

import pytest
from rich.console import Console

from experiments import bench
from pmnet import processor


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"train": True, "batch": 2}, {"seen": True, "shots": 2}])
def test_every_program_does_the_work_and_tells_its_time_and_memory(options: dict) -> None:
    work = bench.Work("tiny", size=64, **options)
    found = bench.in_turn(work, bench.programs_of(work), "cpu", 1, Console(quiet=True))
    assert found.keys() == set(bench.PROGRAMS) - ({"plain"} if work.seen else set())
    assert all(by["seconds"] > 0 for by in found.values())
    (row,) = bench.rows_of({"tiny": found})
    assert row[0] == "tiny"
    assert len(row) == len(bench.HEADERS)


def test_rows_in_bfloat16_need_a_processor_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, rows in ((True, 1), (False, 0)):
        monkeypatch.setattr(processor, "has_bfloat16", lambda fast=fast: fast)
        assert sum(work.precision == "bfloat16" for work in bench.table("cpu")) == rows
    assert any(work.precision == "bfloat16" for work in bench.table("cuda"))


@pytest.mark.slow
def test_a_program_that_fails_is_named() -> None:
    with pytest.raises(SystemExit, match="'pmnet' failed at 'odd'"):
        bench.in_turn(bench.Work("odd", size=100), ["pmnet"], "cpu", 1, Console(quiet=True))


@pytest.mark.parametrize("says", ["print('loaded'); print(0.25)", "print('done')"])
def test_another_program_says_its_seconds_or_is_timed(says: str, tmp_path) -> None:
    (tmp_path / "other.py").write_text(says)
    taken = bench.against(f"{sys.executable} {tmp_path}/other.py", 1, Console(quiet=True))
    assert (taken == 0.25) == ("0.25" in says)
    assert taken > 0


def test_another_program_that_fails_is_named() -> None:
    with pytest.raises(SystemExit, match="exit code 3"):
        bench.against(f"{sys.executable} -c 'raise SystemExit(3)'", 1, Console(quiet=True))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["hsnet", "pfenet", "repri", "prototype"])
def test_any_method_is_timed_beside_its_backbone(model: str) -> None:
    """RePRI takes gradient steps within its prediction."""
    settings = [f"model={model}", "backbone=resnet18", "episodes.image_size=65"]
    settings = settings if model == "pfenet" else [*settings, "episodes.image_size=64"]
    title, rows = bench.of_method(settings, "cpu", 1)
    assert "resnet18" in title
    assert [row[0] for row in rows] == ["1 shot", "5 shots"]
    for row in rows:
        assert len(row) == len(bench.METHOD_HEADERS)
        assert float(row[2]) >= float(row[1])


def test_other_program_is_timed_beside_a_method_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "of_method", lambda settings, device, rounds: ("HSNet", []))
    monkeypatch.setattr(sys, "argv", ["bench", "model=hsnet", "--against", f"{sys.executable} -c 'print(0.25)'"])
    bench.main()
    assert capsys.readouterr().out.rstrip().endswith(": 0.25 s")


def test_curves_are_those_of_pmnet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "model=hsnet", "--curves"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "--curves times PMNet: leave out model=" in capsys.readouterr().err
