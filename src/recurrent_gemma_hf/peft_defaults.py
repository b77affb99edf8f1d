"""What PEFT adapts where a config names no `target_modules`: every linear layer, as with "all-linear".

PEFT keeps one table per method from model types to names. Ours are entered as soon as PEFT is imported, whenever that
is: importing it here would cost everybody a second or two.
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

MODEL_TYPE = "recurrent_gemma"
LINEAR_LAYERS = [
    "q_proj", "k_proj", "v_proj", "o_proj", "linear_x", "linear_y", "linear_out", "gate_proj", "up_proj", "down_proj",
]  # fmt: skip
_TABLES = "peft.utils.constants"


def _enter(constants: ModuleType) -> None:
    """Into the table for LoRA and those that PEFT copied from it; others mean other layers (norms, values alone)."""
    lora = dict(constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
    for table in vars(constants).values():
        if isinstance(table, dict) and table == lora:
            table.setdefault(MODEL_TYPE, list(LINEAR_LAYERS))


class _WhenImported(MetaPathFinder):
    """Lets PEFT's tables be found as usual, once, and enters ours right after they are made."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_enter(module: ModuleType) -> None:
            execute(module)
            _enter(module)

        spec.loader.exec_module = execute_and_enter  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Enters our defaults now or when PEFT is imported; called when this package is."""
    if _TABLES in sys.modules:
        _enter(sys.modules[_TABLES])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())
