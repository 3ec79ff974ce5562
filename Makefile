# Everything runs in .venv, which each target makes when it is not there: Python >= 3.11, make and gcc are enough.
# A CPU build of torch that pip can see (a wheel folder, an extra index in PIP_FLAGS) is taken before anything else.
PYTHON ?= python3
PIP_FLAGS ?=
TESTS ?= tests
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -q $(PIP_FLAGS) -c constraints.txt

.PHONY: demo test check bench bench-train train-nano clean

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "gnomon needs Python 3.11 or newer; name one: make PYTHON=python3.11 ...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: constraints.txt | $(VENV)/.made
	@echo "installing torch (once) ..."
	$(PIP) torch==2.13.0
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "installing gnomon for the demo (once) ..."
	$(PIP) -e '.[plots]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "installing gnomon for tests (once) ..."
	$(PIP) -e '.[plots,gym,dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(VENV)/bin/gnomon demo

test: check
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile $(TESTS)

check: $(VENV)/.test
	$(PY) -m ruff check src tests
	$(VENV)/bin/lint-imports --no-logo
	$(PY) -m mypy

bench: $(VENV)/.test
	$(PY) -m pytest -q -m bench tests
	$(PY) benchmarks/decode.py

# Training speed against the Hugging Face Trainer; on a GPU: make bench-train ARGS="--preset base --compile"
bench-train: $(VENV)/.test
	$(PY) benchmarks/train.py $(ARGS)

# Trains the shipped model again from nothing, or goes on from its newest checkpoint.
train-nano: $(VENV)/.demo
	$(VENV)/bin/gnomon train pretrain --preset nano --resume auto

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
