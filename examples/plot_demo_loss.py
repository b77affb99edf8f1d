"""Draw the loss curves of the demo checkpoint and its peers from the logs of train_demo.py.

python examples/plot_demo_loss.py griffin.jsonl hawk.jsonl transformer.jsonl --output demo_loss.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt

COLOURS = {"griffin": "#c44e1f", "hawk": "#3f7d4e", "transformer": "#2f6690"}


def read_log(path: Path) -> tuple[dict, list[dict], dict]:
    """Return the header, the rows (one per evaluation) and the result of one run."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if len(lines) < 3 or "architecture" not in lines[0] or "bits_per_character" not in lines[-1]:
        raise SystemExit(f"{path} is not a complete log of examples/train_demo.py; run the training again")
    return lines[0], lines[1:-1], lines[-1]


def draw(axes: plt.Axes, path: Path) -> None:
    """Add one run: training loss dashed, validation loss solid, the saved checkpoint's result in the legend."""
    header, rows, result = read_log(path)
    name = header["architecture"]
    label = f"{name.capitalize()}, {header['parameters'] / 1e6:.2f} M parameters"
    steps = [row["step"] for row in rows]
    # A training loss is the mean since the previous evaluation, so it is drawn at the middle of that interval.
    middles = [(before + step) / 2 for before, step in zip([0, *steps], steps, strict=False)]
    losses = f"{result['validation_loss']:.3f} nats per token, {result['bits_per_character']:.3f} bits per character"
    axes.plot(
        steps,
        [row["validation_loss"] for row in rows],
        color=COLOURS[name],
        linewidth=2.2,
        label=f"{label}: {losses}",
    )
    axes.plot(
        middles,
        [row["training_loss"] for row in rows],
        color=COLOURS[name],
        linewidth=1.4,
        linestyle="--",
    )
    best = min(rows, key=lambda row: row["validation_loss"])
    axes.plot(best["step"], best["validation_loss"], "o", color=COLOURS[name], markersize=7)


def main() -> None:
    """Read the command line and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+", help="JSON lines written by examples/train_demo.py")
    parser.add_argument("--output", type=Path, required=True, help="picture to write (PNG)")
    options = parser.parse_args()
    figure, axes = plt.subplots(figsize=(9, 5.2), dpi=110)
    for path in options.logs:
        draw(axes, path)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", ylim=(2.4, 5.2), xlim=(0, None))
    axes.set_title("Loss on Shakespeare: validation solid, training dashed, dot where the weights were kept")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=10)
    figure.tight_layout()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output)


if __name__ == "__main__":
    main()
