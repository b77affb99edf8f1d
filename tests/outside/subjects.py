"""The tiny models that the outside suites run on: ours, Transformers' RecurrentGemma and Gemma, of one shape."""

import os
from typing import Any

SIZES = {
    "vocab_size": 1024, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 24, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
OURS = {**SIZES, "intermediate_size": 192, "lru_width": 48, "attention_window_size": 16}


def tiny_config(**overrides: Any) -> Any:
    """Return the config of the subject that OUTSIDE_SUBJECT names; `overrides` are sizes."""
    subject = os.environ["OUTSIDE_SUBJECT"]
    if subject == "ours":
        from recurrent_gemma_hf import RecurrentGemmaConfig

        return RecurrentGemmaConfig(**{**OURS, "block_types": ["recurrent", "attention"], **overrides})
    if subject == "in-tree":
        from transformers.models.recurrent_gemma import RecurrentGemmaConfig as InTree

        return InTree(**{**OURS, "block_types": ["recurrent", "attention"], **overrides})
    from transformers import GemmaConfig

    return GemmaConfig(**{**SIZES, "intermediate_size": 96, **overrides})


def classes() -> list[Any]:
    """Return the base model and the heads of the subject: language model, sequence, tokens, as far as it has them."""
    subject = os.environ["OUTSIDE_SUBJECT"]
    if subject == "ours":
        import recurrent_gemma_hf as module
    elif subject == "in-tree":
        import transformers.models.recurrent_gemma.modeling_recurrent_gemma as module
    else:
        import transformers.models.gemma.modeling_gemma as module
    stem = "Gemma" if subject == "gemma" else "RecurrentGemma"
    heads = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
    return [getattr(module, stem + head) for head in heads if hasattr(module, stem + head)]
