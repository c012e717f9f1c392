# Everything sets itself up: `make demo`, `make test` or `make docs` on a fresh machine is enough.
PYTHON ?= python3
# The PyTorch that `make test-versions` tests beside the pinned one: the oldest that pyproject.toml promises,
# and the newest.
TORCH_OLDEST ?= 2.11.0
TORCH_NEWEST ?= 2.14.1

VENV := .venv
VENVS := .venvs
BIN := $(VENV)/bin
# Of any of the environments.
PIP := bin/pip --quiet --disable-pip-version-check install
PYTEST := bin/python -m pytest -n auto --dist loadfile

.PRECIOUS: $(VENVS)/torch-%/.tests
.PHONY: help demo test test-slow test-all test-versions lint format types check docs dist release clean

help:
	@echo "make demo           train tokenizer, VIAR and VAR on digits; pictures and table in runs/demo"
	@echo "make test           run the quick tests, which guard all behaviour"
	@echo "make test-slow      run the others"
	@echo "make test-all       run all tests"
	@echo "make test-versions  run the quick tests of deqlib and viar on the oldest and the newest PyTorch"
	@echo "make lint           look for what ruff finds; make format mends what it can"
	@echo "make types          check types"
	@echo "make check          quick tests, lint and types"
	@echo "make docs           build the documentation into site/"
	@echo "make dist           build sdist and wheel into dist/, and try the wheel in an environment of its own"
	@echo "make release        the same, then tag the version"
	@echo "make clean          remove what the above made, runs/ excepted"

demo: $(VENV)/.viar
	$(BIN)/viar demo

test: $(VENV)/.dev
	$(VENV)/$(PYTEST) -m "not slow"

test-slow: $(VENV)/.dev
	$(VENV)/$(PYTEST) -m slow

test-all: test test-slow

test-versions: test-torch-$(TORCH_OLDEST) test-torch-$(TORCH_NEWEST)

test-torch-%: $(VENVS)/torch-%/.tests
	$(VENVS)/torch-$*/$(PYTEST) -m "not slow" tests/deqlib tests/viar

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/mypy

check: test lint types

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

dist: $(VENV)/.release
	.ci/release dist

release: $(VENV)/.release
	.ci/release tag

clean:
	rm -rf $(VENV) $(VENVS) site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# One stamp a set of extras; each is redone only when what it depends on changed.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.viar: EXTRAS := viar
$(VENV)/.dev: EXTRAS := dev,bench
$(VENV)/.docs: EXTRAS := viar,docs
$(VENV)/.release: EXTRAS := release
$(VENV)/.viar $(VENV)/.dev $(VENV)/.docs $(VENV)/.release: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing deqlib with [$(EXTRAS)] into $(VENV) (a minute or two)"
	$(VENV)/$(PIP) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# Everything as pinned, but for PyTorch and Triton, which each PyTorch pins itself.
$(VENVS)/torch-%/.tests: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENVS)/torch-$*
	sed 's/^torch==.*/torch==$*/; /^triton==/d' constraints.txt > $(VENVS)/torch-$*/constraints.txt
	@echo "Installing PyTorch $* with the test tools into $(VENVS)/torch-$* (minutes, and up to 6 GB)"
	$(VENVS)/torch-$*/$(PIP) -c $(VENVS)/torch-$*/constraints.txt -e '.[dev,bench]'
	@touch $@
