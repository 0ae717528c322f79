# Each target sets up what it needs. Nothing here needs a hub, an account or a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint peers bench certify clean

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

# the proofs that take minutes, one after the other: one of them measures
certify: setup
	$(BIN)/python -m pytest -m certify -n 0

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

peers: setup
	peers/run

# whole training steps beside those of the peers; makes their environments, wants the machine to itself
bench: setup
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/step.py --dead 0.3
	$(BIN)/python benchmarks/step.py --dense --peer dictionary_learning
	$(BIN)/python benchmarks/end_to_end.py

clean:
	rm -rf $(VENV) .venv-* build src/*.egg-info
