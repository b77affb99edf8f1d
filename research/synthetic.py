"""Train small models on the synthetic tasks and measure their accuracy at lengths they were not trained on.

Run from a clone: python research/synthetic.py --help

Four architectures of equal size are built from this package's blocks, so that only the temporal mixing differs: Griffin
(one attention block in the middle, as in section 6.2 of the paper), Hawk, and transformers with local and with global
attention.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from synthetic_tasks import TASKS, Batch, Task, find_task
from tqdm import tqdm

from recurrent_gemma_hf import RecurrentGemmaCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from recurrent_gemma_hf.evaluation.records import append_record, provenance, read_records
from recurrent_gemma_hf.training import parameter_groups

LAYERS = 5
HEADS = 4
# The window of global attention: no sequence is longer.
EVERYTHING = 1 << 24
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "griffin": ("recurrent", "recurrent", "attention", "recurrent", "recurrent"),
    "hawk": ("recurrent",),
    "sliding-window transformer": ("attention",),
    "transformer": ("attention",),
}
# Longer sequences are evaluated in chunks of this many tokens, so that memory does not depend on their length. The
# transformer with global attention reads any sequence at once.
CHUNK = 2048
# Part of every seed, so that training, validation and evaluation draw different rows.
TRAINING, VALIDATION, EVALUATION = 0, 1, 2


@dataclass(frozen=True)
class Settings:
    """Training settings, the same for every architecture.

    The sequences of a batch have one length, drawn log-uniformly between `shortest` and `length`. With `shortest` =
    `length` all have the same, as in the paper, which takes far longer to learn. The learning rate warms up, stays, and
    falls to zero over the last `decay_steps` steps. Training ends `decay_steps` after the share of held-out rows solved
    has reached `solved`, so the number of steps measures the speed of learning.
    """

    length: int
    window: int
    shortest: int
    width: int = 64
    batch_size: int = 32
    max_steps: int = 2000
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    decay_steps: int = 100
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    evaluate_every: int = 50
    validation_rows: int = 128
    solved: float = 0.98

    def __post_init__(self) -> None:
        for name in (
            "length",
            "window",
            "shortest",
            "width",
            "batch_size",
            "max_steps",
            "evaluate_every",
            "validation_rows",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be 1 or more")
        if not 1 <= self.shortest <= self.length:
            raise ValueError(f"shortest {self.shortest} must be from 1 to length {self.length}")
        if self.width % HEADS:
            raise ValueError(f"width {self.width} must be a multiple of the {HEADS} heads")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate {self.learning_rate} must be above 0")


def generator_for(purpose: int, seed: int, *rest: int) -> torch.Generator:
    """Return a generator seeded by all arguments, independent of global state."""
    digest = hashlib.sha256(repr((purpose, seed, *rest)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def build_model(architecture: str, task: Task, settings: Settings, seed: int) -> RecurrentGemmaForCausalLM:
    """Return an untrained float32 model; the architectures differ by less than 1% in parameters."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}")
    torch.manual_seed(seed)
    return RecurrentGemmaForCausalLM(_config(architecture, task, settings))


def _config(architecture: str, task: Task, settings: Settings) -> RecurrentGemmaConfig:
    """Return a config with an MLP as wide as needed for Griffin's number of parameters: attention blocks have fewer."""

    def config(architecture: str, mlp: int) -> RecurrentGemmaConfig:
        return RecurrentGemmaConfig(
            vocab_size=task.vocab_size,
            hidden_size=settings.width,
            intermediate_size=2 * mlp,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            block_types=ARCHITECTURES[architecture],
            attention_window_size=EVERYTHING if architecture == "transformer" else settings.window,
            embeddings_scale_by_sqrt_dim=False,  # as in the Griffin paper
            logits_soft_cap=0.0,
            pad_token_id=None,
            eos_token_id=None,
            bos_token_id=None,
        )

    base = 3 * settings.width
    difference = _parameters(config("griffin", base)) - _parameters(config(architecture, base))
    per_unit = _parameters(config(architecture, base + 1)) - _parameters(config(architecture, base))
    return config(architecture, base + round(difference / per_unit))


def _parameters(config: RecurrentGemmaConfig) -> int:
    with torch.device("meta"):
        model = RecurrentGemmaForCausalLM(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def train(
    model: RecurrentGemmaForCausalLM, task: Task, settings: Settings, seed: int, title: str = ""
) -> list[dict[str, float]]:
    """Train in place; return the curve, one row per evaluation on held-out sequences of `settings.length` tokens."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.98)
    )
    validation = task.batch(settings.length, settings.validation_rows, generator_for(VALIDATION, seed))
    random = generator_for(TRAINING, seed)
    curve: list[dict[str, float]] = []
    last_step, losses = settings.max_steps, []
    with tqdm(total=settings.max_steps, unit="step", desc=title) as progress:
        step = 0
        while step < last_step:
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, last_step, settings)
            batch = task.batch(_drawn_length(settings, random), settings.batch_size, random)
            losses.append(_training_step(model, optimizer, batch, settings))
            step += 1
            progress.update()
            if not math.isfinite(losses[-1]):
                raise ValueError(f"the loss became {losses[-1]} at step {step}; give a lower --learning-rate")
            if step % settings.evaluate_every and step != last_step:
                continue
            accuracy = accuracies(model, validation)
            curve.append({"step": step, "training_loss": sum(losses) / len(losses), **accuracy})
            progress.set_postfix(loss=f"{curve[-1]['training_loss']:.3f}", solved=f"{accuracy['rows']:.0%}")
            losses = []
            if accuracy["rows"] >= settings.solved and last_step == settings.max_steps:
                last_step = min(last_step, step + settings.decay_steps)
    return curve


def _drawn_length(settings: Settings, generator: torch.Generator) -> int:
    octaves = torch.rand((), generator=generator).item() * math.log2(settings.length / settings.shortest)
    return round(settings.shortest * 2**octaves)


def _learning_rate(step: int, last_step: int, settings: Settings) -> float:
    warm = (step + 1) / max(settings.warmup_steps, 1)
    left = (last_step - step) / max(settings.decay_steps, 1)
    return settings.learning_rate * min(1.0, warm, left)


def _training_step(
    model: RecurrentGemmaForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, settings: Settings
) -> float:
    model.train()
    targets_BT = batch.labels_BT[:, 1:]
    answers = (targets_BT[0] != -100).nonzero()[:, 0]  # the same positions in every row
    logits_BTV = model(batch.tokens_BT[:, :-1], use_cache=False, logits_to_keep=answers).logits
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT[:, answers].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def accuracies(model: RecurrentGemmaForCausalLM, batch: Batch) -> dict[str, float]:
    """Compute the share of answer tokens ("tokens") and of whole answers ("rows") that greedy decoding gets right."""
    model.eval()
    inputs_BT, answer = batch.tokens_BT[:, :-1], batch.answer
    # If the window covers the sequence, the cache would hold all of it, and chunks would save no memory.
    if inputs_BT.shape[1] <= CHUNK or inputs_BT.shape[1] <= model.config.attention_window_size:
        logits_BTV = model(inputs_BT, use_cache=False, logits_to_keep=answer).logits
    else:
        # The last chunk is exactly the inputs that predict the answer.
        cache, context = RecurrentGemmaCache(model.config), inputs_BT.shape[1] - answer
        for start in range(0, context, CHUNK):
            model(inputs_BT[:, start : min(start + CHUNK, context)], cache=cache, logits_to_keep=1)
        logits_BTV = model(inputs_BT[:, context:], cache=cache).logits
    right_BT = logits_BTV.argmax(-1) == batch.tokens_BT[:, -answer:]
    return {"tokens": right_BT.float().mean().item(), "rows": right_BT.all(dim=1).float().mean().item()}


@dataclass(frozen=True)
class Measurement:
    """Where to evaluate a trained model: at `lengths` with the needle anywhere and, in a task with one needle, at
    `depth_lengths` with the needle at each of `depths`."""

    lengths: tuple[int, ...]
    depth_lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    rows: int = 128
    batch_size: int = 32


def measure(model: RecurrentGemmaForCausalLM, task: Task, wanted: Measurement, seed: int) -> list[dict[str, Any]]:
    """Compute the accuracies for every length, with the needle anywhere (depth None) and at each depth."""
    cells: list[tuple[int, float | None]] = [(length, None) for length in wanted.lengths]
    if task.has_depth:
        cells += [(length, depth) for length in wanted.depth_lengths for depth in wanted.depths]
    return [
        {"length": length, "depth": depth, **_measure_cell(model, task, wanted, length, depth, seed)}
        for length, depth in cells
    ]


def _measure_cell(
    model: RecurrentGemmaForCausalLM, task: Task, wanted: Measurement, length: int, depth: float | None, seed: int
) -> dict[str, float]:
    random = generator_for(EVALUATION, seed, length)
    totals = {"tokens": 0.0, "rows": 0.0}
    for start in range(0, wanted.rows, wanted.batch_size):
        rows = min(wanted.batch_size, wanted.rows - start)
        for name, value in accuracies(model, task.batch(length, rows, random, depth)).items():
            totals[name] += value * rows
    return {name: value / wanted.rows for name, value in totals.items()}


def run(
    tasks: Iterable[tuple[str, Settings, Measurement]], architectures: Iterable[str], seeds: Iterable[int], output: Path
) -> Iterator[dict[str, Any]]:
    """Train and measure every combination that `output` (JSON lines) lacks, and yield the new records.

    Each finished run is written at once, as one line, so the same call resumes an interrupted one. Seeds are the
    outermost loop, so that at any time the combinations differ by at most one run.
    """
    tasks, architectures = list(tasks), list(architectures)
    done = {_key(record) for record in read_records(output)}
    for seed in seeds:
        for name, settings, wanted in tasks:
            for architecture in architectures:
                about = {"task": name, "architecture": architecture, "seed": seed, "settings": asdict(settings)}
                if _key(about) in done:
                    continue
                task = find_task(name)
                model = build_model(architecture, task, settings, seed)
                start = time.perf_counter()
                curve = train(model, task, settings, seed, title=f"{name}, {architecture}, seed {seed}")
                record = {
                    **about,
                    "parameters": model.num_parameters(),
                    "curve": curve,
                    "seconds": round(time.perf_counter() - start, 1),
                    "accuracy": measure(model, task, wanted, seed),
                    **provenance(),
                }
                append_record(output, record)
                yield record


def _key(record: dict[str, Any]) -> str:
    names = ("task", "architecture", "seed", "settings")
    return json.dumps([record.get(name) for name in names], sort_keys=True)


def _parsed(lengths: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, lengths.split(",")))
    except ValueError:
        raise ValueError(f"--lengths {lengths!r} is not a list of numbers; give for instance 64,128,256") from None


def _summary(record: dict[str, Any]) -> str:
    cells = [cell for cell in record["accuracy"] if cell["depth"] is None]
    solved = ", ".join(f"{cell['length']}: {cell['rows']:.0%}" for cell in cells)
    about = f"{record['task']}, {record['architecture']}, seed {record['seed']}"
    return f"{about}: {record['curve'][-1]['step']} steps, {record['seconds']:.0f} s; answers right at {solved}"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="JSON lines to append to; runs already in it are skipped.")],
    task: Annotated[list[str] | None, typer.Option(help="A task; repeat for several. All of them by default.")] = None,
    architecture: Annotated[
        list[str] | None, typer.Option(help="griffin, hawk, 'sliding-window transformer', transformer; all by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds (0, 1, ...) to train every combination with.")] = 3,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a training sequence; the task's length by default.")
    ] = None,
    shortest: Annotated[
        int | None,
        typer.Option(
            help="Draw the length of each batch from this to --length, evenly over octaves; --length by default."
        ),
    ] = None,
    window: Annotated[int | None, typer.Option(help="Attention window; half of --length by default.")] = None,
    width: Annotated[int, typer.Option(help="Width of the models; 64 is 0.26 million parameters, 128 is 1.0.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 32,
    max_steps: Annotated[int, typer.Option(help="Stop after this many, even if the task is not solved.")] = 5000,
    learning_rate: Annotated[float, typer.Option(help="Learning rate between warmup and decay.")] = 3e-3,
    lengths: Annotated[
        str | None,
        typer.Option(help="Measure at these lengths; 1, 2, 4, 8, 16 times --length by default, depths up to 4 times."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Sequences per measurement.")] = 128,
    figure: Annotated[Path | None, typer.Option(help="Also save a figure to this PNG, SVG or PDF file.")] = None,
) -> None:
    """Train small models of equal size on the Griffin paper's synthetic tasks and measure how far they extrapolate."""
    if figure is not None:  # a missing package must show before hours of training
        import synthetic_figures
    try:
        plans = []
        for name in task or TASKS:
            found = find_task(name)
            trained = length or found.training_length
            settings = Settings(
                length=trained,
                shortest=max(shortest, found.shortest) if shortest else trained,
                window=window or trained // 2,
                width=width,
                batch_size=batch_size,
                max_steps=max_steps,
                learning_rate=learning_rate,
            )
            measured = _parsed(lengths) if lengths else tuple(trained * 2**power for power in range(5))
            near = tuple(length for length in measured if length <= 4 * trained)
            plans.append((name, settings, Measurement(lengths=measured, depth_lengths=near, rows=rows)))
        for record in run(plans, architecture or ARCHITECTURES, range(seeds), output):
            typer.echo(_summary(record))
        if figure is not None:
            synthetic_figures.draw(read_records(output), figure)
    except ValueError as error:
        typer.echo(f"synthetic.py: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
