"""Throughput: what is counted, and the transformer it is compared with."""

import json

import pytest
import torch

from recurrent_gemma_hf import PRESETS, RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from recurrent_gemma_hf.evaluation import throughput
from tests.helpers import byte_config, run_command


def test_tokens_are_counted_from_record_to_record(monkeypatch):
    """With a clock that ticks once per reading, every record lasted one second."""
    ticks = iter(range(1000))
    monkeypatch.setattr(throughput, "_now", lambda model: next(ticks))
    model = RecurrentGemmaForCausalLM(byte_config())
    records = list(throughput.measure(model, "ours", prompt=20, tokens=7, every=3, batch_size=2))
    assert [record["length"] for record in records] == [20, 23, 26, 27]
    assert [record["tokens_per_second"] for record in records] == [40, 6, 6, 2]


def test_the_state_of_the_transformer_grows_and_ours_does_not():
    model = RecurrentGemmaForCausalLM(byte_config())
    peer = throughput.transformer_of_equal_size(model.config)
    ours, theirs = (
        [record["cache_bytes"] for record in throughput.measure(each, "", prompt=20, tokens=20, every=10)]
        for each in (model, peer)
    )
    assert ours[0] == ours[1] == ours[2] > 0
    layers, heads, width = 3, model.config.num_key_value_heads, model.config.head_dim
    assert theirs == [2 * layers * heads * width * 4 * length for length in (20, 30, 40)]


def test_a_prompt_is_read_in_chunks_with_the_same_state(monkeypatch):
    model = RecurrentGemmaForCausalLM(byte_config())
    lengths = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **rest: lengths.append(ids.shape[1]) or forward(ids, **rest))
    monkeypatch.setattr(throughput, "chunk_length", lambda *_: 8)
    list(throughput.measure(model, "ours", prompt=20, tokens=2, every=1))
    assert lengths == [8, 8, 4, 1, 1]


@pytest.mark.parametrize("preset", ["recurrentgemma-2b", "recurrentgemma-9b"])
def test_the_transformer_is_of_equal_size(preset):
    config = RecurrentGemmaConfig(**PRESETS[preset])
    with torch.device("meta"):
        ours = RecurrentGemmaForCausalLM(config).num_parameters()
        theirs = throughput.transformer_of_equal_size(config).num_parameters()
    assert theirs == pytest.approx(ours, rel=0.001)


@pytest.mark.parametrize("name", ["prompt", "tokens", "every", "batch_size"])
def test_numbers_below_one_are_refused(name):
    settings = {"prompt": 2, "tokens": 2, "every": 1, "batch_size": 1, name: 0}
    with pytest.raises(ValueError, match="0 must be 1 or more"):
        list(throughput.measure(RecurrentGemmaForCausalLM(byte_config()), "ours", **settings))


def test_the_command_measures_both_and_draws(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra eval is not installed")
    arguments = ["--prompt", 16, "--tokens", 4, "--every", 2, "--output", tmp_path / "out.jsonl"]
    arguments += ["--figure", tmp_path / "figure.png"]
    result = run_command("eval", "throughput", *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["length"] for record in records] == [16, 18, 20] * 2
    assert {record["label"] for record in records} == {"the bundled demo", "transformer of equal size"}
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
