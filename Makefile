# One virtual environment in two stages: the packages of the service, then those of its tests.
# Every package is pinned and hashed. The project is installed in place: .venv/bin/darkroom runs it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV ?= uv
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --no-strip-extras --no-emit-index-url --no-header --no-annotate $(ARGS)
EXTRAS := --extra brokers --extra postgres --extra limits --extra otel --extra s3
PEERS := tests/bench/peers
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# pip installs a lock without resolving it, so it does not notice what a lock lacks.
COMPLETE = found=$$($(BIN)/python -m pip check 2>&1) \
  || { echo "$$found" >&2; \
    echo "$(VENV) is incomplete: run make lock, then make clean" >&2; exit 1; }
# One process runs all tests of a file, because they share servers.
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Logic, workers and SQL of the steps. Coverage traces the tests' own processes and none that they
# start, so it sees nothing of the validator's child.
COVERED := 'service/signing.py,service/tasks/*,service/images/*,service/events/*,service/upkeep/*'
STARTED := service/images/validator_child.py

# The tests start hundreds of processes. Without bytecode each would compile the service anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo dev quick test lint check coverage bench bench-peers chaos screenshots pictures lock sbom clean

help:
	@echo "make demo      show it at work: an upstream, the service and a subscriber on this machine"
	@echo "make dev       serve on a sandbox upstream, to try requests on"
	@echo "make quick     run the tests that run no service and need no server, for every change"
	@echo "make test      run all tests"
	@echo "make lint      check style, types and import rules"
	@echo "make check     run what CI runs: make lint and all tests"
	@echo "make coverage  run all tests and ask for coverage: 95 % of all, 99 % of the steps"
	@echo "make bench     measure, and print the tables of the benchmarks"
	@echo "make bench-peers  the same for programs on Celery, arq and DBOS, which it installs"
	@echo "make chaos     kill and pause processes under load, and look for what is lost or doubled"
	@echo "make screenshots  take the pictures of docs/console.md with Chromium"
	@echo "make setup     create .venv and nothing else"
	@echo "make lock      write the locks; make sbom: list all packages as CycloneDX"
	@echo "make clean     remove .venv, caches and the files of the demo"

setup: $(VENV)/.run $(VENV)/.dev $(VENV)/.node

demo: $(VENV)/.run
	@$(BIN)/python deploy/demo.py

dev: $(VENV)/.run
	@$(BIN)/darkroom serve --sandbox $(ARGS)

quick: $(VENV)/.dev
	@$(PYTEST) -m quick

test: $(VENV)/.dev $(VENV)/.node
	@$(PYTEST)

bench: $(VENV)/.dev
	@$(BIN)/python -m tests.bench

bench-peers: $(VENV)/.dev $(VENV)/.peers
	@$(BIN)/python -m tests.bench.peers $(ARGS)

chaos: $(VENV)/.dev
	@$(BIN)/python -m tests.crash.chaos $(ARGS)

screenshots: $(VENV)/.dev
	@$(BIN)/python -m tests.browser.screenshots

check: lint test

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

coverage: $(VENV)/.dev $(VENV)/.node
	$(PYTEST) --cov --cov-report=
	$(BIN)/coverage report --fail-under=95
	$(BIN)/coverage report --fail-under=99 --include=$(COVERED) --omit=$(STARTED)

# Pillow's own test images, damaged ones among them. They are in its source distribution, which pip
# checks by the hash in the lock.
pictures: $(VENV)/.pictures

sbom: $(VENV)/.dev
	@$(BIN)/python deploy/sbom.py >sbom.json
	@echo "sbom.json lists the packages of requirements.lock"

# make lock ARGS=--upgrade takes the newest versions. This updates the packages for JavaScript:
# npm install --prefix tests/consumers --package-lock-only --omit-lockfile-registry-resolved
lock:
	$(COMPILE) $(EXTRAS) pyproject.toml --output-file requirements.lock
	$(COMPILE) $(EXTRAS) pyproject.toml --group dev --constraint requirements.lock \
	  --output-file requirements-dev.lock
	$(COMPILE) --group build --constraint requirements-dev.lock --output-file requirements-build.lock
	$(COMPILE) $(PEERS)/requirements.in --output-file $(PEERS)/requirements.lock

clean:
	rm -rf $(VENV) sbom.json demo-data .coverage .coverage.* htmlcov .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# A stamp is written last, so the next run repeats a set-up that did not finish.

$(VENV)/.run: requirements.lock requirements-build.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "darkroom needs Python 3.11 or newer, and $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>/dev/null || echo missing):" \
	    "try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "darkroom needs Python's venv module:" \
	    "apt-get install python3-venv, or set PYTHON" >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing the packages of requirements.lock into $(VENV) ..."
	@$(PIP) install --no-deps --require-hashes -r requirements.lock
	@$(PIP) install --no-deps --require-hashes -r requirements-build.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@$(COMPLETE)
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.run
	@echo "installing the packages of requirements-dev.lock into $(VENV) ..."
	@$(PIP) install --no-deps --require-hashes -r requirements-dev.lock
	@$(COMPLETE)
	@touch $@

# The packages of the JavaScript consumers. Without npm or without these packages, the tests that
# need them are skipped, and fail if CI is set.
$(VENV)/.node: tests/consumers/package.json tests/consumers/package-lock.json | $(VENV)/.run
	@command -v npm >/dev/null \
	  || { echo "npm is missing: tests of JavaScript consumers are skipped" >&2; exit 0; }; \
	  echo "installing the packages of JavaScript consumers into $(VENV)/node ..."; \
	  mkdir -p $(VENV)/node && cp $(filter %.json,$^) $(VENV)/node \
	  && npm ci --prefix $(VENV)/node --ignore-scripts --no-audit --no-fund --silent && touch $@ \
	  || echo "npm ci failed: tests of JavaScript consumers are skipped" >&2

# Programs to compare with, in an environment of their own.
$(VENV)/.peers: $(PEERS)/requirements.lock | $(VENV)/.run
	@echo "installing the packages of $(PEERS)/requirements.lock into $(VENV)/peers ..."
	@$(PYTHON) -m venv --clear $(VENV)/peers
	@$(VENV)/peers/bin/python -m pip --disable-pip-version-check --quiet \
	  install --no-deps --require-hashes -r $<
	@$(VENV)/peers/bin/python -m pip check
	@touch $@

$(VENV)/.pictures: requirements.lock $(VENV)/.run
	@echo "fetching Pillow's test images into $(VENV)/pictures ..."
	@rm -rf $(VENV)/pictures && mkdir -p $(VENV)/pictures
	@sed -n '/^pillow==/,/[^\\]$$/p' requirements.lock >$(VENV)/pictures/wanted.txt
	@$(PIP) download --no-deps --no-binary :all: --require-hashes \
	  -r $(VENV)/pictures/wanted.txt --dest $(VENV)/pictures
	@cd $(VENV)/pictures && tar -xzf pillow-*.tar.gz --strip-components=3 \
	    "$$(basename pillow-*.tar.gz .tar.gz)/Tests/images" \
	  && rm pillow-*.tar.gz wanted.txt
	@touch $@
