# On a fresh machine with Python >= 3.11 and make: `make demo` and `make test` are all there is to know.

PYTHON ?= python3
JOBS   ?= 2
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv test slow lint format types contract docs demo bench package clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## .venv with the package and the tested versions of all it needs

# torch first: with its pinned build in place, nothing that follows can pull in another.
$(STAMP): pyproject.toml setup.py constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"kalmanguard needs Python 3.11 or newer, and $(PYTHON) is {sys.version.split()[0]}: try make PYTHON=python3.12")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes some minutes."
	$(PIP) -qq torch setuptools
	$(PIP) -qq --no-build-isolation -e '.[dev]'
	@touch $@

test: $(STAMP) ## all quick tests and doctests
	$(BIN)/python -m pytest -n $(JOBS)

slow: $(STAMP) ## the tests marked slow
	$(BIN)/python -m pytest -n $(JOBS) -m slow tests

lint: $(STAMP) ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## ruff: mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy reads folders, not the mapping of models/ to kalmanguard.models: show it the tree as it is installed.
types: $(STAMP) ## mypy --strict
	@rm -rf build/types && mkdir -p build/types/kalmanguard
	@ln -s $(CURDIR)/kalmanguard/* $(CURDIR)/models build/types/kalmanguard/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

contract: $(STAMP) ## who may import whom
	$(BIN)/lint-imports --no-cache

docs: $(STAMP) ## the documentation, into docs/_build/html
	rm -rf docs/_api
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d docs/_build/doctrees docs docs/_build/html

demo: $(STAMP) ## train, break, rescue and certify a small transformer, into demo-out/
	$(BIN)/kalmanguard demo --out demo-out

bench: $(STAMP) ## the figures of docs/benchmarks.md
	$(BIN)/python -m benchmarks

package: $(STAMP) ## source archive and wheel into dist/, checked and tried in an environment of their own
	$(BIN)/python .ci/package --out dist

clean: ## remove what was built, except .venv
	rm -rf build dist *.egg-info demo-out docs/_build docs/_api
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
