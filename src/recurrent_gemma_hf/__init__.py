"""RecurrentGemma, Griffin and Hawk for Hugging Face Transformers.

Importing this package registers its classes with the Auto classes: `AutoModelForCausalLM.from_pretrained` and
`pipeline` then use them for every checkpoint of model type "recurrent_gemma", instead of Transformers' own. The import
loads neither Transformers nor torch: each public name is imported from its file on first use (PEP 562).
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import auto_classes, peft_defaults

if TYPE_CHECKING:
    from .backend import set_backend
    from .cache_recurrent_gemma import RecurrentGemmaCache
    from .configuration_recurrent_gemma import PRESETS, RecurrentGemmaConfig
    from .cross_entropy import linear_cross_entropy
    from .modeling_recurrent_gemma import (
        RecurrentGemmaForCausalLM,
        RecurrentGemmaModel,
        RecurrentGemmaPreTrainedModel,
    )
    from .scan import linear_recurrence
    from .task_heads import (
        RecurrentGemmaForQuestionAnswering,
        RecurrentGemmaForSequenceClassification,
        RecurrentGemmaForTokenClassification,
    )
    from .training import GriffinTrainerMixin, decayed_parameter_names, parameter_groups

__version__ = "0.1.0"

_FILE_OF = {
    "PRESETS": "configuration_recurrent_gemma",
    "GriffinTrainerMixin": "training",
    "RecurrentGemmaCache": "cache_recurrent_gemma",
    "RecurrentGemmaConfig": "configuration_recurrent_gemma",
    "RecurrentGemmaForCausalLM": "modeling_recurrent_gemma",
    "RecurrentGemmaForQuestionAnswering": "task_heads",
    "RecurrentGemmaForSequenceClassification": "task_heads",
    "RecurrentGemmaForTokenClassification": "task_heads",
    "RecurrentGemmaModel": "modeling_recurrent_gemma",
    "RecurrentGemmaPreTrainedModel": "modeling_recurrent_gemma",
    "decayed_parameter_names": "training",
    "linear_cross_entropy": "cross_entropy",
    "linear_recurrence": "scan",
    "parameter_groups": "training",
    "set_backend": "backend",
}


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_FILE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_FILE_OF})


def demo_checkpoint() -> str:
    """Return the path of the small Griffin that ships with the package (trained on Shakespeare; see its README.md)."""
    return str(Path(__file__).parent / "demo")


auto_classes.register()
peft_defaults.register()

__all__ = [
    "PRESETS",
    "GriffinTrainerMixin",
    "RecurrentGemmaCache",
    "RecurrentGemmaConfig",
    "RecurrentGemmaForCausalLM",
    "RecurrentGemmaForQuestionAnswering",
    "RecurrentGemmaForSequenceClassification",
    "RecurrentGemmaForTokenClassification",
    "RecurrentGemmaModel",
    "RecurrentGemmaPreTrainedModel",
    "__version__",
    "decayed_parameter_names",
    "demo_checkpoint",
    "linear_cross_entropy",
    "linear_recurrence",
    "parameter_groups",
    "set_backend",
]
