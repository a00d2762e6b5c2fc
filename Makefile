# `make train` and `make test` need Python 3.11 or newer, pip and make, and nothing else.
PYTHON ?= python3
VENV ?= .venv
LOCK ?= dev
BIN := $(VENV)/bin
CONFIG ?= configs/digits.py
WORKDIR ?= runs/$(basename $(notdir $(CONFIG)))

.PHONY: train test test-peers check bench docs lock clean

train: $(VENV)/.ready  ## trains on the embedded digits
	$(BIN)/python train.py --config=$(CONFIG) --workdir=$(WORKDIR)

test: $(VENV)/.ready check  ## the checks, and the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

# PyTorch and torchvision (some 5 GB), Keras, OpenCV, rsatoolbox, lpips, Foolbox and captum: an environment of their own.
test-peers:  ## the tests against other people's programs, none of them skipped
	$(MAKE) VENV=.venv-peers LOCK=peers .venv-peers/.ready
	PARITY_AT_FULL_SIZE=1 XLA_FLAGS='--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true' .venv-peers/bin/python -m pytest tests/parity tests/weights tests/export/test_convert.py

bench: $(VENV)/.ready  ## all benchmarks, small: what got worse against benchmarks/stored.json
	$(BIN)/python benchmarks/bench.py

check: $(VENV)/.ready  ## formatting, lint, types of the code and of what it offers, and the order of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH=. basedpyright --verifytypes alexnet_flax --ignoreexternal \
	  > $(VENV)/types.txt || (cat $(VENV)/types.txt; exit 1)

$(VENV)/.ready: requirements/$(LOCK).txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/$(LOCK).txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# The pages, with the API from the docstrings, into site/; nothing in them is fetched from elsewhere.
docs:
	$(MAKE) VENV=.venv-docs LOCK=docs .venv-docs/.ready
	.venv-docs/bin/zensical build --strict --clean

# Pins with hashes for all platforms; no addresses. Needs uv. What runs on an accelerator gets every extra but torch.
# newest.txt has the newest releases, JAX's among them, which need Python 3.12: make test LOCK=newest PYTHON=python3.13
lock: SHELL := bash
lock:
	for lock in dev:dev:3.11 all:all:3.11 cuda:cuda,all:3.11 tpu:tpu,all:3.11 peers:peers:3.11 docs:docs:3.11 newest:dev:3.12; do \
	  IFS=: read -r name extras python <<< "$$lock"; \
	  uv pip compile pyproject.toml $$(echo ,$$extras | sed 's/,/ --extra /g') --universal --fork-strategy fewest \
	    --python-version $$python --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet \
	    --output-file requirements/$$name.txt || exit 1; \
	done

clean:
	rm -rf $(VENV) .venv-peers .venv-docs site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
