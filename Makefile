# make quickstart   from a fresh clone to edited pictures and a short training run
# make test         the test suite, under 10 minutes on 2 cores
# make test-slow    what takes minutes, or needs SD 1.5's full size
# make soak         the kill tests, many more times; what they saw is written to docs/soak.md

PYTHON ?= python3
BIN := .venv/bin
KILLS ?= 50
TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test test-slow soak lint clean

quickstart: .venv/.core
	$(BIN)/python examples/quickstart.py --output quickstart

test: .venv/.test
	$(BIN)/pytest -m "not slow" $(TWO)

test-slow: .venv/.test
	$(BIN)/pytest -m "slow and not heavy" $(TWO)
	$(BIN)/pytest -m heavy --durations 20

soak: .venv/.test
	rm -f docs/soak.md
	IP2P_KILLS=$(KILLS) IP2P_SOAK=docs/soak.md $(BIN)/pytest -k killed

lint: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/shellcheck .ci/run launch/*.sh tests/launch/gcloud

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/.core: pyproject.toml constraints.txt | .venv/bin/pip
	$(INSTALL) --editable ".[photos]"
	touch $@

.venv/.test: pyproject.toml constraints.txt | .venv/bin/pip
	$(INSTALL) --editable ".[photos,test]"
	$(INSTALL) --target .venv/libtpu --upgrade --no-deps libtpu  # in its own place: see tests/tpu
	touch $@ .venv/.core

clean:
	rm -rf .venv .cache quickstart
