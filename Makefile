# One venv, .venv, holds everything; its bin comes first, so that `mlflow run` finds its python.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test test-battery check ui clean

demo: .venv/.installed
	mlflow run . -P size=quick --env-manager local
	@echo "open the runs in the MLflow UI:  make ui   (http://127.0.0.1:5000)"

test: .venv/.installed-test
	python -m pytest -n 2 --dist loadfile -m "not battery"

test-battery: .venv/.installed-test
	python -m pytest -m battery

check: .venv/.installed-dev
	ruff format --check .
	ruff check .
	mypy lvm
	python -m pytest -q tests/test_layering.py
	python -m pytest -q -n 2 --dist loadfile -m "not slow" --ignore tests/test_layering.py

ui: .venv/.installed
	mlflow ui --backend-store-uri sqlite:///$(CURDIR)/mlflow.db

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lvm entrypoints tests -name __pycache__ -type d -exec rm -rf {} +

# torch first: a build for this machine (CPU or GPU) that is there already satisfies the pin.
.venv/.installed: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	python -m pip install torch==2.13.0
	python -m pip install -e .
	touch $@

.venv/.installed-test: .venv/.installed
	python -m pip install -e ".[test]"
	touch $@

.venv/.installed-dev: .venv/.installed
	python -m pip install -e ".[test,dev]"
	touch $@
