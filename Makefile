# `make setup` builds .venv; every other target makes sure of that first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.kvtrain-installed
EXTRAS := $(VENV)/.kvtrain-extras-installed
VLLM   := .venv-vllm
DOCS   := $(VENV)/.kvtrain-docs-installed
FAST   := not roads and not slow and not gpu and not soak and not vllm
ROADS  := roads and not slow and not gpu and not soak and not vllm

# WORKERS processes share the tests, file by file, in the order of their names.
WORKERS ?= 2
PYTEST  := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-roads test-versions test-all test-vllm soak lint format docs bench compare clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## Create .venv with the tested versions; a torch that is there already stays

quickstart: setup ## Retrofit the packaged model, export it, measure it, generate with it; CONTROL=1 trains a control too
	$(BIN)/python -m kvtrain.quickstart $(if $(filter-out 0,$(CONTROL)),--control)

test: setup ## The tests that run anywhere in minutes
	$(PYTEST) -m "$(FAST)"

test-roads: $(EXTRAS) ## What gates a change too and takes longer: several processes, other libraries' trainers and suites
	$(PYTEST) -m "$(ROADS)"
	$(BIN)/python -m tests.versions newest

test-versions: setup ## Named tests under the oldest, the pinned and the newest tested versions, and today's
	$(BIN)/python -m tests.versions

test-all: $(EXTRAS) ## Everything, in full grids, on new random examples, and for a GPU where there is one
	$(PYTEST) --hypothesis-profile=random -m "not soak and not vllm"

test-vllm: $(VLLM)/.kvtrain-installed ## What vLLM serves and refuses, in an environment of its own
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m vllm tests/vllm

soak: $(EXTRAS) ## The endurance tests, for hours
	$(BIN)/python -m pytest -m soak

lint: setup ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS) ## Build the pages of docs/ as a site, in site/
	$(BIN)/python -m kvtrain.help
	$(BIN)/zensical build --strict

bench: setup ## Every benchmark, in the size that fits this machine
	@set -e; for script in $(filter-out benchmarks/compare.py benchmarks/smollm2.py,$(wildcard benchmarks/*.py)); do \
		echo "== $$script"; $(BIN)/python "$$script"; \
	done

compare: setup ## Every method at the same bytes on one base: trains, measures and draws what is missing, for hours
	$(BIN)/python benchmarks/compare.py

clean: ## Remove .venv and caches
	rm -rf $(VENV) $(VLLM) .mypy_cache .ruff_cache .pytest_cache .cache build dist site

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "kvtrain needs Python 3.11 or newer; try: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and by itself, because which build of it fits is the machine's business:
# one that is installed stays, TORCH_INDEX_URL chooses another index, the default is the tested version.
# A torch other than the tested one takes the pins of torch and of its companion triton out of the set.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null \
		|| $(BIN)/python -m pip install $${TORCH_INDEX_URL:+--index-url "$$TORCH_INDEX_URL"} \
			"$$(grep '^torch==' constraints.txt)"
	@version=$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])'); \
	if grep -qx "torch==$$version" constraints.txt; then cp constraints.txt $(VENV)/constraints.txt; \
	else echo "keeping torch $$version"; \
		{ grep -vE '^(torch|triton)==' constraints.txt; echo "torch==$$version"; } > $(VENV)/constraints.txt; fi
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e '.[dev,docs]'
	@touch $@

# Names of metadata are those of the installation, so kvtrain is installed too, without what it asks for beside vLLM.
$(VLLM)/.kvtrain-installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install "$$(grep '^torch==' constraints-vllm.txt)"
	$(VLLM)/bin/python -m pip install -r constraints-vllm.txt
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --no-deps -e .
	@touch $@

$(EXTRAS): $(STAMP)
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e '.[dev,deepspeed,docs,interop,tensorboard,wandb]'
	@touch $@
