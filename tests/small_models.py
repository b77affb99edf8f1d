"""Small models for the tests: the shapes that differ, and weights that are no longer what they were initialised to."""

import math

import torch
from torch import nn

from recurrent_gemma_hf import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

# A fraction of a second per model. The MLP branch, head_dim and the vocabulary differ from all other sizes, and
# sqrt(hidden_size), by which embeddings are scaled, has to be rounded to become a bfloat16.
_TINY = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "lru_width": 48,
    "attention_window_size": 12,
    "logits_soft_cap": 3.0,  # near the size of the logits: a forgotten cap shows
    "block_types": ["recurrent", "recurrent", "attention"],
}

# name -> what differs from `_TINY`
VARIANTS: dict[str, dict] = {
    "recurrentgemma": {},
    "wide_lru": {"lru_width": 80},
    "narrow_lru": {"lru_width": 32},
    "hawk": {
        "block_types": ["recurrent"],
        "lru_width": 80,
        "embeddings_scale_by_sqrt_dim": False,
        "logits_soft_cap": 0.0,
    },
    "griffin_paper": {"lru_width": 88, "embeddings_scale_by_sqrt_dim": False, "logits_soft_cap": 0.0},
    "attention_first": {"block_types": ["attention", "recurrent"], "num_hidden_layers": 4, "attention_window_size": 8},
    "attention_only": {"block_types": ["attention"], "num_hidden_layers": 2, "attention_window_size": 16},
}


def tiny_config(variant: str = "recurrentgemma", **overrides) -> RecurrentGemmaConfig:
    """Our config of one of the `VARIANTS`; `overrides` are config fields."""
    return RecurrentGemmaConfig(**{**_TINY, **VARIANTS[variant], **overrides})


@torch.no_grad()
def perturb(model: nn.Module, seed: int) -> nn.Module:
    """Moves every parameter of `model` (ours) off its initial value, in place, and returns the model.

    Matrices get noise of the size that keeps activations of order one (1 / sqrt(fan in)), norms, biases and the
    convolution get noise of 0.3, Lambda gets noise of 1, so that the recurrence forgets within a few tokens in some
    channels and within hundreds in others.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("recurrent_param"):
            scale = 1.0
        elif parameter.ndim == 1 or name.endswith(("_gate_bias", "conv_1d.weight")):
            scale = 0.3
        else:  # (out, in), gates (H, in, out); the embedding (V, E) serves as the output projection
            scale = 1 / math.sqrt(parameter.shape[1])
        before = parameter.clone()
        parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
        assert (parameter != before).float().mean() > 0.9, f"{name} did not move"
    return model


def build(config: RecurrentGemmaConfig, seed: int = 0, attention: str = "sdpa") -> RecurrentGemmaForCausalLM:
    """Our model in float32 and evaluation mode, freshly initialised and then perturbed."""
    torch.manual_seed(seed)
    model = RecurrentGemmaForCausalLM(config)
    model.set_attn_implementation(attention)
    return perturb(model, seed).eval()
