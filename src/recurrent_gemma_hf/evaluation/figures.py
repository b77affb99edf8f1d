"""Figures of the evaluations. Only this file imports matplotlib, which comes with the extra `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is set


def save(figure: Any, path: Path) -> None:
    """Write the figure to `path`, atomically, and close it."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(temporary, dpi=120, bbox_inches="tight")
    plt.close(figure)
    temporary.replace(path)


def draw_positions(results: list[dict[str, Any]], path: Path) -> None:
    """Draw mean loss and its confidence band against position, one line per result of `position_loss.measure`."""
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    for result in results:
        bins = result["bins"]
        centres = [(b["first"] * b["last"]) ** 0.5 for b in bins]
        axes.plot(centres, [b["loss"] for b in bins], marker=".", label=result["label"])
        axes.fill_between(centres, [b["low"] for b in bins], [b["high"] for b in bins], alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position (tokens since the beginning)", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


def draw_throughput(records: list[dict[str, Any]], path: Path) -> None:
    """Draw tokens per second and megabytes of state against the length of the text."""
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.4))
    for label in dict.fromkeys(record["label"] for record in records):
        mine = [record for record in records if record["label"] == label]
        written = mine[1:]  # the first record is the prompt
        speed.plot([r["length"] for r in written], [r["tokens_per_second"] for r in written], label=label)
        memory.plot([r["length"] for r in mine], [r["cache_bytes"] / 1e6 for r in mine], label=label)
    speed.set(xlabel="tokens so far", ylabel="tokens per second", ylim=(0, None))
    memory.set(xlabel="tokens so far", ylabel="state, MB", ylim=(0, None))
    speed.legend(fontsize=8)
    for axes in (speed, memory):
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
    save(figure, path)
