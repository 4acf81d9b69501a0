# make train                                    the default VAE on MNIST
# make train ARGS="model.latent_dim=2"          any override of train.py
# make test                                     lint, types and tests, offline
# make train TORCH_INDEX=URL                    torch and torchvision from another wheel index: CPU-only builds, say

PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup train test tests versions proof audit lint types reproduce published benchmark tensorboard new clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## build .venv, once

# The stamp is touched last, so a set-up that was interrupted starts again, and a finished one costs nothing.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 14) and "Python 3.11 to 3.13 is needed, and $(PYTHON) is %d.%d: name another with make PYTHON=python3.12" % v)'
	@echo "Setting up $(VENV): a few minutes the first time, mostly for PyTorch."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(if $(TORCH_INDEX),$(PIP) install --index-url "$(TORCH_INDEX)" --constraint $(CONSTRAINTS) torch torchvision)
	@$(PIP) install --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

train: $(STAMP)  ## train the default VAE on MNIST; ARGS="model.latent_dim=2 …" are passed to train.py
	@$(BIN)/python train.py $(ARGS)

test: lint types tests  ## lint, types and tests, offline

tests: $(STAMP)  ## the tests alone
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

versions:  ## the tests with the oldest and the newest versions that pyproject.toml allows (10 GB)
	@$(MAKE) tests VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
	@$(MAKE) tests VENV=.venv-newest CONSTRAINTS=/dev/null

proof: $(STAMP)  ## what takes longer: launchers, two nodes, a real search, fuzzing (about 25 minutes on two cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m proof $(ARGS)
	@OMP_NUM_THREADS=1 FUZZ_EXAMPLES=250 $(BIN)/python -m pytest -n auto tests/test_fuzz.py

audit: $(STAMP)  ## compare the pinned versions with published vulnerabilities; needs the network
	@$(PIP) install pip-audit
	@$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

lint: $(STAMP)  ## ruff: style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict
	@$(BIN)/mypy

reproduce: $(STAMP)  ## train every published system and write docs/results.md (about 20 minutes on two cores)
	@$(BIN)/python benchmarks/reproduce.py $(ARGS)

published: $(STAMP)  ## train the systems of papers that print likelihoods: docs/published.md (hours on two cores)
	@$(BIN)/python benchmarks/published.py $(ARGS)

benchmark: $(STAMP)  ## seconds an epoch beside what one would run instead, in turn (half an hour)
	@$(BIN)/python benchmarks/speed.py $(ARGS)

tensorboard: $(STAMP)  ## look at all runs
	@$(BIN)/tensorboard --logdir outputs

new: $(STAMP)  ## turn a fresh clone into a project of your own: make new NAME=my_project
	@$(BIN)/python scripts/new_project.py $(NAME)

clean:  ## remove .venv and caches; outputs/ stays
	rm -rf $(VENV) .venv-oldest .venv-newest .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
