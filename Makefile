# Everything a person or a machine runs. Needs Python >= 3.11 and make; the rest is installed into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# OpenMP threads that spin while they wait take the cores from each other when several processes share them.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
# Images of machines often forbid bytecode: then every process compiles this package and its tests anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install install-dev quickstart test test-all test-quick lint types sim soak clean

help:
	@echo "make quickstart   images -> latents -> model -> images on this machine, with a report (some minutes)"
	@echo "make test         lint, types, import rules, tests; the jobs on real Ray, with declared GPUs and kills; a store that fails"
	@echo "make test-all     every test there is: also what takes many minutes"
	@echo "make test-quick   unit tests alone: no process, no server, no Ray"
	@echo "make sim          random schedules of the store, SEEDS=10000 of them from FIRST=1000 (half an hour)"
	@echo "make soak         kill tests for as long as KILLS=200 SEED=7 say"
	@echo "make lint         formatting, lint and import rules; make types: mypy"
	@echo "make install      .venv with what jobs need; make install-dev: and with what tests and checks need"
	@echo "make clean        remove quickstart/, builds and caches"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "latentloom needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# pip makes the bytecode of all that it installs with one core, tests and examples too; here that of what is imported is
# made with all cores. The build says of every editable installation, in a box, that folders may hide packages: to who
# installs, it is noise.
PIP_INSTALL := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable
BYTECODE = $(BIN)/python -m compileall -qq -j 0 -x '/(tests?|rllib|_inductor|pipelines)/|transformers/models/' $(VENV)/lib || true

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (once; some minutes)"
	$(PIP_INSTALL) '.[report,s3,text]'
	@$(BYTECODE)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing with development tools into $(VENV) (once; some minutes)"
	$(PIP_INSTALL) '.[dev,report,s3,text]'
	@$(BYTECODE)
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

quickstart: install
	@$(BIN)/python -m jobs.quickstart

test: lint types
	$(BIN)/python -m pytest -m "not soak and not ray and not slow and not s3" -n 2 --durations=15
	$(BIN)/python -m pytest -m "ray and not soak and not s3 and not slow" tests/dataflow tests/e2e tests/encode tests/faults tests/security tests/test_wheel.py --durations=15
	$(BIN)/python -m pytest tests/s3/test_s3_store.py --durations=5

test-all: lint types
	$(BIN)/python -m pytest -m "not soak" --durations=30

test-quick: install-dev
	$(BIN)/python -m pytest --quick -n auto --maxprocesses 4 -q

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo

types: install-dev
	$(BIN)/mypy

sim: install-dev
	$(BIN)/python -m tests.sim.seeds $(or $(FIRST),1000) $(or $(SEEDS),10000)

soak: install-dev
	$(BIN)/python -m pytest tests/faults -m soak --kills $(or $(KILLS),200) --kill-seed $(or $(SEED),7) -s

clean:
	rm -rf quickstart build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
