# `make` lists the targets. Every target sets up .venv first where it needs it; PYTHON=python3.12 chooses another Python.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint lock clean distclean

BIN := .venv/bin
K25 := $(BIN)/k25-export
# Temporary files of tests that pass (bundles, checkpoints) are not kept.
PYTEST := $(BIN)/python -m pytest -o tmp_path_retention_policy=failed
PROMPT := 17+25=

# Nothing here loads a model from a hub.
export HF_HUB_OFFLINE := 1

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## Make .venv with the pinned dependencies (again only when they change)
	@sh scripts/setup.sh

demo: setup ## Checkpoint -> bundle -> parity report -> an answer, and a picture, on a CPU
	$(K25) demo-checkpoint demo/checkpoint --preset trained
	$(K25) build demo/checkpoint --output demo/bundle
	$(K25) run demo/bundle --prompt "$(PROMPT)"
	$(BIN)/python scripts/draw_demo_image.py demo/picture.png
	$(K25) run demo/bundle --image demo/picture.png --prompt "What is in this picture?" --max-new-tokens 8
	@printf '%s\n' '' \
	  'What you just saw' \
	  '  demo/checkpoint   a small checkpoint in the official layout of Kimi K2.5, with INT4 experts; it was trained to' \
	  '                    add, to copy and to close brackets (docs/demo-checkpoint.md), and its vision tower is random' \
	  '  demo/bundle       ONNX components and the manifest that binds them to the bytes of the checkpoint' \
	  '  parity report     the bundle against a PyTorch reference, component by component and end to end:' \
	  '                    demo/bundle/reports/parity.html (parity.json for programs, parity.xml for CI)' \
	  '  $(PROMPT)            answered by ONNX Runtime from the bundle, without PyTorch' \
	  '  demo/picture.png  drawn by this demo and run through the vision component; what is said of it is noise' \
	  'What to try next' \
	  '  $(K25) compile demo/bundle --target sm120      TensorRT engines, without a GPU' \
	  '  $(K25) inspect demo/checkpoint' \
	  '  $(K25) run demo/bundle --token-ids "1 2 3" --save-logits demo/logits.npz' \
	  '  $(K25) --help, README.md, docs/architecture.md'

test: setup ## Run the fast tests
	$(PYTEST) -m "not slow and not gpu and not tensorrt"

# pytest's exit code 5, no test selected, is no failure here.
test-slow: setup ## Run the tests that take minutes
	@sh scripts/browser.sh
	$(PYTEST) -m "slow and not gpu and not tensorrt" || [ $$? -eq 5 ]

lint: setup ## Check style, format, types and import rules
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-logo

lock: ## Take the newest allowed versions into requirements.lock (needs .venv with Python 3.11)
	$(BIN)/python scripts/lock.py

clean: ## Remove the demo, builds and caches (.venv stays)
	rm -rf demo build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## Remove .venv and the native ops too
	rm -rf .venv plugins/k25_plugins/native
