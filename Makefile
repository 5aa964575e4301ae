# `make demo` and `make test` set up everything they need in .venv, which is made again only when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers of one thread each: on two cores faster than one worker of two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test fast lint docs docs-check wheel proof pythons bench study world clean

demo: $(VENV)/.ready
	$(BIN)/perdure demo

test: $(VENV)/.ready-dev
	$(PYTEST)

fast: $(VENV)/.ready-dev
	$(PYTEST) -m "not slow"

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages as a site, in build/site.
docs: $(VENV)/.ready
	$(BIN)/python -m pip install -q -e '.[docs]'
	$(BIN)/mkdocs build --strict

# Every example of README.md and docs/ is executed, two pages at a time.
# The examples of README.md and docs/, or of PAGES alone.
docs-check: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python docs/check.py $(PAGES)

# The package as people get it: built, installed into an environment of its own outside this tree, one short run from there.
wheel: $(VENV)/.ready
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel -q --no-deps -w build/wheel .
	.ci/wheel build/wheel/perdure-*.whl

# The way that real data and real checkpoints take, end to end, on a miniature of MTIL.
proof: $(VENV)/.ready-dev
	$(BIN)/python proofs/real_form.py

# The lowest and the highest Python that are supported, where they are installed: the quick tests in an environment of each.
pythons:
	for python in python3.10 python3.13; do \
		if $$python --version >/dev/null 2>&1; then \
			$(MAKE) fast PYTHON=$$python VENV=.venv-$$python || exit 1; \
		else echo "$$python is not installed: left out."; fi; \
	done

bench: $(VENV)/.ready-dev
	$(BIN)/python bench/train_loop.py
	$(BIN)/python bench/gift_step.py
	$(BIN)/python bench/condu_fusion.py
	$(BIN)/python bench/head_features.py
	$(BIN)/python bench/rows.py
	$(BIN)/python bench/loader.py
	$(BIN)/python bench/learner.py
	$(BIN)/python bench/serve.py

study: $(VENV)/.ready-dev
	$(BIN)/python studies/gift.py
	$(BIN)/python studies/condu.py
	$(BIN)/python studies/mg_clip.py
	$(BIN)/python studies/ridge.py

world: $(VENV)/.ready-dev
	$(BIN)/python -m pip install -q -r recipes/mini/requirements.txt
	$(BIN)/python recipes/mini

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "perdure needs Python 3.10 or newer; try: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch torchvision
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-python3.* build dist
