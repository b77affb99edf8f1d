"""What tests share: small models, tokens with padding, gradients, the command line.

Files beside this one have a theme: `oracles` is the official code, `reference` the paper's equations, `kernels` runs
Triton kernels, `distributed_worker` runs in several processes.
"""

import functools
import importlib.util
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from recurrent_gemma_hf import (
    RecurrentGemmaCache,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RecurrentGemmaForQuestionAnswering,
    RecurrentGemmaForSequenceClassification,
    RecurrentGemmaForTokenClassification,
)
from recurrent_gemma_hf.cli.app import main

# How many times as many rounds as in the suite the fuzzers run: `make fuzz` asks for more.
FUZZ_ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "1"))

# --- models -----------------------------------------------------------------------------------------------------------

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

HEADS = [
    RecurrentGemmaForCausalLM,
    RecurrentGemmaForSequenceClassification,
    RecurrentGemmaForTokenClassification,
    RecurrentGemmaForQuestionAnswering,
]
# float32 by two orders of summation; logits here are of order 1
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def tiny_config(variant: str = "recurrentgemma", **overrides) -> RecurrentGemmaConfig:
    """Return our config of one of the `VARIANTS`; `overrides` are config fields."""
    return RecurrentGemmaConfig(**{**_TINY, **VARIANTS[variant], **overrides})


def byte_config(**overrides) -> RecurrentGemmaConfig:
    """Return a config with a vocabulary of bytes, and defaults wherever a size does not ask for another value."""
    sizes = {
        "vocab_size": 265, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "lru_width": 40, "attention_window_size": 8,
    }  # fmt: skip
    return RecurrentGemmaConfig(**{**sizes, **overrides})


@torch.no_grad()
def perturb(model: nn.Module, seed: int) -> nn.Module:
    """Move every parameter of `model` (ours) off its initial value, in place, and return the model.

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
    """Return our model in float32 and evaluation mode, freshly initialised and then perturbed."""
    torch.manual_seed(seed)
    model = RecurrentGemmaForCausalLM(config)
    model.set_attn_implementation(attention)
    return perturb(model, seed).eval()


@functools.cache
def model_of(variant: str = "recurrentgemma", attention: str = "sdpa") -> RecurrentGemmaForCausalLM:
    """Return a model that tests share: they do not change it."""
    return build(tiny_config(variant), seed=3, attention=attention)


def head_of(head: type, **config) -> nn.Module:
    """Return a perturbed model with the head, so that no two outputs are equal by accident."""
    torch.manual_seed(0)
    return perturb(head(tiny_config(**config)), seed=4).eval()


def in_pieces(model: nn.Module, ids: Tensor, sizes: int | list[int]) -> Tensor:
    """Return the logits of pieces of `ids` (B, T) of these sizes, read one after another into one cache."""
    cache = RecurrentGemmaCache(model.config)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)], dim=1)


def load_file(path: Path, name: str | None = None) -> ModuleType:
    """Return a module from a file that belongs to no package, or from another copy of one that does."""
    specification = importlib.util.spec_from_file_location(name or path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# --- tokens -----------------------------------------------------------------------------------------------------------


def tokens_of(rows: int, length: int, seed: int = 0) -> Tensor:
    """Return (rows, length) ids of `tiny_config`; none is the padding id 0, so that padding can be told by it."""
    return torch.randint(1, _TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def pad(rows: list[Tensor], side: str, value: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids and attention_mask (B, longest row) of rows of ids, each (its length,), padded on the given side."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), longest), value), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, columns], mask[i, columns] = row, 1
    return ids, mask


def padded(lengths: list[int], side: str, seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return ids (B, T), mask (B, T) and the rows alone, each (1, its length)."""
    rows = [tokens_of(1, length, seed + i) for i, length in enumerate(lengths)]
    return *pad([row[0] for row in rows], side), rows


def packed_positions(*lengths: int) -> Tensor:
    """Return the position ids (T,) of documents of these lengths, one behind the other."""
    return torch.cat([torch.arange(length) for length in lengths])


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, loss: Tensor | None = None) -> dict[str, Tensor]:
    """Return the gradients by name, of `loss` where it is given, and leave the model without."""
    if loss is not None:
        model.zero_grad()
        loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Fail with the name of every parameter whose gradient is off by more than `tolerance` of its norm."""
    assert got.keys() == expected.keys()
    errors = {name: (got[name] - gradient).norm() for name, gradient in expected.items()}
    wrong = {
        name: f"{error / expected[name].norm():.1e}"
        for name, error in errors.items()
        if not error <= tolerance * expected[name].norm()  # NaN is wrong too
    }
    assert not wrong, f"relative errors of gradients above {tolerance:.0e}: {wrong}"


# --- linear layers ----------------------------------------------------------------------------------------------------


def assert_is_linear(layer: nn.Linear, x: Tensor, out: Tensor) -> None:
    """Compare `out` with the layer in float64, of the values that its weight has when it is quantized."""
    weight = layer.weight.dequantize() if hasattr(layer.weight, "qdata") else layer.weight
    expected = nn.functional.linear(x.double(), weight.double(), None if layer.bias is None else layer.bias.double())
    assert (out.shape, out.dtype) == (expected.shape, x.dtype)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float64: 1e-14}[x.dtype]
    assert (out.double() - expected).norm() <= tolerance * expected.norm()


# --- the command line -------------------------------------------------------------------------------------------------

# CliRunner takes an app, and what turns a user's mistake into a line on stderr is `main`.
_shell = typer.Typer(pretty_exceptions_enable=False)


@_shell.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def _hand_on(context: typer.Context) -> None:
    main(context.args)


def run_command(
    *arguments: object, app: typer.Typer = _shell, stdin: str | bytes | None = None, **settings: Any
) -> Result:
    """Run `recurrent-gemma` with these arguments, without a process of its own: exit_code, stdout, stderr, output and
    exception are in what is returned. Another `app` is a command of research/."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, **settings)
