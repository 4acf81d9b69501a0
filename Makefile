# make train                                 train the default VAE on MNIST
# make train ARGS="model.latent_dim=2"       pass overrides to train.py
# make train TORCH_INDEX=URL                 install torch and torchvision from another wheel index, such as CPU-only builds
# make test                                  lint, types and tests, offline
# make help                                  list all targets

PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup train test tests proof lint types docs

help:  ## list all targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## build .venv with the pinned versions, once

# The stamp is written last, so that an interrupted set-up is repeated from the start and a finished one is skipped. A
# change of pyproject.toml adds to a finished one, which trainings may be using.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 14) and "$(PYTHON) is Python %d.%d, but 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12" % v)'
	@echo "Setting up $(VENV): a few minutes the first time, mostly for PyTorch."
	@$(PYTHON) -m venv $(if $(wildcard $(STAMP)),,--clear) $(VENV)
	@$(if $(TORCH_INDEX),$(PIP) install --index-url "$(TORCH_INDEX)" --constraint $(CONSTRAINTS) torch torchvision)
	@$(PIP) install --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

train: $(STAMP)  ## train the default VAE on MNIST; ARGS="model.latent_dim=2" passes overrides to train.py
	@$(BIN)/python train.py $(ARGS)

test: lint types tests  ## run lint, types and tests, offline (three minutes on two cores)

tests: $(STAMP)  ## run only the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

proof: $(STAMP)  ## run the slow tests: launchers, several processes, a search, fuzzing (half an hour on two cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m proof $(ARGS)
	@OMP_NUM_THREADS=1 FUZZ_EXAMPLES=250 $(BIN)/python -m pytest -n auto tests/test_fuzz.py

lint: $(STAMP)  ## check style and format with ruff
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP)  ## check types with mypy
	@$(BIN)/mypy

docs: $(STAMP)  ## build the documentation site into docs/site/ and check its links
	@$(PIP) install --constraint $(CONSTRAINTS) --editable '.[docs]'
	@$(BIN)/python docs/write_pages.py
	@$(BIN)/zensical build --config-file docs/zensical.toml --strict --clean
