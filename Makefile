# Everything a fresh machine needs is Python 3.12 and make. `make demo` and `make test` set up .venv themselves.

PYTHON ?= $(firstword $(foreach p,python3.12 python3 python,\
	$(shell $(p) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo $(p))))
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_DIR ?= runs/demo

.PHONY: demo test test-slow lint format clean help

help:
	@echo "make demo   train a tiny MSA model on real text (no GPU, no download of data), draw its curves"
	@echo "make test   run the tests"
	@echo "make lint   ruff and mypy"

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py --output $(DEMO_DIR)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow and not gpu and not multi_gpu" -n $(or $(TEST_WORKERS),2) --dist loadfile

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu and not multi_gpu"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.12 is needed and was not found; pass PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# uv is much faster than pip; pip is the fallback where uv cannot be installed or reach the index.
define install
	@echo "installing $(1) into $(VENV) (PyTorch is large; a few minutes on a slow connection)"
	@{ $(BIN)/pip install --quiet --disable-pip-version-check uv \
		&& $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '$(1)'; } \
		|| $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '$(1)'
	@touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,.)

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,.[dev])
	@touch $(VENV)/.installed

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
