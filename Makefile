# Every target does its own set-up: a virtual environment in .venv with the pinned dependencies and the package.
# PYTHON=python3.12 make install   picks the interpreter (3.11 or newer) when .venv does not exist yet.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers

.PHONY: install demo test test-slow lint bench fuzz clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("tunescope needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(READY)
	$(BIN)/tunescope demo

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not slow'

# With Ray, which the quick tests leave out.
test-slow: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,ray]'
	$(BIN)/python -m pytest -q -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is compared with; a peer that cannot be installed is named in the table. See `bench` in pyproject.toml for
# pytorch-ood. QUICK=1 runs everything small.
$(PEERS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,bench]' \
	  && $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps pytorch-ood \
	  && touch $@ || echo "some of what is compared with could not be installed; the table says which"

bench: $(PEERS)
	$(BIN)/python -m tests.benchmarks $(if $(QUICK),--quick)

# FUZZ_SECONDS=300 make fuzz   gives each of the twelve readers so long in place of 30 s.
fuzz: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,fuzz]'
	$(BIN)/python -m tests.fuzz

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
