"""`recurrent-gemma convert ...`: the conversions, and the upload of their results, as commands.

Each passes its arguments to the parser of `conversion/`, which the scripts of a clone use too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import typer

from .shared import PASSED_ON, Problem, using_extra

app = typer.Typer(
    help="Convert checkpoints of Google's official code to folders that from_pretrained loads, and back.",
    no_args_is_help=True,
)
_OPTIONS: dict[str, Any] = {"context_settings": PASSED_ON, "add_help_option": False}


@contextmanager
def _reported() -> Iterator[None]:
    """Turn what a conversion raises into a Problem, and name the extra if one of its packages is missing."""
    from ..conversion.convert import shown

    try:
        with using_extra("convert"):
            yield
    except (ValueError, OSError) as error:
        # One line: a list under a colon becomes what it is in a sentence.
        raise Problem(re.sub(r"(?<!:)\n\s*", "; ", shown(error))) from error


def _convert(context: typer.Context, direction: str, dialect: Literal["jax", "torch"]) -> None:
    with _reported():
        from ..conversion import convert

        description = " ".join((context.command.help or "").split())
        convert.run(getattr(convert, direction), dialect, description, context.args, context.command_path)


@app.command(**_OPTIONS)
def orbax_to_hf(context: typer.Context) -> None:
    """Convert an Orbax checkpoint of the official JAX code to a folder that from_pretrained loads."""
    _convert(context, "official_to_hf", "jax")


@app.command(**_OPTIONS)
def torch_to_hf(context: typer.Context) -> None:
    """Convert a .pt file of the official PyTorch code to a folder that from_pretrained loads."""
    _convert(context, "official_to_hf", "torch")


@app.command(**_OPTIONS)
def hf_to_orbax(context: typer.Context) -> None:
    """Convert a folder of save_pretrained to an Orbax checkpoint of the official JAX code."""
    _convert(context, "hf_to_official", "jax")


@app.command(**_OPTIONS)
def hf_to_torch(context: typer.Context) -> None:
    """Convert a folder of save_pretrained to a .pt file of the official PyTorch code."""
    _convert(context, "hf_to_official", "torch")


@app.command(**_OPTIONS)
def upload(context: typer.Context) -> None:
    """Upload a checkpoint folder to the Hugging Face Hub. The same call resumes an interrupted upload."""
    with _reported():
        from ..conversion.upload import run

        run(context.args, context.command_path)
