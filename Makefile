# `make help` lists the targets. `make demo` and `make test` also install everything that they need.
PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 20

# Tests of a Ray cluster run in one process, one after the other; all other tests run in two processes, one test thread
# each (tests/conftest.py limits torch to one thread).
PYTEST := $(BIN)/python infra/loopback.py $(BIN)/python -m pytest --durations=10 --durations-min=2
NO_RAY := --ignore tests/ray --ignore tests/faults --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: help env demo test test-unit test-all test-faults soak fuzz audit lint docs bench clean

help: ## List the targets.
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

env: .venv/.installed ## Install the locked dependencies and the package into .venv.

# With uv if it is installed, else with venv and pip; the versions are the same. Bytecode is compiled once, as pip does:
# a run starts a dozen processes, and each would compile all imports if it may not write bytecode.
.venv/.installed: pyproject.toml requirements.lock
	@if command -v uv >/dev/null 2>&1; then \
	  { [ -x $(BIN)/python ] || uv venv -q --python '>=3.11,<3.14' .venv; } && \
	  uv pip install -q --compile-bytecode --python $(BIN)/python -r requirements.lock && uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .; \
	else \
	  $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	    { echo "Python 3.11 to 3.13 is required: make PYTHON=python3.12"; exit 1; }; \
	  { [ -x $(BIN)/pip ] || $(PYTHON) -m venv .venv; } && \
	  $(BIN)/python -m pip install -q -r requirements.lock && $(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .; \
	fi
	@touch $@

demo: env ## Train on the built-in data set, evaluate teacher and student, draw predictions (5 minutes).
	$(BIN)/pais-ray train quickstart run.name=demo
	$(BIN)/pais-ray predict runs/demo --out runs/demo/predictions

test: env ## Run all tests except the slow ones (12 minutes on two cores).
	$(PYTEST) -m "not slow" $(NO_RAY) tests
	$(PYTEST) -m "not slow" tests/ray tests/faults

test-unit: env ## Run the tests that start neither a Ray cluster nor a server (3 minutes).
	$(PYTEST) -m "not slow and not server" $(NO_RAY) tests

test-all: env lint ## Run all tests, with lint and the AP of the demo (an hour).
	$(PYTEST) $(NO_RAY) tests
	$(PYTEST) tests/ray tests/faults

test-faults: env ## Inject faults into real runs; MINUTES limits the random kills. Writes faults.json.
	MINUTES=$(MINUTES) $(BIN)/python infra/loopback.py $(BIN)/python -m pytest -q --timeout 3600 tests/faults

soak: env ## Train continuously for MINUTES and measure memory. Writes soak/.
	$(BIN)/python infra/loopback.py $(BIN)/python benchmarks/soak.py --minutes $(MINUTES) --out soak

fuzz: env ## Validate mutated annotation files for MINUTES; each must end in findings, not in a traceback, crash or hang.
	MINUTES=$(MINUTES) $(BIN)/python -m pytest -q -s --timeout 0 tests/data/test_validate_fuzz.py

audit: env ## Look up known vulnerabilities of the locked packages (uses the network).
	$(BIN)/pip-audit --strict --disable-pip --no-deps -r requirements.lock

lint: env ## Check style, format and types.
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: env ## Build the documentation site in build/site, without network.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

bench: env ## Run the benchmarks of single components.
	for name in augment renewal segmentors streaming validate; do $(BIN)/python benchmarks/$$name.py || exit 1; done

clean: ## Remove the environment and caches.
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
