# Set-up is part of every target: the first call makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
NAME ?= badnet_demo

.PHONY: demo test test-all lint mutants results

# A finished record of that name stays as it is, with all that was made of it.
demo: .venv/installed
	$(BIN)/python attack/badnet.py --save_folder_name $(NAME) --resume
	$(BIN)/python defense/sau.py --result_file $(NAME) --resume

# What a change needs, in some minutes.
test: .venv/installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-all: .venv/installed-dev
	@echo "beside make test: whole runs of scripts and grids, several processes, SLURM, the README's commands, that SAU works"
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Hours on two cores, see CONTRIBUTING.md.
mutants: .venv/installed-dev
	$(BIN)/python perf/mutants.py

# Tables, and the figures that the pages show, from the runs and the curves that results/ has.
results: .venv/installed
	$(BIN)/python benchmark/report.py --rebuild RESULTS.md README.md README_cn.md

# The stamps make pip run again when the requirements change.
.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
