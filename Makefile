# Everything runs in its own environment; the first target that needs it makes it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SAELENS := .venv-saelens
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types docs docs-run notebooks check dist smoke bench saelens clean

demo: $(INSTALLED)  ## Render videos, extract, train, evaluate, gallery; print a table, and where report and gallery are.
	$(BIN)/tubelet demo

test: $(INSTALLED)  ## The test suite, two files at a time: many tests wait for processes that they watch.
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(INSTALLED)  ## Style, and which module may import which.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-run: $(INSTALLED)  ## The commands on the documentation's pages, run in a temporary folder.
	$(BIN)/pytest -m docs_run -x --durations=10 tests/docs/test_docs_run.py

notebooks: $(INSTALLED)  ## The documentation's site with its notebooks executed; fails where a cell does.
	PATH="$(CURDIR)/$(BIN):$$PATH" TUBELET_NOTEBOOKS=true NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint types docs test  ## What a change needs before it is sent; CI runs .ci/run.

dist: $(INSTALLED)  ## Wheel and source distribution, in dist/.
	rm -rf dist
	$(BIN)/python -m build --outdir dist > /dev/null
	# Metadata left here would hide those of the installed package from `python -m`.
	rm -rf tubelet.egg-info

smoke: dist  ## Every extra, installed from the wheel into an environment of its own and used.
	$(BIN)/python tests/release/smoke.py dist/tubelet-*.whl

bench: $(INSTALLED)  ## The benchmarks that fit a laptop, and a table of their goals (minutes).
	$(BIN)/python benchmarks/goals.py

saelens: $(INSTALLED)  ## SAEs to and from SAELens, asked of SAELens itself, in an environment of its own.
	$(PYTHON) -m venv $(SAELENS)
	$(SAELENS)/bin/pip install --quiet torch==2.13.0 sae-lens==6.54.12
	TUBELET_SAELENS_PYTHON=$(SAELENS)/bin/python $(BIN)/pytest tests/trainer/test_exchange.py

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing Tubelet and everything it can use (PyTorch, transformers, Dask, ...) into $(VENV)."
	@echo "This downloads several gigabytes the first time and takes some minutes; later runs skip it."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	@echo "Installed."
	@touch $@

clean:
	rm -rf $(VENV) $(SAELENS) demo dist site
