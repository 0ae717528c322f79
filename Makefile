# Each target sets up what it needs. Nothing here needs a hub, an account or a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint peers clean

setup: $(VENV)/.installed

# constraints.txt pins torch; pip takes the CPU build where one is offered
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python demo.py --config examples/demo.json

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

peers: setup
	peers/run

clean:
	rm -rf $(VENV) .venv-* build src/*.egg-info
