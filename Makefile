# make quickstart   install, then prune, distil and quantize a small model and write its report
# make test         install with the test extras, then run the tests in WORKERS processes (default 2), a file at a time
# make identity     run tiny recipes with the code of BASE (a git revision; default main) and with this one, and compare bits
# make chaos        kill, freeze, resume and spoil runs hundreds of times, and write docs/reliability.md
# make trace        trace training steps on fake GPUs, all tiny ones as tests and 8B to 4.5B, and write docs/gpus.md
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes PyTorch's build for CPUs, which calls itself newer than the default
PYTHON ?= python3
TORCH_INDEX ?=
BASE ?= main
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: pages quickstart test identity chaos trace lint format schema clean

quickstart: $(VENV)/.installed
	$(BIN)/distill run recipes/quickstart.yaml

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile  # a file of tests shares its models

identity: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.identity --base $(BASE)

chaos: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.faults

trace: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "trace or not trace" tests/trace
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.trace

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(VENV)/.installed
	$(BIN)/distill schema recipes/recipe.schema.json

pages: $(VENV)/.installed
	$(BIN)/python docs/generate.py

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "distill needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# each stamp says that its extras are installed as pyproject.toml and constraints.txt have them now
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[test]'
	touch $(VENV)/.installed $@

$(VENV)/.installed-lint: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[lint]'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV)
