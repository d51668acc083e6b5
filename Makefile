# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 20

.PHONY: demo test test-all test-faults soak fuzz audit lint docs bench env clean

env: .venv/.installed

# uv where it is there, else venv + pip: the same locked versions either way. Compiled once, as pip does by itself:
# a run starts a dozen processes, and where Python may not write bytecode each would compile all it imports.
.venv/.installed: pyproject.toml requirements.lock
	@if command -v uv >/dev/null 2>&1; then \
	  { [ -x $(BIN)/python ] || uv venv -q --python '>=3.11,<3.14' .venv; } && \
	  uv pip install -q --compile-bytecode --python $(BIN)/python -r requirements.lock && uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .; \
	else \
	  $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	    { echo "Python 3.11 to 3.13 is needed: make PYTHON=python3.12"; exit 1; }; \
	  { [ -x $(BIN)/pip ] || $(PYTHON) -m venv .venv; } && \
	  $(BIN)/python -m pip install -q -r requirements.lock && $(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .; \
	fi
	@touch $@

# The main job on the embedded data set: train, evaluate teacher and student, draw what the teacher sees.
demo: env
	$(BIN)/pais-ray train quickstart run.name=demo
	$(BIN)/pais-ray predict runs/demo --out runs/demo/predictions

test: env
	$(BIN)/python infra/loopback.py $(BIN)/python -m pytest -m "not slow" tests

test-all: env lint
	$(BIN)/python infra/loopback.py $(BIN)/python -m pytest tests

# Real runs under scripted faults; MINUTES bounds the random kills. Figures: faults.json
test-faults: env
	MINUTES=$(MINUTES) $(BIN)/python infra/loopback.py $(BIN)/python -m pytest -q --timeout 3600 tests/faults

# Continuous training for MINUTES: is memory flat? Figures and plot: soak/
soak: env
	$(BIN)/python infra/loopback.py $(BIN)/python benchmarks/soak.py --minutes $(MINUTES) --out soak

# Known holes in what the lock installs (asks the package index).
audit: env
	$(BIN)/pip-audit --strict --disable-pip --no-deps -r requirements.lock

# Mutated annotation files for MINUTES, none of which may end in a traceback, a crash or a hang.
fuzz: env
	MINUTES=$(MINUTES) $(BIN)/python -m pytest -q -s --timeout 0 tests/data/test_validate_fuzz.py

lint: env
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The documentation site in build/site. The build needs no network.
docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

bench: env
	for script in $(filter-out benchmarks/soak.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
