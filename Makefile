# Every target sets up what it needs on a fresh machine, in .venv. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
QUIET := --quiet --disable-pip-version-check

# Nothing calls home.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

$(READY): constraints.txt pyproject.toml
	@echo "Setting up .venv (the first time this fetches the packages in constraints.txt)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(QUIET) -c constraints.txt torch==2.13.0
	$(BIN)/pip install $(QUIET) -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: setup
setup: $(READY) ## install everything into .venv

.PHONY: demo
demo: $(READY) ## four emulated hospitals train together; report in runs/demo/report.html
	$(BIN)/federad-sim run simulation/plans/demo.toml --sites 4 --out runs/demo

.PHONY: test
test: $(READY) ## the whole test suite, without root, within 15 minutes
	$(BIN)/python -m pytest -m "not system" --numprocesses logical --maxprocesses 4 --dist loadfile

.PHONY: system-packages
system-packages: ## Debian's packages: nginx for a server, Orthanc to try an archive (needs root)
	@command -v nginx /usr/sbin/nginx >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends nginx-light; }
	@command -v Orthanc /usr/sbin/Orthanc >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends orthanc orthanc-dicomweb; }

.PHONY: test-system
test-system: $(READY) system-packages ## what needs root or time: full disks, other users, servers, broken builds
	$(BIN)/python -m pytest -m system

.PHONY: audit
audit: $(READY) ## break privacy in many ways and see whether the tests notice; takes a while
	$(BIN)/python -m tests.broken_builds

.PHONY: fuzz
fuzz: $(READY) ## break 100,000 DICOM files and see that none of them breaks the reader; half an hour
	$(BIN)/python -m tests.fuzz --mutants 100000

.PHONY: check
check: $(READY) ## format, lint and types, as CI runs them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: bench
bench: $(READY) ## measure overhead, memory and aggregation; writes .bench/bench.json
	$(BIN)/python -m tests.benchmarks --out .bench

.PHONY: format
format: $(READY) ## let ruff put the code in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
