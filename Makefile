# `make test` from an empty clone needs python3 and a package registry, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
DEMO := .venv-demo
STAMP := $(VENV)/.installed
BENCHMARKS := training_step memory step_profile packing_curve attention products generation answers latency cache scaling plan_check methods closed_form_start learning_curve loading
# Tests and recipes must not reach for a model hub.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-oldest test-demo bench docs lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with everything that development needs

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

quickstart: install ## train, caption and evaluate on small data
	$(BIN)/python recipes/quickstart.py

test: install lint ## lint, then the fast tests with coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not gpu" --cov --cov-report=term:skip-covered --cov-fail-under=85

test-slow: install ## the tests with real weights
	$(BIN)/python -m pytest -m "slow and not gpu" --durations=10 $(OPTIONS)

test-oldest: $(OLDEST)/.installed ## the fast tests with the oldest releases that pyproject.toml allows
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto -m "not slow and not gpu"

$(OLDEST)/.installed: pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install uv
	$(OLDEST)/bin/uv pip install --python $(OLDEST)/bin/python --resolution lowest-direct -e '.[test]'
	touch $@

test-demo: $(DEMO)/.installed ## the page in headless Chromium, and trackio; without Chromium its tests are skipped
	OMP_NUM_THREADS=1 $(DEMO)/bin/python -m pytest tests/demo/test_page.py tests/training/test_tracking.py $(OPTIONS)

# Beside .venv, whose packages it sees: Gradio and trackio need an older Pillow than the newest, which the other tests take.
$(DEMO)/.installed: $(STAMP)
	test -x $(DEMO)/bin/python || $(PYTHON) -m venv $(DEMO)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$($(DEMO)/bin/python -c \
		"import sysconfig; print(sysconfig.get_path('purelib'))")/packages_of_venv.pth
	$(DEMO)/bin/python -m pip install -e '.[demo,test-demo,trackio]'
	touch $@

bench: install ## run every benchmark
	set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py; done

docs: install ## the documentation site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: install ## formatting, lint, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what tests and builds leave behind, but not .venv
	rm -rf build dist site .coverage htmlcov .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
