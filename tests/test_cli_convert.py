"""`recurrent-gemma convert`: the conversions as commands, their help, and their errors as those of every command.

What is converted is tested in test_conversion.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import build, byte_config
from tests.helpers import run_command as run
from tests.test_upload import REPO, TOKEN, running_hub

CLAIMS = ["--attention-window-size", 8, "--logits-soft-cap", 30, "--scale-embeddings"]
COMMANDS = ("orbax-to-hf", "torch-to-hf", "hf-to-orbax", "hf-to-torch", "upload")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("convert") / "my-griffin"
    build(byte_config(num_hidden_layers=3)).save_pretrained(output)
    return output


@pytest.fixture(scope="module")
def weights(folder: Path) -> Path:
    output = folder.with_name("weights.pt")
    result = run("convert", "hf-to-torch", folder, output)
    assert result.exit_code == 0, result.stderr
    return output


def failure(*arguments: object) -> str:
    """What a command says that fails: one line."""
    result = run("convert", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    line = result.stderr.splitlines()[-1]  # before it, notes of the conversion
    assert line.startswith("recurrent-gemma: ")
    assert "Traceback" not in result.stderr
    return line.removeprefix("recurrent-gemma: ")


@pytest.mark.parametrize("kind", ["orbax", "torch"])
def test_there_and_back(kind: str, folder: Path, tmp_path: Path):
    if kind == "orbax":
        pytest.importorskip("tensorstore", reason="install this package with its `convert` extra")
    assert run("convert", f"hf-to-{kind}", folder, tmp_path / "official").exit_code == 0
    back = run("convert", f"{kind}-to-hf", tmp_path / "official", tmp_path / "hf", *CLAIMS)
    assert (back.exit_code, back.stdout) == (0, f"{tmp_path / 'hf'}: 3 layers of width 32\n")
    assert f"note: without --tokenizer {tmp_path / 'hf'} gets no tokenizer, which the code in its README" in back.stderr
    expected, found = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "hf"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert "# A converted Griffin" in (tmp_path / "hf/README.md").read_text(encoding="utf-8")


def test_the_note_of_a_missing_tokenizer_comes_only_where_there_is_none(folder: Path, tmp_path: Path):
    assert "tokenizer" not in run("convert", "hf-to-torch", folder, tmp_path / "weights.pt").stderr


def test_help_names_the_program():
    program = Path(sys.executable).with_name("recurrent-gemma")
    shown = subprocess.run([program, "convert", "upload", "--help"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: recurrent-gemma convert upload [-h]")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_options_of_the_command(command: str):
    usage = " ".join(run("convert", command, "--help").stdout.split())
    assert f"convert {command} [-h]" in usage
    assert ("--tokenizer FILE" in usage) == command.endswith("-to-hf")
    assert all(option in usage for option in (["--private"] if command == "upload" else ["--preset", "--verify"]))


def test_the_list_of_commands_says_what_each_does():
    shown = " ".join(run("convert", "--help").stdout.split())
    assert all(re.search(rf"{command} +(Convert|Upload) ", shown) for command in COMMANDS)


def test_an_error_is_one_line_and_names_every_field(weights: Path, tmp_path: Path):
    line = failure("torch-to-hf", weights, tmp_path / "hf", "--preset", "recurrentgemma-2b")
    assert line.startswith("the checkpoint contradicts the options: hidden_size: the arrays say 32, preset")
    assert "says 2560; intermediate_size: the arrays say" in line
    assert "lru_width: the arrays say 40, preset recurrentgemma-2b says 2560" in line
    assert "give --preset NAME, or --attention-window-size N" in failure("torch-to-hf", weights, tmp_path / "hf")
    assert failure("hf-to-torch", tmp_path, tmp_path / "out.pt").startswith(f"{tmp_path} has no config.json")
    assert failure("upload", tmp_path, "somebody/x").startswith(f"{tmp_path} holds no checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_cannot_be_understood(weights: Path):
    result = run("convert", "torch-to-hf", weights)
    assert result.exit_code == 2
    assert "error: the following arguments are required: OUTPUT" in result.stderr


@pytest.mark.parametrize(
    ("package", "command"),
    [("tensorstore", "hf-to-orbax"), ("filelock", "hf-to-torch"), ("sentencepiece", "torch-to-hf")],
)
def test_a_package_that_is_missing_is_named_with_the_extra(package, command, folder, weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "recurrent_gemma_hf.conversion.tokenizer", raising=False)
    tokenizer_model = tmp_path / "tokenizer.model"
    tokenizer_model.touch()
    source, options = (weights, ["--tokenizer", tokenizer_model, *CLAIMS]) if "torch-" in command else (folder, [])
    line = failure(command, source, tmp_path / "out", *options)
    assert line == f"this needs {package}, which is not installed: pip install 'recurrent-gemma-hf[convert]'"
    assert list(tmp_path.iterdir()) == [tokenizer_model]


def test_an_upload_and_what_to_do_after_one_that_failed(folder: Path, weights: Path, tmp_path: Path):
    with running_hub() as hub:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        kept |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}

        def convert(*arguments: object) -> subprocess.CompletedProcess:
            command = [sys.executable, "-m", "recurrent_gemma_hf.cli", "convert", *map(str, arguments)]
            return subprocess.run(command, env=kept, capture_output=True, text=True, timeout=120)

        hub.failures[f"POST /api/models/{REPO}/commit"] = [507]
        failed = convert("torch-to-hf", weights, tmp_path / "hf", *CLAIMS, "--push-to-hub", REPO)
        assert failed.returncode == 2
        advice = f"{tmp_path / 'hf'} is complete; push it with: recurrent-gemma convert upload {tmp_path / 'hf'} {REPO}"
        assert failed.stderr.splitlines()[-1].endswith(advice)
        assert hub.commits == 0
        done = convert(*advice.partition("recurrent-gemma convert ")[2].split())
        assert (done.returncode, done.stdout) == (0, f"pushed: {hub.url}/{REPO}/commit/1\n"), done.stderr
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files)
