"""`recurrent-gemma serve`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

from .shared import ModelOption, Problem, adapter_base, locate, reported


def serve(context: typer.Context, model: ModelOption = None) -> None:
    """Serve ONE model over HTTP: `transformers serve MODEL`, its options (try --help), with this package's model and
    checked requests. MODEL is a folder or a Hub id (of a PEFT adapter too), by default the bundled demo; any other name
    in a request is 404."""
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
    with _complete(location) as served:
        wrap_server(lambda app: app.add_middleware(Guard, served=served, names=names))
        command(["serve", served, *options], prog_name="recurrent-gemma")


@contextmanager
def _complete(location: str) -> Iterator[str]:
    """Yield the folder or Hub id to serve: for an adapter's folder, a temporary one of links to the files of the
    checkpoint under it and to its own, because Transformers' server reads config.json where the adapter is."""
    folder = Path(location)
    if not folder.is_dir() or (base := adapter_base(location)) is None:
        yield location
        return
    from huggingface_hub import snapshot_download

    with reported(OSError, ValueError, as_=f"cannot find {base}, the model of the adapter {location}: {{}}"):
        base = base if Path(base).is_dir() else snapshot_download(base, allow_patterns=["*.json", "*.safetensors"])
    with TemporaryDirectory(prefix="recurrent-gemma-serve-") as served:
        links = {file.name: file.absolute() for files in (Path(base), folder) for file in files.iterdir()}
        for name, file in links.items():  # of two files of one name, the adapter's: its tokenizer knows its template
            (Path(served) / name).symlink_to(file)
        yield served
