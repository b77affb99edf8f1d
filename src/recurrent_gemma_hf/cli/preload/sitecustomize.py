"""What every Python process under `recurrent-gemma run` imports at its start: this package, so that the classes that
the process will look for in Transformers are ours. Then the sitecustomize that this one stands before, if any.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import recurrent_gemma_hf  # noqa: F401

_elsewhere = [folder for folder in sys.path if Path(folder) != Path(__file__).parent]
if (_spec := PathFinder.find_spec("sitecustomize", _elsewhere)) is not None and _spec.loader is not None:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
