# make matmul   the matmul benchmark on the best device present (CUDA, MPS, else the simulator)
# make test     the tests; TESTS=testing/metal runs a part of them, TESTS="--one-case-in 3" a third of the cases of each; make
#               test-changed runs those that a change since their last run may have broken; make test-peers also runs other
#               libraries' kernels
# make mutants FILES=tilelang_ext/passes   changes a point of these files and says which test notices; COUNT=20 SEED=1 LIMIT=300
# make hip      installs the compiler for AMD GPUs (root and apt-get for clang), which the tests marked hip need
# make wheel    builds a wheel into dist; make sdist a source distribution
# make venv     prepares the environment only; make doctor says what is missing; make lint, make format, make clean
# TILELANG=0.1.14 make test   the same with another supported tilelang, in .venv-0.1.14
SHELL := /bin/sh
PYTHON ?= python3
TILELANG ?= 0.1.15
TESTS ?=
WORKERS ?= logical --maxprocesses 8
CMAKE_FLAGS ?=
FILES ?= tilelang_ext src
COUNT ?= 20
SEED ?= 1
LIMIT ?= 300

VENV := .venv$(if $(filter-out 0.1.15,$(TILELANG)),-$(TILELANG))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt
CPP_FILES := $(shell find src -name '*.cc' -o -name '*.h' 2>/dev/null)
UNTRACED := $(CPP_FILES) $(shell find testing tilelang_ext -name '*.h' -o -name '*.json' 2>/dev/null)
MYPY_FILES := tilelang_ext/language $(wildcard tilelang_ext/formats.py)

# Byte code is kept: otherwise each worker, and each Python that a test starts, compiles what it imports anew.
unexport PYTHONDONTWRITEBYTECODE

ifeq ($(wildcard requirements/tilelang-$(TILELANG).txt),)
$(error TILELANG: must be one of $(patsubst requirements/tilelang-%.txt,%,$(wildcard requirements/tilelang-*.txt)); got $(TILELANG); pass one of these)
endif

.PHONY: venv matmul test test-changed test-peers mutants hip wheel sdist doctor lint lint-ruff lint-format lint-spelling lint-cpp lint-types format clean always

venv: $(VENV)/.built

matmul: venv
	$(BIN)/python benchmark/bench_matmul.py --target auto

# Neighbouring tests share what they lower, so a worker runs them in order; one that is done steals tests from another.
test: venv
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS)

# Tests that ran a Python line, in their own process, that has changed since they last passed. Of files that are not Python this
# knows nothing, so after a change of one all tests run, as they do the first time.
test-changed: venv $(VENV)/.untraced
	TESTMON_DATAFILE=$(VENV)/testmondata $(BIN)/python -m pytest -n $(WORKERS) --testmon $(TESTS) || [ $$? -eq 5 ]  # 5: none to run

$(VENV)/.untraced: $(UNTRACED)
	@rm -f $(VENV)/testmondata*
	@touch $@

# Downloads other libraries' kernels and runs them in the simulator beside ours.
test-peers: venv
	$(BIN)/python -m pytest -m peers $(TESTS)

# Outside of CI: a mutant takes seconds if a test notices it, LIMIT seconds if none does. Those judged before are not run again.
mutants: venv
	$(BIN)/python testing/mutants.py $(FILES) --count $(COUNT) --seed $(SEED) --limit $(LIMIT)

hip: $(VENV)/.requirements
	@requirements/install_hip.sh $(CURDIR)/$(BIN)/python

# Built as anybody's pip builds them, in an environment of their own; into dist.
wheel: $(VENV)/.requirements
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

sdist: $(VENV)/.requirements
	$(BIN)/python -c 'from scikit_build_core.build import build_sdist; print(build_sdist("dist"))'

doctor: venv
	$(BIN)/tilelang-ext doctor

# Each tool is a target of its own, so that `make -k lint` shows the output of all of them.
lint: lint-ruff lint-format lint-spelling lint-cpp lint-types

lint-ruff: $(VENV)/.requirements
	$(BIN)/ruff check

lint-format: $(VENV)/.requirements
	$(BIN)/ruff format --check

lint-spelling: $(VENV)/.requirements
	$(BIN)/codespell

lint-cpp: $(VENV)/.requirements
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

lint-types: $(VENV)/.requirements
	$(BIN)/mypy $(MYPY_FILES)

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf .venv .venv-* build dist tilelang_ext/lib .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made anew when a requirement changes.
$(VENV)/.requirements: $(wildcard requirements/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("PYTHON: must be 3.10 or later; got %s; run make PYTHON=python3.11" % sys.version.split()[0])'
	@echo "installing tilelang $(TILELANG) and what it needs into $(VENV)"
	@rm -f $@
	@$(PYTHON) -m venv $(VENV)
	@requirements/install_torch.sh $(CURDIR)/$(BIN)/python
	@requirements/install.sh $(CURDIR)/$(BIN)/python -r tilelang-$(TILELANG).txt -r build.txt -r dev.txt
	@requirements/has_clang.sh || requirements/install.sh $(CURDIR)/$(BIN)/python -r simulator.txt
	@touch $@

# The native libraries go to tilelang_ext/lib; a second build compiles only what changed. The environment gets the path of the
# checkout, not a list of its files, so that they may come, go and move.
$(VENV)/.built: $(VENV)/.requirements pyproject.toml CMakeLists.txt $(CPP_FILES) $(if $(and $(wildcard tilelang_ext/lib/$(TILELANG)/*),$(wildcard tilelang_ext/lib/*launch*)),,always)
	@echo "building the native libraries for tilelang $(TILELANG)"
	@$(BIN)/cmake -S . -B $(VENV)/build -G Ninja --log-level=WARNING $(CMAKE_FLAGS) -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	@$(BIN)/cmake --build $(VENV)/build -- --quiet
	@$(PIP) --no-build-isolation --no-deps --config-settings=editable.mode=inplace --config-settings=wheel.cmake=false --editable .
	@touch $@
