# make demo    run a small sweep on the data that ships with the package
# make test    run all checks
# make docs    write the API reference into build/docs
# make docs-figures    run the demo unless it is finished, and write its picture and its table into docs
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs docs-figures clean

demo: .venv/installed
	$(BIN)/fishermask sweep sweeps/demo.yaml

docs: .venv/installed-dev
	$(BIN)/pdoc --docformat google --output-directory build/docs fishermask

docs-figures: .venv/installed
	$(BIN)/python scripts/docs_figures.py

test: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist platform/*.egg-info
