# `make help` lists the targets. Everything is made inside .venv and build/; `make clean` removes both.

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.10 python3,$(if $(shell command -v $(p) 2>/dev/null),$(p))))
# Another package index for torch alone, such as https://download.pytorch.org/whl/cpu where pip would take a CUDA build.
TORCH_INDEX_URL ?=
# More arguments for pytest, such as PYTEST_ARGS="-k planner -x".
PYTEST_ARGS ?=
# Kills of make soak, those of earlier starts included.
SOAK_KILLS ?= 1000

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CORE_SOURCES := pyproject.toml $(sort $(wildcard kernels/csrc/*))
BENCHMARKS := $(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format bench soak wheel clean

help:  ## List the targets
	@grep -hE '^[a-z]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## */\1\t/' | expand -t 10

setup: $(STAMPS)/core  ## Make .venv: the pinned CPU stack, the tools, the project (editable) and its native core

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "setup: no python3 on PATH; install Python 3.10, 3.11 or 3.12, or name one: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info[:2] <= (3, 12); ok or sys.exit("setup: Python must be 3.10, 3.11 or 3.12, got " + sys.version.split()[0] + "; name one: make setup PYTHON=/path/to/python3.11")'
	@echo "setup: virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/cpu: requirements/cpu.txt requirements/torchrec.txt $(STAMPS)/venv
	@echo "setup: torch, fbgemm-gpu-cpu and torchrec (about 1 GB on disk)"
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

demo: setup  ## Train a small DLRM from an SSD tier and compare it with training in memory
	@$(BIN)/mtrains demo

test: lint  ## Run the lint and the whole test suite, except what is marked slow
	@PYTHONSAFEPATH=1 $(BIN)/pytest -m "not slow" $(PYTEST_ARGS)

soak: setup  ## Kill a training job SOAK_KILLS times (1000), go on where an earlier soak stopped; then the slow tests
	@$(BIN)/python tests/soak/soak.py --ranks 1 --kills $(SOAK_KILLS)
	@$(BIN)/python tests/soak/soak.py --ranks 2 --kills $$(( $(SOAK_KILLS) / 4 ))
	@PYTHONSAFEPATH=1 $(BIN)/pytest -m slow $(PYTEST_ARGS)

bench: setup  ## Run every benchmark in benchmarks/
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

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
