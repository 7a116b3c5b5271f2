# Two verbs for a fresh machine: `make demo` answers questions, `make test` proves the tree. Besides: `make gpu`, on one GPU;
# `make two-hosts`, as root, a cluster over two network namespaces; `make manifests`, what Kubernetes would get.
# Each makes .venv if it is absent. PYTHON picks the interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo two-hosts test slow gpu gpu-carry lint manifests protos clean

demo: $(VENV)/installed
	$(BIN)/k2dist demo

# Two hosts on this machine, as far as their network goes: asks one question, then serves until Ctrl-C.
two-hosts: $(VENV)/installed
	$(BIN)/python deploy/two_hosts.py

test: $(VENV)/installed-test
	$(MAKE) lint
	$(BIN)/python -m pytest -m "not slow and not gpu" --durations=10

slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow --durations=10

# With one CUDA device, in under 9 minutes, no Ray: tests, benches, and one table of targets. Where PYTHON has torch, triton, numpy and pytest and nothing
# else can be fetched, `make gpu-carry` elsewhere first: it unpacks the few wheels that the engine wants into .gpu.
GPU_OUT ?= gpu-run
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu: export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(CURDIR)/.gpu
gpu:
	$(GPU_PYTHON) -m k2dist.rehearsal.gpu --out $(GPU_OUT)

GPU_WHEELS = msgspec tiktoken regex llguidance jinja2 markupsafe safetensors hypothesis sortedcontainers
gpu-carry: $(VENV)/bin/python
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --dest .gpu $(GPU_WHEELS)
	cd .gpu && for wheel in *.whl; do $(CURDIR)/$(BIN)/python -m zipfile -e $$wheel . && rm $$wheel; done

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What a KubeRay overlay becomes: rendered, checked, summed up. CRDS: a folder with KubeRay's definitions.
OVERLAY ?= h200-2x8
manifests: $(VENV)/installed-test
	$(BIN)/python deploy/kuberay/manifests.py $(OVERLAY) $(if $(CRDS),--crds $(CRDS))

protos: $(VENV)/installed-test
	$(BIN)/python protos/generate.py

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/installed
