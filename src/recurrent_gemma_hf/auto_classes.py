"""Registration of our classes with Transformers, without importing Transformers, torch or our own model files.

Each Auto mapping of Transformers has class names and, by model type, the module that a class is imported from on first
use (`_modules`, the same in 5.17 to 5.24). That module becomes this package, which in turn imports a class on first
use. `AutoModel.register` would need the classes themselves: importing them doubles the time of `from transformers
import AutoModelForCausalLM`, and fails where Transformers imports its Auto classes before the base classes of ours.

Other tools, such as TRL's trainers and `transformers serve`, take the class that a checkpoint names from the module
`transformers` itself, which maps class names to submodules (`_class_to_module`): for our names, to an alias of this
package. Transformers' own classes stay in `transformers.models.recurrent_gemma`.
"""

import sys
from types import ModuleType

import wrapt

MODEL_TYPE = "recurrent_gemma"
_ALIAS = "models.recurrent_gemma_hf"
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


def _enter_names(_: ModuleType) -> None:
    sys.modules[f"transformers.{_ALIAS}"] = sys.modules[__package__]
    # Importing transformers.processing_utils replaces the module; modules that imported it earlier keep the old one.
    namespaces = [getattr(module, "__dict__", {}) for module in list(sys.modules.values())]
    copies = [sys.modules["transformers"], *(names.get("transformers") for names in namespaces)]
    for transformers in copies:
        if isinstance(transformers, ModuleType) and hasattr(transformers, "_class_to_module"):
            for name in (*_MODELS.values(), "RecurrentGemmaConfig", "RecurrentGemmaPreTrainedModel"):
                transformers._class_to_module[name] = _ALIAS
                vars(transformers).pop(name, None)  # Transformers' own class, if it was used already


def register() -> None:
    """Register with the modules of Transformers, now or when they are imported."""
    wrapt.register_post_import_hook(_enter_config, "transformers.models.auto.configuration_auto")
    wrapt.register_post_import_hook(_enter_models, "transformers.models.auto.modeling_auto")
    for module in ("transformers", "transformers.processing_utils"):
        wrapt.register_post_import_hook(_enter_names, module)
