"""Run the test suites of Transformers and PEFT on this package's model, beside Gemma and Transformers' RecurrentGemma.

    python tests/outside/run.py transformers
    python tests/outside/run.py peft --subject ours --subject gemma -- -n 2 -k lora

The tests come from the tag of the installed version on GitHub (or a folder, `--source`); nothing of them is kept here.
They need what the suites import: pip install parameterized pytest-xdist datasets diffusers. Subjects are tiny models
with random weights. The result is a table of counts, what fails for ours and not for Gemma, and why ours skips what
Gemma runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import typer
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
SUBJECTS = ["ours", "gemma", "in-tree"]
FILES = {"transformers": "test_suite.py", "peft": "tests/test_decoder_models.py"}


def fetch(suite: str, folder: Path) -> Path:
    """Clone the tests of the installed version of `suite`, and return the folder of the clone."""
    url, tag = f"https://github.com/huggingface/{suite}", f"v{version(suite)}"
    clone = ["git", "clone", "--quiet", "--depth", "1", "--branch", tag, "--filter=blob:none", "--sparse", url]
    subprocess.run([*clone, str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "sparse-checkout", "set", "tests", "utils"], check=True)
    return folder


def run_pytest(suite: str, subject: str, source: Path, folder: Path, arguments: list[str]) -> Path:
    """Run the suite on one subject in a process of its own, and return the path of its JUnit report."""
    report = folder / f"{subject}.xml"
    environment = {
        **os.environ,
        "OUTSIDE_SUBJECT": subject,
        "OUTSIDE_MODEL": str(folder / subject),
        # This project's own tests are a package `tests` too: it must not be found before theirs.
        "PYTHONPATH": os.pathsep.join([str(HERE), str(source), os.environ.get("PYTHONPATH", "")]),
    }
    target = source / FILES[suite]
    if suite == "transformers":
        target = folder / FILES[suite]
        target.write_text("from transformers_suite import SubjectTest  # noqa: F401\n")
    # Without a file of settings: those of the suites ask for plugins that we do not need.
    command = [sys.executable, "-m", "pytest", str(target), "-q", "-c", os.devnull, f"--rootdir={target.parent}"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", *(["-p", "peft_plugin"] if suite == "peft" else [])]
    subprocess.run([*command, *arguments], cwd=folder, env=environment, check=False)
    if not report.exists():
        raise SystemExit(f"pytest wrote no report for {subject}: see its output above")
    return report


def read_report(report: Path) -> dict[str, tuple[str, str]]:
    """Read a JUnit report: the outcome of each test, "passed", "failed" or "skipped", and its message."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found = [child for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = "passed" if not found else "skipped" if found[0].tag == "skipped" else "failed"
        lines = (found[0].get("message") or "").strip().splitlines() if found else []
        name = case.get("name", "").replace(str(report.with_suffix("")), "model")
        outcomes[name] = outcome, lines[0][:160] if lines else ""
    return outcomes


def show(results: dict[str, dict[str, tuple[str, str]]]) -> None:
    """Print the counts of every subject, and the tests on which ours does worse than Gemma."""
    console = Console(width=200)
    table = Table("", *results)
    for outcome in ("passed", "failed", "skipped"):
        counts = [sum(found == outcome for found, _ in tests.values()) for tests in results.values()]
        table.add_row(outcome, *map(str, counts))
    console.print(table)
    ours, gemma = results.get("ours", {}), results.get("gemma", {})
    for title, outcome in (("ours fails, Gemma does not", "failed"), ("ours skips, Gemma does not", "skipped")):
        worse = Table("test", "message", title=title, title_justify="left")
        for name, (found, message) in sorted(ours.items()):
            if found == outcome and gemma.get(name, ("passed", ""))[0] != outcome:
                worse.add_row(name, message)
        console.print(worse, markup=False)


def main(
    suite: Annotated[str, typer.Argument(help="transformers or peft.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Further arguments of pytest, after --.")] = None,
    subject: Annotated[list[str] | None, typer.Option(help="ours, gemma or in-tree; all by default.")] = None,
    source: Annotated[Path | None, typer.Option(help="A checkout of the suite, instead of GitHub.")] = None,
) -> None:
    """Run a suite on each subject and compare."""
    if suite not in FILES:
        raise SystemExit(f"there is no suite {suite!r}; give one of {', '.join(FILES)}")
    if unknown := set(subject or ()) - set(SUBJECTS):
        raise SystemExit(f"there is no subject {', '.join(sorted(unknown))}; give some of {', '.join(SUBJECTS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkout = fetch(suite, folder / suite) if source is None else source.resolve()
        show(
            {
                name: read_report(run_pytest(suite, name, checkout, folder, arguments or []))
                for name in subject or SUBJECTS
            }
        )


if __name__ == "__main__":
    typer.run(main)
