# Two commands do everything on a fresh machine with Python >= 3.11:
#   make demo   fetch a real language model and real text, fine-tune with forward passes only, print the table
#   make test   the whole test suite
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO_DIR ?= runs/demo
PYTHONS ?= python3.12 python3.13

.PHONY: help install demo test test-oldest test-newest test-python wheel test-wheel lint format typecheck docs results bench clean

help:
	@sed -n '1,4p;s/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "zokernel needs Python >= 3.11: make PYTHON=python3.11 ...")'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[finetune,report]"
	touch $@

$(VENV)/.installed: $(VENV)/.demo tests/requirements-crosscheck.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,dev,docs]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/requirements-crosscheck.txt
	touch $@

install: $(VENV)/.installed  ## create .venv and install zokernel with every extra

demo: $(VENV)/.demo  ## fine-tune SmolLM2-135M on movie reviews with forward passes only (about 7 minutes on 2 cores)
	$(BIN)/zokernel demo --output_dir $(DEMO_DIR) --overwrite_output_dir

test: install lint typecheck  ## lint, type-check and run the whole suite
	$(BIN)/python -m pytest -n 2 --dist loadscope

test-oldest:  ## the core of the suite with the lowest versions that pyproject.toml allows
	scripts/test_versions.sh oldest

test-newest:  ## the same with the highest versions
	scripts/test_versions.sh newest

test-python:  ## the same on Python 3.12 and 3.13
	for python in $(PYTHONS); do scripts/test_versions.sh $$python || exit 1; done

wheel:  ## build sdist and wheel into dist/
	PYTHON=$(PYTHON) scripts/test_wheel.sh build

test-wheel:  ## build them, install the wheel into empty environments (core, then each extra) and use it there
	PYTHON=$(PYTHON) scripts/test_wheel.sh

lint: install  ## style, and the layers of the package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

typecheck: install
	$(BIN)/mypy

format: install  ## rewrite files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## build the documentation site into site/; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

results: install  ## run every experiment at cpu scale and copy the results to docs/results (about two hours)
	$(BIN)/zokernel reproduce all --scale cpu --output_dir runs/cpu
	$(BIN)/python docs/publish.py runs/cpu

bench: install  ## every benchmark (prints ratios measured in one run)
	for f in benchmarks/*.py; do $(BIN)/python $$f || exit 1; done

clean:
	rm -rf $(VENV) runs build dist site .pytest_cache .mypy_cache .ruff_cache
