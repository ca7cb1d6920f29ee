# Two commands matter: `make demo` (install, train and evaluate the tiny preset, about one coffee) and `make test`.
# What a machine needs: python3.11 or newer with venv, make, and a package index that pip can reach. No GPU, no account.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV ?= .venv
PY = $(VENV)/bin/python
STAMP = $(VENV)/.installed
# Notebooks that `make test` runs. nbval compares the cells that say the same everywhere (vflan/stable.py)
# with what is stored; the others only have to run. `make notebooks-test` does so with all eight.
NBVAL ?= $(wildcard notebooks/01_*.ipynb)
CHECKED = $(PY) -m pytest --nbval-lax --nbval-sanitize-with tests/nbval_sanitize.cfg

# The tiny models are too small to share a step between cores: one thread is as fast, and many times faster on a busy machine.
demo paper test notebooks-test lab: export OMP_NUM_THREADS ?= 1

# Every seed of notebook 06 draws other tasks, so it takes more of them.
PAPER = $(PY) -m vflan.book tiny_frozen --write
FIVE = -p seeds '[20, 21, 22, 23, 24]'
TEN = -p seeds '[20, 21, 22, 23, 24, 25, 26, 27, 28, 29]'

.PHONY: help setup demo paper test notebooks-test lab bench lock format clean
help:
	@echo "make demo    install, then run the eight notebooks on the tiny preset and print the scores"
	@echo "make paper   install, then every claim of the paper on the frozen mini world, five seeds or more (hours)"
	@echo "make test    install, then lint, format check and all tests"
	@echo "make notebooks-test   after make demo: all notebooks, against their stored outputs"
	@echo "make lab     install, then open JupyterLab in notebooks/"
	@echo "make bench   measure demo and tests in a fresh clone (bench/results/demo.json)"
	@echo "make lock    resolve requirements.lock again from pyproject.toml"
	@echo "make format  let ruff lay out code and notebooks"
	@echo "make clean   remove the environment, runs and generated data"

setup: $(STAMP)

# uv is quick but does not read pip's settings, so the folders in pip's find-links are handed on; where uv cannot
# install, pip does (a mirror that only pip knows, for example). Compiled here, as pip does: else the first notebook
# compiles torch and transformers, and where Python may not write bytecode, every process does.
$(STAMP): requirements.lock pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@set -e; links=; \
	for folder in $$($(PY) -m pip config get global.find-links 2>/dev/null || echo $$PIP_FIND_LINKS); do \
	    if [ -d "$$folder" ]; then links="$$links --find-links $$folder"; fi; \
	done; \
	echo "installing requirements.lock into $(VENV)"; \
	{ $(PY) -m pip install -qq uv && $(PY) -m uv pip install --quiet --compile-bytecode --python $(PY) $$links -r requirements.lock; } \
	    || { echo "uv could not install it; trying pip"; $(PY) -m pip install -qq -r requirements.lock; }
	$(PY) -m pip install -qq --no-deps --no-build-isolation -e .
	$(PY) -m compileall -q vflan
	@touch $@

demo: $(STAMP)
	$(PY) -m vflan.book tiny

paper: $(STAMP)
	$(PAPER) --notebooks 06 $(TEN) -p beyond True
	$(PAPER) --notebooks 07 $(FIVE) -p budget None -p instances '[30, 100, 300, 1000, 3000]'
	$(PAPER) --notebooks 08 $(FIVE)

test: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CHECKED) -n auto --dist loadfile --no-loadscope-reorder $(NBVAL) tests

# One after the other: every notebook trains and asks on all cores, and they share the demo's runs.
notebooks-test: $(STAMP)
	$(CHECKED) $(sort $(wildcard notebooks/[0-9][0-9]_*.ipynb))

lab: $(STAMP)
	$(PY) -m jupyterlab notebooks

bench: $(STAMP)
	$(PY) -m bench.demo

# One lock for CPU and GPU machines: torch itself asks for the CUDA libraries that fit it, so they are left out here.
CUDA = cuda-bindings cuda-pathfinder cuda-toolkit triton nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
	nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
	nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx
lock: $(STAMP)
	$(PY) -m uv pip compile --universal --python-version 3.11 --extra test pyproject.toml --no-header --no-annotate \
	    $(CUDA:%=--no-emit-package %) --quiet -o requirements.lock

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) runs data/frozen data/tiny/samples data/tiny/benchmarks data/tiny/benchmarks_more vflan.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
