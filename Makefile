# Everything sets itself up: `make demo`, `make test` or `make docs` on a fresh machine is enough.
PYTHON ?= python3
# The PyTorch that `make test-versions` tests beside the pinned one: the oldest that pyproject.toml promises,
# and the newest.
TORCH_OLDEST ?= 2.11.0
TORCH_NEWEST ?= 2.14.1
# The Python for which `make wheels` fetches what `make gpu` would otherwise do without.
PYTHON_VERSION ?= 3.12

VENV := .venv
VENVS := .venvs
BIN := $(VENV)/bin
# With all that they need and PyTorch, numpy and scikit-learn do not bring.
WHEELS := jsonschema attrs jsonschema-specifications referencing rpds-py tyro docstring_parser typeguard \
	torchdeq mlxtend
# Of any of the environments.
PIP := bin/pip --quiet --disable-pip-version-check install
UNPACK := $(PYTHON) -m pip -qq --disable-pip-version-check install --no-index --no-deps --no-compile --target
WHEEL_FILES = $(wildcard wheels/*.whl)
PYTEST := bin/python -m pytest -n auto --dist loadfile

.PRECIOUS: $(VENVS)/torch-%/.tests
.PHONY: help demo test test-slow test-faults test-all test-versions lint format types check gpu wheels recipes docs reliability dist release clean

help:
	@echo "make demo           show the shipped VIAR, train VIAR and VAR on MNIST; all in runs/demo"
	@echo "make test           run the quick tests, which guard all behaviour"
	@echo "make test-slow      run the others, but for faults"
	@echo "make test-faults    run those that inject faults and bad input, few of each"
	@echo "make test-all       run all tests"
	@echo "make test-versions  run the quick tests of deqlib and viar on the oldest and the newest PyTorch"
	@echo "make lint           look for what ruff finds; make format mends what it can"
	@echo "make types          check types"
	@echo "make check          quick tests, lint and types"
	@echo "make gpu            measure on a GPU for 8 minutes, with \$$(PYTHON) as it is; ARGS= as --help tells"
	@echo "make wheels         fetch what a machine with a GPU may lack into wheels/, for make gpu there"
	@echo "make reliability    run them in full, for hours, and renew docs/reliability.md"
	@echo "make recipes        run the recipes in full, and renew what their pages show of it"
	@echo "make docs           build the documentation into site/"
	@echo "make dist           build sdist and wheel into dist/, and try the wheel in an environment of its own"
	@echo "make release        the same, then tag the version"
	@echo "make clean          remove what the above made, runs/ excepted"

demo: $(VENV)/.viar
	$(BIN)/viar demo

test: $(VENV)/.dev
	$(VENV)/$(PYTEST) -m "not slow and not faults"

test-slow: $(VENV)/.dev
	$(VENV)/$(PYTEST) -m "slow and not faults"

test-faults: $(VENV)/.dev
	$(VENV)/$(PYTEST) -m faults

# In one run: what takes a worker long to collect is collected once.
test-all: $(VENV)/.dev
	$(VENV)/$(PYTEST)

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

# The machine is somebody's, and may reach no network: nothing is installed but wheels/, into a folder that goes.
# One by one where not all are for this Python.
gpu:
	@site=$$(mktemp -d) && trap 'rm -rf "$$site"' EXIT && \
	if [ -n "$(WHEEL_FILES)" ]; then $(UNPACK) "$$site" $(WHEEL_FILES) 2> /dev/null \
		|| for wheel in $(WHEEL_FILES); do $(UNPACK) "$$site" "$$wheel" \
		|| echo "$$wheel is left out; make wheels PYTHON_VERSION= fetches for another Python" >&2; \
	done; fi && \
	PYTHONPATH=.:models:$$site $(PYTHON) -m benchmarks gpu $(ARGS)

wheels:
	rm -rf wheels
	$(PYTHON) -m pip --quiet --disable-pip-version-check download -d wheels -c constraints.txt --no-deps \
		--only-binary=:all: --python-version $(PYTHON_VERSION) --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 $(WHEELS)
	@echo "$$(ls wheels | wc -l) wheels for Python $(PYTHON_VERSION), x86_64 Linux in wheels/: copy this folder with the" \
		"checkout (git ignores it)"

reliability: $(VENV)/.dev
	DEQLIB_THOROUGH=1 DEQLIB_RECORD=tests/reliability/record.json $(BIN)/python -m pytest -m faults $(ARGS)
	$(BIN)/python tests/reliability/counted.py

recipes: $(VENV)/.viar
	for script in docs/recipes/*.py; do name=$$(basename $$script .py); \
		$(BIN)/python $$script --out docs/assets/recipes > docs/assets/recipes/$$name.txt || exit 1; done

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/.release
	.ci/release dist

release: $(VENV)/.release
	.ci/release tag

clean:
	rm -rf $(VENV) $(VENVS) site dist wheels .pytest_cache .mypy_cache .ruff_cache .hypothesis

# One stamp a set of extras; each is redone only when what it depends on changed.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.viar: EXTRAS := viar
$(VENV)/.dev: EXTRAS := dev,bench,docs,app
$(VENV)/.dev: HAS_TOO := $(VENV)/.viar $(VENV)/.docs
$(VENV)/.docs: EXTRAS := viar,docs
$(VENV)/.release: EXTRAS := release
$(VENV)/.viar $(VENV)/.dev $(VENV)/.docs $(VENV)/.release: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing deqlib with [$(EXTRAS)] into $(VENV) (a minute or two)"
	$(VENV)/$(PIP) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@ $(HAS_TOO)

# Everything as pinned, but for PyTorch and Triton, which each PyTorch pins itself.
$(VENVS)/torch-%/.tests: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENVS)/torch-$*
	sed 's/^torch==.*/torch==$*/; /^triton==/d' constraints.txt > $(VENVS)/torch-$*/constraints.txt
	@echo "Installing PyTorch $* with the test tools into $(VENVS)/torch-$* (minutes, and up to 6 GB)"
	$(VENVS)/torch-$*/$(PIP) -c $(VENVS)/torch-$*/constraints.txt -e '.[dev,bench]'
	@touch $@
