# Everything runs in .venv of this checkout. `make` alone lists the targets.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.numprune-ready
TORCH := torch==2.13.0
VLLM := .venv-vllm
TORCHAO := torchao==0.18.0

# The first Python that works; set PYTHON=... to choose another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-images sweep repro test test-engines test-servers train train-images ui-prefect ui-mlflow \
	servers clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with exactly the versions in constraints.txt.

# torch comes first and by its exact version: pip then takes the CPU build where one is at hand, and no second one.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 not found: install one or set PYTHON=/path/to/python."; exit 2; }
	@test -x $(BIN)/python || { echo "Creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing dependencies (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[team,dev]' -c constraints.txt
	@touch $@

demo: setup ## Compress the reference model as params.yaml says; prints a table, registers the results.
	@$(BIN)/python -m flows.compress

sweep: setup ## Measure the budgets 10 to 50 % beside each other; OPTIONS="--budgets 0.1,0.15 --models a,b" names others.
	@$(BIN)/python -m flows.sweep $(OPTIONS)

demo-images: setup ## The same for images: a small LlamaGen at 10, 15, 20 and 50 %, by three recipes.
	@$(BIN)/python -m flows.demo_images

repro: setup ## The same files with DVC alone: no Prefect, no MLflow.
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tasks.forkserver dvc repro

test: setup ## Format, lint, types, unit tests, then the pipeline tests.
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses 8 --dist loadfile -m "not pipeline and not servers and not gpu and not engines"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile -m "pipeline and not gpu and not engines"

# vLLM wants an older transformers than the rest: it has an environment of its own. torchao has a folder of its own:
# transformers imports it wherever it finds it, which takes every command a second.
$(VLLM)/.ready: tests/engines/vllm.txt pyproject.toml
	@test -x $(VLLM)/bin/python || { echo "Creating $(VLLM) with $(PYTHON)"; $(PYTHON) -m venv $(VLLM); }
	@echo "Installing vLLM (a few minutes the first time)"
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/engines/vllm.txt
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VLLM)/torchao $(TORCHAO)
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

test-engines: setup $(VLLM)/.ready ## Pruned models in transformers, llama.cpp and vLLM; writes the table of README.md.
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/engines --engine-results docs/engines.json
	@$(BIN)/python -m tests.engines.table --write

train: setup ## Train the reference model again (an hour or more on a CPU).
	@$(BIN)/python -m flows.train_reference

train-images: setup ## Train the reference image model again (ten minutes on a CPU).
	@$(BIN)/python -m flows.train_reference_images

test-servers: setup ## From a dropped checkpoint to a champion, with every server of a team (ten minutes).
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -m servers

ui-prefect: setup ## Open Prefect's page: runs, progress, logs, tables.
	@$(BIN)/python -m flows.web prefect

ui-mlflow: setup ## Open MLflow's page: metrics and registered versions.
	@$(BIN)/python -m flows.web mlflow

servers: setup ## Run Prefect, a worker and MLflow for a team on this machine; OPTIONS=--help lists what can be chosen.
	@$(BIN)/python -m infra.servers $(OPTIONS)

clean: ## Remove results; .venv, models, registered versions and DVC's cache stay.
	@rm -rf artifacts report data/corpus .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
