"""The rules of the house: which file may import which. Read from the source, so that no import has to run."""

import ast
from pathlib import Path

import pytest

import recurrent_gemma_hf

PACKAGE = Path(recurrent_gemma_hf.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What a checkpoint carries to the Hub, as its own code. Each file imports files above it only, wherever the import
# stands: at its head, or in a function that needs Triton.
CARRIED = (
    "transformers_compat configuration_recurrent_gemma backend cross_entropy triton_tools scan_triton scan "
    "causal_conv1d_triton causal_conv1d rg_lru_triton rg_lru_step_triton rg_lru cpu_linear "
    "cache_file cache_recurrent_gemma inputs attention tensor_parallel generation modeling_recurrent_gemma"
).split()
OPERATIONS = CARRIED[CARRIED.index("backend") : CARRIED.index("cache_recurrent_gemma")]


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of everything that a file imports: relative modules as "." and their path."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(module, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("name", CARRIED)
def test_a_carried_file_imports_files_above_it_alone(name: str):
    ours = {module[1:] or imported for module, imported in imports(PACKAGE / f"{name}.py") if module.startswith(".")}
    assert ours <= set(CARRIED[: CARRIED.index(name)])


def test_the_model_reaches_every_carried_file():
    """The order above names what the model imports, directly or not, and nothing else."""
    reached, waiting = set(), ["modeling_recurrent_gemma"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [m[1:] or n for m, n in imports(PACKAGE / f"{name}.py") if m.startswith(".")]
    assert reached == set(CARRIED)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_know_neither_transformers_nor_the_configuration(name: str):
    modules = {module for module, _ in imports(PACKAGE / f"{name}.py")}
    assert not {m for m in modules if m.split(".")[0] == "transformers" or m.startswith((".config", ".transformers"))}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_private_name_crosses_a_file(path: Path):
    private = {name for module, name in imports(path) if module.startswith(".") and name.startswith("_")}
    assert not private


def test_nobody_imports_the_command_line():
    """It imports everything; evaluation/ is a library, whose commands are in cli/evaluate.py."""
    others = [path for path in FILES if path.parent.name != "cli"]
    found = [(path.name, module, name) for path in others for module, name in imports(path)]
    ours = [entry for entry in found if entry[1].startswith((".", PACKAGE.name))]
    assert not [(file, module, name) for file, module, name in ours if "cli" in (*module.split("."), name)]


@pytest.mark.parametrize("name", ["context_parallel", "vllm/model", "vllm/plugin"])
def test_users_of_the_parts_do_not_import_the_model_file(name: str):
    found = {entry for names in imports(PACKAGE / f"{name}.py") for entry in names}
    assert not {entry for entry in found if entry.split(".")[-1] == "modeling_recurrent_gemma"}
