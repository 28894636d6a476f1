# Requires make and Python 3.11 to 3.14 with the venv module; everything else is installed into $(VENV).

VENV ?= .venv
# Candidates, best tested first; override with PYTHON=/path/to/python.
PYTHONS ?= python3.11 python3.13 python3.12 python3.14 python3 python
PYTHON ?=
# Additional index for PyTorch wheels. On Linux, torch from PyPI includes CUDA (some 5 GB); without
# an NVIDIA GPU the much smaller CPU wheels are sufficient:
#     make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR: # no half-made environment
.PHONY: help venv install demo test test-real test-slow test-faults check format clean distclean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

venv: $(BIN)/python ## Create an empty virtual environment in .venv

install: $(STAMP) ## Install the project and its development tools into .venv

demo: $(STAMP) ## Run the whole pipeline on generated phantoms, with its own Ray head
	$(BIN)/python jobs/demo.py

test: $(STAMP) ## Run the fast tests
	$(BIN)/python -m pytest

test-real: $(STAMP) ## Run the tests on real slices, if available (BRAINRAY_DATA)
	$(BIN)/python -m pytest -m real

test-slow: $(STAMP) ## Run the slow tests (minutes)
	$(BIN)/python -m pytest -m slow

test-faults: $(STAMP) ## Run the tests that kill workers, servers and jobs
	$(BIN)/python -m pytest -m faults

check: $(STAMP) ## Check formatting, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Format the code and apply safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove caches and build artefacts
	rm -rf build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find brainray jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Like clean, and remove .venv
	rm -rf $(VENV)

# Candidates are executed, since version managers leave stubs behind and some distributions ship
# Python without venv. Links to a Python that is gone are no environment.
$(BIN)/python:
	@rm -f $(BIN)/python*
	@for candidate in $(if $(PYTHON),"$(PYTHON)",$(PYTHONS)); do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
	      >/dev/null 2>&1; then \
	    echo "$$candidate -m venv $(VENV)"; \
	    exec "$$candidate" -m venv $(VENV); \
	  fi; \
	done; \
	echo "error: no Python 3.11 to 3.14 with the venv module among: $(or $(PYTHON),$(PYTHONS));" \
	  "install one (Debian: python3.11 and python3.11-venv) or set its path: make PYTHON=..." >&2; \
	exit 1

$(STAMP): pyproject.toml | $(BIN)/python
	@if [ "$$(uname -s)" = Linux ] && [ -z "$(TORCH_INDEX)" ] \
	    && ! command -v nvidia-smi >/dev/null 2>&1; then \
	  echo "note: no NVIDIA GPU found; TORCH_INDEX=https://download.pytorch.org/whl/cpu" \
	    "would save some 5 GB (optional)"; \
	fi
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") -e '.[dev]'
	@touch $@
