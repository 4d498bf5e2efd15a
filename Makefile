# Two commands do everything on a machine with Python 3.11+ and make:
#   make demo    the environment, then the main job with the shipped model
#   make test    everything that the tests need, then the tests, in three processes (PROCESSES=8: in eight)
#   make chaos   thousands of steps while workers, broker, database and store fail
# `make check` adds lint, types and import contracts.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO := recipes/demo/demo.yaml
PROCESSES ?= 3

.DEFAULT_GOAL := help
.PHONY: help demo test check chaos format clean

help:
	@sed -n 's/^#   //p' Makefile

# torch first, pinned: a bare newer range may bring gigabytes of another build.
$(VENV)/runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(VENV)/dev: $(VENV)/runtime
	$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/runtime
	$(BIN)/kontext-batch run $(DEMO)
	$(BIN)/kontext-batch report --workspace recipes/demo/kontext-out

test: $(VENV)/dev
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

chaos: $(VENV)/dev
	$(BIN)/python -m tests.chaos

format: $(VENV)/dev
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) kontext-out recipes/demo/kontext-out build *.egg-info
