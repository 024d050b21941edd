# `make run` and `make test` do all the set-up; PYTHON chooses the interpreter, ARGS is handed to the command.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu,dev || echo cpu,dev)$(shell command -v npm >/dev/null 2>&1 || echo ,npm)
ARGS ?=

.PHONY: run test lint bench scaling chaos docs screenshots browser clean

# A GPU machine gets faiss-gpu, any other faiss-cpu; one without npm gets PyPI's (EXTRAS overrides).
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

run: $(VENV)/.installed
	$(BIN)/upcycle-bench run --strategy cluster-aware $(ARGS)

# As many processes as cores, at most 4 (each takes up to 3 GB); a file stays in one of them, with what it shares.
test: $(VENV)/.installed browser
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

# Chromium for the tests of the HTML report, where it is missing: by apt-get as root, or with sudo that asks for nothing.
browser:
	@sh tests/browser.sh

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A quarter of an hour on two quiet cores; writes tests/bench/latest.json and the table in docs/performance.md.
bench: $(VENV)/.installed
	$(BIN)/python -m tests.bench --markdown docs/performance.md $(ARGS)

# Under four minutes on a quiet machine; writes tests/bench/scaling.json, docs/figures/ and a part of docs/performance.md.
scaling: $(VENV)/.installed
	$(BIN)/python -m tests.bench.scaling $(ARGS)

# About an hour on two cores: disturbs runs on purpose, writes the table of outcomes; as root, also on a full disk.
chaos: $(VENV)/.installed
	$(BIN)/python -m tests.chaos --markdown docs/notes/chaos.md $(ARGS)

# Writes the generated parts of README.md and docs/ anew (tests/test_docs.py fails while they are stale).
docs: $(VENV)/.installed
	$(BIN)/python tests/generate_docs.py

# Pictures of the HTML report from results/lab, into docs/figures/.
screenshots: $(VENV)/.installed browser
	$(BIN)/python -m tests.screenshots

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
