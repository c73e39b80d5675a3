# Each target makes .venv first, so each works after a clone, with Python and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: prune test faults bench coverage device frontier lint clean

prune: $(VENV)/built
	$(BIN)/taylor-cuda prune $(if $(wildcard runs/digits/checkpoints/*),--resume)

# Two files at a time, each on one thread: two threads of two tests would wait for each other.
test: $(VENV)/built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# A run of two ranks, killed at twenty moments: each goes on to the same end.
faults: $(VENV)/built
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

lint: $(VENV)/built
	$(BIN)/python -m pip install --quiet clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(NATIVE))

bench: $(VENV)/built
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,train,bench]"
	$(BIN)/taylor-cuda bench --check --plot
	OMP_NUM_THREADS=1 $(BIN)/python -m taylor_cuda.bench.frontier

coverage: $(VENV)/built
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,train,bench]"
	OMP_NUM_THREADS=1 $(BIN)/python -m taylor_cuda.bench.coverage

# On a machine with a GPU, whose own Python has a CUDA build of torch, Triton, ninja, pybind11 and pytest: nothing is downloaded, and
# what is missing of torchvision, torch-pruning and matplotlib is said and left out. Within nine minutes: the libraries, the tests of
# the kernels (three minutes at most; side by side where pytest-xdist is there, for Triton takes long to compile), then rows, the most
# telling ones first, for as long as there is time.
# BUILD=none takes the libraries that lie in taylor_cuda/ already, built elsewhere from the same sources.
BUILD ?= cuda
device:
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'make device needs a GPU that torch can use'"
	start=$$(date +%s); status=0; \
	PIP_BREAK_SYSTEM_PACKAGES=1 TAYLOR_CUDA_BUILD=$(BUILD) $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e . || exit 1; \
	workers=$$($(PYTHON) -c "import importlib.util as found; print('-n 8' if found.find_spec('xdist') else '')"); \
	timeout 180 $(PYTHON) -m pytest -o addopts= -p no:cacheprovider -q $$workers -m gpu tests/gpu || status=$$?; \
	$(PYTHON) -u -m taylor_cuda.bench --device cuda --plot --time-limit $$((525 - $$(date +%s) + start)) || status=$$?; \
	exit $$status

# The whole frontier, on a machine as for "make device". Every call takes up to nine minutes and goes on where the last one ended.
# Where there is no matplotlib, runs/frontier/glyphs-384.pt has to come from another machine; no torch-pruning, no rows of it.
frontier:
	PIP_BREAK_SYSTEM_PACKAGES=1 TAYLOR_CUDA_BUILD=$(BUILD) $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	$(PYTHON) -u -m taylor_cuda.bench.frontier --form full --device cuda --time-limit 480

clean:
	rm -rf $(VENV) build dist *.egg-info taylor_cuda/*.so

$(VENV)/packages: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision "setuptools>=77" wheel ninja pybind11
	touch $@

$(VENV)/built: $(VENV)/packages $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,train]"
	touch $@
