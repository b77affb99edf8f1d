"""`recurrent-gemma memory`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .shared import DEMO, ConfigOption, Problem, find_config, flag, note, print_table, reported


def memory(
    model: ConfigOption = None,
    strategy: Annotated[
        str | None, typer.Option(help="full-fp32, full-amp, full-bf16, lora or qlora; all of them by default.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens per row.")] = 8192,
    batch_size: Annotated[int, typer.Option(help="Rows per device.")] = 1,
    devices: Annotated[int, typer.Option(help="Devices over which FSDP shards the weights.")] = 1,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    as_json: Annotated[bool, flag("--json", "Print one JSON object per line instead of a table.")] = False,
) -> None:
    """Compute the memory per device of an AdamW training step, without and with activation checkpointing."""
    from ..memory import STRATEGIES, training_memory

    config = find_config(model)
    settings = {"tokens": tokens, "batch_size": batch_size, "devices": devices, "rank": rank}
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name in STRATEGIES if strategy is None else [strategy]:
        try:
            for checkpointing in (False, True):
                with reported(ValueError):
                    result = training_memory(config, name, checkpointing=checkpointing, **settings)
                rows.append({"strategy": name, "checkpointing": checkpointing, **asdict(result)})
        except ModuleNotFoundError as error:
            if strategy is not None:
                raise Problem(f"{error}: the adapters of {name} are peft's; pip install peft") from error
            left_out.append(name)
    if as_json:
        typer.echo("\n".join(json.dumps(row) for row in rows))
    else:
        _print_rows(f"{model or DEMO}: {batch_size} x {tokens:,} tokens, {devices} device(s)", rows)
    if left_out:
        note(f"left out: {', '.join(left_out)}, whose adapters are peft's; pip install peft")


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Column

    from ..memory import STRATEGIES

    names = ("weights", "gradients", "optimizer", "activations", "loss", "gathered", "peak")
    parts = [name for name in names if any(row[name] for row in rows)]
    unit, divisor = ("GB", 1e9) if max(row["peak"] for row in rows) >= 1e9 else ("MB", 1e6)
    cells = [
        (row["strategy"], "yes" if row["checkpointing"] else "no", *(f"{row[part] / divisor:.2f}" for part in parts))
        for row in rows
    ]
    caption = "Not all of it exists at a time: the peak is less than the sum. " + "; ".join(
        f"{strategy}: {STRATEGIES[strategy].explanation}" for strategy in dict.fromkeys(row["strategy"] for row in rows)
    )
    heads = {"activations": "acti-\nvations"}
    columns: list[str | Column] = ["strategy", "check-\npointing"]
    columns += [Column(heads.get(part, part), justify="right") for part in parts]
    # Fits 80 columns: the unit is in the title only, and long heads have two lines.
    style = {"box": SIMPLE_HEAD, "padding": 0}
    print_table(f"{title}, in {unit}", columns, cells, caption, **style)
