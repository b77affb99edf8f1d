"""What every test gets: no network, fixed seeds, one thread per process, small configs."""

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

from recurrent_gemma_hf import RecurrentGemmaConfig

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


@pytest.fixture(scope="session")
def tiny_config():
    """A factory of configs: one Griffin pattern, a window shorter than the texts; any field can be overridden."""

    def make(**overrides) -> RecurrentGemmaConfig:
        fields = {
            "vocab_size": 265,
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "lru_width": 40,
            "attention_window_size": 8,
        }
        return RecurrentGemmaConfig(**{**fields, **overrides})

    return make
