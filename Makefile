# make demo: set up and run the demonstration; make test: set up and run all checks.
# Both are idempotent: what is set up is not set up again.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)
# One architecture compiles in a fifth of the time of all; a release builds all.
export TORCH_DROPOUT_IR_CUDA_ARCHS ?= 90

.PHONY: help setup demo paper tutorials test lint pytest clean

help:
	@echo "make demo    set up, train with and without dropout, show the difference"
	@echo "             (ARGS='--help' lists its options)"
	@echo "make paper   the paper's figures again, cheapest first (ARGS=--quick for a look,"
	@echo "             DATA_ROOT=DIR where the data sets are or are to be downloaded)"
	@echo "make tutorials"
	@echo "             run them as notebooks and write pages, in build/tutorials"
	@echo "make test    set up, check style and types, run the tests"
	@echo "make setup   virtual environment, torch, the extension, extras"
	@echo "make lint    style and types alone"
	@echo "make clean   remove the environment and what was built"

setup: $(VENV)/.installed

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or later is needed; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	@echo "installing torch and torchvision: a minute and 5.5 GB with CUDA"
	$(BIN)/pip install -q 'torch>=2.10' torchvision 'setuptools>=77' wheel
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@echo "building and installing torch-dropout-ir"
	@$(BIN)/pip install -v --no-build-isolation -e '.[demo,test,lint]' \
	  > $(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; exit 1; }
	@grep -o 'torch_dropout_ir: .*' $(VENV)/install.log | sort -u
	@touch $@

demo: setup
	$(BIN)/torch-dropout-ir demo $(ARGS)

paper: setup
	$(if $(DATA_ROOT),DROPOUT_IR_DATA=$(DATA_ROOT)) \
	  $(BIN)/python tutorials/paper/all.py $(ARGS)

# The extra "tutorials", without building the extension again.
tutorials: setup
	@$(BIN)/pip install -q 'nbconvert>=7.16' 'ipykernel>=6.29'
	$(BIN)/python tutorials/render.py $(ARGS)

test: lint pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Tests are of one thread each: two processes use two cores.
pytest: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info torch_dropout_ir/_C*.so
