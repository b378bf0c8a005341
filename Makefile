# `make help` lists the targets. Needs python3 (3.11 or newer, with venv) and make, nothing else.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo
AUDIO ?= $(DEMO)/corpus/nsynth-train
SEED ?= 0
# More settings for the demo's commands, for instance of a smaller one: see tests/smoke.sh.
NOTES ?=
FIT ?=
STAMP := .venv/.installed
DEMO_SETTINGS = --data.root "$(AUDIO)" --model.seed $(SEED) --data.seed $(SEED) \
  --trainer.callbacks+ OnlineProbe --trainer.callbacks.corpus $(DEMO)/corpus --trainer.callbacks.every_n_steps 300 $(FIT)

.PHONY: help
help: ## This list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

.PHONY: install
install: $(STAMP) ## A virtual environment in .venv with the locked versions.

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("python3 is %d.%d, 3.11 or newer is needed: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock -e .
	@touch $@

.PHONY: demo
demo: $(STAMP) ## Pretrain two small JEPAs, probe them, write demo/report.html; AUDIO=DIR pretrains on your own files.
	$(BIN)/jepa-audio data synth $(DEMO)/corpus --seed $(SEED) $(NOTES)
	$(BIN)/jepa-audio fit --config demo/wavjepa --run_dir $(DEMO)/wavjepa $(DEMO_SETTINGS)
	$(BIN)/jepa-audio fit --config demo/pupujepa --run_dir $(DEMO)/pupujepa $(DEMO_SETTINGS)
	$(BIN)/jepa-audio probe --encoder $(DEMO)/wavjepa/checkpoints/last.ckpt,$(DEMO)/pupujepa/checkpoints/last.ckpt \
	  --tasks nsynth_pitch,nsynth_instrument --data $(DEMO)/corpus --output $(DEMO)/probe --preset linear --max_train 2000
	$(BIN)/jepa-audio report $(DEMO)

ON_ALL_CORES := --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: test
test: $(STAMP) ## The fast tests on all cores (a process on each, eight at most): no network, no GPU, a few minutes.
	$(BIN)/pytest $(ON_ALL_CORES)

.PHONY: test-slow
test-slow: $(STAMP) ## All tests, those that train for minutes too.
	$(BIN)/pytest $(ON_ALL_CORES) --runslow

.PHONY: wheel
wheel: $(STAMP) ## Build the wheel and use it in a clean environment, away from this folder.
	bash tests/wheel.sh

.PHONY: lint
lint: $(STAMP) ## Ruff: rules and format.
	$(BIN)/ruff check src tests benchmarks setup.py
	$(BIN)/ruff format --check src tests benchmarks setup.py

.PHONY: type
type: $(STAMP) ## Mypy.
	$(BIN)/mypy

.PHONY: deps
deps: $(STAMP) ## Deptry: the declared dependencies are the imported ones.
	$(BIN)/deptry src

.PHONY: check
check: lint type deps ## Lint, types and dependencies.

.PHONY: bench
bench: $(STAMP) ## Measure the training step; results are in benchmarks/RESULTS.md.
	$(BIN)/python -m benchmarks.train_step

.PHONY: docs
docs: $(STAMP) ## Check that the documents' commands, files and settings exist.
	$(BIN)/pytest tests/test_docs.py

.PHONY: lock
lock: $(STAMP) ## Resolve requirements.lock again, with the newest versions.
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --quiet --upgrade -o requirements.lock

.PHONY: clean
clean: ## Remove the virtual environment and the demo.
	rm -rf .venv $(DEMO)
