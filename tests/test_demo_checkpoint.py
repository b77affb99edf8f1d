"""The checkpoint that ships with the package: what it is, that it loads, and that it has learned what its card says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from recurrent_gemma_hf import RecurrentGemmaForCausalLM, demo_checkpoint
from tests.helpers import load_file

ROOT = Path(__file__).parents[1]
LOGS = {name: ROOT / f"benchmarks/results/demo_training_{name}.jsonl" for name in ("griffin", "hawk", "transformer")}

# From the validation part of the text (The Taming of the Shrew, act IV, scene 5), which was not trained on.
EXCERPT = """PETRUCHIO:
Why, how now, Kate! I hope thou art not mad:
This is a man, old, wrinkled, faded, wither'd,
And not a maiden, as thou say'st he is.

KATHARINA:
Pardon, old father, my mistaking eyes,
That have been so bedazzled with the sun
That everything I look on seemeth green:
Now I perceive thou art a reverend father;
Pardon, I pray thee, for my mad mistaking.

PETRUCHIO:
Do, good old grandsire; and withal make known
Which way thou travellest: if along with us,
We shall be joyful of thy company.
"""
# Nats per token. The checkpoint reaches 3.06; knowing only how frequent each token is gives 5.79, an untrained model 9.
EXCERPT_BOUND = 3.2

HARD_STRINGS = [
    "ROMEO:\nBut, soft! what light through yonder window breaks?",
    "  two spaces,\ttabs\t\t and newlines\n\n\n at the end \n",
    "\r\n carriage returns, a \0 and a \x7f",
    "emoji 😀👩‍👩‍👧, accents é e\u0301, 漢字, عربى",
    "don't 'tis I'll 12345 <b> & --",
    "",
]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo_checkpoint())


@pytest.fixture(scope="module")
def script():
    """The training script as a module."""
    return load_file(ROOT / "examples/train_demo.py")


def excerpt_loss(model, demo_tokenizer) -> float:
    ids = demo_tokenizer(EXCERPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def test_folder_is_small_and_complete(model):
    files = {path.name: path.stat().st_size for path in Path(demo_checkpoint()).iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(files) == {*expected, "README.md"}
    assert sum(files.values()) <= 6e6
    assert type(model) is RecurrentGemmaForCausalLM
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert 1e6 <= model.num_parameters() <= 3e6
    assert set(model.config.layers_block_type) == {"recurrent", "attention"}


@pytest.mark.parametrize("text", HARD_STRINGS)
def test_tokenizer_round_trips(demo_tokenizer, text):
    ids = demo_tokenizer(text)["input_ids"]
    assert ids[0] == demo_tokenizer.bos_token_id
    assert demo_tokenizer.decode(ids, skip_special_tokens=True) == text


def test_without_its_tokenizer_config_the_tokens_stay_the_same(demo_tokenizer, tmp_path):
    """The config names the tokenizer's class; Transformers would take this model type's, GemmaTokenizer."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(Path(demo_checkpoint()) / name, tmp_path)
    text = "First Citizen: before we proceed"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == demo_tokenizer(text)["input_ids"]


def test_special_tokens_are_gemmas(demo_tokenizer, model):
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    assert [getattr(demo_tokenizer, name) for name in names] == [0, 1, 2]
    assert [getattr(model.config, name) for name in names] == [0, 1, 2]
    assert [getattr(model.generation_config, name) for name in names] == [0, 1, 2]
    assert demo_tokenizer.unk_token_id == 3
    assert len(demo_tokenizer) == model.config.vocab_size


def test_loss_on_unseen_text(model, demo_tokenizer):
    assert excerpt_loss(model, demo_tokenizer) < EXCERPT_BOUND
    # float32 arithmetic on the same weights sees the same text
    float32 = AutoModelForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    assert excerpt_loss(float32, demo_tokenizer) < EXCERPT_BOUND


def test_an_untrained_model_fails_the_bound(demo_tokenizer):
    untrained = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(demo_checkpoint()), dtype=torch.float32)
    assert excerpt_loss(untrained.eval(), demo_tokenizer) > 1.5 * EXCERPT_BOUND


def test_pipeline_writes_with_the_settings_of_the_checkpoint():
    generate = pipeline("text-generation", model=demo_checkpoint())
    text = generate("ROMEO:\n", max_new_tokens=40)[0]["generated_text"]
    assert text.startswith("ROMEO:\n")
    assert generate.model.generation_config.do_sample
    assert generate("ROMEO:\n", max_new_tokens=40)[0]["generated_text"] != text


@pytest.mark.parametrize("prompt", ["ROMEO:\n", "QUEEN MARGARET:\n", "Second Servingman:\n"])
def test_greedy_text_is_not_degenerate(model, demo_tokenizer, prompt):
    inputs = demo_tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=96, do_sample=False, top_k=None, top_p=None, temperature=None)
    written = output[0, inputs["input_ids"].shape[1] :].tolist()
    # A model stuck in a loop repeats one line: a dozen tokens, each triple of them at least seven times.
    assert len(set(written)) >= 18
    triples = list(zip(written, written[1:], written[2:], strict=False))
    assert max(triples.count(triple) for triple in triples) <= 6


def test_card_states_the_numbers_of_the_logs():
    card = ModelCard.load(ROOT / "model_cards/demo.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert card.data.pipeline_tag == "text-generation"
    assert (Path(demo_checkpoint()) / "README.md").read_text() == (ROOT / "model_cards/demo.md").read_text()
    results = {name: json.loads(path.read_text().splitlines()[-1]) for name, path in LOGS.items()}
    for result in results.values():
        assert f"{result['validation_loss']:.3f}" in card.text
        assert f"{result['bits_per_character']:.3f}" in card.text
    stated = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert stated["bits_per_character"] == round(results["griffin"]["bits_per_character"], 3)


@pytest.mark.parametrize(
    ("characters", "output_file", "message"),
    [
        (None, None, "no such file; give a plain text file"),
        (1000, None, "1000 characters are too few to train on; at least 51200 are needed"),
        (60_000, "notes.txt", "exists and is not an empty folder; remove it or name another"),
    ],
)
def test_training_script_explains_bad_input(script, tmp_path, capsys, characters, output_file, message):
    text, output = tmp_path / "text.txt", tmp_path / "output"
    if characters is not None:
        text.write_text("x" * characters)
    if output_file is not None:
        output.mkdir()
        (output / output_file).write_text("mine")
    arguments = ["--text", text, "--architecture", "griffin", "--output", output, "--log", tmp_path / "log.jsonl"]
    assert script.main([str(argument) for argument in arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "log.jsonl").exists()


def test_training_script_makes_equal_sized_models(script):
    sizes = [script.build_model(architecture, 1024).num_parameters() for architecture in LOGS]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]


@pytest.mark.parametrize("architecture", LOGS)
def test_training_script_writes_a_whole_checkpoint_and_log(script, tmp_path, architecture):
    text, output, log = tmp_path / "text.txt", tmp_path / "output", tmp_path / "log.jsonl"
    text.write_text(EXCERPT * 120)
    arguments = ["--text", text, "--architecture", architecture, "--output", output, "--log", log, "--steps", "2"]
    assert script.main([str(argument) for argument in arguments]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "output", "log.jsonl"}
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16
    header, row, result = map(json.loads, log.read_text().splitlines())
    assert (header["architecture"], row["step"]) == (architecture, 2)
    assert result["validation_loss"] < row["validation_loss"] + 0.05
