"""`recurrent-gemma info`."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shared import (
    DEMO,
    DTYPES,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    find_config,
    flag,
    pick_device,
    pick_dtype,
    print_table,
)

if TYPE_CHECKING:
    import torch

    from .. import RecurrentGemmaConfig

# The lengths, in tokens, for which a transformer's cache is computed for comparison.
COMPARED_LENGTHS = (8 * 1024, 128 * 1024)


def info(
    model: ConfigOption = None,
    as_json: Annotated[bool, flag("--json", "Print one JSON object instead of a table.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Describe a model: shape, memory compared with a transformer's, and the device, dtype and backend here."""
    config = find_config(model)
    facts = {"model": model or DEMO, **_describe(config), **_describe_computation(config, dtype, device)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print_table(facts)


def _describe(config: RecurrentGemmaConfig) -> dict[str, Any]:
    """Return shape, parameters and memory in bytes, without loading or allocating any weight."""
    import torch

    from .. import RecurrentGemmaForCausalLM

    with torch.device("meta"):
        model = RecurrentGemmaForCausalLM(config)
    model.tie_weights()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    blocks = config.layers_block_type
    names = ("hidden_size", "lru_width", "num_attention_heads", "num_key_value_heads", "head_dim",
             "attention_window_size", "vocab_size")  # fmt: skip
    # Two bytes each for the key and the value of every token in every layer.
    transformer_bytes_per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {
        "model_type": config.model_type,
        "layers": {kind: blocks.count(kind) for kind in ("recurrent", "attention")},
        "mlp_width": config.intermediate_size // 2,
        **{name: getattr(config, name) for name in names},
        "parameters": parameters,
        "embedding_parameters": model.get_input_embeddings().weight.numel(),
        "weight_bytes": {"bfloat16": 2 * parameters, "float32": 4 * parameters},
        "cache_bytes": _cache_bytes(config),
        "transformer_cache_bytes": {length: length * transformer_bytes_per_token for length in COMPARED_LENGTHS},
    }


def _cache_bytes(config: RecurrentGemmaConfig) -> int:
    """Return the bytes of a RecurrentGemmaCache for one sequence of any length, in bfloat16 with float32 states."""
    recurrent = (config.conv1d_width - 1) * config.lru_width * 2 + config.lru_width * 4
    attention = 2 * config.sliding_window * config.num_key_value_heads * config.head_dim * 2
    size = {"recurrent": recurrent, "attention": attention}
    return sum(size[block] for block in config.layers_block_type)


def _describe_computation(config: RecurrentGemmaConfig, dtype: str, device: str | None) -> dict[str, Any]:
    chosen_device = pick_device(device)
    chosen_dtype = pick_dtype(dtype, chosen_device, config)
    return {
        "device": str(chosen_device),
        "dtype": str(chosen_dtype).removeprefix("torch."),
        "backend": _backend(chosen_device, chosen_dtype),
        "backends": backends_by_device(),
    }


def backends_by_device() -> dict[str, dict[str, str]]:
    """Return the backend of the recurrent blocks for each kind of device and dtype."""
    import torch

    return {
        kind: {name: _backend(torch.device(kind), getattr(torch, name)) for name in DTYPES if name != "auto"}
        for kind in ("cuda", "xpu", "mps", "cpu")
    }


def _backend(device: torch.device, dtype: torch.dtype) -> str:
    from ..backend import use_triton

    return "triton" if use_triton(device, dtype) else "portable"


def _print_table(facts: dict[str, Any]) -> None:
    from rich.filesize import decimal

    layers, lengths = facts["layers"], facts["transformer_cache_bytes"]
    attention = {
        "attention heads": f"{facts['num_attention_heads']} of width {facts['head_dim']}, "
        f"{facts['num_key_value_heads']} for keys and values",
        "attention window": f"{facts['attention_window_size']} tokens before the query",
    }
    rows = {
        "type": facts["model_type"],
        "layers": f"{sum(layers.values())}: {layers['recurrent']} recurrent, {layers['attention']} attention",
        "width": f"{facts['hidden_size']}, recurrence {facts['lru_width']}, MLP {facts['mlp_width']}",
        **(attention if layers["attention"] else {}),
        "vocabulary": f"{facts['vocab_size']:,}",
        "parameters": f"{facts['parameters']:,}, of them {facts['embedding_parameters']:,} in the embedding",
        "weights": ", ".join(f"{decimal(size)} in {dtype}" for dtype, size in facts["weight_bytes"].items()),
        "cache per sequence": f"{decimal(facts['cache_bytes'])} at any length",
        "a transformer's cache": ", ".join(f"{decimal(size)} at {length:,} tokens" for length, size in lengths.items()),
        "computes here": f"on {facts['device']} in {facts['dtype']}, recurrent blocks by {facts['backend']!r}",
        "recurrent blocks": "; ".join(
            f"{name!r} on {', '.join(places)}" for name, places in _places_by_backend(facts["backends"]).items()
        ),
    }
    caption = (
        "Caches in bfloat16, recurrent states in float32. The transformer has the same layers, each with the same "
        "key and value heads: 2 x layers x heads x width of a head x 2 bytes for every token."
    )
    print_table(facts["model"], (), rows.items(), caption, show_header=False)


def _places_by_backend(backends: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    """Return {"triton": ["cuda", ...]}: each backend's devices, with the dtypes if it does not support all of them."""
    places = defaultdict(list)
    for device, names in backends.items():
        for name in dict.fromkeys(names.values()):
            dtypes = [dtype for dtype in names if names[dtype] == name]
            places[name].append(device if len(dtypes) == len(names) else f"{device} in {', '.join(dtypes)}")
    return places
