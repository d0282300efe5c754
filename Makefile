# `make demo` and `make test` need nothing but Python 3.11+, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test lint serve demo-checkpoint clean

$(STAMP): pyproject.toml constraints.txt $(foreach ending,cpp h def,$(wildcard kernels/*/*.$(ending) parallel/*.$(ending) scheduler/*/*.$(ending)))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,train]'
	touch $(STAMP)

demo: $(STAMP)  ## serve the demo model with 2 ranks, ask it, stop it
	$(BIN)/python demo/run.py

serve: $(STAMP)  ## serve the demo model until Ctrl-C
	$(BIN)/torchrun --nproc-per-node 2 launch/serve.py --model demo/model --device cpu --dtype float32

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## everything CI checks
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

demo-checkpoint: $(STAMP)  ## train the demo model from scratch (well over an hour on 2 cores)
	$(BIN)/python launch/train.py demo --out demo/build

clean:
	rm -rf $(VENV) build *.egg-info
