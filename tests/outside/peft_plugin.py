"""A pytest plugin that runs PEFT's tests of decoder models on one tiny model instead of those that PEFT downloads."""

import importlib.util
import os
from pathlib import Path

import pytest
from subjects import classes, tiny_config

MODEL = os.environ["OUTSIDE_MODEL"]  # the folder of the model


def pytest_configure() -> None:
    """Save the subject in a folder, which is the id of the model in the tests."""
    # For ours, this registers the classes with the Auto classes, in every worker.
    causal_lm = classes()[1]
    if Path(MODEL).exists():  # a worker of pytest-xdist
        return
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    causal_lm(tiny_config(num_hidden_layers=3)).save_pretrained(MODEL)
    # Not by an import of this package, which would put its model in the place of Transformers'.
    package = Path(importlib.util.find_spec("recurrent_gemma_hf").origin).parent
    AutoTokenizer.from_pretrained(package / "demo").save_pretrained(MODEL)


def pytest_pycollect_makeitem(collector: pytest.Collector) -> None:
    """Replace PEFT's list of models. The marks of its tests hold the list itself, so this happens in place."""
    collector.getparent(pytest.Module).obj.PEFT_DECODER_MODELS_TO_TEST[:] = [MODEL]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that take a model, since the others name one of the Hub."""
    items[:] = [item for item in items if getattr(item, "callspec", None) and MODEL in item.callspec.params.values()]
