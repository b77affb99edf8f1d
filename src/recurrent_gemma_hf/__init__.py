"""RecurrentGemma, Griffin and Hawk for Hugging Face Transformers.

Importing this package registers its classes with the Auto classes: `AutoModelForCausalLM.from_pretrained` and
`pipeline` then use them for every checkpoint of model type "recurrent_gemma", instead of Transformers' own.
"""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from . import peft_defaults
from .backend import set_backend
from .cache_recurrent_gemma import RecurrentGemmaCache
from .configuration_recurrent_gemma import PRESETS, RecurrentGemmaConfig
from .cross_entropy import linear_cross_entropy
from .modeling_recurrent_gemma import (
    RecurrentGemmaForCausalLM,
    RecurrentGemmaForQuestionAnswering,
    RecurrentGemmaForSequenceClassification,
    RecurrentGemmaForTokenClassification,
    RecurrentGemmaModel,
    RecurrentGemmaPreTrainedModel,
)
from .scan import linear_recurrence
from .training import GriffinTrainerMixin, decayed_parameter_names, parameter_groups

__version__ = "0.1.0"


def demo_checkpoint() -> str:
    """Path of the small Griffin that ships with the package (trained on Shakespeare; see its README.md)."""
    return str(Path(__file__).parent / "demo")


def _register() -> None:
    AutoConfig.register("recurrent_gemma", RecurrentGemmaConfig, exist_ok=True)
    for auto_class, model_class in (
        (AutoModel, RecurrentGemmaModel),
        (AutoModelForCausalLM, RecurrentGemmaForCausalLM),
        (AutoModelForSequenceClassification, RecurrentGemmaForSequenceClassification),
        (AutoModelForTokenClassification, RecurrentGemmaForTokenClassification),
        (AutoModelForQuestionAnswering, RecurrentGemmaForQuestionAnswering),
    ):
        auto_class.register(RecurrentGemmaConfig, model_class, exist_ok=True)
    peft_defaults.register()


_register()

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
