"""What `recurrent-gemma memory` computes, against the allocator and against arithmetic by hand."""

import json
import sys
from pathlib import Path

import pytest
import torch

from recurrent_gemma_hf import RecurrentGemmaConfig
from recurrent_gemma_hf.memory import STRATEGIES, training_memory
from tests.helpers import load_file, run_command, tiny_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GB = 10**9


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return load_file(BENCHMARKS / "memory.py", "memory_benchmark")


# Transformers 5.23 has new names for these, which 5.17 and peft do not know.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "qlora"])
def test_the_peak_is_the_allocators(benchmark, strategy, checkpointing):
    """To a tenth: what layers need for a moment is not counted."""
    config = benchmark.our_config(192, 6, 4, 256, 4000)
    computed = training_memory(config, strategy, tokens=512, checkpointing=checkpointing)
    measured = benchmark.measured_peak(config, strategy, 512, checkpointing)
    assert 0.9 < computed.peak / measured < 1.05


def test_weights_of_the_2b_model_by_hand():
    """Three of its layers: two recurrent ones and one of attention."""
    config = RecurrentGemmaConfig.from_preset("recurrentgemma-2b", num_hidden_layers=3)
    E, F, H = 2560, 7680, 10
    mlp, norms = 3 * E * F, 2 * E
    recurrent = 3 * E * E
    attention = 2 * E * E + 2 * E * 256
    matrices = 3 * mlp + 2 * recurrent + attention
    biases = 3 * (2 * F + E) + 2 * 3 * E + E
    rest = 256_000 * E + E + 3 * norms + biases + 2 * (E * 5 + E + 2 * (E * E // H + E))
    full = training_memory(config, "full-fp32", tokens=8)
    assert full.weights == full.gradients == full.optimizer // 2 == 4 * (matrices + rest)
    assert training_memory(config, "full-bf16", tokens=8).weights == 2 * (matrices + rest)
    r = 16
    adapters = r * (3 * 3 * (E + F) + 2 * 3 * 2 * E + 2 * 2 * E + 2 * (E + 256))
    lora = training_memory(config, "lora", tokens=8, rank=r)
    assert lora.gradients == lora.optimizer // 2 == 4 * adapters
    assert lora.weights == 2 * (matrices + rest) + 4 * adapters
    qlora = training_memory(config, "qlora", tokens=8, rank=r)
    assert qlora.weights == pytest.approx(matrices * (0.5 + 1 / 64 + 1 / 4096) + 2 * rest + 4 * adapters, rel=1e-9)
    assert qlora.activations == lora.activations


def test_what_grows_with_what():
    config = tiny_config()
    base = training_memory(config, "full-bf16", tokens=64)
    assert training_memory(config, "full-bf16", tokens=64, batch_size=2).activations == pytest.approx(
        2 * base.activations, rel=0.01
    )
    checkpointed = training_memory(config, "full-bf16", tokens=64, checkpointing=True)
    assert checkpointed.activations < 0.5 * base.activations
    assert (checkpointed.weights, checkpointed.optimizer) == (base.weights, base.optimizer)
    sharded = training_memory(config, "full-bf16", tokens=64, devices=4)
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(sharded, part) == pytest.approx(getattr(base, part) / 4, abs=1)
    assert sharded.activations == base.activations
    assert base.gathered == 0 < sharded.gathered <= base.weights


def test_every_strategy_of_the_published_models():
    """8k tokens: LoRA with checkpointing fits the 2B model into 12 GB and QLoRA the 9B one into 16, as the docs say."""
    two, nine = (RecurrentGemmaConfig.from_preset(f"recurrentgemma-{size}") for size in ("2b", "9b"))
    assert training_memory(two, "lora", checkpointing=True).peak < 12 * GB
    assert training_memory(nine, "qlora", checkpointing=True).peak < 16 * GB
    assert training_memory(two, "full-amp", checkpointing=True, devices=8).peak < 24 * GB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "lisa"}, "strategy='lisa' is unknown; there are full-fp32, full-amp, full-bf16, lora, qlora"),
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"devices": -2}, "devices=-2 must be at least 1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        training_memory(tiny_config(), **{"strategy": "lora", **options})


def test_the_command():
    lines = run_command("memory", "--tokens", 100, "--strategy", "lora", "--json").stdout.splitlines()
    assert [json.loads(line)["checkpointing"] for line in lines] == [False, True]
    table = run_command("memory", "--tokens", 100, env={"COLUMNS": "80"}).stdout
    assert all(table.count(f" {strategy} ") == 2 for strategy in STRATEGIES)
    assert "in MB" in table
    for devices in (1, 8):  # no head and no number is cut off
        wide = run_command("memory", "--model", "recurrentgemma-9b", "--devices", devices, env={"COLUMNS": "80"}).stdout
        assert "…" not in wide
        assert all(len(line.rstrip()) <= 80 for line in wide.splitlines())
    assert "1 x 100 tokens" in table
    failed = run_command("memory", "--strategy", "lisa")
    assert failed.exit_code == 2
    assert "there are full-fp32" in failed.stderr
    assert not torch.cuda.is_available() or torch.cuda.memory_allocated() == 0


def test_without_peft_the_strategies_that_need_it_are_left_out_and_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    done = run_command("memory", "--tokens", 100, "--json")
    assert done.exit_code == 0
    assert {json.loads(line)["strategy"] for line in done.stdout.splitlines()} == {"full-fp32", "full-amp", "full-bf16"}
    assert "left out: lora, qlora, whose adapters are peft's; pip install peft" in done.stderr
    alone = run_command("memory", "--strategy", "lora")
    assert alone.exit_code == 2
    assert "pip install peft" in alone.stderr
