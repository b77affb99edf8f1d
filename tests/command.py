"""The `recurrent-gemma` command as a shell runs it, without a process of its own."""

from typing import Any

import typer
from typer.testing import CliRunner, Result

from recurrent_gemma_hf.cli.app import main

# CliRunner takes an app, and what turns a user's mistake into a line on stderr is `main`.
shell = typer.Typer(pretty_exceptions_enable=False)


@shell.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def _hand_on(context: typer.Context) -> None:
    main(context.args)


def run_command(*arguments: object, stdin: str | bytes | None = None, **settings: Any) -> Result:
    """Runs `recurrent-gemma` with these arguments; the result has exit_code, stdout, stderr, output and exception."""
    return CliRunner().invoke(shell, [str(argument) for argument in arguments], input=stdin, **settings)
