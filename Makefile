# make demo | test | bench | lint | sanitize | cuda-check | gpu-check; each sets up what it needs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)

.PHONY: demo test bench lint sanitize cuda-check gpu-check clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# Two processes share the cores: threads that wait must not spin.
test: $(INSTALLED)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests -n 2 --dist loadfile

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks --plot bench.png

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# AddressSanitizer + UndefinedBehaviorSanitizer and ThreadSanitizer over the emulated CUDA kernels, and the former over
# the CPU kernels.
sanitize: $(INSTALLED)
	$(BIN)/python tests/sanitize.py

# Compiles the CUDA code for every supported GPU, or those of ARCHS=75,90, without having one.
cuda-check: $(VENV)/.cuda-check
	$(BIN)/python tests/cuda_check.py $(if $(ARCHS),--archs $(ARCHS))

# On a machine with a GPU; installs nothing and uses the interpreter that it is given.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) build dist *.egg-info fastnorm/*.so fastnorm/_build.json

$(VENV)/.torch:
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || test -n "$$CXX" || \
	  { echo "fastnorm: no C++ compiler was found. To mend it: apt-get install g++, or set CXX"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH) 'setuptools>=77' wheel ninja pybind11 numpy
	touch $@

$(INSTALLED): $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e '.[test,bench,demo]'
	touch $@

$(VENV)/.lint: $(VENV)/.torch
	$(BIN)/pip install -q --disable-pip-version-check ruff==0.17.5 clang-format==23.1.5
	touch $@

$(VENV)/.cuda-check: $(INSTALLED)
	$(BIN)/pip install -q --disable-pip-version-check nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	touch $@
