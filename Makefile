# make demo | make test | make lint | make milvus | make test-lowest | make release-check | make audit | make clean
# Everything happens in .venv and its likes beside it; nothing outside is touched. CONTRIBUTING.md says what each is for.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo,serve,openvino,onnx,heic
MILVUS := milvus-lite pymilvus
DEV := $(DEMO),parquet,tensorboard,milvus,dev

# CPU=1 takes the builds of PyTorch and FAISS without GPU, 2 GB in place of 8; the environment stays so.
CPU ?= $(wildcard $(VENV)/.cpu)
CPU_BUILDS ?= torch torchvision --index-url https://download.pytorch.org/whl/cpu
ifneq ($(CPU),)
ifeq ($(wildcard $(BIN)/python)$(wildcard $(VENV)/.cpu),$(BIN)/python)
$(error $(VENV) has the builds for GPUs; make clean removes it)
endif
endif

# uv, where it is there, installs the same several times faster; UV= takes pip.
UV ?= $(shell command -v uv)
INSTALL = $(if $(UV),$(UV) pip install --python $(BIN)/python,$(BIN)/python -m pip install)

# Threads that wait for each other by spinning bring a busy machine to a crawl: let them sleep.
export OMP_WAIT_POLICY := passive
# Or each of the tests' many processes would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
# Processes of a thread each, one more than cores: many tests wait for a process that they have started.
PARALLEL := -n $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo test lint coverage docs milvus test-lowest release-check lock audit clean
demo: $(VENV)/.installed-demo
	$(BIN)/python evaluate.py

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)

# Which lines and branches no test reaches, the files that lack most last; fails under the floor in pyproject.toml.
coverage: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) --cov

# The API reference from the docstrings; fails on a link that leads nowhere.
docs: $(VENV)/.installed-dev
	rm -rf build/docs
	$(BIN)/python docs/reference.py build/docs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# The tests on the lower bounds that pyproject.toml declares.
test-lowest: .venv-lowest/.installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/pytest $(PARALLEL)

# A small Milvus server for tests and small use, in an environment of its own: it brings faiss-cpu.
milvus: .venv-milvus/.installed
	.venv-milvus/bin/milvus-lite server --data-dir .milvus --host 127.0.0.1

# What a user of the wheel has.
release-check: .venv-tools/.installed
	.ci/release-check $(PYTHON)

# Renews what LOCK installs.
lock: | .venv-tools/bin/python
	.venv-tools/bin/python -m pip install -q --dry-run --ignore-installed --report .venv-tools/report.json -e '.[$(DEV)]'
	.ci/lock .venv-tools/report.json > .ci/lock.txt
	.venv-tools/bin/python -m pip install -q --dry-run --ignore-installed --report .venv-tools/report.json $(MILVUS)
	.ci/lock .venv-tools/report.json > .ci/lock-milvus.txt

# Known vulnerabilities; what cannot be asked about is a failure too.
audit: .venv-tools/.installed $(VENV)/.installed-dev
	.ci/audit

# A stamp per set of extras, renewed when pyproject.toml changes: a second run installs nothing.
$(VENV)/.installed-demo: pyproject.toml | $(BIN)/python
	$(call install,$(DEMO))
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(call install,$(DEV))
	@touch $@ $(VENV)/.installed-demo

# LOCK=.ci/lock.txt installs what stands there (Linux, x86_64, Python 3.11), file by file, by its digest; pip would
# compile it on one core. Some libraries hold files of Python 2, which nothing compiles and nothing imports: || true.
ifneq ($(LOCK),)
define install
$(BIN)/python -m pip install -q --no-compile --require-hashes -r $(LOCK)
$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
$(BIN)/python -m compileall -qq -j0 $(VENV)/lib || true
endef
else ifeq ($(CPU),)
install = $(INSTALL) -q -e '.[$(1)]'
else
define install
$(INSTALL) -q $(CPU_BUILDS)
$(BIN)/python .ci/requirements cpu $(1) > $(VENV)/.cpu-requirements
$(INSTALL) -q -r $(VENV)/.cpu-requirements
$(INSTALL) -q --no-deps -e .
endef
endif

.venv-lowest/.installed: pyproject.toml tests/lowest.txt | .venv-lowest/bin/python
	.venv-lowest/bin/python -m pip install -q -e '.[$(DEV)]' -c tests/lowest.txt
	@touch $@

.venv-milvus/.installed: | .venv-milvus/bin/python
	.venv-milvus/bin/python -m pip install -q $(if $(LOCK),--require-hashes -r .ci/lock-milvus.txt,$(MILVUS))
	@touch $@

.venv-tools/.installed: | .venv-tools/bin/python
	.venv-tools/bin/python -m pip install -q build pip-audit 'twine>=6.1'
	@touch $@

# Some systems ship venv without ensurepip; then the system's pip puts one in.
%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "metilr needs Python 3.11 or newer; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $* || { \
		$(PYTHON) -m venv --without-pip --clear $* && \
		$(PYTHON) -m pip install -q pip --target \
			"$$($@ -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
	} || { rm -rf $*; exit 1; }
	@$(if $(CPU),touch $*/.cpu)
	@$(if $(filter $(VENV) .venv-lowest,$*),echo "installing into $*; with PyTorch and FAISS $(if \
		$(CPU),2 GB,8 GB (make demo CPU=1 takes 2 GB, without GPUs)): minutes")

clean:
	rm -rf $(VENV) .venv-* build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info
