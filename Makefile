# Each command does its own set-up; a second call finds it done.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# One torch thread a test process: several processes that each take all cores are slower than one.
TEST_PROCESSES ?= 2
TEST_THREADS   ?= 1

.PHONY: demo test lint format clean

demo: $(STAMP)
	$(BIN)/python -m longfit demo

test: lint
	OMP_NUM_THREADS=$(TEST_THREADS) TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone, by its pin, so that pip settles on one build of it before anything depends on it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "longfit needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find longfit tests recipes -name __pycache__ -type d -prune -exec rm -rf {} +
