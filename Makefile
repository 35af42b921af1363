# make demo        steers a real model by real reward models; ARGS="--quick" and other options are passed on
# make check       checks style and types and runs the fast tests, for the loop of edit and run
# make test        runs the tests; ARGS="tests/demo -x" and other options are passed on
# make test-vllm   tests the vLLM integration in an environment of its own (.venv-vllm, 3 GB)
# make lint        checks style and types
# make sanitize    runs ops on random input, under ASan and UBSan and in Triton's interpreter, for FUZZ=300 seconds each
# make soak        runs threads, streams, faults and forks under load and writes soak.json; ARGS="--seconds 3600": an hour
# make wheel-test  builds sdist and wheel, and tries them in a fresh environment without the clone
# make bench-gpu   measures guided decoding on a GPU; ARGS=--dry tries the script out without a GPU
# make bench       runs the short benchmarks: table, plot and benchmarks/results/<date>-<machine>.json
# make peers       compares with llama.cpp, Hugging Face and vLLM (if .venv-vllm exists) on the CPU; makes .venv-llama
# make evidence    compares guidance with other methods; ARGS=--quick: a reduced size that takes three minutes
# Each target first makes its virtual environment, if it is missing or older than pyproject.toml, setup.py or its versions.

PYTHON ?= python3
VENV ?= .venv
VLLM ?= .venv-vllm
LLAMA ?= .venv-llama
ARGS ?=
RUN := $(VENV)/bin/python -m

# Waiting threads sleep instead of spinning: on a shared machine, spinning makes two threads slower than one.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo check test test-vllm lint bench bench-gpu peers wheel-test sanitize soak evidence
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	@$(RUN) genarm_fast.demo $(ARGS)

# The tests of `make check` take 30 s on two cores of a shared AMD EPYC, and 71 s of CPU time with the linters. They do not
# include the tests of ops and most tests of the engine: add the tests of the code that you change by ARGS.
FAST := tests/test_api.py tests/test_docs.py tests/test_layers.py tests/test_params.py tests/text tests/utils tests/jobs \
	tests/cli/test_main.py tests/cli/test_command_line_docs.py tests/engine/test_turns.py \
	tests/models/test_members.py tests/models/test_fused_decoder.py tests/models/test_fast_modules.py \
	tests/speculation/test_tuner.py tests/speculation/test_policy.py tests/speculation/test_estimates.py \
	tests/speculation/test_ngram.py

check: lint
	OMP_NUM_THREADS=1 $(RUN) pytest -x -n logical --maxprocesses 4 $(FAST) $(ARGS)

# The tests run in one process per core, at most 4, with one thread each.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(RUN) pytest -n logical --maxprocesses 4 $(ARGS)

# The folder `site` lets vLLM's V2 runner start without a GPU.
test-vllm: $(VLLM)/.installed
	PYTHONPATH=tests/vllm_plugin/site OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -n 2 --dist loadfile \
		--durations 20 tests/vllm_plugin $(ARGS)

lint: $(VENV)/.installed-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy genarm_fast kernels/ops

wheel-test: $(VENV)/.installed-dev
	$(VENV)/bin/python scripts/wheel_test.py

FUZZ ?= 300
sanitize: $(VENV)/.installed-dev
	$(VENV)/bin/python scripts/fuzz_ops.py --seconds $(FUZZ) --json sanitize.json $(ARGS)
	$(VENV)/bin/python scripts/fuzz_ops.py --seconds $(FUZZ) --triton --json sanitize-triton.json $(ARGS)

soak: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/soak_faults.py --json soak.json $(ARGS)

bench: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/short.py $(ARGS)

peers: $(VENV)/.installed-dev $(LLAMA)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/peers.py measure $(ARGS)

evidence: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/quality.py general weak front --json benchmarks/results $(ARGS)

# A machine with a GPU often has no network, but a Python whose torch is built for CUDA: that one runs the clone as it is.
bench-gpu:
	@$(PYTHON) scripts/has_cuda_torch.py || $(MAKE) --no-print-directory $(VENV)/.installed-dev
	@$$($(PYTHON) scripts/has_cuda_torch.py && echo $(PYTHON) || echo $(VENV)/bin/python) benchmarks/gpu.py $(ARGS)

$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt $(wildcard kernels/csrc/*.cpp kernels/csrc/*/*)
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(RUN) pip install -c constraints.txt -e '.[$*]'
	touch $@

# pip neither isolates the build nor resolves dependencies: constraints-vllm.txt has all versions and the reasons.
$(VLLM)/.installed: pyproject.toml setup.py constraints-vllm.txt $(wildcard kernels/csrc/*.cpp kernels/csrc/*/*)
	test -x $(VLLM)/bin/pip || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/pip install --no-deps --no-build-isolation -e .
	touch $@

$(LLAMA)/.installed: constraints-llama.txt
	test -x $(LLAMA)/bin/pip || $(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/pip install --no-deps -r constraints-llama.txt
	touch $@
