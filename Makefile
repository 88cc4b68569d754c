# make demo | make test | make test-lowest | make lint | make clean. Everything happens in .venv; nothing outside is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Threads that wait for each other by spinning bring a busy machine to a crawl: let them sleep.
export OMP_WAIT_POLICY := passive
# A process per core with a thread each is twice as fast as one process with all of them.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile

.PHONY: demo test test-lowest lint clean
demo: $(VENV)/.installed-demo
	$(BIN)/python evaluate.py

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)

# The tests on the lower bounds that pyproject.toml declares, in an environment of their own.
test-lowest:
	test -d .venv-lowest || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q -e '.[demo,serve,openvino,dev]' -c tests/lowest.txt
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest $(PARALLEL)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# A stamp per set of extras, renewed when pyproject.toml changes: a second run installs nothing.
$(VENV)/.installed-demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[demo,serve,openvino]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[demo,serve,openvino,dev]'
	@touch $@ $(VENV)/.installed-demo

# Some systems ship venv without ensurepip; then the system's pip puts one in.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "metilr needs Python 3.10 or newer; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV) || { \
		$(PYTHON) -m venv --without-pip --clear $(VENV) && \
		$(PYTHON) -m pip install -q pip --target \
			"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
	} || { rm -rf $(VENV); exit 1; }
	@echo "installing into $(VENV) (PyTorch and FAISS are several GB; this takes minutes)"

clean:
	rm -rf $(VENV) .venv-lowest .mypy_cache .ruff_cache .pytest_cache *.egg-info
