# `make reproduce-table1` and `make test` are all that a fresh machine needs (Python 3.11 or later).
PYTHON  ?= python3
PRESET  ?= pocket
SEEDS   ?= 0
METHODS ?= base,sft,spin,tspin
VENV    := .venv
READY   := $(VENV)/.ready

.PHONY: reproduce-table1 sweep benchmark test lint clean

reproduce-table1: $(READY)
	$(VENV)/bin/tspin run --preset $(PRESET) --seeds "$(SEEDS)" --methods "$(METHODS)"
	$(VENV)/bin/tspin table 1 --preset $(PRESET)

sweep: $(READY)
	$(VENV)/bin/python experiments/sweep.py experiments/$(PRESET)/sweep.yaml

benchmark: $(VENV)/.benchmark
	$(VENV)/bin/python experiments/benchmark/run.py
	$(VENV)/bin/python -m analysis.benchmark

test: $(READY)
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# torch comes first and by its exact version, so that nothing else decides which build is taken.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tspin needs Python 3.11 or later: make PYTHON=python3.11 …")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV): PyTorch, Transformers, lm-evaluation-harness and the rest (a few minutes, once)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep -o 'torch==[0-9.]*' pyproject.toml | head -n 1)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(VENV)/.lint: $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[lint]'
	touch $@

$(VENV)/.benchmark: $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[benchmark]'
	touch $@

clean:
	rm -rf $(VENV) runs
