"""Run the task list of the RecurrentGemma report (arXiv 2404.07839, table 2) with lm-eval; print published figures too.

Run from a clone: python research/papers.py --help

Published figures are read from the model cards (`model_cards/`, or the README.md beside converted weights), which name
their source. Google evaluated with its own code: prompts differ, and so can the number of examples where the report
does not state it. Results are not comparable to a tenth of a point.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import lm_eval
import typer
from huggingface_hub import ModelCard
from lm_eval.api.model import LM
from rich.console import Console
from rich.table import Table

from recurrent_gemma_hf.cli.shared import (
    DEMO,
    DeviceOption,
    DtypeOption,
    ModelOption,
    Problem,
    locate,
    pick_device,
    read_config,
)
from recurrent_gemma_hf.evaluation.harness import RecurrentGemmaLM
from recurrent_gemma_hf.evaluation.records import append_record, provenance, read_records

CARDS = Path(__file__).parents[1] / "model_cards"


@dataclass(frozen=True)
class PaperTask:
    """A line of the report's table.

    task: the name in lm-eval; dataset: the dataset type in the cards; metric: the key in lm-eval's results; few_shot:
    examples in the prompt, None for the task's default; stated: the setting that the report states.
    """

    title: str
    task: str
    dataset: str
    metric: str
    few_shot: int | None
    stated: str
    runs_code: bool = False


PAPER_TASKS = (
    PaperTask("MMLU", "mmlu", "mmlu", "acc,none", 5, "5-shot, top-1"),
    PaperTask("HellaSwag", "hellaswag", "hellaswag", "acc_norm,none", 0, "0-shot"),
    PaperTask("PIQA", "piqa", "piqa", "acc,none", 0, "0-shot"),
    PaperTask("SocialIQA", "social_iqa", "social_i_qa", "acc,none", 0, "0-shot"),
    PaperTask("BoolQ", "boolq", "boolq", "acc,none", 0, "0-shot"),
    PaperTask("WinoGrande", "winogrande", "winogrande", "acc,none", 0, "partial score"),
    PaperTask("CommonsenseQA", "commonsense_qa", "commonsense_qa", "acc,none", 7, "7-shot"),
    PaperTask("OpenBookQA", "openbookqa", "openbookqa", "acc_norm,none", 0, "not stated"),
    PaperTask("ARC-e", "arc_easy", "arc_easy", "acc,none", 0, "not stated"),
    PaperTask("ARC-c", "arc_challenge", "arc_challenge", "acc_norm,none", 0, "not stated"),
    PaperTask("TriviaQA", "triviaqa", "trivia_qa", "exact_match,remove_whitespace", 5, "5-shot"),
    PaperTask("Natural Questions", "nq_open", "nq_open", "exact_match,remove_whitespace", 5, "5-shot"),
    PaperTask("HumanEval", "humaneval", "humaneval", "pass@1,create_test", 0, "pass@1", runs_code=True),
    PaperTask("MBPP", "mbpp", "mbpp", "pass_at_1,none", 3, "3-shot", runs_code=True),
    PaperTask("GSM8K", "gsm8k", "gsm8k", "exact_match,strict-match", 5, "maj@1"),
    PaperTask("MATH", "minerva_math", "math", "exact_match,none", 4, "4-shot"),
    PaperTask("AGIEval", "agieval", "agieval", "acc,none", None, "not stated"),
    PaperTask("BIG-Bench Hard", "bbh", "bbh", "exact_match,get-answer", None, "not stated"),
)
PUBLISHED = ("recurrentgemma-2b", "recurrentgemma-2b-it", "recurrentgemma-9b", "recurrentgemma-9b-it")


def find_tasks(names: Iterable[str] | None) -> tuple[PaperTask, ...]:
    """Return the tasks with these lm-eval names (None: all); raise ValueError for an unknown name."""
    if names is None:
        return PAPER_TASKS
    known = {task.task: task for task in PAPER_TASKS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is not on the paper's list, which is {', '.join(known)}; any other task of lm-eval runs "
            "with recurrent-gemma eval harness"
        )
    return tuple(known[name] for name in names)


def card_path(name: str) -> Path:
    """Return the path of a published model's card; raise ValueError for any other name."""
    if name not in PUBLISHED:
        raise ValueError(f"there is no card {name!r}; there are {', '.join(PUBLISHED)}")
    return CARDS / f"{name}.md"


def published_figures(card: Path) -> dict[str, float]:
    """Return {dataset type: figure} from the metadata of a card (`model-index`), empty if it has none."""
    return {
        result.dataset_type: float(result.metric_value)
        for result in ModelCard.load(card).data.eval_results or ()
        if result.metric_value is not None
    }


def run(
    model: LM, label: str, tasks: Iterable[PaperTask], output: Path, limit: int | None, run_code: bool
) -> Iterator[dict[str, Any]]:
    """Evaluate the tasks that `output` lacks, and yield the records of all tasks in order.

    Each finished task is written at once, as one line of JSON. Raises ValueError before the first evaluation if a task
    runs the model's code and `run_code` is False, and during one if its data cannot be read.
    """
    tasks = tuple(tasks)
    refused = [task.task for task in tasks if task.runs_code and not run_code]
    if refused:
        raise ValueError(
            f"{', '.join(refused)} run the code that the model writes; allow it with --run-code where that is safe, or "
            "name the other tasks with --task"
        )
    done = {
        record["task"]: record
        for record in read_records(output)
        if (record.get("model"), record.get("limit")) == (label, limit)
    }
    for task in tasks:
        record = done.get(task.task)
        if record is None:
            record = {"model": label, "limit": limit, **evaluate(model, task, limit), **provenance()}
            append_record(output, record)
        yield record


def evaluate(model: LM, task: PaperTask, limit: int | None) -> dict[str, Any]:
    """Return a task's result and lm-eval's standard error, both in per cent, and the settings."""
    try:
        results = lm_eval.simple_evaluate(
            model,
            tasks=[task.task],
            num_fewshot=task.few_shot,
            limit=limit,
            log_samples=False,
            confirm_run_unsafe_code=task.runs_code,
        )["results"][task.task]
    except (OSError, ConnectionError) as error:
        raise ValueError(
            f"the data of {task.task} cannot be read ({' '.join(str(error).split())[:200]}); connect to the Hub once, "
            "or leave the task out with --task"
        ) from error
    if task.metric not in results:
        raise ValueError(f"lm-eval's {task.task} has no {task.metric!r} but {', '.join(sorted(results))}")
    metric, _, filtered = task.metric.partition(",")
    standard_error = results.get(f"{metric}_stderr,{filtered}")
    return {
        "task": task.task,
        "metric": task.metric,
        "few_shot": task.few_shot,
        "value": 100 * results[task.metric],
        "standard_error": 100 * standard_error if isinstance(standard_error, float) else None,
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="JSON lines to append to; tasks already in it are skipped.")],
    model: ModelOption = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A task of the list; repeat for several. All by default.")
    ] = None,
    published: Annotated[
        str | None, typer.Option(help="Whose published figures to print: recurrentgemma-2b, -2b-it, -9b, -9b-it.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Number of questions per task; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions per batch.")] = 8,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Let HumanEval and MBPP run what the model wrote.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Run the RecurrentGemma report's task list and print the results beside its published figures."""
    try:
        tasks = find_tasks(task)
        location = locate(model)
        read_config(location)
        card = card_path(published) if published else Path(location) / "README.md"
        figures = published_figures(card) if card.is_file() else {}
        where = str(pick_device(device))
        loaded = RecurrentGemmaLM(location, batch_size=batch_size, device=where, dtype=dtype, logits_cache=True)
        records = list(run(loaded, model or DEMO, tasks, output, limit, run_code))
    except (Problem, ValueError) as error:
        typer.echo(f"papers.py: {error}", err=True)
        raise typer.Exit(2) from None
    _print_records(tasks, records, figures, card.stem if published else str(card))


def _print_records(
    tasks: Iterable[PaperTask], records: list[dict[str, Any]], figures: dict[str, float], source: str
) -> None:
    table = Table("task", "shots", "measured", "published", "the report says", title=f"{records[0]['model']}")
    for task, record in zip(tasks, records, strict=True):
        error = "" if record["standard_error"] is None else f" ± {record['standard_error']:.1f}"
        shots = "task's own" if task.few_shot is None else str(task.few_shot)
        known = f"{figures[task.dataset]:.1f}" if task.dataset in figures else ""
        table.add_row(task.title, shots, f"{record['value']:.1f}{error}", known, task.stated)
    table.caption = f"published: {source}"
    Console().print(table)


if __name__ == "__main__":
    app()
