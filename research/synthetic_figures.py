"""Draw the results of the synthetic tasks: learning curves, and accuracy by length."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from recurrent_gemma_hf.evaluation.figures import plt, save

COLOURS = {
    "griffin": "tab:blue",
    "hawk": "tab:orange",
    "sliding-window transformer": "tab:green",
    "transformer": "tab:red",
}


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Save a figure with a row per task: the share of correct answer tokens during training (a line per seed) and by
    length (mean and range over the seeds)."""
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
