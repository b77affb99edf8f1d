"""Registers our classes with Transformers' Auto classes without importing Transformers, torch or our own model files.

Each Auto mapping of Transformers holds names of classes, and by model type the module that a class is taken from when
somebody asks for it (`_modules`, the same in 5.17 to 5.24). That module becomes this package, which in turn imports
the file of a class when somebody asks for it. `AutoModel.register` would need the classes themselves: importing them
doubles what `from transformers import AutoModelForCausalLM` takes, and fails where Transformers imports its Auto
classes before the base classes that ours inherit from.
"""

import sys
from types import ModuleType

import wrapt

MODEL_TYPE = "recurrent_gemma"
_MODELS = {
    "MODEL": "RecurrentGemmaModel",
    "MODEL_FOR_CAUSAL_LM": "RecurrentGemmaForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION": "RecurrentGemmaForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION": "RecurrentGemmaForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING": "RecurrentGemmaForQuestionAnswering",
}


def _enter_config(configuration_auto: ModuleType) -> None:
    configuration_auto.CONFIG_MAPPING._modules[MODEL_TYPE] = sys.modules[__package__]


def _enter_models(modeling_auto: ModuleType) -> None:
    for mapping, class_name in _MODELS.items():
        getattr(modeling_auto, f"{mapping}_MAPPING_NAMES")[MODEL_TYPE] = class_name
        getattr(modeling_auto, f"{mapping}_MAPPING")._modules[MODEL_TYPE] = sys.modules[__package__]


def register() -> None:
    """Register now with what Transformers has imported, and with the rest as soon as it is imported."""
    wrapt.register_post_import_hook(_enter_config, "transformers.models.auto.configuration_auto")
    wrapt.register_post_import_hook(_enter_models, "transformers.models.auto.modeling_auto")
