# Everything runs in its own environment; the first target that needs it makes it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SAELENS := .venv-saelens
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types docs check saelens clean

demo: $(INSTALLED)  ## Render videos, extract, train, evaluate; print a table and where the report lies.
	$(BIN)/tubelet demo

test: $(INSTALLED)  ## The test suite, two files at a time: many tests wait for processes that they watch.
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint types docs test

saelens: $(INSTALLED)  ## SAEs to and from SAELens, asked of SAELens itself, in an environment of its own.
	$(PYTHON) -m venv $(SAELENS)
	$(SAELENS)/bin/pip install --quiet torch==2.13.0 sae-lens==6.54.12
	TUBELET_SAELENS_PYTHON=$(SAELENS)/bin/python $(BIN)/pytest tests/trainer/test_exchange.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(SAELENS) demo site
