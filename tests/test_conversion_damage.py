"""Damaged and malformed checkpoints, runs that are killed, and two runs at once: one error, and nothing half made."""

import contextlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recurrent_gemma_hf import RecurrentGemmaForCausalLM
from tests.helpers import FUZZ_ROUNDS, build, byte_config
from tests.test_conversion import (
    convert,
    flax_tree,
    hf_to_official,
    official_state,
    official_to_hf,
    save_orbax,
    sources,
)

SCRIPTS = Path(__file__).parents[1] / "conversion"
CONFIG = byte_config(num_hidden_layers=3)
OPTIONS = ["--attention-window-size", "8", "--logits-soft-cap", "30", "--scale-embeddings"]


def run(direction, dialect: str, checkpoint: Path, output: Path, *options: str) -> str:
    """The error of a conversion, or "" for none."""
    try:
        convert.main(direction, dialect, "", [str(checkpoint), str(output), *options])
    except SystemExit as end:
        assert not output.exists()
        return str(end.code)
    return ""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.save(official_state(CONFIG, "float32"), folder / "weights.pt")
    build(CONFIG).save_pretrained(folder / "hf", max_shard_size="50KB")
    return {
        "torch": folder / "weights.pt",
        "jax": save_orbax(folder / "orbax", {"params": flax_tree(CONFIG, "float32")}),
        "jax, files": save_orbax(folder / "files", {"params": flax_tree(CONFIG, "float32")}, use_ocdbt=False),
        "hf": folder / "hf",
    }


@pytest.fixture
def copied(checkpoints, tmp_path):
    def copy(name: str) -> Path:
        target = tmp_path / checkpoints[name].name
        if checkpoints[name].is_dir():
            shutil.rmtree(target, ignore_errors=True)
            return shutil.copytree(checkpoints[name], target)
        return shutil.copy(checkpoints[name], target)

    return copy


# --- flipped bits -----------------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_torch_file_is_found_or_harmless(checkpoints, tmp_path):
    """Harmless: in a name that nobody reads, or in the gaps that align the members."""
    content, draw = checkpoints["torch"].read_bytes(), random.Random(0)
    expected, found = sources.TorchSource(checkpoints["torch"]), 0
    for _ in range(60 * FUZZ_ROUNDS):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (tmp_path / "weights.pt").write_bytes(changed)
        error = run(official_to_hf, "torch", tmp_path / "weights.pt", tmp_path / "out", *OPTIONS)
        if error:
            assert error.startswith("error: ")
            assert "weights.pt" in error
            found += 1
        else:
            source = sources.TorchSource(tmp_path / "weights.pt")
            assert source.shapes == expected.shapes
            assert all(torch.equal(source.read(name), expected.read(name)) for name in source.shapes)
            shutil.rmtree(tmp_path / "out")
    assert found > 40 * FUZZ_ROUNDS


def test_what_has_no_checksum_is_said(checkpoints, tmp_path, capsys):
    assert run(official_to_hf, "jax", checkpoints["jax"], tmp_path / "out", *OPTIONS) == ""
    assert "note: an Orbax checkpoint has no checksums of its weights" in capsys.readouterr().err
    assert run(hf_to_official, "torch", checkpoints["hf"], tmp_path / "back.pt") == ""
    assert "note: a safetensors folder has no checksums of its weights" in capsys.readouterr().err
    assert run(official_to_hf, "torch", checkpoints["torch"], tmp_path / "again", *OPTIONS) == ""
    assert "checksums" not in capsys.readouterr().err.replace("checksums:", "")


# --- malformed metadata -----------------------------------------------------------------------------------------------

ODD = [
    None, True, -1, 0, 3, 1.5, float("nan"), 2**31, 10**30, "", "x", "\ud800", [], [1], [None], {}, {"a": 1}, [[]],
    {"0": {}}, "9" * 5000,
]  # fmt: skip


def odd_json(draw: random.Random, value):
    """`value` with one place of it replaced."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        return {**value, key: odd_json(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        i = draw.randrange(len(value))
        return [*value[:i], odd_json(draw, value[i]), *value[i + 1 :]]
    return draw.choice(ODD)


def malformed(draw: random.Random, file: Path) -> bytes:
    content = file.read_bytes()
    kind = draw.randrange(8)
    if kind == 0:
        return content[: draw.randrange(len(content))]
    if kind == 1:
        return draw.choice([b"", b"null", b"[]", b"[" * 100_000, b"\xff\xfe", b"{}", b'"x"', b"1e999"])
    return json.dumps(odd_json(draw, json.loads(content))).encode()


FILES = {
    "jax": ("_METADATA", official_to_hf, "jax"),
    "jax, files": (".zarray", official_to_hf, "jax"),
    "hf": ("model.safetensors.index.json", hf_to_official, "torch"),
    "hf ": ("config.json", hf_to_official, "torch"),
}


@pytest.mark.parametrize("kind", FILES)
def test_malformed_metadata_is_one_error(kind, copied, tmp_path):
    name, direction, dialect = FILES[kind]
    draw, errors = random.Random(kind), 0
    checkpoint = copied(kind.strip())
    options = OPTIONS if direction is official_to_hf else []
    for _ in range(25 * FUZZ_ROUNDS):
        file = draw.choice(sorted(checkpoint.rglob(name)))
        before = file.read_bytes()
        file.write_bytes(malformed(draw, file))
        output = tmp_path / "out"
        error = run(direction, dialect, checkpoint, output, *options)
        assert error == "" or (error.startswith("error: ") and len(error) < 4100)
        errors += bool(error)
        shutil.rmtree(output, ignore_errors=True)
        output.unlink(missing_ok=True)
        file.write_bytes(before)
    assert errors


@pytest.mark.parametrize("outside", ["../weights.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_an_index_that_points_outside_its_folder_is_refused(outside, copied, tmp_path):
    checkpoint = copied("hf")
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = outside
    index.write_text(json.dumps(content))
    error = run(hf_to_official, "torch", checkpoint, tmp_path / "out.pt")
    assert f"names {outside}, outside its folder: refused" in error


@pytest.mark.parametrize("layer", ["999999999", "9" * 30, "7"])
def test_a_layer_of_a_strange_number(layer, tmp_path):
    state = official_state(CONFIG, "float32")
    torch.save({**state, f"blocks.{layer}.mlp_block.ffw_up.w": torch.zeros(2, 32, 48)}, tmp_path / "weights.pt")
    start = time.perf_counter()
    error = run(official_to_hf, "torch", tmp_path / "weights.pt", tmp_path / "out", *OPTIONS)
    assert "the checkpoint has none, or both, in blocks.3" in error
    assert time.perf_counter() - start < 60  # a billion layers would take the memory and minutes


def test_chunks_that_are_larger_than_their_array_are_refused(copied, tmp_path):
    checkpoint = copied("jax, files")
    file = next(checkpoint.rglob("*final_norm*/.zarray"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "chunks": [2**31]}))
    error = run(official_to_hf, "jax", checkpoint, tmp_path / "out", *OPTIONS)
    assert "has chunks of (2147483648,) in an array of (32,)" in error


def test_a_safetensors_header_of_any_length(copied, tmp_path):
    checkpoint = copied("hf")
    file = sorted(checkpoint.glob("*.safetensors"))[0]
    content = file.read_bytes()
    for size in (0, 7, 2**31, 2**63, len(content)):
        file.write_bytes(struct.pack("<Q", size) + content[8:])
        error = run(hf_to_official, "torch", checkpoint, tmp_path / "out.pt")
        assert error.startswith("error: cannot open")


# --- two runs, and runs that are killed -------------------------------------------------------------------------------


def command(checkpoint: Path, output: Path) -> list[str]:
    return [sys.executable, str(SCRIPTS / "torch_to_hf.py"), str(checkpoint), str(output), *OPTIONS]


def test_two_runs_into_one_output(checkpoints, tmp_path, monkeypatch):
    """The second is told, while the first is writing; the first is not disturbed."""
    original, told = convert._copy, []

    def copy(*arguments):
        monkeypatch.setattr(convert, "_copy", original)
        told.append(subprocess.run(command(checkpoints["torch"], tmp_path / "out"), capture_output=True, text=True))
        return original(*arguments)

    monkeypatch.setattr(convert, "_copy", copy)
    assert run(official_to_hf, "torch", checkpoints["torch"], tmp_path / "out", *OPTIONS) == ""
    assert told[0].returncode == 1
    assert "error: another process writes" in told[0].stderr
    assert "Traceback" not in told[0].stderr
    RecurrentGemmaForCausalLM.from_pretrained(tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


# Runs a conversion in a fork for every line of its input: a fork is there at once, and JAX, which this process has
# imported, must not be forked.
FORKS = """
import os, sys
from recurrent_gemma_hf.conversion import convert
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        convert.main(convert.official_to_hf, "torch", "", sys.argv[1:])
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_a_run_that_is_killed_leaves_nothing_that_loads_and_nothing_in_the_way(checkpoints, tmp_path):
    """50 runs, killed after a random time; then the next one is as good as the first."""
    draw, output, whole, killed = random.Random(0), tmp_path / "out", tmp_path / "whole", 0
    assert run(official_to_hf, "torch", checkpoints["torch"], whole, *OPTIONS) == ""
    expected = load_file(whole / "model.safetensors")
    arguments = [sys.executable, "-c", FORKS, checkpoints["torch"], output, *OPTIONS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([str(part) for part in arguments], **pipes) as forks:
        for _ in range(50):
            forks.stdin.write("\n")
            forks.stdin.flush()
            child = int(forks.stdout.readline())
            time.sleep(draw.uniform(0.0, 0.08))
            with contextlib.suppress(ProcessLookupError):  # it was finished before
                os.kill(child, signal.SIGKILL)
            status = forks.stdout.readline()
            while not status.strip().isdecimal():  # the line of a run that was finished before
                status = forks.stdout.readline()
            killed += int(status) == signal.SIGKILL
            if output.exists():
                RecurrentGemmaForCausalLM.from_pretrained(output)
                found = load_file(output / "model.safetensors")
                assert all(torch.equal(found[name], expected[name]) for name in expected)
                shutil.rmtree(output)
        forks.stdin.close()
    assert killed
    assert run(official_to_hf, "torch", checkpoints["torch"], output, *OPTIONS) == ""
    found = load_file(output / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "whole"]
