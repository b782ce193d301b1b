# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#
# Every target sets up what it needs by itself; `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VARIANT ?= cpu
PORT ?= 8000
HOST ?= 127.0.0.1
CONFIG ?= examples/echo.json
DTYPE ?=
COMPILE ?= 0
# Engines of the tests run on one thread each, two test files at a time.
WORKERS ?= 2
HOURS ?= 1
ARGS ?=
V2_TESTS := tests/v2/graph.py tests/v2/paths.py tests/v2/stock.py tests/v2/trees.py tests/v2/budget.py tests/v2/learning.py tests/v2/drawn.py tests/v2/grammar.py tests/v2/tracing.py tests/v2/full.py tests/v2/parallel.py
export VARIANT PORT HOST CONFIG DTYPE COMPILE ARGS

PYTHON_OF_VENV := .venv/bin/python

.PHONY: help setup train-setup serve test test-fast check cuda-check wheel install-test dashboard-test image image-test docs soak format bench-quick clean test-v2 port

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo
	@echo "  variables: VARIANT=$(VARIANT) (or cuda: see README) PORT=$(PORT) HOST=$(HOST) CONFIG=$(CONFIG)"
	@echo "             DTYPE=(what suits the CPU; or bfloat16, float32) COMPILE=$(COMPILE) (1: torch.compile) ARGS= (more options)"

setup: ## .venv, vLLM, our patches and extension, the demo model; starts nothing
	@scripts/setup.sh

train-setup: export FOR_TRAINING := 1
train-setup: setup ## what echo-vllm train-drafter needs besides (speculators, 80 MB)

serve: setup ## serve the demo model: PORT, HOST, CONFIG (empty: no speculation), DTYPE, COMPILE
	@exec scripts/serve.sh

# Passed on to setup, which these targets depend on.
test test-fast test-v2: export FOR_TESTS := 1

test: setup ## all tests (under 25 minutes on two cores); ARGS go to pytest
	@$(PYTHON_OF_VENV) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: setup ## the fast tier (under three minutes)
	@$(PYTHON_OF_VENV) -m pytest -n $(WORKERS) --dist loadfile -m 'not full and not gpu' $(ARGS)

test-v2: setup ## vLLM's Model Runner V2 on the CPU, in Triton's interpreter (35 minutes)
	@$(PYTHON_OF_VENV) -m tests.v2.on_cpu -m pytest -q $(V2_TESTS) $(ARGS)

check: setup ## ruff, mypy, import contracts and clang-format; changes nothing
	@scripts/check.sh

cuda-check: setup ## compile the CUDA kernels for every architecture (needs nvcc, no GPU)
	@$(PYTHON_OF_VENV) scripts/cuda_check.py $(ARGS)

wheel: setup ## dist/*.whl with a manylinux tag, dist/*.tar.gz, and their sizes
	@$(PYTHON_OF_VENV) scripts/make_wheel.py $(ARGS)

install-test: wheel ## both of dist/ in fresh environments: patches, doctor, a server (5 minutes)
	@scripts/install_test.sh

dashboard-test: setup ## every query of dashboard and alert rules, in a real Prometheus
	@$(PYTHON_OF_VENV) -m monitoring.check $(ARGS)

image: ## the CPU image, with docker, podman or buildah: ENGINE, IMAGE, PYTHON_IMAGE, IMAGE_ARGS
	@scripts/image.sh build

image-test: ## starts it: health, an answer, its user, a read-only root, SIGTERM
	@scripts/image.sh test

docs: setup ## the documentation as a site in .build/site; a broken link is an error
	@$(PYTHON_OF_VENV) scripts/docs_site.py

soak: setup ## HOURS (1) of mixed traffic, a killed server, and what must be true afterwards
	@$(PYTHON_OF_VENV) -m scripts.soak --hours $(HOURS) $(ARGS)
port: setup ## what another release of vLLM asks of us: VLLM=X.Y.Z
	@$(PYTHON_OF_VENV) -m scripts.port $(or $(VLLM),$(error VLLM must name a release: make port VLLM=X.Y.Z)) $(ARGS)

format: setup ## let ruff and clang-format rewrite what make check complains about
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .
	@find csrc tests/cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs -r .venv/bin/clang-format -i

bench-quick: setup ## one table: plain decoding, vLLM's eagle3, and our policies
	@$(PYTHON_OF_VENV) -m benchmarks.quick $(ARGS)

clean: ## remove .venv, the builds and the demo model
	rm -rf .venv .build build dist *.egg-info echo_vllm/*.so models/smollm2-135m-instruct
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
