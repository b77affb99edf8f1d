"""Importing the package: it costs nothing, every public name is there, and the Auto classes give ours in any order."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import recurrent_gemma_hf

PACKAGE = Path(recurrent_gemma_hf.__file__).parent
# A window and widths of a model that takes milliseconds to make.
TINY = {
    "vocab_size": 9, "hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "lru_width": 8, "attention_window_size": 4,
}  # fmt: skip


def run(code: str) -> str:
    """Run the code in a fresh process and return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_import_brings_neither_torch_nor_transformers():
    code = "import recurrent_gemma_hf, sys; recurrent_gemma_hf.demo_checkpoint(); print(*sys.modules)"
    loaded = {name.split(".")[0] for name in run(code).split()}
    assert "recurrent_gemma_hf" in loaded
    assert not loaded & {"torch", "transformers", "peft", "triton", "numpy"}


def test_the_auto_classes_bring_no_model_file_of_ours():
    """That is why the package adds nothing noticeable to importing Transformers' Auto classes."""
    code = (
        "import recurrent_gemma_hf, sys; from transformers import AutoConfig, AutoModelForCausalLM, pipeline;"
        "print(*(name for name in sys.modules if name.startswith('recurrent_gemma_hf.')))"
    )
    assert set(run(code).split()) == {"recurrent_gemma_hf.auto_classes", "recurrent_gemma_hf.peft_defaults"}


@pytest.mark.parametrize("name", recurrent_gemma_hf.__all__)
def test_public_names(name: str):
    assert name in dir(recurrent_gemma_hf)
    imported: dict = {}
    exec(f"from recurrent_gemma_hf import {name}", imported)
    assert imported[name] is getattr(recurrent_gemma_hf, name)
    if name not in ("PRESETS", "__version__"):
        assert callable(imported[name])  # set_backend is no submodule of that name, nor are the others
        assert imported[name].__name__ == name


def test_type_checkers_see_every_public_name():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (guarded,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {alias.name for node in guarded.body for alias in node.names}
    assert seen | {"__version__", "demo_checkpoint"} == set(recurrent_gemma_hf.__all__)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'recurrent_gemma_hf' has no attribute 'RecurrentGemma2'"):
        recurrent_gemma_hf.RecurrentGemma2  # noqa: B018
    assert not hasattr(recurrent_gemma_hf, "_modules")


# --- The Auto classes -------------------------------------------------------------------------------------------------

ORDERS = {
    "ours first": "import recurrent_gemma_hf, transformers",
    "transformers first": "import transformers, recurrent_gemma_hf",
    "Auto classes first": "from transformers import AutoConfig, AutoModelForCausalLM; import recurrent_gemma_hf",
    "Transformers' own model first": (
        "from transformers import RecurrentGemmaForCausalLM, AutoConfig;"
        "AutoConfig.for_model('recurrent_gemma'); import recurrent_gemma_hf"
    ),
    "transformers replaced in between": (
        "import recurrent_gemma_hf, transformers.processing_utils; from transformers import AutoProcessor"
    ),
    "a submodule of ours": "from recurrent_gemma_hf.configuration_recurrent_gemma import RecurrentGemmaConfig",
}
USES = {
    "from_pretrained": "m = transformers.AutoModelForCausalLM.from_pretrained(path); print(type(m), type(m.config))",
    "pipeline": "m = transformers.pipeline('text-generation', path).model; print(type(m), type(m.config))",
    "AutoConfig": "print(type(transformers.AutoConfig.from_pretrained(path)))",
    "for_model": "print(type(transformers.AutoConfig.for_model('recurrent_gemma', **tiny)))",
    "from_config": (
        "c = transformers.AutoConfig.for_model('recurrent_gemma', **tiny);"
        "print(*(type(getattr(transformers, 'AutoModel' + head).from_config(c))"
        " for head in ('', 'ForCausalLM', 'ForSequenceClassification', 'ForTokenClassification',"
        " 'ForQuestionAnswering')))"
    ),
    "our config": (
        "from recurrent_gemma_hf import RecurrentGemmaConfig as C; m = transformers.AutoModel.from_config(C(**tiny));"
        "print(type(m), type(m.config))"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_give_ours_in_any_order_of_imports(order: str):
    """One process for each order; each begins with another use, so that every use is once the first."""
    first = list(ORDERS).index(order)
    uses = [*USES.values()][first:] + [*USES.values()][:first]
    code = [ORDERS[order], "import transformers", f"path, tiny = {str(PACKAGE / 'demo')!r}, {TINY!r}", *uses]
    classes = run("\n".join(code)).split("<class ")[1:]
    assert len(classes) == 13
    assert all(name.startswith("'recurrent_gemma_hf.") for name in classes), classes


def test_a_registration_of_the_users_own_goes_before():
    code = f"""
import recurrent_gemma_hf
from transformers import AutoModelForCausalLM
class Mine(recurrent_gemma_hf.RecurrentGemmaForCausalLM): pass
AutoModelForCausalLM.register(recurrent_gemma_hf.RecurrentGemmaConfig, Mine, exist_ok=True)
config = recurrent_gemma_hf.RecurrentGemmaConfig(**{json.dumps(TINY)})
print(type(AutoModelForCausalLM.from_config(config)).__name__)
"""
    assert run(code).split() == ["Mine"]
