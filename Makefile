# make demo    train, compress, evaluate, reload and report a small ViT; offline once installed
# make test    lint, types and the fast tests; make test-slow the others
# make test-lowest  some of the fast tests with the oldest versions that pyproject.toml allows, in .venv-lowest
# make ci      lint, types, all tests, and the branch coverage of the fast ones
# make dist    the wheel and the source distribution, checked, into dist/
# make docs    the documentation site, into build/site/; offline once installed
# make outside odd checkpoints, data and surroundings; COUNT=1000 SEED=7 for more, others
# CONSTRAINTS= takes the latest versions in place of those of constraints.txt.
# Each sets up its own environment in .venv first; PYTHON=python3.12 make test picks the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
INSTALLED := $(VENV)/.installed
OUTPUT ?= demo-output
CONSTRAINTS ?= constraints.txt
COUNT ?= 1000
SEED ?= 0
WORKERS ?= auto

# COVERAGE is what `make ci` adds
PYTEST = HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(COVERAGE)

# What calls the dependencies where their versions differ: loading and saving (transformers, safetensors), training
# (accelerate), data (datasets, pyarrow, pillow), reports (jinja2, matplotlib, pydantic), exports (onnx, openvino), tensors,
# the command line (typer, rich). The mathematics is the same in all versions.
LOWEST_TESTS := tests/test_api.py tests/test_autoload.py tests/test_cli.py tests/test_data_sources.py tests/test_data_tables.py \
	tests/test_exporting.py tests/test_finetuning.py tests/test_report.py tests/test_runtimes.py tests/test_start.py

.DELETE_ON_ERROR:
.PHONY: help venv demo check test test-slow test-lowest ci outside docs dist clean

help:
	@echo "make demo   the whole job on an embedded example, into $(OUTPUT)/"
	@echo "make test   lint, types and the fast tests: before every change goes in; WORKERS=$(WORKERS)"
	@echo "make test-slow  the other tests: real checkpoints, several processes, kills, demo, benchmarks"
	@echo "make test-lowest  some of the fast tests with the oldest versions that pyproject.toml allows, in $(LOWEST)/"
	@echo "make ci     both, and the branch coverage of the fast ones: what continuous integration runs"
	@echo "make outside  the command line on odd input by chance: COUNT=$(COUNT) cases from SEED=$(SEED)"
	@echo "make dist   the wheel and the source distribution, checked, into dist/"
	@echo "make docs   the documentation site, into build/site/; a broken link fails"
	@echo "make check  lint and types only"
	@echo "make venv   only the environment, in $(VENV)/"
	@echo "make clean  remove the environment, caches and demo output"

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "vitshrink needs Python 3.11 or newer; point to one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "setting up $(VENV) (once; torch is a large download where it is not cached)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e ".[dev]"
	@touch $@

demo: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/vitshrink demo --output $(OUTPUT)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

# warnings are no errors there: old versions warn of their own
test-lowest: $(LOWEST)/.installed
	HF_HUB_OFFLINE=1 $(LOWEST)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -W default -m "not slow" $(LOWEST_TESTS)

$(LOWEST)/.installed: pyproject.toml
	@echo "setting up $(LOWEST) (once; torch is a large download where it is not cached)"
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt uv
	@VIRTUAL_ENV=$(LOWEST) $(LOWEST)/bin/uv pip install -q --resolution lowest-direct -e ".[onnx,openvino,tensor,test]"
	@touch $@

# the fast tests alone are to reach the branches; measuring them doubles their time
ci:
	$(MAKE) test COVERAGE=--cov
	$(MAKE) test-slow

outside: $(INSTALLED)
	$(BIN)/python -m tests.outside --singles --count $(COUNT) --seed $(SEED)

# what a release publishes
dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m hatchling build
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt twine check-wheel-contents
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

# the theme's notes on its own future are no concern of the build
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "open build/site/index.html, or, to search too: $(BIN)/python -m http.server --directory build/site"

clean:
	rm -rf $(VENV) $(LOWEST) build dist demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
