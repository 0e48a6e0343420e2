# Every target does all of its own set-up; the second time there is nothing left to do.
#
#   make serve CONFIG=config/demo-vision.yaml
#   make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu   # no GPU: gigabytes less to download

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test fidelity check bench

CONFIG ?= serve_config.yaml
ARGS ?=
TORCH_INDEX ?=

# The first Python that is new enough and not too new. PYTHON=... takes another.
PYTHON ?= $(shell for python in python3.12 python3.13 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$python && break; done)

BIN := .venv/bin
INSTALLED := .venv/.installed

help:
	@echo "make serve     serve Gemma 3 at http://127.0.0.1:8000/v1 (CONFIG=$(CONFIG))"
	@echo "make test      run the tests (ARGS=... goes to pytest)"
	@echo "make fidelity  compare 50 prompts with transformers token by token (most of an hour)"
	@echo "make check     formatting, lints and types"
	@echo "make bench     compare with other servers on the demo model (ARGS=... goes to the benchmark)"

serve: $(INSTALLED)
	@echo "==> Serving $(CONFIG). Ctrl-C stops it."
	@exec $(BIN)/python -m deployments.launch $(CONFIG) $(ARGS)

test: $(INSTALLED)
	@echo "==> Running the tests"
	@$(BIN)/python -m pytest $(ARGS)

fidelity: $(INSTALLED)
	@echo "==> Comparing greedy tokens with transformers"
	@$(BIN)/python -m pytest -m slow $(ARGS)

check: $(INSTALLED)
	@echo "==> Checking format, lints and types"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(INSTALLED)
	@echo "==> Comparing with transformers and the servers that are installed (benchmarks/README.md)"
	@$(BIN)/python -m benchmarks.compare $(ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed, and none was" \
	"found. Install one (Debian, Ubuntu: apt install python3 python3-venv), or name it:" \
	"make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "==> Setting up .venv with $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "error: $(PYTHON)" \
	"cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "==> Installing torch (the largest part)"
	@$(BIN)/python -m pip install --constraint constraints.txt torch \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@echo "==> Installing everything else"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,demo,dev]'
	@touch $@
