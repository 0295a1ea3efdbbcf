# `make demo` and `make test` set everything up in .venv, from nothing but Python, g++ and make.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BUILD := build/editable

BIN := $(VENV)/bin
# One stamp per TORCH, so that another value installs that one.
TORCH_STAMP := $(VENV)/.torch-$(firstword $(shell echo '$(TORCH)' | cksum))
# One stamp per WARPFORMER_CUDA (see README), for the same reason.
BUILT_STAMP := $(VENV)/.built-$(WARPFORMER_CUDA)
# What the compiled module is made of; Python files need no rebuild.
SOURCES := pyproject.toml CMakeLists.txt $(shell find cmake csrc tests/emulator -type f ! -name '*.py' ! -name '*.pyc')
CXX_FILES := $(shell find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test build bench peers docs lint format stubs wheel clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 9

demo: build  ## embed, translate and write with the models of the package, and time ops beside torch
	cut -f2 examples/data/bible.en-es.test.tsv | head -n 256 | $(BIN)/warpformer demo -

test: build  ## the whole CPU suite; make test ARGS="tests/ops -k softmax" for a part
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

build: $(BUILT_STAMP)  ## set .venv up and compile what changed

bench: build  ## time one op beside torch: make bench OP=softmax
	$(BIN)/warpformer bench $(OP)

peers: build  ## install what bench/ compares with besides torch; compiles llama.cpp, minutes
	$(BIN)/python -m pip install 'warpformer[peers]'

docs: build  ## the site, from docs/ and the docstrings, in build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: build  ## ruff and clang-format, changing nothing
	$(BIN)/ruff check . .ci/ptxas
	$(BIN)/ruff format --check . .ci/ptxas
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: build  ## ruff and clang-format, in place
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

stubs: build  ## write python/warpformer/_C.pyi anew, after a binding changed
	$(BIN)/python -m tests.test_stubs

wheel: build  ## build the wheel, audit it, and run it beside another torch
	PATH="$(CURDIR)/$(BIN):$$PATH" .ci/wheel

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist

# Ends in a second, and names the package to install, where a 15-minute download would fail at its end.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is older than 3.10, or missing: set PYTHON"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo "$(PYTHON) makes no virtual environments: apt install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; \
		sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
		|| { echo "$(PYTHON) has no Python.h: apt install python3-dev"; exit 1; }
	@command -v $(CXX) > /dev/null || { echo "no C++ compiler: apt install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(TORCH_STAMP): | $(BIN)/python
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install $(TORCH)
	@rm -f $(VENV)/.torch-*
	@touch $@

# The build tools lie in .venv, not in pip's isolated environment, whose paths no later build could reuse.
$(VENV)/.tools: pyproject.toml | $(TORCH_STAMP)
	$(BIN)/python -m pip install scikit-build-core 'pybind11>=3.0' cmake ninja
	@touch $@

$(BUILT_STAMP): $(VENV)/.tools $(TORCH_STAMP) $(SOURCES)
	$(BIN)/python -m pip install --no-build-isolation -Cbuild-dir=$(BUILD) -Ccmake.define.WARPFORMER_EMULATOR=ON -e '.[test,bench,dev]'
	@# For "warpformer/bench" = "bench" it puts the folder that this one lies in on sys.path, with all that is there.
	@sed -i '\#^$(patsubst %/,%,$(dir $(CURDIR)))$$#d' $(VENV)/lib/python*/site-packages/_editable_skbc_warpformer.pth
	@rm -f $(VENV)/.built-*
	@touch $@
