"""`recurrent-gemma doctor`: it finds nothing here, and everything that is broken on purpose."""

import json

import pytest
import torch

from recurrent_gemma_hf import RecurrentGemmaCache, RecurrentGemmaForCausalLM, scan
from recurrent_gemma_hf.cli import doctor
from tests.helpers import run_command


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(doctor, "READ_BYTES", 2**20)


def failures() -> dict[str, object]:
    """The failed checks of float32 and their errors; the command says how many they are."""
    result = run_command("doctor", "--json")
    checks = json.loads(result.stdout)["checks"]
    failed = [check for check in checks if not check["ok"]]
    assert result.exit_code == bool(failed)
    assert (f"{len(failed)} of {len(checks)} checks failed" in result.stderr) == bool(failed)
    return {check["check"]: check["error"] for check in failed if check["dtype"] == "float32"}


def test_nothing_is_broken_here(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    facts = json.loads(run_command("doctor", "--json").stdout)
    assert all(check["ok"] and check["error"] < doctor.LIMITS[check["dtype"]] for check in facts["checks"])
    assert {check["check"] for check in facts["checks"]} == {"scan", "block", "cache", "generate"}
    assert facts["versions"]["torch"] == torch.__version__
    table = run_command("doctor").stdout
    assert max(map(len, table.splitlines())) <= 80
    assert all(name in table for name in facts["versions"])


def test_a_wrong_scan_is_found(monkeypatch):
    def wrong(*arguments, out_BTD=None, **options):
        right(*arguments, **options)
        arguments[3][:, 40:] *= 1.01

    right = scan._chunked_scan
    monkeypatch.setattr(scan, "_chunked_scan", wrong)
    assert failures().keys() == {"scan", "block"}  # no other reads more than 30 tokens at once


def test_a_wrong_file_is_found(monkeypatch):
    def load(*arguments, **options):
        cache = right(*arguments, **options)
        cache.layers[0].recurrent_states[0] *= 1.1
        return cache

    right = RecurrentGemmaCache.load
    monkeypatch.setattr(RecurrentGemmaCache, "load", load)
    assert failures().keys() == {"cache"}


def test_a_wrong_generate_is_found(monkeypatch):
    def generate(self, *arguments, **options):
        output = right(self, *arguments, **options)
        output.sequences[:, 35] = (output.sequences[:, 35] + 1) % 64
        return output

    right = RecurrentGemmaForCausalLM.generate
    monkeypatch.setattr(RecurrentGemmaForCausalLM, "generate", generate)
    assert failures().keys() == {"generate"}


def test_an_exception_is_one_line_and_the_other_checks_run(monkeypatch):
    def load(*arguments, **options):
        raise RuntimeError("no kernel image\nis available \x1b[2J")

    monkeypatch.setattr(RecurrentGemmaCache, "load", load)
    assert failures() == {"cache": r"RuntimeError: no kernel image is available \x1b[2J"}
    assert "FAILED" in run_command("doctor").stdout


def test_nan_is_an_error(monkeypatch):
    right = RecurrentGemmaForCausalLM.forward

    def forward(self, *arguments, use_cache=None, **options):
        output = right(self, *arguments, use_cache=use_cache, **options)
        if use_cache is False:
            output.logits[0, 3] = torch.nan
        return output

    monkeypatch.setattr(RecurrentGemmaForCausalLM, "forward", forward)
    assert failures() == {"block": "nan"}


def test_another_class_from_the_auto_classes_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "_OURS", ["elsewhere"])
    assert "import recurrent_gemma_hf first" in run_command("doctor").stderr
