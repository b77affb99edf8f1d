"""Every Triton kernel compiled for an H100 that is not here: what the interpreter lets pass, the compiler does not.

And what a kernel takes: shared memory that a multiprocessor has, registers without more than a few spilled.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton: install the `test` extra")

SCRIPT = Path(__file__).parent / "compile_kernels.py"
SHARED = 227 * 1024


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, SCRIPT, "--targets", "sm_90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(900)
def test_all_kernels_compile_and_fit(facts):
    files = (SCRIPT.parent.parent / "src/recurrent_gemma_hf").glob("*_triton.py")
    kernels = {name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)}
    assert {fact["function"] for fact in facts} == kernels
    for fact in facts:
        assert fact["shared"] <= SHARED, fact
        assert fact["spilled"] <= fact["tolerated"], fact
