# Tasks. `make demo` and `make test` set up everything they need in .venv; nothing else is touched.
VENV  ?= .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.kvtune-env
NATIVE := $(wildcard src/kvtune/kernels/csrc/* src/kvtune/cache/csrc/*) CMakeLists.txt
DEMO_OUT := kvtune-demo

.PHONY: env demo test check proof bench docs clean help

help:
	@echo "make demo   tune the demo model end to end, write $(DEMO_OUT)/report.html"
	@echo "make test   the test suite"
	@echo "make check  format, lint, types, import contracts, docs in step"
	@echo "make proof  slow proofs (KVTUNE_TRACES=DIR, KVTUNE_VLLM_PYTHON=PATH add theirs;"
	@echo "            apt-get install g++-aarch64-linux-gnu qemu-user adds those of 64-bit ARM)"
	@echo "make bench  benchmarks, ours and the peers side by side"

env: $(STAMP)

$(STAMP): pyproject.toml requirements/constraints.txt tools/make_env.sh $(NATIVE)
	tools/make_env.sh $(VENV)
	@touch $@

demo: env
	$(PY) -m kvtune tune --demo --budget 5m

test: env
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not proof" $(ARGS)

check: env
	$(VENV)/bin/ruff format --check src tests tools benchmarks
	$(VENV)/bin/ruff check src tests tools benchmarks
	$(VENV)/bin/pyright --pythonpath $(PY)
	PYTHONPATH=src $(VENV)/bin/lint-imports
	$(PY) tools/make_docs.py --check

docs: env
	$(PY) tools/make_docs.py

proof: env
	OMP_NUM_THREADS=1 $(PY) -m pytest -m proof $(ARGS)

bench: env
	$(PY) benchmarks/run_all.py

clean:
	rm -rf $(VENV) build dist $(DEMO_OUT) .pytest_cache .ruff_cache .hypothesis
