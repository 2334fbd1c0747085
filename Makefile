PYTHON ?= python3
BIN = .venv/bin

# The environment, made anew when what it is made from changes.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e .[dev]
	touch $@

install: .venv/ready

run: install  ## first contact: learn 15 drawn classes, test on 5 others
	$(BIN)/python run.py experiment=quickstart

test: install  ## everything, the slow parts too; a file of tests a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" -n auto --maxprocesses 4 --dist loadfile

quick: install  ## the fast tests alone
	$(BIN)/python -m pytest

bench: install  ## PMNet beside the bare backbone and a plain implementation; some minutes
	$(BIN)/python -m experiments.bench

check: install  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: install run test quick bench check
