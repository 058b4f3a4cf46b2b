# Set-up and everyday commands. `make help` lists them.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export DS_ACCELERATOR ?= cpu
.DEFAULT_GOAL := help
.PHONY: help setup demo test faults tutorial-test hosts-test image-test lint format clean

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(READY)

setup: $(READY)  ## create .venv and install everything into it

demo: $(READY)  ## train a tiny DeepSeek-V3 on two expert-parallel ranks (about 3 minutes)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --log_level error --num_accelerators 2 launch/train.py --config configs/demo.toml

test: $(READY)  ## run the whole CPU test suite
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

TIMES ?= 20
faults: $(READY)  ## run the long fault campaigns: signals and crashes, TIMES (20) times each (about 2 hours)
	cd tests && PATH="$(CURDIR)/$(BIN):$$PATH" $(CURDIR)/$(BIN)/python -m faults.signals --times $(TIMES)
	cd tests && PATH="$(CURDIR)/$(BIN):$$PATH" $(CURDIR)/$(BIN)/python -m faults.signals --times $(TIMES) --by-hand
	cd tests && PATH="$(CURDIR)/$(BIN):$$PATH" $(CURDIR)/$(BIN)/python -m faults.restarts --times $(TIMES)

tutorial-test: $(READY)  ## run each launcher and docs/tutorial.md on two hosts in network namespaces (root; about 4 minutes)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "" tests/distributed/test_hosts_launch.py

hosts-test: tutorial-test  ## tutorial-test, then openmpi, a bad network and a disconnected host (about 8 minutes)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.hosts.campaign

image-test: $(READY)  ## build the cpu image without a Docker engine and train in it (root, buildah, debootstrap)
	PATH="$(CURDIR)/$(BIN):$$PATH" docker/build.sh cpu localhost/alfb_dist:cpu
	PATH="$(CURDIR)/$(BIN):$$PATH" ALFB_IMAGE=localhost/alfb_dist:cpu $(BIN)/python -m pytest tests/test_images.py

lint: $(READY)  ## run ruff check, ruff format --check and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## format, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment and caches, never the runs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
