# Everything runs from .venv inside the checkout, made from pyproject.toml with pip.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test mutants lint recipes exports docs bench zoo clean

.venv/.made:
	$(PYTHON) -m venv .venv
	touch $@

# One stamp an extra, so that `make demo` does not wait for the tools of `make lint`.
.venv/.with-%: .venv/.made pyproject.toml
	$(BIN)/python -m pip install -e '.[$*]'
	touch $@

demo: .venv/.with-train .venv/.with-report
	$(BIN)/torchdrop compare --out runs/demo $(DEMO)

test: .venv/.with-test
	$(BIN)/python -m pytest -n auto --dist worksteal $(TESTS)

zoo: .venv/.with-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m zoo $(TESTS)

# Small changes of the source, each of which the tests have to notice. Takes about twenty minutes.
mutants: .venv/.with-test
	$(BIN)/python tests/mutants/run_mutants.py $(MUTANTS)

lint: .venv/.with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

recipes:
	$(PYTHON) tools/recipes.py

exports:
	$(PYTHON) tools/exports.py

docs: .venv/.with-docs
	$(BIN)/mkdocs build --strict

bench: .venv/.with-test
	$(BIN)/python benchmarks/steps.py --out runs/steps.json
	$(BIN)/python benchmarks/scale.py --out runs/scale.json

clean:
	rm -rf .venv runs site
