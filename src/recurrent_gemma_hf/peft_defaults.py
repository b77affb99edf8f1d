"""Defaults for PEFT's `target_modules`.

PEFT has one table per method, from model types to module names. The entries for this model are derived from Gemma's
when PEFT is imported; importing it here would cost every user one or two seconds.
"""

from types import ModuleType

import wrapt

from .auto_classes import MODEL_TYPE

LINEAR_LAYERS = [
    "q_proj", "k_proj", "v_proj", "o_proj", "linear_x", "linear_y", "linear_out", "gate_proj", "up_proj", "down_proj",
]  # fmt: skip

# Gemma's modules and those with the same role in our attention and recurrent layers: the recurrence sums linear_x as
# attention sums values, and linear_y gates per token what is read from it, as a query does.
_OF_GEMMA = {
    "q_proj": ("q_proj", "linear_y"),
    "k_proj": ("k_proj",),
    "v_proj": ("v_proj", "linear_x"),
    "o_proj": ("o_proj", "linear_out"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
    "input_layernorm": ("temporal_pre_norm",),
    "post_attention_layernorm": ("channel_pre_norm",),
    "norm": ("final_norm",),
}


def _enter(constants: ModuleType) -> None:
    """Add our modules to each table: all linear layers where Gemma has its LoRA default, else those in `_OF_GEMMA`."""
    lora = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["gemma"]
    for table in vars(constants).values():
        gemma = table.get("gemma") if isinstance(table, dict) else None
        if isinstance(gemma, list):
            names = LINEAR_LAYERS if gemma == lora else [ours for name in gemma for ours in _OF_GEMMA.get(name, ())]
            table.setdefault(MODEL_TYPE, list(names))


def register() -> None:
    """Add the defaults to PEFT's tables, now or when PEFT is imported."""
    wrapt.register_post_import_hook(_enter, "peft.utils.constants")
