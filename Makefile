# `make demo` and `make test` set up everything they need in .venv, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= test
JOBS ?= 2
RUNS ?= runs

.PHONY: demo test aot lint types format report bench clean help

help:
	@echo "make demo    train S4 and its rivals on sequential digits: table, claims, plots"
	@echo "make test    lint, types and all tests"
	@echo "make aot     the tests with the compilers for TPU and H200 installed"
	@echo "make report  one HTML page of all runs"
	@echo "make bench   speed and memory of the kernels, of attention over quantised keys, of the optimizers"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxkit needs Python 3.11 or later; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras: a change of pyproject.toml installs again, nothing else does.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

TEST_STAMP := $(VENV)/.installed-$(EXTRAS)

demo: $(VENV)/.installed-experiments
	$(BIN)/jaxkit run s4-digits --preset cpu --out $(RUNS)/s4-digits
	$(BIN)/jaxkit report $(RUNS)/s4-digits --out $(RUNS)/report.html

test: lint types $(TEST_STAMP)
	$(BIN)/python -m pytest -n $(JOBS)

aot:
	$(MAKE) test EXTRAS=test,aot

lint: $(TEST_STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(TEST_STAMP)
	$(BIN)/mypy

format: $(TEST_STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

report: $(VENV)/.installed-experiments
	$(BIN)/jaxkit report $(RUNS) --out $(RUNS)/report.html

bench: $(VENV)/.installed-experiments
	$(BIN)/jaxkit bench ssm
	$(BIN)/jaxkit bench vq
	$(BIN)/jaxkit bench optim

clean:
	rm -rf $(VENV) $(RUNS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
