"""Transformers' common tests of causal language models, for the subject that OUTSIDE_SUBJECT names."""

import unittest
from typing import Any

from subjects import classes, tiny_config

# Those of Transformers' checkout, which is in front of this project on the path.
from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester

CLASSES = dict(zip(("base", "causal_lm", "sequence", "token"), classes(), strict=False))


class SubjectTester(CausalLMModelTester):
    """Inputs for the tests; the config is ours, because Transformers' tester fills in fields that only some have."""

    base_model_class = CLASSES["base"]
    causal_lm_class = CLASSES["causal_lm"]
    sequence_classification_class = CLASSES.get("sequence")
    token_classification_class = CLASSES.get("token")
    config_class = CLASSES["base"].config_class

    def __init__(self, parent: unittest.TestCase, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        config = tiny_config()
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            setattr(self, name, getattr(config, name))

    def get_config(self) -> Any:
        """Return the subject's config."""
        return tiny_config()


class SubjectTest(CausalLMModelTest, unittest.TestCase):
    """Everything that Transformers tests on a model like Llama, except pipelines, which download models."""

    model_tester_class = SubjectTester
    pipeline_model_mapping = {}
