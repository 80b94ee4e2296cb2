# make help lists the targets. VENV and PYTHON may be set: make test VENV=/elsewhere PYTHON=python3.12
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
PY     := $(BIN)/python

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export DS_BUILD_OPS := 0
export PYTHONUNBUFFERED := 1
# Byte code is written on first import, for what is used, and not by pip for everything: half a minute less.
export PYTHONDONTWRITEBYTECODE :=

LOG := $(VENV)/install.log
# $(call pip_install,what is shown,arguments of pip): one dot a package; the log, and its end if the installation fails.
define pip_install
	printf '%s ' "$(1)"
	$(PY) -m pip install --no-compile --progress-bar off $(2) 2>&1 | tee -a $(LOG) \
	  | while read -r line; do case "$$line" in Collecting*|Building*|Installing*) printf .;; esac; done \
	  || { printf ' failed; the end of $(LOG):\n'; tail -n 20 $(LOG); exit 1; }
	printf ' done\n'
endef

.PHONY: help quickstart test ends chaos trajectories check audit format bench claims tutorials docs clean

help:  ## List the targets
	@awk -F':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# torch first and pinned: left to itself pip may replace a CPU build by gigabytes of CUDA.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "alignkit needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(call pip_install,[1/2] installing torch,-c constraints.txt torch)
	@touch $@

# What training needs.
$(VENV)/.run: $(VENV)/.torch pyproject.toml
	@$(call pip_install,[2/2] installing alignkit,-c constraints.txt -e .)
	@touch $@

# What training, the tests and the checks need. lm-eval (extra eval) is large and no test imports it.
$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@$(call pip_install,[2/2] installing alignkit with test tools,-c constraints.txt -e '.[data$(comma)deepspeed$(comma)quantization$(comma)dev]')
	@touch $@ $(VENV)/.run

comma := ,

quickstart: $(VENV)/.run  ## Install, train a tiny model on synthetic preferences, show what happened to it
	@$(PY) scripts/quickstart.py --overwrite

test: check  ## Static checks, then the whole test suite
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup

# Every test that brings a fault about, the long form beside the short one; those of tests/chaos are not all of them.
FAULTS = tests/chaos $(wildcard tests/*/test_hostile.py tests/*/test_full_disk.py) tests/data/test_bounded.py \
         tests/programs/test_signals.py tests/programs/test_bad_inputs.py tests/programs/test_sft_bad_inputs.py \
         tests/distributed/test_signals_of_ranks.py
# What leans on transformers: private names of its, parity with TRL, routers, kernels and casts of its layers, a launch.
LEANING = tests/contracts/test_trl_seams.py tests/shapes/test_parity.py tests/shapes/test_supervised_parity.py \
          $(addprefix tests/models/test_,routers.py kernels.py adapter_casts.py comparison.py) \
          tests/programs/test_run_directory_program.py
ENDS = 5.21.0 5.24.0
ends: $(VENV)/.dev  ## What leans on transformers, under the oldest and the newest that alignkit accepts; some 6 minutes
	@for version in $(ENDS); do \
	  target=$(VENV)/transformers-$$version; \
	  test -d $$target || $(PY) -m pip install -q --no-deps --no-compile --target $$target transformers==$$version; \
	  echo "transformers $$version"; \
	  PYTHONPATH=$$target OMP_NUM_THREADS=1 $(PY) -m pytest -q $(LEANING); \
	done

chaos: $(VENV)/.dev  ## Long fault injection, some 25 minutes, with a table of all of it at the end
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m "chaos or not chaos" --capture=tee-sys $(sort $(filter-out tests/chaos/%,$(FAULTS)))

trajectories: $(VENV)/.dev  ## What no refactor may change: runs of BASE=<commit> and of this tree, bit for bit
	@test -n "$(BASE)" || { echo 'say what to compare with: make trajectories BASE=main'; exit 2; }
	@$(PY) -m tests.trajectories since $(BASE)

check: $(VENV)/.dev  ## Lint, format, types, layers, budgets, licences
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(PY) -m pytest -q tests/contracts/test_budgets.py tests/contracts/test_licences.py

# Not a part of check: it asks the package index about every pinned version, and what it finds changes from day to day
# while the code stays. --strict because without it a version that nobody could look up passes.
audit:  ## Known vulnerabilities of the pinned packages; needs the network
	@test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/pip install -q pip-audit==2.10.1; }
	@$(VENV)/audit/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

format: $(VENV)/.dev  ## Rewrite the sources in the project's format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(VENV)/.dev  ## Speed: training against trl.DPOTrainer and trl.GRPOTrainer, the token reward pass, gradient rules, the start of a run
	@$(PY) scripts/benchmark.py
	@$(PY) scripts/benchmark_online.py
	@$(PY) scripts/benchmark_token_rewards.py
	@$(PY) scripts/benchmark_gradients.py
	@$(PY) scripts/benchmark_startup.py

tutorials: $(VENV)/.dev  ## Translate and run the first commands of other toolkits' tutorials, on a tiny model
	@OMP_NUM_THREADS=1 $(PY) scripts/tutorials.py

claims: $(VENV)/.dev  ## Repeat the experiments of docs/results
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m experiment
	@for script in $$(grep -l __main__ scripts/claims/*.py); do $(PY) $$script; done

docs: $(VENV)/.dev  ## Regenerate the tables in README.md and docs/
	@$(PY) scripts/docs.py

clean:  ## Remove the environment, caches, builds and the quickstart's output
	rm -rf $(VENV) build dist *.egg-info quickstart .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find alignkit trainers scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
