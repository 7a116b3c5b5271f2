# Two verbs for a fresh machine: `make demo` answers questions, `make test` proves the tree.
# Each makes .venv if it is absent. PYTHON picks the interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow lint protos clean

demo: $(VENV)/installed
	$(BIN)/k2dist demo

test: $(VENV)/installed-test
	$(MAKE) lint
	$(BIN)/python -m pytest -m "not slow and not gpu" --durations=10

slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow --durations=10

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

protos: $(VENV)/installed-test
	$(BIN)/python protos/generate.py

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/installed
