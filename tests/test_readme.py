"""Every Python block of the README and of docs/training.md runs as written, one after another, in a fresh process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("page", "blocks", "written"),
    [
        ("README.md", 5, "my-griffin/modeling_recurrent_gemma.py"),  # the shared folder carries its code
        ("docs/training.md", 3, "griffin-adapter/adapter_config.json"),
    ],
)
def test_python_blocks_run_as_written(tmp_path: Path, page: str, blocks: int, written: str):
    if page == "docs/training.md":
        pytest.importorskip("peft", reason="the page is about adapters too: install the train extra")
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(found) >= blocks, f"has {page} lost its examples?"
    script = tmp_path / "page.py"
    script.write_text("\n".join(found), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / written).is_file()
