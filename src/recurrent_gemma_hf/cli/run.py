"""`recurrent-gemma run`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import typer

from .shared import Problem


def run(context: typer.Context) -> None:
    """Run COMMAND [ARGS], a program that does not know of this package, with this package's model: `trl sft ...`,
    `lm_eval ...`, `accelerate launch ...`, `python train.py`, or a script by its path. It and every Python process that
    it starts import the package first."""
    if not context.args or context.args[0] in ("--help", "-h"):
        typer.echo("Usage: recurrent-gemma run COMMAND [ARGS]...\n\n" + " ".join((run.__doc__ or "").split()))
        return
    command, *arguments = context.args
    environment = dict(os.environ)
    preload = str(Path(__file__).parent / "preload")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (preload, environment.get("PYTHONPATH"))))
    # Programs of this environment come first, even if it is not activated.
    environment["PATH"] = os.pathsep.join(filter(None, (str(Path(sys.executable).parent), environment.get("PATH"))))
    program = sys.executable if command.endswith(".py") else shutil.which(command, path=environment["PATH"])
    arguments = context.args if command.endswith(".py") else arguments
    if program is None or (command.endswith(".py") and not Path(command).is_file()):
        raise Problem(f"there is no program {command!r} here; give one that is installed, or a script by its path")
    raise SystemExit(subprocess.call([program, *arguments], env=environment))
