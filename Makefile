PYTHON ?= python3
BIN = .venv/bin
CURVES = $(filter --curves,$(MAKECMDGOALS))

# The environment; set up again when its requirements change.
.venv/ready: pyproject.toml constraints.txt
	@echo "Setting up .venv: about 5 GB of packages, some minutes. Log: .venv/install.log"
	@$(PYTHON) -m venv .venv
	@{ $(BIN)/pip install --upgrade pip && $(BIN)/pip install -c constraints.txt -e .[dev]; } > .venv/install.log 2>&1 || \
		{ tail -n 30 .venv/install.log; echo "The installation failed; the whole log is .venv/install.log."; exit 1; }
	@touch $@

install: .venv/ready

run: install  ## first contact: train on 15 synthetic classes, test on 5 unseen ones, beside the shipped head
	@echo "Training PMNet lite on synthetic images: about 3 minutes on 2 cores. It ends with a table and pictures."
	@$(BIN)/python run.py experiment=quickstart
	@echo "The same test with the shipped head, which has learned longer and from photos too: half a minute."
	@$(BIN)/python run.py experiment=quickstart mode=test ckpt=pmnet_lite

demo: install  ## a page in the browser: paint an object in one photo, find it in others
	@$(BIN)/pmnet serve

test: install  ## all tests, the slow ones too; one test file per core at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 30

quick: install  ## the fast tests alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

bench: install  ## speed beside the bare backbone and a plain implementation; import and start-up times; some minutes. model=hsnet: that method alone
ifeq ($(origin model),command line)
	$(BIN)/python -m experiments.bench model=$(model) $(if $(backbone),backbone=$(backbone)) $(CURVES) $(ARGS)
else
	$(BIN)/python -m experiments.bench $(CURVES) $(ARGS)
	$(BIN)/python -m experiments.startup
endif

faults: install  ## breaks real runs at random moments (TRIES=300) and writes docs/reliability.md; about 20 seconds a try
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --tries $(or $(TRIES),300)

fuzz: install  ## feeds INPUTS=10000 damaged files and settings to everything that reads them; some minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --inputs $(or $(INPUTS),10000)

audit: install  ## known vulnerabilities of the tested versions, where the database can be reached
	@$(BIN)/python .ci/audit

docs: install  ## the documentation site, in site/; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "To read it: $(BIN)/python -m http.server -d site, then http://localhost:8000"

--curves: bench  ## make bench -- --curves: speed over shots, image sizes, classes and batches, too
	@:

check: install  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: install run demo test quick bench --curves faults fuzz audit docs check
