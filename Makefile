# Every target sets up .venv by itself and installs nothing twice. Variables: PYTHON, DATA, DATA_DIR, OUT.
PYTHON ?= python3
DATA ?= scenes
BIN := .venv/bin
READY := .venv/.installed
# Freed memory stays in the process: large batches are not mapped and faulted anew at each step
export MALLOC_MMAP_THRESHOLD_ := 2000000000
export MALLOC_TRIM_THRESHOLD_ := 8000000000
export PYTHONWARNINGS := ignore::FutureWarning,ignore::DeprecationWarning
export MPLBACKEND := agg

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs lab export

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(READY): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "The venv module is missing: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,models,dist,grid,track]'
	@touch $@

demo: $(READY) ## CutMix with and without SUMix, and how wrong their labels are; DATA=digits, or DATA=cifar100 DATA_DIR=...
	@$(BIN)/python tools/demo.py --data $(DATA) $(if $(DATA_DIR),--data-dir "$(DATA_DIR)")

test: $(READY) ## Every check: export in sync, notebooks clean, lint, docs current, pytest, which runs the pages too
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/check_sync.py
	$(BIN)/ruff check --quiet .
	$(BIN)/python tools/build_docs.py --check
	$(BIN)/pytest -q -n 2 --dist worksteal

check: docs test ## Bring library, notebooks and docs up to date, then `test`

bench: $(READY) ## Time mixers, loss, steps and labels against their peers; OUT=folder keeps records
	$(BIN)/python tools/bench.py $(if $(OUT),--out "$(OUT)")
	$(BIN)/python tools/bench_sumix.py $(if $(OUT),--out "$(OUT)")
	$(BIN)/python tools/bench_labels.py $(if $(OUT),--out "$(OUT)")

export: $(READY) ## Write sumix_nb/ from the notebooks and clean them
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

docs: export ## Build docs/ and README.md, and check links, anchors, maths and that nothing asks the network
	PYTHONWARNINGS=ignore $(BIN)/python tools/build_docs.py
	$(BIN)/pytest -q tests/tools/test_docs.py

lab: $(READY) ## Open JupyterLab in the environment
	$(BIN)/jupyter lab nbs
