# Everything from a fresh clone, with Python 3.11, a C++ compiler and make: `make test`, `make demo`.
# Set-up and build come along and are remembered: a second run starts at once.

PYTHON ?= python3
# Passed on to pip where torch itself is installed, e.g. to choose an index with CPU-only builds.
PIP_TORCH_ARGS ?=

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check

PEERS := .venv-peers

NATIVE   := $(sort $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu'))
BENCH_NATIVE := $(sort $(shell find benchmarks -name '*.cpp' -o -name '*.cu'))

# The instrumented build and how Python runs on it. Python is not instrumented itself: the runtime of
# AddressSanitizer has to be loaded first, and with it libstdc++, which it looks into when it starts.
# Python frees little before it exits, so leaks are not looked for. One thread, as the slowed-down code
# would mostly wait for the other; the tests of threads set a number of their own. Needs GCC.
SANITIZE  := build/sanitize/lib
SANITIZED  = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	PYTHONPATH=$(SANITIZE) PYTHONSAFEPATH=1 $(BIN)/python

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build test test-onnx test-frameworks test-cuda-on-host demo docs figures lint format sanitize bench bench-peers gpu-check clean

help:  ## this list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo "Variables: PYTHON, PIP_TORCH_ARGS, and those of setup.py (CXX, MAX_JOBS, ...)."

build: $(VENV)/built  ## set up .venv and compile in place

test: build  ## all tests; only some: make test ARGS="-k packed"
	$(BIN)/python -m pytest $(ARGS)

# ONNX and its runtime are large, and nothing else needs them.
test-onnx: build  ## tests of the export to ONNX, which `make test` skips
	$(PIP) install --quiet -r requirements-onnx.txt
	$(BIN)/python -m pytest tests/test_onnx.py $(ARGS)

# The same goes for these; requirements.txt says that torch stays the one that it is.
test-frameworks: build  ## tests with Lightning, TorchRL and safetensors, which `make test` skips
	$(PIP) install --quiet -r requirements-frameworks.txt -c requirements.txt
	$(BIN)/python -m pytest tests/test_lightning_model.py tests/test_torchrl_policy.py \
		tests/test_safetensors.py $(ARGS)

# The CUDA kernels as C++ with a thread of the GPU a fiber (tests/cuda_on_host), in a build of their own;
# every tensor of a test then goes to them. Once on the path that the plan chooses, then on each of them.
# A barrier or a copy that is missing shows in a random order of the fibers. Left out: tests of what
# PyTorch's CPU products or the CPU's own kernels do. Where nvcc is found, every kernel is compiled.
ON_HOST    := build/cuda-on-host/lib
ON_HOST_RUN = OMP_NUM_THREADS=1 PYTHONPATH=$(ON_HOST) PYTHONSAFEPATH=1 $(BIN)/python -m pytest -q
test-cuda-on-host: build  ## tests of the CUDA kernels without a GPU
	TORCH_BPTT_CUDA_ON_HOST=1 $(BIN)/python setup.py --quiet build --build-lib $(ON_HOST)
	$(ON_HOST_RUN) tests/test_kernels.py tests/test_options.py tests/test_rnn_module.py tests/test_cuda_tf32.py \
	  -k "not avx and not neither_run_nor_threads" $(ARGS)
	for path in step block cluster gemm; do \
	  TORCH_BPTT_CUDA_PATH=$$path TORCH_BPTT_SCHEDULE_SEED=1 $(ON_HOST_RUN) tests/test_kernels.py \
	    -k "baseline and every_size and not T40 and not T70" $(ARGS) || exit 1; \
	done
	TORCH_BPTT_CUDA_PATH=grid TORCH_BPTT_SCHEDULE_SEED=1 $(ON_HOST_RUN) tests/test_kernels.py \
	  -k "baseline and every_size and not T40 and not T70 and not H257" $(ARGS)
	TORCH_BPTT_CUDA_PATH=gemm $(ON_HOST_RUN) tests/test_cuda_gemm.py tests/test_kernels.py tests/test_options.py \
	  -k "not avx and not neither_run_nor_threads" $(ARGS)
	TORCH_BPTT_TEST_ALL_CUDA_SOURCES=1 $(BIN)/python -m pytest -q tests/test_cuda_build.py $(ARGS)

demo: build  ## train a character-level language model with nn.RNN and with torch_bptt.RNN
	$(BIN)/python examples/char_lm.py $(ARGS)

# Sphinx goes into .venv beside the rest. Warnings are errors, and every name of ours has to be found.
docs: build $(VENV)/docs  ## the pages in build/docs, their code and examples run before
	$(BIN)/python -m pytest tests/test_docs.py
	rm -rf build/docs
	$(BIN)/python -m sphinx -q -E -n -W --keep-going -b html docs build/docs
	@echo 'open build/docs/index.html'

figures: build  ## draw the figures of the documentation again
	$(BIN)/python docs/figures/curves.py
	$(BIN)/python docs/figures/diagrams.py
	$(BIN)/python docs/figures/diagnose.py

bench: build  ## measure against nn.RNN, write benchmarks/results, print the tables
	$(BIN)/python benchmarks/run.py --threads 1 $(ARGS)
	$(BIN)/python benchmarks/run.py --threads all $(ARGS)
	$(BIN)/python benchmarks/report.py

# In an environment of its own, which `make` sets up as it does .venv.
bench-peers:  ## the same against JAX, oneDNN and ONNX Runtime, too
	$(MAKE) VENV=$(PEERS) build
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet -r requirements-peers.txt
	$(MAKE) VENV=$(PEERS) bench

# With a Python that has torch for CUDA, pytest and hypothesis already: nothing is installed, so that
# it also works on a machine without a network. Only some parts: make gpu-check ARGS="--parts cudnn".
gpu-check:  ## on a machine with a GPU: build there, test, measure
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

lint: $(VENV)/installed  ## style of Python and C++; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE) $(BENCH_NATIVE)

format: $(VENV)/installed  ## rewrite Python and C++ in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE) $(BENCH_NATIVE)

# A build in a directory of its own: the normal one stays as it is. Before any test it is shown that
# the library is instrumented and that it is the one Python loads.
sanitize: build  ## kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	TORCH_BPTT_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build --build-lib $(SANITIZE)
	nm -D $(SANITIZE)/torch_bptt/_C.*.so | grep -m 1 __asan_init
	nm -D $(SANITIZE)/torch_bptt/_C.*.so | grep -m 1 __ubsan_handle
	$(SANITIZED) -c 'import torch_bptt._C as c; print(c.__file__); assert "$(SANITIZE)" in c.__file__'
	$(SANITIZED) -m pytest --capture=sys tests/test_kernels.py $(ARGS)

clean:  ## remove all that was built, both environments too
	rm -rf $(VENV) $(PEERS) build dist *.egg-info torch_bptt/_C*.so .pytest_cache .ruff_cache .hypothesis

$(VENV)/built: $(VENV)/installed setup.py $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# torch first and alone: nothing else then has a say in which build of it is taken. The last line
# makes the working tree importable from everywhere, without a second build.
$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("needs Python 3.11: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(PIP_TORCH_ARGS) $$(grep '^torch==' requirements.txt)
	$(PIP) install -r requirements.txt
	@echo '$(CURDIR)' > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_bptt.pth
	@touch $@

$(VENV)/docs: $(VENV)/installed docs/requirements.txt
	$(PIP) install --quiet -r docs/requirements.txt
	@touch $@
