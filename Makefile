# Two commands do everything: `make demo` (sets up, then distils, exports, verifies, measures and reports a real model)
# and `make test` (sets up, then runs the tests). Everything lands in .venv/, runs/ and the cache folder.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RECIPE ?= minilm
# The set-up is up to date when this stamp is newer than what it was made from.
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-whole test-slow lint types peers schemas clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv/ with everything locked in constraints.txt

$(READY): pyproject.toml constraints.txt .ci/setup .ci/llama_wheel.py .ci/llama_without_common.cmake
	@PYTHON=$(PYTHON) VENV=$(VENV) .ci/setup
	@touch $(READY)

demo: setup ## run the main job on real input: RECIPE=minilm (default) or smollm2
	@$(BIN)/edgestill run $(RECIPE)

test: setup ## run the tests that need no real model (minutes)
	@$(BIN)/pytest -n auto --dist loadfile -m "not slow" $(ARGS)

test-whole: setup ## run whole runs of tiny models, and the README's commands (minutes)
	@$(BIN)/pytest -n auto --dist loadfile -m whole $(ARGS)

test-slow: setup ## run the tests on real models and real text too (longer)
	@$(BIN)/pytest -n auto -m slow $(ARGS)

lint: setup ## ruff: style and formatting
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup ## mypy --strict
	@rm -rf build # what an earlier wheel left there would be seen as part of the package
	@$(BIN)/mypy -p edgestill

peers: setup ## measure us side by side with other tools: NAMES="cli export decode"
	@$(BIN)/python -m tests.peers $(NAMES)

schemas: setup ## write schemas/*.json anew from the types
	@$(BIN)/python -m edgestill.schemas

clean: ## remove what was built (not the cache, not runs/)
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
