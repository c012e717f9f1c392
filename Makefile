# Everything sets itself up: `make demo`, `make test` or `make docs` on a fresh machine is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check install -c constraints.txt

.PHONY: demo test lint types check docs clean help

help:
	@echo "make demo    train tokenizer, VIAR and VAR on digits; pictures and table in runs/demo"
	@echo "make test    run the tests"
	@echo "make check   tests, lint and types"
	@echo "make docs    build the documentation into site/"
	@echo "make clean   remove what the above made, runs/ excepted"

demo: $(VENV)/.viar
	$(BIN)/viar demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

check: test lint types

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# One stamp a set of extras; each is redone only when what it depends on changed.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.viar: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing deqlib and viar into $(VENV) (a minute or two)"
	$(PIP) -e '.[viar]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing deqlib and viar with the test tools into $(VENV) (a minute or two)"
	$(PIP) -e '.[dev,bench]'
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing deqlib and viar with the documentation tools into $(VENV) (a minute or two)"
	$(PIP) -e '.[viar,docs]'
	@touch $@
