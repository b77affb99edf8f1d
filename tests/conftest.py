"""What every test gets: no network, fixed seeds, one thread per process."""

import os
import random

# Read by huggingface_hub and jax when they are imported, so they are set before anything else is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a warning on every fork otherwise
# Read by triton when it is imported: its kernels run in its interpreter, on a CPU, wherever a test asks for them.
os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from recurrent_gemma_hf import demo_checkpoint, set_backend
from tests.kernels import needs_triton, small_programs

collect_ignore = ["serving"]  # `make test-vllm`, in an environment of their own

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# The first example of a test pays for imports and compilation, so no deadline. In CI the same examples every time.
hypothesis.settings.register_profile("project", deadline=None, derandomize="CI" in os.environ, print_blob=True)
hypothesis.settings.load_profile("project")


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the global generator is what other libraries draw from)
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """Forget what torch.compile has compiled: it counts how often, and gives up."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=["portable", pytest.param("triton", marks=needs_triton)])
def backend(request, monkeypatch):
    """Computes by plain torch, and by the kernels in Triton's interpreter."""
    if request.param == "triton":
        small_programs(monkeypatch)
    set_backend(request.param)
    yield request.param
    set_backend("auto")


@pytest.fixture(scope="session")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(demo_checkpoint())
