"""Cards: metadata that the Hub reads, tables that agree with it, a source for every figure, code that runs."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard, ModelCardData

from recurrent_gemma_hf import RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from recurrent_gemma_hf.conversion.cards import CARDS, MARK, PUBLISHED, published_name, write_card
from recurrent_gemma_hf.conversion.tokenizer import write_tokenizer
from tests.helpers import byte_config
from tests.test_conversion_tokenizer import GEMMA, train

PAPER = "https://arxiv.org/abs/2404.07839"
GOOGLES_CARD = "https://ai.google.dev/gemma/docs/recurrentgemma/model_card"
# Table 2 of the paper, as far as its figures could be read somewhere.
BENCHMARKS = set(
    "MMLU HellaSwag PIQA SocialIQA BoolQ WinoGrande CommonsenseQA OpenBookQA ARC-e ARC-c TriviaQA HumanEval MBPP GSM8K "
    "MATH AGIEval".split()
) | {"Natural Questions", "BIG-Bench Hard"}
UNREAD = {"recurrentgemma-2b": {"CommonsenseQA", "OpenBookQA", "ARC-e", "AGIEval", "BIG-Bench Hard"}}
TERMS = "https://ai.google.dev/gemma/terms"
# The identifiers of the Hub that these cards may use (hub-docs: licenses, libraries, tasks).
LICENSES = {"gemma", "apache-2.0", None}
FIELDS = {"base_model", "language", "library_name", "license", "model-index", "pipeline_tag", "tags"}
ALL_CARDS = [*PUBLISHED, "demo", "converted"]
BASE = [name for name in PUBLISHED if not name.endswith("-it")]


def load(name: str) -> ModelCard:
    return ModelCard.load(CARDS / f"{name}.md")


def test_there_is_a_card_for_every_published_model():
    assert {path.stem for path in CARDS.iterdir()} == set(ALL_CARDS)


@pytest.mark.parametrize("name", ALL_CARDS)
def test_metadata_is_what_the_hub_reads(name: str):
    data = load(name).data
    assert isinstance(data, ModelCardData)
    written = data.to_dict()
    assert set(written) <= FIELDS
    assert data.license in LICENSES
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert "recurrent_gemma" in data.tags
    assert ModelCardData(**written).to_dict() == written, "nothing is lost on the way through huggingface_hub"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_under_googles_terms(name: str):
    card = load(name)
    assert card.data.license == "gemma"
    assert TERMS in card.text
    assert "https://ai.google.dev/gemma/prohibited_use_policy" in card.text
    assert card.text.count(MARK) == 1, "where the converter writes what it knows of the checkpoint"
    assert card.data.base_model == (f"google/{name.removesuffix('-it')}" if name.endswith("-it") else None)


@pytest.mark.parametrize("name", BASE)
def test_evaluation_table_and_metadata_hold_the_same_figures(name: str):
    card = load(name)
    assert card.data.model_name == name
    metadata = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert {result.source_url for result in card.data.eval_results} <= {PAPER, GOOGLES_CARD}
    table = re.findall(r"^\| ([\w -]+) \| [^|]+ \| ([\d.]+) \|$", card.text, flags=re.MULTILINE)
    figures = {benchmark: float(value) for benchmark, value in table if not benchmark.startswith("average")}
    assert metadata == figures
    unread = UNREAD.get(name, set())
    assert set(figures) == BENCHMARKS - unread
    assert all(re.search(rf"Not in this table:[^|]*\b{benchmark}\b", card.text) for benchmark in unread)
    assert metadata["MMLU"] == {"recurrentgemma-2b": 38.4, "recurrentgemma-9b": 60.5}[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_table_is_that_of_the_preset(name: str):
    config = RecurrentGemmaConfig.from_preset(name.removesuffix("-it"))
    kinds = config.layers_block_type
    text = load(name).text
    assert f"| {len(kinds)}: {kinds.count('recurrent')} recurrent, {kinds.count('attention')} attention |" in text
    assert f"| {config.hidden_size:,}; RG-LRU the same; MLP branches {config.intermediate_size // 2:,}; " in text
    assert f"{config.num_attention_heads} heads of {config.head_dim}" in text
    assert f"soft-capped at {config.logits_soft_cap:g} |" in text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny instruction-tuned model as the converter leaves it, in two shards."""
    folder = tmp_path_factory.mktemp("cards") / "my-griffin"
    config = byte_config(vocab_size=GEMMA["vocab_size"], num_hidden_layers=4)
    model = RecurrentGemmaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    write_tokenizer(train(folder.parent / "tokenizer.model"), folder, instruction_tuned=True)
    return folder


@pytest.mark.parametrize("name", [*PUBLISHED, "converted"])
def test_the_code_runs_as_written(name: str, checkpoint: Path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", load(name).text, flags=re.DOTALL)
    code, replaced = re.subn(r'^checkpoint = ".*?"', f"checkpoint = {str(checkpoint)!r}", code, flags=re.MULTILINE)
    assert replaced == 1
    names: dict = {}
    exec(compile(code, f"{name}.md", "exec"), names)
    if name.endswith("-it"):
        assert names["written"].numel() > 0, "an untrained model may well write nothing but line breaks"
    else:
        assert "The leaves turn red in autumn because" in capsys.readouterr().out


def test_a_converted_model_gets_its_card(checkpoint: Path):
    write_card(None, checkpoint, converted_from="step-1000, Orbax")
    card = ModelCard.load(checkpoint / "README.md")
    stored = [safetensors.torch.load_file(shard) for shard in checkpoint.glob("*.safetensors")]
    parameters = sum(tensor.numel() for shard in stored for tensor in shard.values())
    assert len(stored) > 1
    for row in (
        "| Checkpoint | not one of those that Google published |",
        "| Converted from | step-1000, Orbax |",
        f"| Parameters | {parameters:,} |",
        "| Stored as | bfloat16 |",
        "| Blocks | 4: 3 recurrent, 1 attention |",
        "| Width | 32; RG-LRU 40 |",
        "| Local attention | a token sees itself and the 8 tokens before it |",
        "| Embeddings | scaled by the square root of the width |",
        "| Logits | soft-capped at 30 |",
    ):
        assert row in card.text
    assert MARK not in card.text
    assert card.data.license is None, "whose license it is, only its owner knows"


def published_folder(path: Path, preset: str, **overrides) -> Path:
    """The config of a published model, beside weights of another size: the card reads headers, not numbers."""
    path.mkdir()
    fields = RecurrentGemmaConfig.from_preset(preset, **overrides).to_dict()
    (path / "config.json").write_text(json.dumps(fields))
    safetensors.torch.save_file(
        {"a": torch.zeros(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16)}, path / "x.safetensors"
    )
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_gets_its_own_card(name: str, tmp_path: Path):
    output = published_folder(tmp_path / "out", name.removesuffix("-it"))
    write_card(name, output, converted_from=f"{name[15:]}, Orbax")
    card = ModelCard.load(output / "README.md")
    assert card.data.to_dict() == load(name).data.to_dict()
    assert f"## This checkpoint\n\n| | |\n|---|---|\n| Checkpoint | {name} |\n" in card.text
    assert "| Parameters | 14 |\n| Stored as | float32, bfloat16 |" in card.text


def test_hawk_has_no_attention_window(tmp_path: Path):
    write_card(None, published_folder(tmp_path / "out", "hawk-paper-7b"), converted_from="hawk, Orbax")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| Blocks | 32: 32 recurrent |" in text
    assert "| Local attention |" not in text
    assert "| Embeddings | not scaled |\n| Logits | not capped |" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("2b", "recurrentgemma-2b"),
        ("2b-it", "recurrentgemma-2b-it"),
        ("9b-it.pt", "recurrentgemma-9b-it"),
        ("recurrentgemma-9b", "recurrentgemma-9b"),
        ("my-2b", None),
        ("2b-finetuned", None),
        ("7b", None),
    ],
)
def test_published_archives_are_known_by_name(name: str, expected: str | None):
    assert published_name(Path("archives") / name) == expected


def test_bad_input_is_named(tmp_path: Path):
    output = published_folder(tmp_path / "out", "recurrentgemma-9b")
    with pytest.raises(ValueError, match="no card for 'gemma-2b': there are recurrentgemma-2b"):
        write_card("gemma-2b", output, converted_from="")
    with pytest.raises(ValueError, match="not recurrentgemma-2b-it: hidden_size is 4096 instead of 2560; intermediate"):
        write_card("recurrentgemma-2b-it", output, converted_from="")
    (output / "x.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="write the weights first"):
        write_card("recurrentgemma-9b", output, converted_from="")
    (output / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="write the model's config first"):
        write_card("recurrentgemma-9b", output, converted_from="")
    assert list(output.iterdir()) == []
