"""Weight decay as Griffin is trained with: which parameters are spared, for any optimizer and for Trainer.

The RG-LRU is what must not decay: a Lambda pulled to zero makes the recurrence forget within a few tokens, whatever
the data say. Transformers' Trainer spares biases and norms by their names and knows nothing of Lambda.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

# Whole parts of parameter names: the RG-LRU (Lambda, gates and their biases), the embedding, tied to the head or not,
# biases, and the lengths that DoRA learns.
_SPARED = {"rg_lru", "embed_tokens", "lm_head", "bias", "lora_magnitude_vector"}


def decayed_parameter_names(names: Iterable[str]) -> list[str]:
    """Those of the names of parameters that weight decay is for.

    Spared are the RG-LRU, the embedding, biases and norms, as in the official fine-tuning tutorial
    (google-deepmind/recurrentgemma, colabs/fine_tuning_tutorial_jax.ipynb, `griffin_weight_decay_mask`). Names may have
    prefixes, as PEFT, DDP, FSDP and torch.compile add them.
    """

    def decays(name: str) -> bool:
        parts = name.split(".")
        return not _SPARED.intersection(parts) and not any(part.endswith("norm") for part in parts)

    return [name for name in names if decays(name)]


def parameter_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """The trainable parameters as two groups for any torch optimizer: with and without weight decay.

    The tutorial's optimizer is `AdamW(parameter_groups(model), lr=1e-4, betas=(0.9, 0.96), eps=1e-8)`.

    Args:
        model: any model of this package, also wrapped (PEFT, DDP, FSDP, torch.compile).
        weight_decay: for the matrices of the linear layers and the taps of the convolution.

    Raises:
        ValueError: for a negative weight_decay, and where nothing is trainable.
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
    """Makes a Trainer decay what `decayed_parameter_names` says, also under FSDP and DeepSpeed, where it has to make
    the optimizer itself:

        class GriffinTrainer(GriffinTrainerMixin, Trainer): ...  # or trl's SFTTrainer, DPOTrainer
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Called by Trainer when it makes its optimizer."""
        return decayed_parameter_names(name for name, _ in model.named_parameters())


__all__ = ["GriffinTrainerMixin", "decayed_parameter_names", "parameter_groups"]
