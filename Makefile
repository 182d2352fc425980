# make demo    train, compress, evaluate, reload and report a small ViT; offline once installed
# make test    lint, types and the fast tests; make test-slow the others
# make ci      lint, types, all tests, and the branch coverage of the fast ones
# make outside odd checkpoints, data and surroundings; COUNT=1000 SEED=7 for more, others
# Each sets up its own environment in .venv first; PYTHON=python3.12 make test picks the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUTPUT ?= demo-output
COUNT ?= 1000
SEED ?= 0
WORKERS ?= auto

# COVERAGE is what `make ci` adds
PYTEST = HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(COVERAGE)

.DELETE_ON_ERROR:
.PHONY: help venv demo check test test-slow ci outside clean

help:
	@echo "make demo   the whole job on an embedded example, into $(OUTPUT)/"
	@echo "make test   lint, types and the fast tests: before every change goes in; WORKERS=$(WORKERS)"
	@echo "make test-slow  the other tests: real checkpoints, several processes, kills, demo, benchmarks"
	@echo "make ci     both, and the branch coverage of the fast ones: what continuous integration runs"
	@echo "make outside  the command line on odd input by chance: COUNT=$(COUNT) cases from SEED=$(SEED)"
	@echo "make check  lint and types only"
	@echo "make venv   only the environment, in $(VENV)/"
	@echo "make clean  remove the environment, caches and demo output"

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "vitshrink needs Python 3.11 or newer; point to one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "setting up $(VENV) (once; torch is a large download where it is not cached)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev,demo]"
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

# the fast tests alone are to reach the branches; measuring them doubles their time
ci:
	$(MAKE) test COVERAGE=--cov
	$(MAKE) test-slow

outside: $(INSTALLED)
	$(BIN)/python -m tests.outside --singles --count $(COUNT) --seed $(SEED)

clean:
	rm -rf $(VENV) build dist demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
