"""Every benchmark runs, on the CPU, tiny: which peers it measures, which it leaves out and why, what it works out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script in this process with `--quick`; returns its rows."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import peers

    monkeypatch.setattr(peers, "RESULTS", tmp_path)

    def run_script(name: str, *arguments: str, module: str | None = None) -> list[dict]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--device", "cpu", *arguments])
        source = (FOLDER / f"{name}.py").read_text()
        namespace = {"__name__": "__main__", "__doc__": f"{name} %(prog)s"}
        exec(compile(source, f"{name}.py", "exec"), namespace)
        files = list(tmp_path.glob("*.jsonl"))
        assert len(files) == 1
        rows = [json.loads(line) for line in files[0].read_text().splitlines()]
        assert all(row["torch"] and row["transformers"] and row["device"] for row in rows)
        return rows

    return run_script


def measured(rows: list[dict]) -> set[str]:
    assert all(("ms" in row) != ("error" in row) for row in rows)
    assert all(row["ms"] > 0 for row in rows if "ms" in row)
    return {row["model"] for row in rows if "ms" in row}


def test_scan(run, tmp_path):
    rows = run("scan")
    assert measured(rows) >= {"ours: portable", "official torch", "official jax"}
    assert {row["model"] for row in rows if "error" in row} >= {"fla hgrn", "mamba-ssm"}
    ours = next(row for row in rows if row["model"] == "ours: portable" and row["what"] == "forward")
    assert ours["GB/s"] == pytest.approx(3 * 64 * 32 * 4 / ours["ms"] / 1e6)
    assert (tmp_path / "scan_cpu_tiny_float32.png").stat().st_size > 1000


def test_block(run):
    rows = run("block")
    assert measured(rows) >= {"ours: portable", "in-tree", "official torch", "official jax", "products", "fused"}
    assert {row["what"] for row in rows} == {"inside", "block", "gate and up", "q, k and v"}
    wide = {row["model"]: row.get("error", "") for row in rows if row.get("lru_width") == 48}
    assert "lru_width" in wide["in-tree"]


TORCH_PEERS = ["ours", "in-tree", "gemma", "gemma, flash", "official torch"]


@pytest.mark.parametrize("name", ["prefill", "train"])
def test_prefill_and_train(run, name: str):
    options = ["--checkpoint"] if name == "train" else []
    rows = run(name, "--peers", *TORCH_PEERS, "official jax", *options)
    assert measured(rows) == {*TORCH_PEERS, "official jax"} - {"gemma, flash"}
    assert next(row for row in rows if row["model"] == "gemma, flash")["error"].startswith("import flash_attn")
    ours = next(row for row in rows if row["model"] == "ours")
    assert ours["times ours"] == 1
    assert ours["share of peak"] > 0


@pytest.mark.parametrize("weights", ["as they are", "int8", "int4"])
def test_decode(run, weights: str):
    peers = TORCH_PEERS if weights == "as they are" else ["ours"]
    dtype = "float32" if weights == "as they are" else "bfloat16"
    rows = run("decode", "--weights", weights, "--dtype", dtype, "--peers", *peers, "--contexts", "8", "1000000")
    assert measured(rows) == set(peers) - {"gemma, flash"}
    far = {row["model"] for row in rows if row.get("context") == 1_000_000 and "ms" in row}
    assert "ours" in far
    assert "gemma" not in far


def test_throughput(run):
    rows = run("throughput", "--peers", "ours", "gemma", "--memory-gb", "0.0003")
    assert measured(rows) == {"ours", "gemma"}
    sizes = {(row["model"], row["sampled"]): row["GB per sequence"] for row in rows}
    assert sizes["gemma", 32] > 2 * sizes["gemma", 8]
    assert sizes["ours", 32] < 1.1 * sizes["ours", 8]


def test_the_gpu_script_names_scripts_and_options_that_exist():
    text = (FOLDER / "gpu.sh").read_text()
    assert subprocess.run(["bash", "-n", str(FOLDER / "gpu.sh")], check=False).returncode == 0
    for line in text.splitlines():
        words = line.split()
        for script in (word for word in words if word.endswith(".py") and "/" not in word):
            assert (FOLDER / script).exists(), script
    assert "--device cuda" in text
