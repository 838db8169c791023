# One target per verb; .ci/run calls the same ones. `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The first of these that is Python 3.11 or newer makes the environment; PYTHON=python3.12 chooses another.
PYTHON ?=
WANTED = $(or $(PYTHON),python3 python3.12 python3.11 python3.13 python3.14)

.PHONY: help
help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(STAMP)  ## the whole line on this machine: draw a town, train, evaluate, export, serve, segment
	@$(BIN)/python -m jobs demo

.PHONY: test
test: $(STAMP)  ## every test but those that kill processes
	@$(BIN)/python -m pytest -m "not chaos" $(ARGS)

.PHONY: test-unit
test-unit: $(STAMP)  ## the quick tests: no Ray, no servers but S3
	@$(BIN)/python -m pytest -m "unit and not chaos" $(ARGS)

.PHONY: test-chaos
test-chaos: $(STAMP)  ## slow tests that kill training workers
	@$(BIN)/python -m pytest -m chaos $(ARGS)

.PHONY: test-serve
test-serve: $(STAMP)  ## of those, the endpoint's: mixed sizes, kills, promote and rollback, autoscaling, a batch killed
	@$(BIN)/python -m pytest -m chaos $(ARGS) -s \
	  tests/ray/test_serve_mixed.py tests/ray/test_serve_faults.py tests/ray/test_serve_routing.py tests/ray/test_autoscaling.py \
	  tests/ray/test_cluster_config.py tests/ray/test_uploads_memory.py tests/ray/test_batch_predict.py tests/ray/test_benchmarks.py

.PHONY: test-slice
test-slice: $(STAMP)  ## of those, the few that CI runs
	@$(BIN)/python -m pytest -m "chaos and slice" $(ARGS)

.PHONY: lint
lint: $(STAMP)  ## ruff and mypy
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check --quiet . || { echo "run: make format" >&2; exit 1; }
	@$(BIN)/python -m mypy

.PHONY: format
format: $(STAMP)  ## rewrite the code in the house's format
	@$(BIN)/python -m ruff check --fix --select I .
	@$(BIN)/python -m ruff format .

.PHONY: bench
bench: $(STAMP)  ## the benchmarks: each prints its claim beside a peer's
	@for script in benchmarks/[a-z]*.py; do \
	  echo "== $$script"; \
	  $(BIN)/python -m "benchmarks.$$(basename "$$script" .py)"; \
	done

.PHONY: install
install: $(STAMP)  ## the virtual environment alone

.PHONY: clean
clean:  ## remove the virtual environment and all caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Made where it is missing or where its Python went away; brought up to date where the two files changed.
$(STAMP): pyproject.toml constraints.txt
	@new='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(BIN)/python -c "$$new" 2>/dev/null; then \
	  for name in $(WANTED); do \
	    if "$$name" -c "$$new" 2>/dev/null; then found="$$name"; break; fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then \
	    echo "sceneray needs Python 3.11 or newer; tried: $(WANTED)." >&2; \
	    echo "Install one, or name the one you have: make PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  "$$found" -m venv --clear $(VENV); \
	fi
	@echo "installing into $(VENV) ($$($(BIN)/python --version)); once, a few minutes ..." >&2
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
