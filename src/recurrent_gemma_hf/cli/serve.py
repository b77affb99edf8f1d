"""`recurrent-gemma serve`."""

import typer

from .shared import reported


def serve(context: typer.Context) -> None:
    """Serve over HTTP: `transformers serve`, its arguments and options (try --help), with this package's model."""
    from ..transformers_compat import transformers_command

    with reported(ModuleNotFoundError):
        command = transformers_command()
    command(["serve", *context.args], prog_name="recurrent-gemma")
