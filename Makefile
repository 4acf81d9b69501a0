# make train                                 train the default VAE on MNIST
# make train ARGS="model.latent_dim=2"       pass overrides to train.py
# make train TORCH_INDEX=URL                 install torch and torchvision from another wheel index, such as CPU-only builds
# make test                                  lint, types and tests, offline
# make help                                  list all targets

PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
CORE := $(VENV)/.core
DEV := $(VENV)/.dev
ARGS ?=
TORCH_INDEX ?=
UV = $(or $(shell command -v uv),$(BIN)/uv)
INSTALL = $(UV) pip install --python $(BIN)/python --constraint $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help setup train test tests proof lint types docs

help:  ## list all targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DEV)  ## build .venv with the pinned versions and the development tools, once

# uv installs, ten times as fast as pip. Without uv on the path, pip installs it into .venv first. The stamps are written
# last, so that an interrupted set-up is repeated from the start and a finished one is skipped. A change of pyproject.toml
# adds to a finished one, which trainings may be using.
$(CORE): pyproject.toml $(CONSTRAINTS)
	@echo "Setting up $(VENV): a minute the first time, mostly for PyTorch."
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 14) and "$(PYTHON) is Python %d.%d, but 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12" % v)'
	@[ -e $@ ] || $(PYTHON) -m venv --clear $(VENV)
	@command -v uv > /dev/null || $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint $(CONSTRAINTS) uv
	@$(if $(TORCH_INDEX),$(INSTALL) --index-url "$(TORCH_INDEX)" torch torchvision)
	@$(INSTALL) --editable .
	@touch $@

$(DEV): $(CORE)
	@echo "Adding the development tools to $(VENV)."
	@$(INSTALL) --editable '.[dev]'
	@touch $@

train: $(CORE)  ## train the default VAE on MNIST; ARGS="model.latent_dim=2" passes overrides to train.py
	@$(BIN)/python train.py $(ARGS)

test: lint types tests  ## run lint, types and tests, offline (three minutes on two cores)

tests: $(DEV)  ## run only the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

proof: $(DEV)  ## run the slow tests: launchers, several processes, a search, fuzzing (half an hour on two cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m proof $(ARGS)
	@OMP_NUM_THREADS=1 FUZZ_EXAMPLES=250 $(BIN)/python -m pytest -n auto tests/test_fuzz.py

lint: $(DEV)  ## check style and format with ruff
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(DEV)  ## check types with mypy
	@$(BIN)/mypy

docs: $(DEV)  ## build the documentation site into docs/site/ and check its links
	@$(INSTALL) --editable '.[docs]'
	@$(BIN)/python docs/write_pages.py
	@$(BIN)/zensical build --config-file docs/zensical.toml --strict --clean
