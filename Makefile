# make quickstart   install, then prune, distil and quantize a small model and write its report
# make test         install with the test extras, then run the tests
# make chaos        kill, freeze, resume and spoil runs hundreds of times, and write docs/reliability.md
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes PyTorch's build for CPUs, which calls itself newer than the default
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: quickstart test chaos lint format schema clean

quickstart: $(VENV)/.installed
	$(BIN)/distill run recipes/quickstart.yaml

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest  # models are tiny, and processes that share two cores wait for each other

chaos: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.faults

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(VENV)/.installed
	$(BIN)/distill schema recipes/recipe.schema.json

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
