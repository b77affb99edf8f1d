"""The `recurrent-gemma` command: `generate` writes text, `chat` holds a conversation, `serve` serves over HTTP, `info`
describes a model without loading it, `memory` computes what training needs, `doctor` checks the installation, `convert`
converts checkpoints of the official code, `eval` measures, `run` starts a program.

Every error of the user's input is one line on stderr, with the remedy, and exit status 2.
"""

from __future__ import annotations

import logging
from typing import Annotated

import typer

# Not the metadata of an installation, which in a clone can be older than the code.
from recurrent_gemma_hf import __version__

from .chat import chat, generate
from .convert import app as conversion_app
from .doctor import doctor
from .evaluate import app as evaluation_app
from .info import info
from .memory import memory
from .run import run
from .serve import serve
from .shared import PASSED_ON, Problem, note

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
for command in (generate, chat, info, memory, doctor):
    app.command()(command)
app.command(context_settings=PASSED_ON, add_help_option=False)(run)
app.command(context_settings=PASSED_ON, add_help_option=False)(serve)
app.add_typer(conversion_app, name="convert")
app.add_typer(evaluation_app, name="eval")

# Transformers and PEFT import torchao and bitsandbytes where they are installed, which then warn of kernels that were
# built for other devices; torch warns of torchao's enumerations.
_TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"recurrent-gemma-hf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and stop.", callback=_show_version, is_eager=True, metavar=""
        ),
    ] = False,
) -> None:
    """RecurrentGemma, Griffin and Hawk on Hugging Face Transformers."""


def main(arguments: list[str] | None = None) -> None:
    """Run the `recurrent-gemma` command with the given arguments, by default those of the process."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app(arguments)
    except Problem as problem:
        note(" ".join(str(problem).split()))
        raise SystemExit(2) from None
