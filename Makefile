# Everything a developer types. Each target does its own set-up; a second run finds it done.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# mke2fs, debugfs and their like are in root's directories, which not everybody has in PATH.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- set-up -------------------------------------------------------------------------------------------------------

$(VENV)/pyvenv.cfg:
	@deploy/make-venv $(VENV)

$(VENV)/.requirements: requirements-dev.txt | $(VENV)/pyvenv.cfg
	@echo "installing pinned requirements into $(VENV)" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $@

$(READY): $(VENV)/.requirements pyproject.toml
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# --- use ----------------------------------------------------------------------------------------------------------

.PHONY: demo
demo: $(READY) ## watch a file-system image travel to a second site, change, and travel again
	@deploy/packages e2fsprogs
	@$(BIN)/python -m deploy.demo

.PHONY: test
test: $(READY) ## everything that must pass: make check, then all tests
	@deploy/packages tests
	@$(MAKE) --no-print-directory check
	@base=$$(mktemp -d) && trap 'rm -rf "$$base"' EXIT && deploy/isolate \
		$(BIN)/python -m pytest --numprocesses $(or $(WORKERS),2) --dist worksteal --basetemp="$$base/tests" $(TESTS)

.PHONY: check
check: $(READY) ## formatting, lint, types, import contracts, generated code
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m deploy.protos --check

.PHONY: protos
protos: $(READY) ## regenerate common/blockferry/v1 from protos/
	@$(BIN)/python -m deploy.protos

.PHONY: bench
bench: $(READY) ## measure, compare with the bounds, write bench/results/ (BENCH=NAME for one)
	@deploy/isolate $(BIN)/python -m bench $(BENCH)

# $(call soak,ENVIRONMENT,TESTS): tests without a time limit, with larger samples.
define soak
@base=$$(mktemp -d) && trap 'rm -rf "$$base"' EXIT && $(1) deploy/isolate \
		$(BIN)/python -m pytest --timeout 0 --basetemp="$$base/tests" $(2)
endef

.PHONY: soak
soak: $(READY) ## thousands of kills at random instants, and a hundred thousand random messages (hours; KILLS=200 for fewer)
	@deploy/packages tests
	$(call soak,BLOCKFERRY_FUZZ_EXAMPLES=$(or $(MESSAGES),100000),tests/fault/test_fuzz.py)
	$(call soak,BLOCKFERRY_SOAK_KILLS=$(or $(KILLS),2000),tests/soak tests/fault/test_rehydration_crashes.py)
	$(call soak,BLOCKFERRY_AGENT_KILLS=$(or $(KILLS),2000),tests/fault/test_agent_kills.py)
	$(call soak,BLOCKFERRY_CRASH_PASSES=4,tests/fault/test_cycle_crashes.py tests/fault/test_group_commits.py)
	$(call soak,BLOCKFERRY_CYCLE_STEPS=3000,tests/fault/test_cycle_lives.py)
	$(call soak,BLOCKFERRY_NBD_EXAMPLES=$(or $(HISTORIES),2000),tests/integration/test_nbd_server.py -k history)
	$(call soak,BLOCKFERRY_CRASH_STEP=1,tests/fault/test_archive_crashes.py)
	$(call soak,BLOCKFERRY_ARCHIVE_BLOCKS=65536,tests/integration/test_archive_create.py -k 16_tib)
	$(call soak,BLOCKFERRY_ARCHIVE_EXAMPLES=$(or $(HISTORIES),2000),tests/unit/test_archive_reader.py \
		tests/unit/test_archive_restore.py -k "any_chain or whatever_is_there")
	$(call soak,BLOCKFERRY_REHYDRATE_MIB=4096 BLOCKFERRY_REHYDRATE_EXAMPLES=5000,tests/integration/test_rehydrate.py \
		tests/unit/test_hydrating_model.py -k "verified or Rehydrating")

.PHONY: system
system: $(READY) ## two hosts in network namespaces of their own, a real S3, and a virtual machine (root)
	@deploy/packages tests iproute2 gateway mmdebstrap qemu-system-x86
	@base=$$(mktemp -d) && trap 'rm -rf "$$base"' EXIT && deploy/isolate \
		$(BIN)/python -m pytest --basetemp="$$base/tests" tests/system

.PHONY: lock
lock: $(READY) ## pin and hash the newest development requirements that pyproject.toml allows
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --upgrade --quiet \
		--generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
		--output-file requirements-dev.txt

.PHONY: clean
clean: ## remove the virtual environment, caches and results
	@rm -rf $(VENV) dist build bench/results .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
