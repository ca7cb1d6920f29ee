# Two commands matter: `make demo` (install, train and evaluate the tiny preset, about one coffee) and `make test`.
# What a machine needs: python3.11 or newer with venv, make, and a package index that pip can reach. No GPU, no account.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV ?= .venv
PY = $(VENV)/bin/python
STAMP = $(VENV)/.installed
# Notebooks that `make test` runs. nbval compares the cells that say the same everywhere (vflan/tools/stable.py)
# with what is stored; the others only have to run. `make notebooks-test` does so with all eight.
NBVAL ?= $(wildcard notebooks/01_*.ipynb)
PYTEST = $(PY) -m pytest --nbval-lax --nbval-sanitize-with tests/nbval_sanitize.cfg

# The tiny models are too small to share a step between cores: one thread is as fast, and many times faster on a busy machine.
demo paper test notebooks-test lab: export OMP_NUM_THREADS ?= 1

# The seeds and sizes that docs/claims.md declares. Every seed of notebook 06 draws other tasks, so it takes more of them.
PAPER = $(PY) -m vflan notebooks tiny_frozen -p live all
SIX = -p seeds '[40, 41, 42, 43, 44, 45]'
TEN = -p seeds '[40, 41, 42, 43, 44, 45, 46, 47, 48, 49]'

.PHONY: help setup demo paper publish test notebooks-test lab bench lock format clean
help:
	@echo "make demo    install, then run the eight notebooks on the tiny preset and print the scores"
	@echo "make paper   install, then every claim of the paper on the frozen mini world, six seeds or more (hours)"
	@echo "make publish for the authors: copy a finished run to what git tracks (PRESET=tiny or tiny_frozen)"
	@echo "make test    install, then lint, format check and all tests"
	@echo "make notebooks-test   after make demo: all notebooks, against their stored outputs"
	@echo "make lab     install, then open JupyterLab in notebooks/"
	@echo "make bench   measure demo and tests in a fresh clone (bench/results/demo.json)"
	@echo "make lock    resolve the three lock files again from pyproject.toml (UPGRADE=1: the newest of everything)"
	@echo "make format  let ruff lay out code and notebooks"
	@echo "make clean   remove the environment, runs and generated data"

setup: $(STAMP)

# Torch first, without looking at its hash where this machine has a build of its own: from TORCH_INDEX (an index of CPU
# builds, say), or from the folders in pip's find-links, which uv does not read by itself. Elsewhere it is PyPI's, with hashes.
# All else is installed with hashes. pip does the same where uv cannot install (a mirror that only pip knows, for example).
# Compiled here, as pip does: else the first notebook compiles torch and transformers, and where Python may not write
# bytecode, every process does.
TORCH_INDEX ?=
LOCKS = requirements.lock requirements.hashes.lock requirements.torch.lock
CHECKED = --no-deps --require-hashes -r
$(STAMP): $(LOCKS) pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@set -e; links=; \
	for folder in $$($(PY) -m pip config get global.find-links 2>/dev/null || echo $$PIP_FIND_LINKS); do \
	    if ls "$$folder"/torch-*.whl >/dev/null 2>&1; then links="$$links --find-links $$folder"; fi; \
	done; \
	pinned=$$(grep '^torch==' requirements.lock); \
	if [ -n "$(TORCH_INDEX)" ]; then torch="--no-deps --index-url $(TORCH_INDEX) $$pinned"; \
	elif [ -n "$$links" ]; then torch="--no-deps $$links $$pinned"; \
	else torch="$(CHECKED) requirements.torch.lock"; fi; \
	rest="$(CHECKED) requirements.hashes.lock"; uv="$(PY) -m uv pip install --quiet --compile-bytecode --python $(PY)"; \
	pip="$(PY) -m pip install -qq"; echo "installing the locked packages into $(VENV)"; \
	{ $$pip uv && $$uv $$torch && $$uv $$rest; } \
	    || { echo "uv could not install them; trying pip"; $$pip $$torch && $$pip $$rest; }
	$(PY) -m pip install -qq --no-deps --no-build-isolation -e .
	$(PY) -m pip check
	$(PY) -m compileall -q vflan
	@touch $@

demo: $(STAMP)
	$(PY) -m vflan notebooks tiny

paper: $(STAMP)
	$(PAPER) --notebooks 06 $(TEN) -p beyond True
	$(PAPER) --notebooks 07 $(SIX) -p instances '[100, 300, 1000, 3000]'
	$(PAPER) --notebooks 08 $(SIX) -p budget None

PRESET ?= tiny
publish: $(STAMP)
	$(PY) -m vflan publish $(PRESET)

test: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PYTEST) -n auto --dist loadfile --no-loadscope-reorder $(NBVAL) tests

# One after the other: every notebook trains and asks on all cores, and they share the demo's runs.
notebooks-test: $(STAMP)
	$(PYTEST) $(sort $(wildcard notebooks/[0-9][0-9]_*.ipynb))

lab: $(STAMP)
	$(PY) -m jupyterlab notebooks

bench: $(STAMP)
	$(PY) -m bench.demo

# One lock for CPU and GPU machines: torch itself asks for the CUDA libraries that fit it, so they are left out here.
CUDA = cuda-bindings cuda-pathfinder cuda-toolkit triton nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
	nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
	nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx
# Three files of one resolution, for every system and Python from 3.11 on; none names an index.
#   requirements.lock         exact versions: for pip, conda, Colab, and machines with a torch of their own
#   requirements.hashes.lock  the same versions with the hashes of their files; no torch, because a machine without a GPU
#                             takes a build of torch that is not on PyPI and has other hashes
#   requirements.torch.lock   torch as PyPI has it, with what it needs (on Linux CUDA too), with hashes
# `make lock` keeps every version that pyproject.toml still allows, `make lock UPGRADE=1` takes the newest of each.
COMPILE = $(PY) -m uv pip compile --universal --python-version 3.11 --no-header --no-annotate --quiet
lock: $(STAMP)
	$(COMPILE) --extra test pyproject.toml $(CUDA:%=--no-emit-package %) $(if $(UPGRADE),--upgrade) -o requirements.lock
	$(COMPILE) --extra test pyproject.toml $(CUDA:%=--no-emit-package %) --no-emit-package torch \
	    -c requirements.lock --generate-hashes --upgrade -o requirements.hashes.lock
	echo torch | $(COMPILE) - -c requirements.lock --generate-hashes $(if $(UPGRADE),--upgrade) -o requirements.torch.lock

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) runs data/frozen data/tiny/samples data/tiny/benchmarks data/tiny/benchmarks_more build vflan.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
