# `make help` lists the targets. They set up what they need: a virtual environment with the pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow prove-gpu lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

$(READY): pyproject.toml constraints.txt configs/eval/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps --requirement configs/eval/requirements.txt
	mkdir -p $(VENV)/names && ln -sfn ../.. $(VENV)/names/shortzip  # mypy's way to the packages' one name
	touch $(READY)

demo: $(READY)  ## tune demo-llava's projector on 11 % of its visual tokens, show the table (4 minutes on 2 cores)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no train/tune_projector.py \
		--overwrite_output_dir true

test: $(READY)  ## the test suite (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

$(VENV)/.app: $(READY) configs/app-requirements.txt
	$(BIN)/pip install --quiet --no-deps --requirement configs/app-requirements.txt
	touch $@

test-slow: $(VENV)/.app  ## the tests that take minutes each (the page's needs Debian's chromium and chromium-driver)
	$(BIN)/python -m pytest -m slow

# With the machine's own torch and transformers: those of the virtual environment may not know its GPU.
prove-gpu:  ## on a machine with a GPU: prove what no CPU can, in 10 minutes (checkpoints/gpu-proof)
	$(PYTHON) scripts/prove_on_gpu.py --overwrite

lint: $(READY)  ## ruff (lint, format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment, caches and runs (demo-llava stays)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find checkpoints -mindepth 1 -maxdepth 1 ! -name demo-llava -exec rm -rf {} +
