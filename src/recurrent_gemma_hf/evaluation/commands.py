"""`recurrent-gemma eval ...`: the command line of this folder. Everything slow is imported where it is used."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    help="Measure a model: tasks of lm-eval, loss against position, retrieval, the papers' synthetic tasks.",
    no_args_is_help=True,
)

OutputOption = Annotated[Path, typer.Option(help="JSON lines to append to; what is there is not repeated.")]
FigureOption = Annotated[Path | None, typer.Option(help="Also draw a figure into this PNG, SVG or PDF file.")]


def fail(problem: str) -> NoReturn:
    """Ends the command with one line that says what is wrong and what to do."""
    from .. import cli  # which imports this file

    cli._fail(problem)


def note(message: str) -> None:
    """One line on stderr."""
    from .. import cli

    cli._note(message)


def _numbers(text: str, option: str, kind: type = int) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        fail(f"{option} {text!r} is not a list of numbers; give for instance 64,128,256")


@app.command()
def synthetic(
    output: OutputOption,
    task: Annotated[list[str] | None, typer.Option(help="A task; repeat for several. All of them by default.")] = None,
    architecture: Annotated[
        list[str] | None, typer.Option(help="griffin, hawk, 'sliding-window transformer', transformer; all by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Train every combination with the seeds 0, 1, ... below this.")] = 3,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a training sequence; the task's own by default.")
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
    max_steps: Annotated[int, typer.Option(help="Stop there even if the task is not solved.")] = 5000,
    learning_rate: Annotated[float, typer.Option(help="Between warmup and decay.")] = 3e-3,
    lengths: Annotated[
        str | None,
        typer.Option(help="Measure at these; 1, 2, 4, 8, 16 times --length by default, depths to 4 times."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Sequences per measurement.")] = 128,
    figure: FigureOption = None,
) -> None:
    """Train small models of equal size on the Griffin paper's synthetic tasks and measure how far they extrapolate."""
    from .records import read_records
    from .synthetic import ARCHITECTURES, Measurement, Settings, run
    from .synthetic_tasks import TASKS, find_task

    figures = _import_extra("figures") if figure is not None else None  # not first missed after hours of training
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
            measured = _numbers(lengths, "--lengths") if lengths else tuple(trained * 2**power for power in range(5))
            near = tuple(length for length in measured if length <= 4 * trained)
            plans.append((name, settings, Measurement(lengths=measured, depth_lengths=near, rows=rows)))
        for record in run(plans, architecture or ARCHITECTURES, range(seeds), output):
            note(_summary(record))
    except ValueError as error:
        fail(str(error))
    if figures is not None:
        figures.draw_synthetic(read_records(output), figure)


def _summary(record: dict[str, Any]) -> str:
    cells = [cell for cell in record["accuracy"] if cell["depth"] is None]
    solved = ", ".join(f"{cell['length']}: {cell['rows']:.0%}" for cell in cells)
    about = f"{record['task']}, {record['architecture']}, seed {record['seed']}"
    return f"{about}: {record['curve'][-1]['step']} steps, {record['seconds']:.0f} s; answers right at {solved}"


def _import_extra(module: str) -> Any:
    """A module of this folder that needs the extra; says how to install it where it is missing."""
    try:
        return import_module(f"{__package__}.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__.split(".")[0]):
            raise
        fail(f"this needs {error.name}, which is not installed: pip install 'recurrent-gemma-hf[eval]'")


ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="A checkpoint folder or a Hub id; the bundled demo by default.")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...; the fastest here by default.")]


@app.command()
def position(
    text: Annotated[list[Path], typer.Option(help="A text file; repeat for several documents.")],
    length: Annotated[int, typer.Option(help="Positions to measure; a document is cut into segments of it.")],
    model: ModelOption = None,
    part: Annotated[str, typer.Option(help="Use only this part of each text; 0.9:1 is its last tenth.")] = "0:1",
    segments: Annotated[int | None, typer.Option(help="At most so many segments; all there are by default.")] = None,
    bins_per_octave: Annotated[int, typer.Option(help="Points between a position and its double.")] = 2,
    output: Annotated[Path | None, typer.Option(help="Append to these JSON lines; the figure shows all.")] = None,
    figure: FigureOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Mean next-token loss at every distance from the beginning, up to millions of tokens in constant memory."""
    from .. import cli
    from .position_loss import Wanted, measure, read_documents
    from .records import append_record, read_records

    figures = _import_extra("figures") if figure is not None else None
    try:
        wanted = Wanted(length=length, segments=segments, bins_per_octave=bins_per_octave)
        texts = read_documents(text, _shares(part))
        loaded, tokenizer = cli._load(model, dtype, device)
        name = model or "the bundled demo"
        result = measure(loaded, tokenizer, texts, wanted, label=f"{name}, {length} tokens")
    except ValueError as error:
        fail(str(error))
    _print_bins(result)
    results = [result]
    if output is not None:
        append_record(output, result)
        results = read_records(output)  # measurements in one file come into one figure
    if figures is not None:
        figures.draw_positions(results, figure)


def _shares(part: str) -> tuple[float, float]:
    start, _, end = part.partition(":")
    try:
        return float(start), float(end)
    except ValueError:
        fail(f"--part {part!r} is not a part of a text; give two shares, for instance 0.9:1")


def _print_bins(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("positions", "loss", "band", title=f"{result['label']}, {result['segments']} segments")
    for row in result["bins"]:
        table.add_row(f"{row['first']}-{row['last']}", f"{row['loss']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}")
    table.caption = f"nats per token, mean over all {result['mean_loss']:.4f}; {result['band']}"
    Console().print(table)


@app.command()
def retrieval(
    task: Annotated[str, typer.Option(help="passkey or phonebook.")],
    output: Annotated[Path | None, typer.Option(help="Append the results to this file of JSON lines.")] = None,
    model: ModelOption = None,
    sizes: Annotated[
        str, typer.Option(help="Blocks of filler (passkey) or entries (phonebook), comma-separated.")
    ] = "10,30,100,300",
    depths: Annotated[
        str, typer.Option(help="Where the needle lies: 0 the beginning, 1 the end.")
    ] = "0,0.25,0.5,0.75,1",
    repeats: Annotated[int, typer.Option(help="Prompts per size and depth.")] = 20,
    seed: Annotated[int, typer.Option(help="The same seed asks the same questions.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Look for a needle in a long prompt: a passkey in filler text, or a number in a phonebook."""
    from rich.console import Console
    from rich.table import Table

    from .. import cli
    from .records import append_record, provenance
    from .retrieval import measure

    wanted = _numbers(sizes, "--sizes"), _numbers(depths, "--depths", float)
    table = Table("size", "tokens", "depth", "right", title=f"{task}, {model or 'the bundled demo'}")
    try:
        loaded, tokenizer = cli._load(model, dtype, device)
        for record in measure(loaded, tokenizer, task, *wanted, repeats, seed):
            if output is not None:
                append_record(output, {"model": model or "the bundled demo", "seed": seed, **record, **provenance()})
            table.add_row(*(str(record[name]) for name in ("size", "tokens", "depth")), f"{record['accuracy']:.0%}")
    except ValueError as error:
        fail(str(error))
    Console().print(table)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def harness(context: typer.Context) -> None:
    """lm-eval's own command line with this package's models: run --model hf, or run --model recurrent_gemma."""
    _import_extra("harness").run_command_line(context.args)


@app.command()
def papers(
    output: OutputOption,
    model: ModelOption = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A task of the list; repeat for several. All by default.")
    ] = None,
    published: Annotated[
        str | None, typer.Option(help="Whose figures to print beside: recurrentgemma-2b, -2b-it, -9b, -9b-it.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many questions per task, for a first look.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at once.")] = 8,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Let HumanEval and MBPP run what the model wrote.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """The RecurrentGemma report's task list, with its published figures beside."""
    _import_extra("harness")
    from .. import cli
    from .papers import card_path, find_tasks, load_model, published_figures, run

    try:
        tasks = find_tasks(task)
        location = cli._locate(model)
        cli._read_config(location)
        card = card_path(published) if published else Path(location) / "README.md"
        figures = published_figures(card) if card.is_file() else {}
        loaded = load_model(location, batch_size, str(cli._pick_device(device)), dtype)
        records = list(run(loaded, model or "the bundled demo", tasks, output, limit, run_code))
    except ValueError as error:
        fail(str(error))
    _print_papers(tasks, records, figures, card.stem if published else str(card))


def _print_papers(tasks: Any, records: list[dict[str, Any]], figures: dict[str, float], source: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "shots", "measured", "published", "the report says", title=f"{records[0]['model']}")
    for task, record in zip(tasks, records, strict=True):
        error = "" if record["standard_error"] is None else f" ± {record['standard_error']:.1f}"
        shots = "task's own" if task.few_shot is None else str(task.few_shot)
        known = f"{figures[task.dataset]:.1f}" if task.dataset in figures else ""
        table.add_row(task.title, shots, f"{record['value']:.1f}{error}", known, task.stated)
    table.caption = f"published: {source}"
    Console().print(table)


@app.command()
def throughput(
    model: ModelOption = None,
    prompt: Annotated[int, typer.Option(help="Tokens to read before the first one is written.")] = 2048,
    tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 32_768,
    every: Annotated[int, typer.Option(help="Measure after so many tokens.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Texts at once.")] = 1,
    alone: Annotated[bool, typer.Option("--alone", help="Leave out the transformer of equal size.")] = False,
    output: Annotated[Path | None, typer.Option(help="Append the results to this file of JSON lines.")] = None,
    figure: FigureOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Tokens per second and memory of the state against length, beside a transformer of equal size."""
    from rich.console import Console
    from rich.table import Table

    from .. import cli
    from .records import append_record
    from .throughput import measure, transformer_of_equal_size

    figures = _import_extra("figures") if figure is not None else None
    table = Table("model", "tokens so far", "tokens/s", "state, MB")
    records = []
    try:
        loaded, _ = cli._load(model, dtype, device)
        models = {model or "the bundled demo": loaded}
        if not alone:
            peer = transformer_of_equal_size(loaded.config)
            models["transformer of equal size"] = peer.to(device=loaded.device, dtype=loaded.dtype)
        for label, each in models.items():
            for record in measure(each, label, prompt, tokens, every, batch_size):
                records.append(record)
                if output is not None:
                    append_record(output, record)
    except ValueError as error:
        fail(str(error))
    for record in records:
        numbers = (f"{record['length']:,}", f"{record['tokens_per_second']:.1f}", f"{record['cache_bytes'] / 1e6:.2f}")
        table.add_row(record["label"], *numbers)
    Console().print(table)
    if figures is not None:
        figures.draw_throughput(records, figure)
