# `make demo` and `make test` do all set-up on a machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo docs test test-slow test-oldest fuzz gpu lint readme map clean

demo: $(VENV)/.demo
	$(BIN)/greenvis run recipes/quickstart.yaml --out runs/quickstart-report

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

READING := files fuzz images loading readers recipes records sinks  # what depends on versions of libraries

test-oldest: $(VENV)/.uv pyproject.toml  # what strangers' files may do, with the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv $(VENV)-oldest
	$(BIN)/uv pip install --quiet --python $(VENV)-oldest/bin/python --resolution lowest-direct "pytest>=8.2" "pytest-xdist>=3.6" "hypothesis>=6.100" -e .
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist loadfile $(READING:%=tests/hostile/test_%.py)

# seconds for all readers together: about half for shapes (Hypothesis), half for bytes (atheris)
FUZZ_S ?= 600
READERS := recipe record card coefficients results cache

fuzz: $(VENV)/.dev
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[fuzz]'
	GREENVIS_FUZZ=$$(($(FUZZ_S) * 3)) $(BIN)/python -m pytest tests/hostile/test_fuzz.py
	for reader in $(READERS); do PYTHONPATH=. $(BIN)/python tests/hostile/fuzz_atheris.py $$reader -max_total_time=$$(($(FUZZ_S) / 12)) || exit 1; done

gpu: $(VENV)/.demo
	$(BIN)/greenvis bench gpu --out reports/gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.dev  # into site/: open site/index.html, no server is needed
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

readme: $(VENV)/.dev
	$(BIN)/python tests/readme.py

map: $(VENV)/.dev
	$(BIN)/python tests/rooms.py

$(VENV)/.uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "greenvis needs Python 3.11 or newer; this is %s. Use: make PYTHON=python3.11 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	touch $@

$(VENV)/.demo: $(VENV)/.uv pyproject.toml constraints.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.uv pyproject.toml constraints.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'  # tests start many processes
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest runs site
