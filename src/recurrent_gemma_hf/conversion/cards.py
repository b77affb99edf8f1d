"""Write the model card of converted weights: one of `model_cards/` plus a section about this checkpoint."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

from huggingface_hub import ModelCard
from safetensors import safe_open

from .. import RecurrentGemmaConfig

# The wheel has the cards beside this file, a clone at its top.
_IN_WHEEL, _IN_CLONE = (Path(__file__).parents[i] / "model_cards" for i in (0, 3))
CARDS = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CLONE
PUBLISHED = ("recurrentgemma-2b", "recurrentgemma-2b-it", "recurrentgemma-9b", "recurrentgemma-9b-it")
MARK = "<!-- checkpoint -->"  # replaced by the section

# The fields that distinguish the published architectures.
SHAPE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "lru_width",
    "vocab_size",
)

# Names of dtypes in safetensors files, and in PyTorch.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def published_name(checkpoint: Path) -> str | None:
    """Return the published model that a checkpoint's name denotes, or None.

    Google's archives are called 2b, 2b-it, 9b and 9b-it, as a folder or with .pt. Only the name decides: the
    weights do not show whether a model is a published one or a fine-tune of it.
    """
    found = re.fullmatch(r"(?:recurrentgemma-)?((?:2b|9b)(?:-it)?)(?:\.pt)?", checkpoint.name)
    return f"recurrentgemma-{found[1]}" if found else None


def write_card(model_name: str | None, output: Path, converted_from: str) -> None:
    """Write `README.md` beside the weights.

    Args:
        model_name: one of `PUBLISHED`, or None for any other model, whose card has gaps for its owner to fill.
        output: the checkpoint folder, with `config.json` and the safetensors already there.
        converted_from: a readable name of the source ("2b-it, Orbax").

    Raises:
        ValueError: the model is not a published one, or its shapes differ from the weights'.
        FileNotFoundError: the folder has no config or no weights.
    """
    if model_name is not None and model_name not in PUBLISHED:
        raise ValueError(f"no card for {model_name!r}: there are {', '.join(PUBLISHED)}; None writes one with gaps")
    config = _read_config(output)
    if model_name is not None:
        _check_shape(model_name, config)
    section = _checkpoint_section(model_name, config, _stored_values(output), converted_from)
    template = (CARDS / f"{model_name or 'converted'}.md").read_text(encoding="utf-8")
    card = template.replace(MARK, section)
    ModelCard(card)  # raises on metadata that the Hub would refuse to read
    (output / "README.md").write_text(card, encoding="utf-8")


def _read_config(output: Path) -> RecurrentGemmaConfig:
    path = output / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: write the model's config first, the card describes it")
    return RecurrentGemmaConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))


def _check_shape(model_name: str, config: RecurrentGemmaConfig) -> None:
    expected = RecurrentGemmaConfig.from_preset(model_name.removesuffix("-it"))
    different = [
        f"{field} is {getattr(config, field)} instead of {getattr(expected, field)}"
        for field in SHAPE_FIELDS
        if getattr(config, field) != getattr(expected, field)
    ]
    if different:
        raise ValueError(f"these weights are not {model_name}: {'; '.join(different)}; name the right model, or None")


def _stored_values(output: Path) -> Counter[str]:
    """Count the values of each dtype in the safetensors. Reads only the headers."""
    shards = sorted(output.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"no *.safetensors in {output}: write the weights first, the card describes them")
    values: Counter[str] = Counter()
    for shard in shards:
        with safe_open(shard, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping and cannot be iterated over)
                tensor = tensors.get_slice(name)
                dtype = tensor.get_dtype()
                values[DTYPES.get(dtype, dtype)] += math.prod(tensor.get_shape())
    return values


def _checkpoint_section(
    model_name: str | None, config: RecurrentGemmaConfig, values: Counter[str], converted_from: str
) -> str:
    blocks = Counter(config.layers_block_type)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(blocks.items(), reverse=True))
    rows = {
        "Checkpoint": model_name or "not one of those that Google published",
        "Converted from": converted_from,
        "Parameters": f"{values.total():,}",
        "Stored as": ", ".join(dtype for dtype, _ in values.most_common()),
        "Blocks": f"{config.num_hidden_layers}: {kinds}",
        "Width": f"{config.hidden_size:,}; RG-LRU {config.lru_width:,}",
        "Vocabulary": f"{config.vocab_size:,}",
        "Embeddings": "scaled by the square root of the width" if config.embeddings_scale_by_sqrt_dim else "not scaled",
        "Logits": f"soft-capped at {config.logits_soft_cap:g}" if config.logits_soft_cap else "not capped",
    }
    if "attention" in blocks:
        rows["Local attention"] = f"a token sees itself and the {config.attention_window_size:,} tokens before it"
    lines = [f"| {title} | {value} |" for title, value in rows.items()]
    return "\n".join(["## This checkpoint", "", "| | |", "|---|---|", *lines])
