"""More than one process: each check of distributed_worker.py is a test of its own, in fresh processes (gloo)."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest

from recurrent_gemma_hf import RecurrentGemmaConfig
from recurrent_gemma_hf.tensor_parallel import check_tensor_parallel
from tests import distributed_worker

SECONDS = 200  # for one check; the slowest takes some ten alone


@pytest.fixture(scope="module")
def fork_server():
    """A process that has imported all that the checks import, and of which every rank is a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([distributed_worker.__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        # Python 3.11 does not hand sys.path down before it imports what is to be loaded once.
        roots = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, roots)))
        yield context


def launch(
    context: multiprocessing.context.ForkServerContext, name: str, ranks: int, folder: Path, seconds: int = SECONDS
) -> None:
    """Run one check on every rank; fail with what each rank says, the first to fail first."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ((name, rank, ranks, folder, port) for rank in range(ranks))
    processes = [context.Process(target=distributed_worker.run, args=each, daemon=True) for each in arguments]
    end = time.monotonic() + seconds
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    said = sorted(folder.glob("failed.*"), key=lambda path: path.stat().st_mtime_ns)
    said = "\n".join(f"{path.name}: {path.read_text()}" for path in said)
    assert not late, f"{name}: ranks {late} were still running after {seconds} s\n{said}"
    codes = [process.exitcode for process in processes]
    assert codes == [0] * ranks, f"{name}: exit codes {codes}\n{said}"


@pytest.mark.parametrize(("name", "ranks"), distributed_worker.CHECKS)
def test_many_processes_equal_one(fork_server, name: str, ranks: int, tmp_path: Path) -> None:
    launch(fork_server, name, ranks, tmp_path)


@pytest.mark.timeout(900)
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed; it compiles an extension for a minute on its first use",
)
def test_deepspeed_zero_equals_one_process(fork_server, tmp_path: Path) -> None:
    launch(fork_server, "deepspeed_zero", 2, tmp_path, seconds=800)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_rank_fails", r"exit codes \[1, 1\]\s+failed\.1: [^#]*ArithmeticError: this rank cannot add"),
        ("one_rank_hangs", r"ranks \[0, 1\] were still running after 10 s"),
    ],
    ids=["fails", "hangs"],
)
def test_a_rank_that_fails_or_hangs_is_named(fork_server, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        launch(fork_server, name, 2, tmp_path, seconds=10)


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
