"""`recurrent-gemma serve`."""

from pathlib import Path

import typer

from .shared import ModelOption, Problem, locate, reported


def serve(context: typer.Context, model: ModelOption = None) -> None:
    """Serve ONE model over HTTP: `transformers serve MODEL`, its options (try --help), with this package's model and
    checked requests. MODEL is a folder or a Hub id, by default the bundled demo; any other name in a request is 404."""
    from ..transformers_compat import transformers_command, wrap_server

    options = list(context.args)
    if options and not options[0].startswith("-"):
        if model is not None:
            raise Problem(f"two models are given, {model} and {options[0]}; a server has one")
        model = options.pop(0)
    with reported(ModuleNotFoundError):
        command = transformers_command()
    if "--help" in options:
        command(["serve", "--help"], prog_name="recurrent-gemma")
        return
    from .guard import Guard

    location = locate(model)
    # A folder may be asked for by its last name too, so that clients need not know where it is.
    names = [model or "demo", Path(location).name] if Path(location).is_dir() else []
    wrap_server(lambda app: app.add_middleware(Guard, served=location, names=names))
    command(["serve", location, *options], prog_name="recurrent-gemma")
