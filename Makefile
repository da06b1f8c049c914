# make demo | make test | make docs | make soak | make bench | make lint: each sets up .venv by itself and reuses it.
# make capture has a folder of its own, .capture (2 GB). ARGS has its options: make capture ARGS='--only cut'
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test docs soak bench capture lint clean

demo: $(VENV)/.demo
	$(BIN)/python -m fastnce demo

test: lint
	$(BIN)/python -m pytest tests -n auto --maxprocesses 8 --dist worksteal

# The site is in site/: open site/index.html, without a server. mkdocs-material says at each call which program follows it.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.test | $(VENV)/typed/fastnce/kernels
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# mypy knows kernels/ as fastnce.kernels by this link. What it cached without the link would be wrong.
$(VENV)/typed/fastnce/kernels:
	@rm -rf .mypy_cache && mkdir -p $(@D) && ln -sfn $(CURDIR)/kernels $@

soak: $(VENV)/.test
	$(BIN)/python -m tests.soak --write docs/reliability.md

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/run.py --out benchmarks/results/local

capture:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "make capture needs Python 3.11 or newer as $(PYTHON) (or: make capture PYTHON=/path/to/python3.12)" >&2; exit 2; }
	@$(PYTHON) -m tools.standin $(ARGS)

clean:
	rm -rf $(VENV) .capture build dist site *.egg-info

$(VENV)/.demo: EXTRAS := demo
$(VENV)/.test: EXTRAS := demo,test
$(VENV)/.bench: EXTRAS := demo,bench
$(VENV)/.docs: EXTRAS := docs
$(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing fastnce[$(EXTRAS)] into $(VENV) (some minutes the first time)"
	$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

# Debian's Python has no ensurepip without the package python3-venv: install it as root, otherwise name it.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "fastnce needs Python 3.11 or newer as $(PYTHON) (or: make PYTHON=/path/to/python3.12 ...)" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "installing python3-venv"; \
			apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv >/dev/null \
			&& $(PYTHON) -m venv $(VENV); \
		else \
			echo "cannot make a virtual environment: run 'sudo apt install python3-venv', then make again" >&2; exit 2; \
		fi; }
