# make demo    the whole way on a small real world, on this machine
# make test    all tests that belong to every change (make check: format, lint, types)
# make test-faults   processes, nodes and servers that fail while a run goes on; a quarter of an hour
# make test-ui   the Prefect UI in Chromium: its form, a run, what it shows, what it refuses; a few minutes
# make docs    docs/ as a site, in site/
#
# Everything runs in .venv, which is set up by itself, once, and again when the pins change. On a machine with NVIDIA
# GPUs: make setup ENGINE=gpu. Set PIP_FIND_LINKS to a folder of wheels to install from it first.

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
ENGINE ?= $(if $(wildcard .venv/.ready-gpu),gpu,cpu)
BIN := .venv/bin
READY := .venv/.ready-$(ENGINE)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export RAY_USAGE_STATS_ENABLED := 0
INSTALL := $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[$(ENGINE),dev,docs]'

.PHONY: demo test test-faults test-ui check docs setup format clean

demo: setup
	@$(BIN)/prefsieve demo

# TinyWorld is built while the first tests run; the tests that need it wait for it. vLLM remembers the number of torch's
# threads, which other tests change: a process of its own.
test: setup
	@$(BIN)/python -m examples.tinyworld.build --out .prefsieve/tinyworld >/dev/null 2>&1 & \
	echo "pytest, twice: all but vLLM, then vLLM" && \
	$(BIN)/python -m pytest --ignore=tests/test_vllm.py --ignore=tests/faults --ignore=tests/ui --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest tests/test_vllm.py

# Much of it is waiting, so three processes for two cores; the files that take longest begin first.
LONGEST := $(foreach file,processes storage submission surroundings nodes engines vanished,tests/faults/test_$(file).py)
test-faults: setup
	$(BIN)/python -m pytest $(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/faults/test_*.py)) \
		--numprocesses 3 --dist loadfile --no-loadscope-reorder

test-ui: setup
	@command -v chromium >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qq --no-install-recommends chromium >/dev/null; } || \
		{ echo "make test-ui needs chromium on PATH; on Debian, as root: apt-get install chromium"; exit 1; }
	$(BIN)/python -m pytest tests/ui

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy flows tasks

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

# PyTorch's own index has the CPU build; where it cannot be reached, the default build serves as well, only larger.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
		{ echo "prefsieve needs Python 3.11 or 3.12; say where it is: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
ifeq ($(ENGINE)$(UV_FIND_LINKS),cpu)
	@$(INSTALL) --torch-backend=cpu --quiet || { echo "Going on with PyTorch's default build, which is larger."; $(INSTALL) --quiet; }
else
	@$(INSTALL) --quiet
endif
	@rm -f .venv/.ready-* && touch $@

clean:
	rm -rf .venv .prefsieve site
