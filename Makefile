# What people and CI both call. `make` alone lists the targets.
SHELL := /bin/bash
VENV  ?= .venv
PY    := $(VENV)/bin/python
SETUP := $(firstword $(foreach p,python3 python3.11 python3.12 python3.13 python,$(shell command -v $(p)))) \
         -m scripts.setup $(if $(PYTHON),--python $(PYTHON)) $(if $(ENGINE),--engine $(ENGINE))
# `MODEL=… PROFILE=… PORT=… ENGINE_PORT=… HOST=… make serve`
UP    := $(if $(MODEL),--model $(MODEL)) $(if $(PROFILE),--profile $(PROFILE)) $(if $(PORT),--port $(PORT)) \
         $(if $(ENGINE_PORT),--engine-port $(ENGINE_PORT)) $(if $(HOST),--host $(HOST))

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-fast page-test stack-test check fix grade judge selftest bench docs dashboards lock sbom audit

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## the virtual environment, from uv.lock
	@$(SETUP) --venv $(VENV)

setup-dev:
	@$(SETUP) --venv $(VENV) --dev

serve: setup ## engine and gateway, here and now; Ctrl-C stops both
	@exec $(PY) -m launcher up $(UP) $(ARGS)

test: setup-dev ## style, types and every test: with the real engine, beside it the others, also on a second Python
	@ALSO="$(ALSO)" scripts/test_pythons.sh $(VENV) $(ARGS)

test-fast: setup-dev ## the tests that need no engine
	@$(PY) -m pytest -m "not engine" $(ARGS)

page-test: setup-dev ## the page in a real browser; its screenshots go to out/page
	@scripts/system.sh browser || true
	@$(PY) -m pytest -m browser tests/page $(ARGS)

stack-test: setup-dev ## compose.yaml brought up in containers with the real vLLM; root, some minutes
	@$(PY) -m pytest -m stack tests/stack $(ARGS)

check: setup-dev ## style, types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

fix: setup-dev ## mend what the style checker can mend
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .

grade: setup-dev ## the judge at home: scores, speed, what is wrong, a report; `MODEL=… PORT=…` as for serve
	@$(PY) -m lab grade --record deploy/grades/grade.json $(if $(MODEL),--model_path $(MODEL)) \
	  $(if $(PORT),--port $(PORT)) $(ARGS) $(if $(PROFILE),-- --profile $(PROFILE))

judge: setup-dev ## the course's image as its judge takes it: built, run offline, timed, graded, PASS or FAIL
	@$(PY) -m lab judge $(ARGS)

selftest: setup-dev ## fourteen checks of the gateway that runs here
	@$(PY) -m lab selftest $(if $(PORT),--port $(PORT)) $(ARGS)

bench: setup-dev ## what the gateway costs over the engine itself, with a control; `ARGS=--quick`: a minute's look
	@$(PY) -m lab bench $(if $(MODEL),--model $(MODEL)) $(ARGS) $(if $(PROFILE),-- --profile $(PROFILE))

docs: setup-dev ## the tables of docs/settings.md and docs/metrics.md, and docs/results.md
	@$(PY) -m scripts.reference
	@$(PY) -m scripts.tree draw
	@$(PY) -m lab results

dashboards: setup-dev ## deploy/grafana/dashboards/*.json, from scripts/panels.py; the rules for Kubernetes
	@$(PY) -m scripts.dashboards

lock: setup-dev ## resolve uv.lock anew, from the public index: it names where each file is
	@$(VENV)/bin/uv lock $(or $(ARGS),--upgrade)

sbom: setup-dev ## what the images are made of, as CycloneDX: out/sbom/
	@mkdir -p out/sbom
	@$(VENV)/bin/uv export --frozen --quiet --format cyclonedx1.5 -o out/sbom/gateway.json >/dev/null
	@$(VENV)/bin/uv export --frozen --quiet --format cyclonedx1.5 --extra cpu -o out/sbom/engine-cpu.json >/dev/null
	@$(VENV)/bin/uv export --frozen --quiet --format cyclonedx1.5 --extra cuda --extra modelscope --extra otel \
	  -o out/sbom/engine-cuda.json >/dev/null

audit: setup-dev ## known vulnerabilities of what uv.lock pins, from osv.dev; needs the network
	@$(VENV)/bin/uv audit --frozen $(ARGS)
