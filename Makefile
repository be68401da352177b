# The project's verbs. Each makes `.venv` when it is missing, installs what it needs, and runs.

PYTHON ?= python3
BIN := .venv/bin
# Two workers with a torch thread each: more threads than cores make small models slower.
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test check types docs bench build clean

demo: .venv/.installed
	$(BIN)/fxmpq run recipes/resnet.yaml --output demo

test: .venv/.installed-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS)

check: .venv/.installed-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/.installed-check
	$(BIN)/mypy -p fxmpq

docs: .venv/.installed-docs
	$(BIN)/mkdocs build --strict

bench: .venv/.installed-test
	@set -e; for script in benchmarks/[!_]*.py; do \
		echo "== $$script"; $(ONE_THREAD) $(BIN)/python "$$script"; \
	done

build: .venv/.installed-build
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist site demo *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "fxmpq needs Python 3.10 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
			"name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: its module venv or ensurepip is missing." \
			"On Debian or Ubuntu install the package python3-venv, or name another Python:" \
			"make PYTHON=/path/to/python ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

# torch comes first and alone, at the version of constraints.txt, which says why. Dependency groups
# need pip 25.1.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[onnxruntime]'
	@touch $@

.venv/.installed-%: .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group $*
	@touch $@
