"""Figures of the evaluations. matplotlib comes with the extra `eval` and is imported here alone."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # (the backend comes first)
from matplotlib.axes import Axes

COLOURS = {
    "griffin": "tab:blue",
    "hawk": "tab:orange",
    "sliding-window transformer": "tab:green",
    "transformer": "tab:red",
}


def save(figure: Any, path: Path) -> None:
    """Writes the figure under its name only when it is complete."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(temporary, dpi=120, bbox_inches="tight")
    plt.close(figure)
    temporary.replace(path)


def draw_synthetic(records: list[dict[str, Any]], path: Path) -> None:
    """One row per task: the share of answer tokens that are right, while learning (a line per seed), and against length
    (mean over the seeds and their range)."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    size = (11, 3.4 * len(tasks))
    figure, grid = plt.subplots(len(tasks), 2, figsize=size, squeeze=False, layout="constrained")
    for (learning, length), task in zip(grid, tasks, strict=True):
        _draw_learning(learning, [record for record in records if record["task"] == task], task)
        _draw_lengths(length, [record for record in records if record["task"] == task], task)
    grid[0][0].legend(fontsize=8)
    save(figure, path)


def _by_architecture(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups = defaultdict(list)
    for record in records:
        groups[record["architecture"]].append(record)
    return groups


def _draw_learning(axes: Axes, records: list[dict[str, Any]], task: str) -> None:
    for architecture, runs in _by_architecture(records).items():
        for number, run in enumerate(runs):
            steps = [0, *(row["step"] for row in run["curve"])]
            right = [0.0, *(row["tokens"] for row in run["curve"])]
            label = f"{architecture}, seeds: {len(runs)}" if number == 0 else None
            axes.plot(steps, right, color=COLOURS.get(architecture), alpha=0.8, label=label)
    axes.set(title=f"{task}: learning", xlabel="step", ylabel="answer tokens right", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)


def _draw_lengths(axes: Axes, records: list[dict[str, Any]], task: str) -> None:
    for architecture, runs in _by_architecture(records).items():
        lengths = [cell["length"] for cell in runs[0]["accuracy"] if cell["depth"] is None]
        right = np.array([[c["tokens"] for c in run["accuracy"] if c["depth"] is None] for run in runs])
        colour = COLOURS.get(architecture)
        axes.plot(lengths, right.mean(0), marker="o", color=colour)
        axes.fill_between(lengths, right.min(0), right.max(0), color=colour, alpha=0.15)
    settings = records[0]["settings"]
    axes.axvline(settings["length"], color="grey", linestyle="--", linewidth=1)
    axes.axvline(settings["window"], color="grey", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(title=f"{task}: trained to the dashed length, window dotted", xlabel="tokens", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)


def draw_positions(results: list[dict[str, Any]], path: Path) -> None:
    """Mean loss against position with its band, one line per result."""
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
    """Tokens per second while writing, and megabytes of state, against the length of the text."""
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
