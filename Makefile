# make matmul   build, then run the matmul benchmark on the best device present (CUDA, MPS, else the simulator)
# make test     build, then run the tests
# make venv     only prepare; make test-peers also runs other libraries' kernels; make lint, make format, make clean
# TILELANG=0.1.14 make test   the same in an environment of its own, with another supported tilelang

SHELL := /bin/bash
TILELANG ?= 0.1.15
PYTHON ?= python3
VENV ?= .venv$(if $(filter-out 0.1.15,$(TILELANG)),-$(TILELANG))
TORCH := 2.13.0
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
CXX_FILES := $(wildcard src/metal/*.cc src/metal/*.h src/simulator/*.h src/simulator/metal/*.h)
WORKERS ?= 2

.PHONY: matmul test test-peers venv lint format clean
.DEFAULT_GOAL := venv

matmul: venv
	$(VENV)/bin/python benchmark/bench_matmul.py --target auto

test: venv
	$(VENV)/bin/python -m pytest -q -n $(WORKERS) -m "not peers" $(TESTS)

test-peers: venv
	$(VENV)/bin/python -m pytest -q -m peers

venv: $(VENV)/.built

# Torch: with an NVIDIA GPU the CUDA build and its runtime, on a Mac the only build; elsewhere a CPU build, from the
# configured indexes if one has it, else from PyTorch's own index, which uv knows.
$(VENV)/.installed: Makefile requirements/runtime.txt requirements/develop.txt
	$(PYTHON) -m venv $(VENV)
	if [ "$$(uname)" = Darwin ] || nvidia-smi -L >/dev/null 2>&1; then $(PIP) install -q torch==$(TORCH); else \
	  $(PIP) install -q --no-deps "torch==$(TORCH)+cpu" 2>/dev/null || { \
	    $(PIP) install -q uv && $(VENV)/bin/python -m uv pip install -q --no-deps --torch-backend cpu torch==$(TORCH) \
	      --python $(VENV)/bin/python; }; fi
	$(PIP) install -q --no-deps -r requirements/runtime.txt -r requirements/develop.txt tilelang==$(TILELANG)
	for c in clang++ clang++-22 clang++-21 clang++-20 clang++-19 clang++-18 clang++-17 clang++-16; do \
	  v=$$($$c -dumpversion 2>/dev/null | cut -d. -f1); [ "$${v:-0}" -ge 16 ] && exit 0; done; \
	  $(PIP) install -q --no-deps ziglang==0.15.2
	touch $@

$(VENV)/.built: $(VENV)/.installed CMakeLists.txt pyproject.toml $(wildcard src/metal/*)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/mypy

format: venv
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf .venv .venv-* build tilelang_ext/lib
