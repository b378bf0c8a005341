# `make help` lists the targets. They need only python3 (3.11 or newer, with venv) and make.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo
AUDIO ?= $(DEMO)/corpus/nsynth-train
SEED ?= 0
CORPORA ?= corpora
FSDD ?=
# More options of the commands of the demo, for example for a smaller demo: see tests/smoke.sh.
NOTES ?=
FIT ?=
STAMP := .venv/.installed
DEMO_SETTINGS = --data.root "$(AUDIO)" --model.seed $(SEED) --data.seed $(SEED) \
  --trainer.max_steps 600 --trainer.val_check_interval 300 \
  --trainer.callbacks+ OnlineProbe --trainer.callbacks.corpus $(DEMO)/corpus --trainer.callbacks.every_n_steps 300 $(FIT)

.PHONY: help
help: ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

.PHONY: install
install: $(STAMP) ## Create a virtual environment in .venv with the locked versions.

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("python3 is %d.%d, 3.11 or newer is needed: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock -e .
	@touch $@

.PHONY: demo
demo: $(STAMP) ## Pretrain two small JEPAs, probe them, write demo/report.html; AUDIO=DIR pretrains on your own files.
	$(BIN)/jepa-audio data synth $(DEMO)/corpus --num_test 3000 --seed $(SEED) $(NOTES)
	$(BIN)/jepa-audio fit --config small/waveform --run_dir $(DEMO)/waveform --overwrite $(DEMO_SETTINGS)
	$(BIN)/jepa-audio fit --config small/spectrogram --run_dir $(DEMO)/spectrogram --overwrite $(DEMO_SETTINGS)
	$(BIN)/jepa-audio probe --encoder $(DEMO)/waveform,$(DEMO)/spectrogram --variants "[target]" \
	  --tasks nsynth_pitch,nsynth_instrument --data $(DEMO)/corpus --output $(DEMO)/probe --max_train 2000 \
	  --preset linear --pooling mean_std --frequency concat
	$(BIN)/jepa-audio report $(DEMO)

ON_ALL_CORES := --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: test
test: $(STAMP) ## Run the fast tests on all cores, with at most eight processes: no network, no GPU, a few minutes.
	$(BIN)/pytest $(ON_ALL_CORES) --ignore tests/docs

.PHONY: test-docs
test-docs: $(STAMP) ## Run the commands and blocks of README, the pages and the notebook.
	$(BIN)/pytest $(ON_ALL_CORES) tests/docs

.PHONY: test-slow
test-slow: $(STAMP) ## Run all tests, including those that train for minutes.
	$(BIN)/pytest $(ON_ALL_CORES) --runslow

.PHONY: wheel
wheel: $(STAMP) ## Build the wheel, and test it in a clean environment outside this folder.
	bash tests/wheel.sh

.PHONY: lint
lint: $(STAMP) ## Check rules and format with ruff.
	$(BIN)/ruff check src tests benchmarks setup.py
	$(BIN)/ruff format --check src tests benchmarks setup.py

.PHONY: type
type: $(STAMP) ## Check types with mypy.
	$(BIN)/mypy

.PHONY: deps
deps: $(STAMP) ## Check with deptry that the declared and the imported dependencies are equal.
	$(BIN)/deptry src

.PHONY: check
check: lint type deps ## Run lint, type and deps.

.PHONY: bench
bench: $(STAMP) ## Measure the training step; results are in benchmarks/RESULTS.md.
	$(BIN)/python -m benchmarks.train_step

.PHONY: corpora
corpora: $(STAMP) ## Build sets of real speech and music from Debian packages; FSDD=PATH adds spoken digits.
	$(BIN)/python -m benchmarks.corpora "$(CORPORA)" $(if $(FSDD),--fsdd "$(FSDD)")

.PHONY: speedrun
speedrun: corpora ## Measure how long encoders train until they know more than log-mel; takes hours.
	$(BIN)/python -m benchmarks.learning speedrun --corpora "$(CORPORA)" --output speedrun

.PHONY: docs
docs: $(STAMP) ## Build the site of the documents in build/site; a warning is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

.PHONY: docs-serve
docs-serve: $(STAMP) ## Show the site of the documents at 127.0.0.1:8000.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

.PHONY: lock
lock: $(STAMP) ## Write requirements.lock again, with the newest versions.
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --quiet --upgrade -o requirements.lock

.PHONY: clean
clean: ## Remove the virtual environment and the demo.
	rm -rf .venv $(DEMO)
