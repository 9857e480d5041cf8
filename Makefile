# `make help` lists the targets. Everything is made inside .venv and build/; `make clean` removes both.

# The first that runs: a name on PATH may be a shim of pyenv without an interpreter behind it.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.10 python3,$(shell $(p) -c 'print("$(p)")' 2>/dev/null)))
# Another package index for torch alone, such as https://download.pytorch.org/whl/cpu where pip would take a CUDA build.
TORCH_INDEX_URL ?=
# More arguments for pytest, such as PYTEST_ARGS="-k planner -x".
PYTEST_ARGS ?=
# Processes that share out the test files: one a core, at most 4; 0 is pytest's own process alone, as on one core and for --pdb.
TEST_WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$(( n < 2 ? 0 : n > 4 ? 4 : n )))
# Kills of make soak, those of earlier starts included.
SOAK_KILLS ?= 1000

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CORE_SOURCES := pyproject.toml $(sort $(wildcard kernels/csrc/*.*))
PYTEST := PYTHONSAFEPATH=1 $(BIN)/pytest
# A file's tests stay in one process: they share its ranks, and what they write into build/.
PYTEST_SHARED := $(PYTEST) -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
comma := ,
BENCHMARKS := $(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format bench soak torchrec-versions torchrec-harness wheel clean native-test sanitize fuzz

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 20

setup: $(STAMPS)/core  ## Make .venv: the pinned CPU stack, the tools, the project (editable) and its native core

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "setup: no python3 on PATH; install Python 3.10, 3.11 or 3.12, or name one: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info[:2] <= (3, 12); ok or sys.exit("setup: Python must be 3.10, 3.11 or 3.12, got " + sys.version.split()[0] + "; name one: make setup PYTHON=/path/to/python3.11")'
	@echo "setup: virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/cpu: requirements/cpu.txt requirements/torchrec.txt $(STAMPS)/venv
	@echo "setup: torch, fbgemm-gpu-cpu and torchrec (about 1 GB on disk; the longest step, a minute or more)"
	@if [ -n "$(TORCH_INDEX_URL)" ]; then $(PIP) install --index-url "$(TORCH_INDEX_URL)" "$$(grep '^torch==' requirements/cpu.txt)"; fi
	@$(PIP) install -r requirements/cpu.txt
	@$(PIP) install --no-deps -r requirements/torchrec.txt
	@touch $@

$(STAMPS)/dev: requirements/dev.txt requirements/bench.txt $(STAMPS)/cpu
	@echo "setup: build and test tools"
	@$(PIP) install -r requirements/dev.txt -r requirements/bench.txt
	@touch $@

# Best effort: without liburing the core is built all the same, on its pread thread pool.
$(STAMPS)/liburing: $(STAMPS)/venv
	@if echo '#include <liburing.h>' | $${CXX:-c++} -E -x c++ - >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	     { apt-get install -y -qq liburing-dev || { apt-get update -qq && apt-get install -y -qq liburing-dev; }; } >/dev/null 2>&1; then \
	  echo "setup: installed liburing-dev"; \
	else \
	  echo "setup: no liburing, so the core is built on the slower pread fallback; for io_uring install liburing-dev (apt) or liburing-devel (dnf) and run: rm $(STAMPS)/liburing && make setup"; \
	fi
	@touch $@

$(STAMPS)/core: $(CORE_SOURCES) $(STAMPS)/dev $(STAMPS)/liburing
	@echo "setup: native core and editable install"
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

demo: setup  ## Train tables 15 times their memory budget from an SSD, then ml-100k from tiers and in memory
	@$(BIN)/mtrains demo

test: lint  ## Run the lint and the whole test suite, except what is marked slow
	@$(PYTEST_SHARED) -m "not slow" $(PYTEST_ARGS)

soak: setup  ## Kill a training job SOAK_KILLS times (1000), go on where an earlier soak stopped; then the slow tests, and all properties on new examples
	@$(BIN)/python tests/soak/soak.py --ranks 1 --kills $(SOAK_KILLS)
	@$(BIN)/python tests/soak/soak.py --ranks 2 --kills $$(( $(SOAK_KILLS) / 4 ))
	@$(PYTEST) -m slow $(PYTEST_ARGS)
	@$(PYTEST_SHARED) -m "not slow" --hypothesis-profile=default $(PYTEST_ARGS)

# Each release goes before the one in .venv on Python's path; all of them run on the torch and fbgemm of .venv.
TORCHREC_VERSIONS := 1.6.1 1.8.0 1.9.2
TORCHREC_TESTS := $(addprefix tests/test_,$(addsuffix .py,collections equality_dmp migration online planner registration state_dict \
  state_of_shardings torchrec_groups torchrec_harness torchrec_hooks torchrec_pipeline training_loops))
torchrec-versions: setup  ## Run the tests that meet TorchRec on several releases of it, and write the table in docs/torchrec.md
	@mkdir -p build; failed=0; for v in $(TORCHREC_VERSIONS); do echo "== torchrec $$v"; \
	  test -d build/torchrec-$$v || $(PIP) install --no-deps --target build/torchrec-$$v torchrec==$$v || exit 1; \
	  PYTHONPATH=$(CURDIR)/build/torchrec-$$v $(PYTEST_SHARED) $(TORCHREC_TESTS) -q -m "not slow" \
	    --junitxml=build/torchrec-$$v.xml $(PYTEST_ARGS) || failed=1; \
	done; $(BIN)/python tests/torchrec_tables.py versions $(TORCHREC_VERSIONS:%=build/torchrec-%.xml); exit $$failed

torchrec-harness: setup  ## Run TorchRec's own tests on tiered tables, and write their tables in docs/torchrec.md
	@mkdir -p build; $(PYTEST) tests/test_torchrec_harness.py -q --junitxml=build/torchrec-harness.xml $(PYTEST_ARGS); \
	  failed=$$?; $(BIN)/python tests/torchrec_tables.py harness build/torchrec-harness.xml; exit $$failed

bench: setup  ## Run every benchmark in benchmarks/
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

# The native core alone: no Python, no torch. NATIVE_ARGS="--rounds 20 --seed 7" makes its random histories longer and others.
NATIVE_ARGS ?=
CMAKE := $(firstword $(wildcard $(BIN)/cmake) $(shell command -v cmake 2>/dev/null))
FUZZ_SECONDS ?= 60
define build_native
	@test -n "$(CMAKE)" || { echo "$@: no cmake; install cmake 3.20 or later and a C++20 compiler (apt: cmake g++), or run make setup first"; exit 1; }
	@$(CMAKE) -S kernels/csrc -B $(1) -DMTRAINS_MODULE=OFF $(2) >$(1).log || { cat $(1).log; exit 1; }
	@$(CMAKE) --build $(1) --parallel $$(nproc) >$(1).log || { cat $(1).log; exit 1; }
endef

native-test:  ## Build the native core's own tests, without Python or torch, and run them
	@mkdir -p build/native
	$(call build_native,build/native,-DMTRAINS_TESTS=ON)
	@cd build/native && tests/native_tests $(NATIVE_ARGS)

sanitize: $(addprefix build/sanitize-,address undefined thread)  ## Run the native tests under the address, undefined-behaviour and thread sanitizers

build/sanitize-%: FORCE
	@mkdir -p $@
	$(call build_native,$@,-DMTRAINS_TESTS=ON -DMTRAINS_SANITIZE=$*)
	@echo "== $* sanitizer"
	@cd $@ && tests/native_tests $(NATIVE_ARGS)
FORCE:

# libFuzzer comes with clang: from Debian's packages where that is allowed, told otherwise.
fuzz:  ## Fuzz the parsers of what lies on disk, FUZZ_SECONDS (60) a target
	@command -v clang++ >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get install -y -qq clang libclang-rt-14-dev >/dev/null 2>&1; } || \
	  { echo "fuzz: no clang++; install clang and its runtime (apt: clang libclang-rt-14-dev)"; exit 1; }
	@mkdir -p build/fuzz/corpus
	$(call build_native,build/fuzz,-DMTRAINS_FUZZ=ON -DMTRAINS_SANITIZE=address$(comma)undefined -DCMAKE_CXX_COMPILER=clang++)
	@kernels/csrc/tests/fuzz.sh build/fuzz $(FUZZ_SECONDS)

lint: setup wheel  ## Check style, formatting, types (of the installed package) and the wheel's contents
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@rm -rf build/typed && $(BIN)/python -m zipfile -e build/wheel/*.whl build/typed
	@MYPYPATH=build/typed $(BIN)/mypy --cache-dir=build/typed/cache -p torchrec_mtrains
	@$(BIN)/check-wheel-contents build/wheel/*.whl

format:  ## Rewrite the Python sources in the project's format
	@$(BIN)/ruff check --fix-only --quiet . ; $(BIN)/ruff format .

wheel: setup  ## Build the wheel into build/wheel
	@rm -rf build/wheel
	@$(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel .

clean:  ## Remove .venv, build/ and the tools' caches
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
