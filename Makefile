# A clone, `make demo`, and a Qwen model has been fine-tuned and answers.

PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/installed
PROMPT ?= What is 37 + 4?

.PHONY: help demo test test-slow lint clean

help:  ## Show this list
	@awk -F ':.*  ## ' '/^[a-z.-]+:.*  ## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

$(SETUP): setup.cfg pyproject.toml constraints.txt
	@echo "Installing into .venv: some minutes the first time"
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.venv: $(SETUP)  ## Virtual environment with everything, at the tested versions

# Starts anew each time: what an earlier demo left is removed.
demo: $(SETUP)  ## Train the built-in small Qwen3 on 2 ranks, export it, answer PROMPT
	rm -rf outputs/demo
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=2 scripts/train.py --cache_dir cache --output_dir outputs/demo
	$(BIN)/python scripts/generate.py outputs/demo/export "$(PROMPT)"

# Two at a time: starting Python and its libraries keeps one core busy.
test: $(SETUP)  ## Every test that is not slow
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(SETUP)  ## The tests that take longest
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal

lint: $(SETUP)  ## Style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_CACHE_DIR=.venv/pyright PYRIGHT_PYTHON_IGNORE_WARNINGS=1 \
		$(BIN)/pyright --pythonpath $(BIN)/python

clean:  ## Remove the virtual environment and tool caches; cache/ and outputs/ stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
