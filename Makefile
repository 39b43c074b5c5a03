# make demo    pre-train, adapt and prompt a model here and now     (the first command)
# make test    the whole test suite                                 (the second command)
# make lint    ruff and mypy          make clean   remove the virtual environment

PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/demo
JOBS   ?= 2
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# By a path, not an import hook: beside a clone named fmcore the hook would lose against that folder.
EDITABLE := --config-settings editable_mode=compat -e
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)

# With a GPU, PyTorch's default build. Without one, the CPU build if pip finds it, or from TORCH_INDEX, the address of
# PyTorch's index of CPU builds; else the default build, which is larger by gigabytes.
INSTALL_TORCH = if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then \
	    $(PIP) install -q -c constraints.txt torch; \
	else \
	    $(PIP) install -q -c constraints.txt "torch==$(TORCH)+cpu" 2>/dev/null || \
	    { [ -n "$(TORCH_INDEX)" ] && $(PIP) install -q -c constraints.txt --index-url "$(TORCH_INDEX)" torch; } || \
	    $(PIP) install -q -c constraints.txt torch; \
	fi

.PHONY: demo test lint clean

demo: $(BIN)/.base
	$(BIN)/python -m fmcore demo --run $(RUN) $(ARGS)

test: $(BIN)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

lint: $(BIN)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fmcore needs Python 3.11 or newer, got " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(BIN)/.base: Makefile pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing fmcore into $(VENV) (once, some minutes)"
	@$(INSTALL_TORCH)
	$(PIP) install -q -c constraints.txt $(EDITABLE) .
	@touch $@

$(BIN)/.test: $(BIN)/.base
	$(PIP) install -q -c constraints.txt $(EDITABLE) '.[test]'
	@touch $@

$(BIN)/.lint: $(BIN)/.base
	$(PIP) install -q -c constraints.txt $(EDITABLE) '.[lint]'
	@touch $@
