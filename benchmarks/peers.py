"""The models that are compared, of one size, and how a comparison is measured and written down."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import GemmaConfig, GemmaForCausalLM
from transformers.models.recurrent_gemma import modeling_recurrent_gemma as in_tree
from transformers.models.recurrent_gemma.configuration_recurrent_gemma import RecurrentGemmaConfig as InTreeConfig

from recurrent_gemma_hf import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

RESULTS = Path(__file__).parent / "results"


def our_config(hidden_size: int, layers: int, heads: int, window: int, vocab_size: int) -> RecurrentGemmaConfig:
    return RecurrentGemmaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=6 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        attention_window_size=window,
        eos_token_id=None,
    )


def ours(config: RecurrentGemmaConfig) -> RecurrentGemmaForCausalLM:
    torch.manual_seed(0)
    return RecurrentGemmaForCausalLM(config)


def in_tree_recurrent_gemma(config: RecurrentGemmaConfig) -> torch.nn.Module:
    """Transformers' own RecurrentGemma with the same shapes."""
    fields = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads lru_width "
        "attention_window_size eos_token_id"
    ).split()
    torch.manual_seed(0)
    their_config = InTreeConfig(**{name: getattr(config, name) for name in fields})
    return in_tree.RecurrentGemmaForCausalLM._from_config(their_config, attn_implementation="sdpa")


def gemma(config: RecurrentGemmaConfig) -> torch.nn.Module:
    """A Gemma with the same layers, heads and widths, its MLP chosen so that the parameters are as many."""

    def build(width: int) -> torch.nn.Module:
        torch.manual_seed(0)
        return GemmaForCausalLM._from_config(
            GemmaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=width,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=1,
                head_dim=config.head_dim,
                max_position_embeddings=1 << 20,
                eos_token_id=None,
            ),
            attn_implementation="sdpa",
        )

    with torch.device("meta"):
        wanted = parameters(RecurrentGemmaForCausalLM(config))
        base, step = parameters(build(64)), 3 * 64 * config.hidden_size * config.num_hidden_layers
    return build(64 * (1 + round((wanted - base) / step)))


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def machine() -> dict[str, Any]:
    """Hardware, commit and versions, written beside every number."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {torch.get_num_threads()} threads"
    return {
        "device": device,
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def seconds(run: Callable[[], Any], repeats: int, warmup: int = 1) -> float:
    """The fastest of `repeats` runs: noise on a shared machine only ever adds."""
    for _ in range(warmup):
        run()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def read_bandwidth(size: int = 1 << 29) -> float:
    """Bytes per second that a matrix-vector product reads, float32: what decoding is limited by."""
    matrix, vector = torch.randn(size // 4 // 4096, 4096), torch.randn(4096)
    return size / seconds(lambda: torch.mv(matrix, vector), repeats=7)


@contextmanager
def recorded(name: str, columns: list[str]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that takes rows; prints them as a table and writes one JSON line each at the end."""
    rows: list[dict[str, Any]] = []
    console, about = Console(), machine()
    yield rows.append
    table = Table(*columns, title=f"{name}: {about['device']}, {about['commit']}")
    for row in rows:
        table.add_row(*(f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("w") as file:
        file.writelines(json.dumps({**row, **about}) + "\n" for row in rows)
