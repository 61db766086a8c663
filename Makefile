# make quickstart   install, then prune, distil and quantize a small model and write its report
# make test         install with the test extras, then run the tests in WORKERS processes (default 2), a file at a time
# make test-all     the same with the further variants that are marked exhaustive
# make identity     run tiny recipes with the code of BASE (a git revision; default main) and with this one, and compare bits
# make chaos        kill, freeze, resume and spoil runs hundreds of times, and write docs/reliability.md
# make docs         build the documentation site into build/site with its own .venv-docs; a dead link is an error
# make release      build wheel and sdist, check them, and run the quickstart from each in an empty environment
# make trace        trace training steps on fake GPUs, all tiny ones as tests and 8B to 4.5B, and write docs/gpus.md
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes PyTorch's build for CPUs, which calls itself newer than the default
PYTHON ?= python3
TORCH_INDEX ?=
BASE ?= main
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: pages quickstart test test-all identity chaos trace lint format schema docs release clean

quickstart: $(VENV)/.installed
	$(BIN)/distill run recipes/quickstart.yaml

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile  # a file of tests shares its models

test-all: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not trace"

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

docs: .venv-docs/.installed
	.venv-docs/bin/python docs/site.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet

release: .venv-docs/.installed
	rm -rf dist
	.venv-docs/bin/python -m build
	.venv-docs/bin/python -m twine check --strict dist/*
	.ci/try_release $(PYTHON) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TRY)

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

# apart from .venv, as neither the site nor a release needs torch
.venv-docs/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c 'import tomllib as t; e = t.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print(*e["docs"], *e["release"], sep="\n")' > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-docs/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-docs build dist
