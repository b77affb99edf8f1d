"""More than one process: the checks of distributed_worker.py, one launch of torchrun (gloo) per number of processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recurrent_gemma_hf import RecurrentGemmaConfig
from recurrent_gemma_hf.tensor_parallel import check_tensor_parallel
from tests.distributed_worker import CHECKS

WORKER = Path(__file__).with_name("distributed_worker.py")


def launch(processes: int, folder: Path, *checks: str) -> subprocess.CompletedProcess:
    root = str(WORKER.parent.parent)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }  # fmt: skip
    # A standalone launch takes a free port by itself.
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={processes}",
    ]
    command = [*torchrun, str(WORKER), str(folder), *checks]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def why(run: subprocess.CompletedProcess, folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("failed.*"))) or run.stderr[-6000:]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_equal_one(processes: int, tmp_path: Path, subtests: pytest.Subtests) -> None:
    run = launch(processes, tmp_path)
    report = tmp_path / "passed"
    passed = report.read_text().split() if report.exists() else []
    for check in CHECKS[processes]:
        with subtests.test(check.__name__):
            assert check.__name__ in passed, "failed, or did not run after a failure: see the end"
    assert run.returncode == 0, why(run, tmp_path)


@pytest.mark.timeout(900)
def test_deepspeed_zero_equals_one_process(tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; it compiles an extension for a minute on its first use")
    run = launch(2, tmp_path, "deepspeed_zero")
    assert run.returncode == 0, why(run, tmp_path)


@pytest.mark.parametrize(
    ("ranks", "changes", "match"),
    [
        (4, {}, "over 4 ranks needs num_attention_heads=10 to be a multiple of 4"),
        (2, {"intermediate_size": 2 * 4097}, "intermediate_size // 2=4097 to be a multiple of 2"),
        (2, {"vocab_size": 99_999}, "vocab_size=99999 to be a multiple of 2"),
        (2, {"num_key_value_heads": 2}, "this model has num_key_value_heads=2; use FSDP"),
    ],
)
def test_tensor_parallelism_that_does_not_divide_is_refused(ranks: int, changes: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_tensor_parallel(RecurrentGemmaConfig(**changes), ranks)


def test_tensor_parallelism_takes_what_divides() -> None:
    check_tensor_parallel(RecurrentGemmaConfig(), 2)
    check_tensor_parallel(RecurrentGemmaConfig.from_preset("recurrentgemma-9b"), 16)
    check_tensor_parallel(RecurrentGemmaConfig.from_preset("hawk-paper-7b", num_key_value_heads=2), 8)
