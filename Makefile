# Everything runs in VENV, made on first use. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install quickstart test slow lint clean

help:            ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[recipes,dev]'
	touch $@

install: $(VENV)/.installed          ## .venv with the library and what recipes and tests need

quickstart: install                  ## digits: train, integers, verify, C++, report in build/quickstart
	$(BIN)/python recipes/quickstart.py

test: export OMP_NUM_THREADS = 1
test: install                        ## the default test suite
	$(BIN)/python -m pytest -n 2

slow: export OMP_NUM_THREADS = 1
slow: install                        ## every test, the full-set comparisons included
	$(BIN)/python -m pytest -n 2 -m 'slow or not slow'

lint: install                        ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:                               ## what was built, not the environment
	rm -rf build .pytest_cache .hypothesis .mypy_cache .ruff_cache
