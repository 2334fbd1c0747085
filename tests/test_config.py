from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

from tests.conftest import run

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
FILES = sorted(p.relative_to(CONF).with_suffix("") for p in CONF.glob("*/*.yaml") if p.parent.name != "local")


@pytest.fixture(autouse=True)
def conf():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def contains(whole, part) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(k in whole and contains(whole[k], v) for k, v in part.items())
    return whole == part


# Choices


def test_defaults():
    cfg = compose("config")
    assert (cfg.shot.k, cfg.fold.index, cfg.mode) == (1, 0, "train")


@pytest.mark.parametrize(
    "overrides, shot, fold",
    [
        (["fold=2"], 1, 2),
        (["fold=0", "shot=5"], 5, 0),
        (["shot='5'"], 5, 0),
        (["shot.k=7"], 7, 0),
        (["shot=5", "shot.k=7"], 7, 0),
        (["fold=all"], 1, "all"),
        (["fold.index=9", "shot=1"], 1, 9),
        (["experiment=quickstart", "fold=3", "shot=5"], 5, 3),
    ],
)
def test_integers_choose_from_groups(overrides, shot, fold):
    cfg = compose("config", overrides)
    assert (cfg.shot.k, cfg.fold.index) == (shot, fold)


def test_integers_stay_integers_where_they_are_values():
    cfg = compose("config", ["seed=3", "trainer.devices=2", "episodes.test=10"])
    assert (cfg.seed, cfg.trainer.devices, cfg.episodes.test) == (3, 2, 10)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_composes_and_has_the_last_word(path):
    cfg = OmegaConf.to_container(
        compose("config", [f"{path.parent}={path.name}"], return_hydra_config=True), enum_to_str=True
    )
    own = OmegaConf.to_container(OmegaConf.load(CONF / path.with_suffix(".yaml")))
    own.pop("defaults", None)
    whole = "@package _global_" in (CONF / path.with_suffix(".yaml")).read_text()
    assert contains(cfg if whole else cfg[str(path.parent)], own)


def test_every_group_is_found():
    groups = {str(p.parent) for p in FILES}
    assert {"task", "dataset", "backbone", "model", "shot", "fold", "optimizer", "trainer", "logger"} <= groups


@pytest.mark.parametrize("experiment", [p.name for p in FILES if p.parent.name == "experiment"])
def test_experiments_leave_the_command_line_the_last_word(experiment):
    overrides = [f"experiment={experiment}", "optimizer=sgd", "optimizer.lr=0.5", "trainer.max_epochs=2", "seed=9"]
    cfg = compose("config", overrides)
    assert (cfg.optimizer._target_, cfg.optimizer.lr, cfg.trainer.max_epochs) == ("torch.optim.SGD", 0.5, 2)
    assert cfg.seed == 9


def test_synthetic_images_follow_the_image_size():
    assert compose("config", ["dataset=synthetic"]).dataset.size == 128
    for name in ("synthetic", "materials"):
        assert compose("config", [f"dataset={name}", "episodes.image_size=64"]).dataset.size == 64


def test_targets_are_the_datasets():
    cfg = compose("config", ["task=cross_domain", "target=isic", "target.classes=3", "data=/d", "validation=fss"])
    assert (cfg.dataset.root, cfg.target.root, cfg.validation.root) == ("/d/pascal", "/d/isic", "/d/fss")
    assert (cfg.target.classes, cfg.task.name, cfg.fold.index) == (3, "cross_domain", "all")


@pytest.mark.parametrize(
    "task, target", [("cross_category", None), ("cross_dataset", "pascal"), ("cross_domain", "deepglobe")]
)
def test_target_follows_the_task_unless_chosen(task, target):
    assert (compose("config", [f"task={task}"]).target or {}).get("root") == (target and f"data/{target}")
    assert compose("config", [f"task={task}", "target=suim"]).target.root == "data/suim"


def test_null_takes_a_group_away():
    assert compose("config", ["experiment=table3_isic"]).validation is not None
    assert compose("config", ["experiment=table3_isic", "validation=null"]).validation is None
    assert compose("config", ["experiment=null"]).dataset._target_ == "datamodules.own.folder.FolderDataset"


# Mistakes


@pytest.mark.parametrize("group", sorted({p.parent.name for p in FILES}))
def test_wrong_choice_lists_the_right_ones(group):
    with pytest.raises(MissingConfigException) as caught:
        compose("config", [f"{group}=nonsense"])
    message = str(caught.value)
    assert f"{group}/nonsense" in message
    for path in FILES:
        if path.parent.name == group:
            assert f"\t{path.name}" in message


@pytest.mark.parametrize("choice", ["fold=17", "shot=3"])
def test_integer_that_is_no_choice_lists_the_right_ones(choice):
    with pytest.raises(MissingConfigException, match=r"Available options in '(fold|shot)':\n\t"):
        compose("config", [choice])


@pytest.mark.parametrize("option", ["sede=1", "trainer.max_epoch=3", "shot.n=5"])
def test_misspelt_option_keeps_hydras_message(option):
    name = option.split("=")[0]
    with pytest.raises(ConfigCompositionException) as caught:
        compose("config", [option])
    assert f"Could not override '{name}'" in str(caught.value)
    assert f"+{option}" in str(caught.value)


@pytest.mark.parametrize(
    "text, line, words",
    [
        (b"a: 1\nb: [1, 2\nc: 3\n", 3, "expected ',' or ']'"),
        (b"a: 1\n\tb: 2\n", 2, "'\\t'"),
        (b"a: 1\nb: 2\na: 3\n", 3, "duplicate key a"),
        (b"a: 1\nb: *x\n", 2, "undefined alias 'x'"),
        (b"a: !!python/object:os.system {}\n", 1, "could not determine a constructor"),
        (b"a: 1\nb: \x07\n", 2, "U+0007"),
        (b"a: 1\nb: 2\nc: caf\xe9\n", 3, "not UTF-8"),
        (b"# mine\n- 1\n- 2\n", 2, "name: value"),
        (b"hello world\n", 1, "name: value"),
        (b"\n5\n", 2, "name: value"),
        (b"\n# @package\na: 1\n", 2, "@package _global_"),
        (b"a: 1\ndefaults: small\n", 2, "must be a list"),
        (b"defaults:\n  - small\n  - override /shot: 5\n", 3, "'5'"),
        (b"defaults:\n  - {a: b, c: d}\n", 2, "must be a list"),
        (b"defaults:\n  - a\n  - b\n  - {a: {b: c}}\n", 4, "must be a list"),
        (b"a: ${\n", None, "no viable alternative"),
        (b"[" * 5000, None, "recursion"),
    ],
)
def test_broken_file_is_named_with_its_line(tmp_path, text, line, words):
    """What a user's own folder of configs (--config-dir) may hold; Hydra alone would print a traceback."""
    path = tmp_path / "dataset" / "mine.yaml"
    path.parent.mkdir()
    path.write_bytes(text)
    with pytest.raises(ConfigCompositionException) as caught:
        compose("config", [f"hydra.searchpath=[{tmp_path}]", "dataset=mine"])
    assert str(caught.value).startswith(f"Error: {path}" + (f" (line {line})" if line else "") + " cannot be read: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "# mine\n", "a:\n", "a: null\n", "defaults:\n  - small\n  - /augment: null\na: b\n"]
)
def test_sound_file_is_read(tmp_path, text):
    (tmp_path / "dataset").mkdir()
    for name, content in (("mine", text), ("small", "c: 1\n")):
        (tmp_path / "dataset" / f"{name}.yaml").write_text(content)
    cfg = compose("config", [f"hydra.searchpath=[{tmp_path}]", "dataset=mine"])
    assert cfg.dataset.get("a") == ("b" if "b" in text else None)


# As a user starts it


def test_broken_file_ends_the_command_with_one_message(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 3\n trainer: {\n")
    for flags in ([], ["-m"]):
        done = run(*flags, "--config-dir", str(tmp_path), "experiment=mine")
        assert done.returncode == 1
        assert f"{tmp_path}/experiment/mine.yaml (line 3)" in done.stderr
        assert done.stderr.count("Error: ") == 1
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_first_start_without_data_says_what_to_do(tmp_path):
    done = run(
        "dataset=folder", "dataset.root=null", "backbone=small", f"hydra.run.dir={tmp_path}"
    )  # whatever conf/local says
    assert done.returncode == 1
    assert "dataset.root=" in done.stderr
    assert "experiment=quickstart" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_integers_sweep_over_groups(tmp_path):
    sweep = ["fold=0,1", "shot=1,5", "hydra/launcher=basic", f"hydra.sweep.dir={tmp_path}", "-m"]
    done = run("dataset=folder", "dataset.root=null", "backbone=small", *sweep)
    assert done.returncode == 1, done.stderr
    settings = []
    for job in sorted(tmp_path.glob("*/.hydra/config.yaml")):
        cfg = OmegaConf.load(job)
        settings.append((cfg.fold.index, cfg.shot.k))
    assert settings == [(0, 1), (0, 5), (1, 1), (1, 5)]
    assert done.stderr.count("No data chosen") >= 4


def test_help_lists_the_choices():
    done = run("--help")
    assert done.returncode == 0
    assert "experiment: " in done.stdout
    assert "quickstart" in done.stdout
