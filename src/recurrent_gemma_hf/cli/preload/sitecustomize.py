"""Import this package at the start of every Python process under `recurrent-gemma run`, so that the process gets our
classes from Transformers; then run the sitecustomize that this one hides, if any.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import recurrent_gemma_hf  # noqa: F401

_elsewhere = [folder for folder in sys.path if Path(folder) != Path(__file__).parent]
if (_spec := PathFinder.find_spec("sitecustomize", _elsewhere)) is not None and _spec.loader is not None:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
