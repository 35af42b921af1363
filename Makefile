# make demo    a real model, steered by real reward models; ARGS="--quick" and the like are passed on
# make test    the tests; ARGS="tests/demo -x" and the like are passed on
# make lint    style and types
# Each makes the virtual environment first if it is missing or pyproject.toml, setup.py or constraints.txt changed.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
RUN := $(VENV)/bin/python -m

.PHONY: demo test lint
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(RUN) genarm_fast.demo $(ARGS)

# One thread a process: two busy OpenMP teams on two cores stall each other.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(RUN) pytest $(ARGS)

lint: $(VENV)/.installed-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy genarm_fast kernels/ops

$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt $(wildcard kernels/csrc/*)
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(RUN) pip install -c constraints.txt -e '.[$*]'
	touch $@
