"""Loss against position: the same numbers as one forward over everything, averaged in the right bins.

Shape suffixes: S segments, T positions.
"""

import json

import pytest
import torch

from recurrent_gemma_hf import RecurrentGemmaForCausalLM, demo_checkpoint
from recurrent_gemma_hf.evaluation import position_loss, streaming
from recurrent_gemma_hf.evaluation.position_loss import Wanted
from tests.helpers import byte_config, run_command

TEXT = "ROMEO:\nWhat, shall this speech be spoke for our excuse? Or shall we on without apology?\n"


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("block_types", [("recurrent", "recurrent", "attention"), ("recurrent",)])
def test_streamed_losses_equal_one_long_forward(chunk, block_types):
    model = RecurrentGemmaForCausalLM(byte_config(block_types=block_types)).eval()
    tokens_BT = torch.randint(265, (2, 50))
    with torch.no_grad():
        logits_BTV = model(tokens_BT, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), tokens_BT[:, 1:], reduction="none")
    found = torch.cat(list(streaming.streamed_losses(model, tokens_BT, chunk)), dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_nothing_to_predict_is_refused():
    model = RecurrentGemmaForCausalLM(byte_config())
    with pytest.raises(ValueError, match="1 tokens leave nothing to predict"):
        list(streaming.streamed_losses(model, torch.zeros(1, 1, dtype=torch.long)))


def test_chunks_keep_the_logits_at_a_gigabyte():
    assert streaming.chunk_length(1024) == 4096
    assert streaming.chunk_length(256_000) == 1048
    assert streaming.chunk_length(256_000, batch_size=8) == 131
    assert streaming.chunk_length(1 << 40) == 1


def test_the_memory_of_a_stream_is_constant(monkeypatch):
    model = RecurrentGemmaForCausalLM(byte_config())
    sizes = []

    class Watched(streaming.RecurrentGemmaCache):
        def begin_forward(self, *arguments, **settings):
            super().begin_forward(*arguments, **settings)
            sizes.append(self.memory_footprint())

    monkeypatch.setattr(streaming, "RecurrentGemmaCache", Watched)
    list(streaming.streamed_losses(model, torch.randint(265, (1, 2000)), 100))
    assert len(sizes) == 20
    assert len(set(sizes[1:])) == 1  # the first forward allocates


@pytest.mark.parametrize("length", [1, 2, 3, 100, 1024, 1_000_000])
@pytest.mark.parametrize("bins_per_octave", [1, 2, 5])
def test_bins_cover_every_position_once(length, bins_per_octave):
    edges = position_loss.bin_edges(length, bins_per_octave)
    assert edges[0] == 0
    assert edges[-1] == length
    assert edges == sorted(set(edges))


def test_bins_of_one_octave_are_powers_of_two():
    assert position_loss.bin_edges(20, 1) == [0, 1, 2, 4, 8, 16, 20]


def test_each_bin_has_the_mean_of_its_positions():
    losses_ST = torch.arange(1.0, 21.0).repeat(6, 1) + torch.arange(6.0)[:, None]
    rows = position_loss.summarise(losses_ST, Wanted(length=20, bins_per_octave=1))
    assert [(row["first"], row["last"]) for row in rows] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 20)]
    assert [row["loss"] for row in rows] == pytest.approx([3.5, 4.5, 6.0, 9.0, 15.0, 21.0])
    assert [row["tokens"] for row in rows] == [6, 6, 12, 24, 48, 24]


def test_the_band_covers_the_truth_as_often_as_it_says():
    """Segments with a mean of their own around 2: the 90% band of the mean holds 2 in about 90% of all experiments."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for seed in range(40):
        means = 2 + torch.randn(30, 1, generator=generator)
        losses_ST = means + 0.1 * torch.randn(30, 4, generator=generator)
        (*_, row) = position_loss.summarise(losses_ST, Wanted(length=4, bins_per_octave=1, confidence=0.9, seed=seed))
        inside += row["low"] <= 2 <= row["high"]
    assert 31 <= inside <= 39


def test_few_segments_are_resampled_in_blocks():
    """One segment alone has a band too, from its blocks of tokens; equal tokens have none."""
    generator = torch.Generator().manual_seed(0)
    (*_, varied) = position_loss.summarise(torch.rand(1, 4096, generator=generator), Wanted(length=4096))
    (*_, equal) = position_loss.summarise(torch.full((1, 4096), 1.5), Wanted(length=4096))
    assert varied["low"] < varied["loss"] < varied["high"]
    assert varied["high"] - varied["low"] < 0.1
    assert equal["low"] == equal["high"] == 1.5


def test_segments_begin_with_bos_and_follow_the_text(demo_tokenizer):
    segments_ST = position_loss.cut_segments([TEXT * 4, TEXT * 2], demo_tokenizer, Wanted(length=30))
    ids = [demo_tokenizer(text, add_special_tokens=False).input_ids for text in (TEXT * 4, TEXT * 2)]
    assert len(segments_ST) == len(ids[0]) // 30 + len(ids[1]) // 30
    assert (segments_ST[:, 0] == demo_tokenizer.bos_token_id).all()
    assert segments_ST[0, 1:].tolist() == ids[0][:30]
    assert segments_ST[1, 1:].tolist() == ids[0][30:60]
    assert segments_ST[len(ids[0]) // 30, 1:].tolist() == ids[1][:30]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 1000}, r"the longest text has \d+ tokens, 1000 were asked for"),
        ({"length": 20, "segments": 99}, r"there are \d segments of 20 tokens, 99 were asked for"),
        ({"length": 0}, "length 0 must be 1 or more"),
        ({"length": 5, "segments": 0}, "segments 0 must be 1 or more"),
        ({"length": 5, "confidence": 1.0}, "confidence 1.0 must be above 0 and below 1"),
        ({"length": 5, "bins_per_octave": 0}, "bins per octave 0 must be 1 or more"),
    ],
)
def test_what_the_text_cannot_give_is_refused(demo_tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        position_loss.cut_segments([TEXT * 2], demo_tokenizer, Wanted(**settings))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 20)
    return path


def test_the_command_measures_writes_and_draws(text_file, tmp_path, demo_tokenizer):
    pytest.importorskip("matplotlib", reason="the extra eval is not installed")
    output, figure = tmp_path / "out.jsonl", tmp_path / "figure.png"
    arguments = ("--text", text_file, "--length", 64, "--dtype", "float32", "--output", output, "--figure", figure)
    result = run_command("eval", "position", *arguments)
    assert result.exit_code == 0, result.output
    (record,) = [json.loads(line) for line in output.read_text().splitlines()]
    model = RecurrentGemmaForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32).eval()
    segments_ST = position_loss.cut_segments([TEXT * 20], demo_tokenizer, Wanted(length=64))
    with torch.no_grad():
        logits = model(segments_ST[:, :-1], use_cache=False).logits
    losses_ST = torch.nn.functional.cross_entropy(logits.transpose(1, 2), segments_ST[:, 1:], reduction="none")
    assert record["mean_loss"] == pytest.approx(losses_ST.mean().item(), abs=1e-4)
    assert record["bins"][0]["loss"] == pytest.approx(losses_ST[:, 0].mean().item(), abs=1e-4)
    assert record["bins"][-1]["last"] == 64
    assert record["segments"] == len(segments_ST)
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", 100_000], "tokens, 100000 were asked for; give a longer text or a length of at most"),
        (["--length", 10, "--part", "0.9:0.1"], "part 0.9:0.1 must be two shares from 0 to 1"),
        (
            ["--length", 10, "--part", "0.5"],
            "--part '0.5' is not a part of a text; give two shares, for instance 0.9:1",
        ),
        (["--length", 10, "--text", "nowhere.txt"], "there is no file nowhere.txt; give a text file"),
    ],
)
def test_the_command_names_mistakes(text_file, arguments, message):
    result = run_command("eval", "position", "--text", text_file, *arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe\x00", "is not UTF-8"), (b" \n", "has no text in the part")]
)
def test_a_file_that_is_no_text_is_refused(tmp_path, content, message):
    (tmp_path / "odd.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        position_loss.read_documents([tmp_path / "odd.txt"])
