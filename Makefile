# Two commands on a fresh machine with Python 3.11: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and pinned: a plain `torch` may bring several GB of CUDA.
TORCH ?= torch==2.13.0
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo bench test test-all families pictures gpu-check clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

# Two ranks, a slow link, four variants: about 10 minutes; QUICK=1: two layers, forward only, under 3 minutes.
demo: setup
	$(BIN)/farskip demo $(if $(QUICK),--quick) --json build/demo.json

bench: setup
	$(BIN)/farskip bench $(ARGS)

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" $(ARGS)

# With the cases marked slow: a few minutes more.
test-all: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

# One NVIDIA GPU and torch >= 2.11: numerics, order and overlap over an emulated link; says so where there is none.
gpu-check: setup
	$(BIN)/python -m farskip_fx.bench.gpu $(ARGS)

# docs/families.md: which model families are exact, which are refused and why; a few minutes on one core.
families: setup
	$(BIN)/python tests/families_table.py

# The pictures of docs/report.md; needs Chromium.
pictures: setup
	$(BIN)/python tests/report_pictures.py

clean:
	rm -rf build $(VENV) *.egg-info
