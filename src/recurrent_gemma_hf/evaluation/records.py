"""Results as JSON lines, so that an interrupted run loses nothing and can be continued."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Return the device and the versions of a measurement."""
    import torch

    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_cpu()}, {torch.get_num_threads()} threads"
    )
    return {
        "device": device,
        "versions": {name: version(name) for name in ("recurrent-gemma-hf", "torch", "transformers")},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file of JSON lines, none if it does not exist; raise ValueError naming a broken line."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}); remove the line or name another file"
            ) from error
    return records


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append one line, flushed to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
