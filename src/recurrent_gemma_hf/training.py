"""Weight decay as in Griffin's training: which parameters it excludes, for any optimizer and for Trainer.

The RG-LRU must not decay: as Lambda goes to zero the recurrence forgets within a few tokens, regardless of the data.
Transformers' Trainer excludes biases and norms by name, but not Lambda.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

# Parts of parameter names, between dots: the RG-LRU (Lambda, gates and their biases), the embedding and the head,
# biases, and DoRA's magnitudes.
_SPARED = {"rg_lru", "embed_tokens", "lm_head", "bias", "lora_magnitude_vector"}


def decayed_parameter_names(names: Iterable[str]) -> list[str]:
    """Return the parameter names that weight decay applies to.

    It excludes the RG-LRU, the embedding, the head, biases and norms, as the official fine-tuning tutorial does
    (google-deepmind/recurrentgemma, colabs/fine_tuning_tutorial_jax.ipynb, `griffin_weight_decay_mask`). Names may have
    prefixes, as added by PEFT, DDP, FSDP and torch.compile.
    """

    def decays(name: str) -> bool:
        parts = name.split(".")
        return not _SPARED.intersection(parts) and not any(part.endswith("norm") for part in parts)

    return [name for name in names if decays(name)]


def parameter_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups for any torch optimizer: with and without weight decay.

    The tutorial's optimizer is `AdamW(parameter_groups(model), lr=1e-4, betas=(0.9, 0.96), eps=1e-8)`.

    Args:
        model: any model of this package, also wrapped (PEFT, DDP, FSDP, torch.compile).
        weight_decay: the decay of the linear layers' weights and the convolution's taps.

    Raises:
        ValueError: weight_decay is negative, or no parameter is trainable.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay={weight_decay!r} must not be negative")
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(f"no parameter of this {type(model).__name__} is trainable; was it frozen for an adapter?")
    decayed = set(decayed_parameter_names(trainable))
    groups = [
        {"params": [p for name, p in trainable.items() if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class GriffinTrainerMixin:
    """Mixin for a Trainer that decays only `decayed_parameter_names`, also under FSDP and DeepSpeed, where Trainer must
    make the optimizer:

        class GriffinTrainer(GriffinTrainerMixin, Trainer): ...  # or trl's SFTTrainer, DPOTrainer
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameter names that Trainer's optimizer decays."""
        return decayed_parameter_names(name for name, _ in model.named_parameters())


__all__ = ["GriffinTrainerMixin", "decayed_parameter_names", "parameter_groups"]
