# `make demo` and `make test` need only Python 3.11 or newer with pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types matrix clean

$(VENV)/installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

demo: $(VENV)/installed-demo
	$(BIN)/python examples/resume_after_kill.py

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Saves and resumes on every topology, and what came of it in the README. Takes two minutes on two cores.
matrix: $(VENV)/installed-test
	CKPTMGR_WRITE_MATRIX=1 $(BIN)/python -m pytest tests/topology/test_matrix.py tests/topology/test_matrix_lightning.py; \
	$(BIN)/python tests/topology/table.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
