"""`recurrent-gemma eval ...`: measurements of the evaluation folder, as commands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import (
    DEMO,
    PASSED_ON,
    DeviceOption,
    DtypeOption,
    ModelOption,
    flag,
    load,
    print_table,
    reported,
    using_extra,
)

app = typer.Typer(
    help="Measure a model: loss against position, retrieval, throughput, tasks of lm-eval.", no_args_is_help=True
)

OutputOption = Annotated[Path | None, typer.Option(help="Append the results to this file of JSON lines.")]
FigureOption = Annotated[Path | None, typer.Option(help="Also draw a figure into this PNG, SVG or PDF file.")]


def import_extra(module: str) -> Any:
    """Import a module of the evaluation folder that needs the extra `eval`; raise a Problem that names it if
    missing."""
    with using_extra("eval"):
        return import_module(f"{__package__.partition('.')[0]}.evaluation.{module}")


def _numbers(text: str, option: str, kind: type = int) -> tuple[Any, ...]:
    with reported(ValueError, as_=f"{option} {text!r} is not a list of numbers; give for instance 64,128,256"):
        return tuple(kind(part) for part in text.split(","))


def _appended(records: Iterable[dict[str, Any]], output: Path | None, **about: Any) -> Iterator[dict[str, Any]]:
    """Append each record, with the fields `about`, to `output` if given, and then yield it."""
    from ..evaluation.records import append_record

    for record in records:
        if output is not None:
            append_record(output, {**about, **record})
        yield record


@app.command()
@reported(ValueError)
def position(
    text: Annotated[list[Path], typer.Option(help="A text file; repeat for several documents.")],
    length: Annotated[int, typer.Option(help="Tokens per segment; documents are cut into segments.")],
    model: ModelOption = None,
    part: Annotated[str, typer.Option(help="Use only this part of each text; 0.9:1 is its last tenth.")] = "0:1",
    segments: Annotated[int | None, typer.Option(help="Number of segments; all by default.")] = None,
    bins_per_octave: Annotated[int, typer.Option(help="Bins from a position to its double.")] = 2,
    output: Annotated[Path | None, typer.Option(help="Append to this file of JSON lines; --figure shows all.")] = None,
    figure: FigureOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Measure mean next-token loss by position, up to millions of tokens in constant memory."""
    figures = import_extra("figures") if figure is not None else None  # before the measurement, if it is missing
    from ..evaluation.position_loss import Wanted, measure, read_documents
    from ..evaluation.records import append_record, read_records

    start, _, end = part.partition(":")
    with reported(ValueError, as_=f"--part {part!r} is not a part of a text; give two shares, for instance 0.9:1"):
        shares = float(start), float(end)
    wanted = Wanted(length=length, segments=segments, bins_per_octave=bins_per_octave)
    texts = read_documents(text, shares)
    result = measure(*load(model, dtype, device), texts, wanted, label=f"{model or DEMO}, {length} tokens")
    print_table(
        f"{result['label']}, {result['segments']} segments",
        ("positions", "loss", "band"),
        [
            (f"{row['first']}-{row['last']}", f"{row['loss']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}")
            for row in result["bins"]
        ],
        f"nats per token, mean over all {result['mean_loss']:.4f}; {result['band']}",
    )
    if output is not None:
        append_record(output, result)
    if figures is not None:  # the figure shows all measurements in the file
        figures.draw_positions([result] if output is None else read_records(output), figure)


@app.command()
@reported(ValueError)
def retrieval(
    task: Annotated[str, typer.Option(help="passkey or phonebook.")],
    output: OutputOption = None,
    model: ModelOption = None,
    sizes: Annotated[
        str, typer.Option(help="Blocks of filler (passkey) or entries (phonebook), comma-separated.")
    ] = "10,30,100,300",
    depths: Annotated[str, typer.Option(help="Depth of the needle: 0 the beginning, 1 the end.")] = "0,0.25,0.5,0.75,1",
    repeats: Annotated[int, typer.Option(help="Prompts per size and depth.")] = 20,
    seed: Annotated[int, typer.Option(help="The same seed makes the same prompts.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Look for a needle in a long prompt: a passkey in filler text, or a number in a phonebook."""
    from ..evaluation.records import provenance
    from ..evaluation.retrieval import measure

    wanted = _numbers(sizes, "--sizes"), _numbers(depths, "--depths", float)
    records = measure(*load(model, dtype, device), task, *wanted, repeats, seed)
    rows = [
        (str(r["size"]), str(r["tokens"]), str(r["depth"]), f"{r['accuracy']:.0%}")
        for r in _appended(records, output, model=model or DEMO, seed=seed, **provenance())
    ]
    print_table(f"{task}, {model or DEMO}", ("size", "tokens", "depth", "right"), rows)


@app.command(context_settings=PASSED_ON)
def harness(context: typer.Context) -> None:
    """Run lm-eval's own command line with this package's models: run --model hf, or run --model recurrent_gemma."""
    import_extra("harness").run_command_line(context.args)


@app.command()
@reported(ValueError)
def throughput(
    model: ModelOption = None,
    prompt: Annotated[int, typer.Option(help="Tokens to prefill.")] = 2048,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 32_768,
    every: Annotated[int, typer.Option(help="Tokens per measurement.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Rows of the batch.")] = 1,
    alone: Annotated[bool, flag("--alone", "Leave out the transformer of equal size.")] = False,
    output: OutputOption = None,
    figure: FigureOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Measure tokens per second and memory of the state by length, beside a transformer of equal size."""
    figures = import_extra("figures") if figure is not None else None
    from ..evaluation.throughput import measure, transformer_of_equal_size

    loaded, _ = load(model, dtype, device)
    models = {model or DEMO: loaded}
    if not alone:
        peer = transformer_of_equal_size(loaded.config)
        models["transformer of equal size"] = peer.to(device=loaded.device, dtype=loaded.dtype)
    measured = (measure(each, label, prompt, tokens, every, batch_size) for label, each in models.items())
    records = list(_appended(chain.from_iterable(measured), output))
    rows = [
        (r["label"], f"{r['length']:,}", f"{r['tokens_per_second']:.1f}", f"{r['cache_bytes'] / 1e6:.2f}")
        for r in records
    ]
    print_table("", ("model", "tokens so far", "tokens/s", "state, MB"), rows)
    if figures is not None:
        figures.draw_throughput(records, figure)
