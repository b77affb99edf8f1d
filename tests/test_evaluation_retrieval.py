"""Passkeys and phonebooks: the prompts hold what is asked for, and right answers are counted."""

import json
import random

import pytest
import torch
from transformers import AutoTokenizer

from recurrent_gemma_hf import RecurrentGemmaForCausalLM, demo_checkpoint
from recurrent_gemma_hf.evaluation import retrieval
from recurrent_gemma_hf.evaluation.records import append_record, read_records
from tests.helpers import run_command


def test_a_passkey_prompt_holds_its_key_at_its_depth():
    early, late = (retrieval.passkey_prompt(20, depth, random.Random(1)) for depth in (0.0, 1.0))
    assert early.text.startswith(f"The pass key is {early.answer}.")
    assert late.text.count(late.answer) == 2
    assert late.text.index(late.answer) > len(retrieval.FILLER) * 20
    assert early.text.endswith("The pass key is")


@pytest.mark.parametrize("depth", [None, 0.0, 1.0])
def test_a_phonebook_prompt_asks_for_one_of_its_entries(depth):
    prompt = retrieval.phonebook_prompt(12, depth, random.Random(2))
    book, questions = prompt.text.split("\n\n")
    lines = book.split("\n")
    *examples, asked = questions.split("\n")
    assert len(lines) == len(set(lines)) == 12
    assert all(example in lines for example in examples)
    assert f"{asked} {prompt.answer}" in lines
    assert f"{asked} {prompt.answer}" not in examples
    if depth is not None:
        assert lines[round(11 * depth)] == f"{asked} {prompt.answer}"


def test_retrieval_counts_right_answers(monkeypatch):
    """A model that knows every second answer is right half the time."""
    asked = []

    def answer(model, tokenizer, prompt):
        asked.append(prompt)
        return (f" {prompt.answer} and so on" if len(asked) % 2 else "no idea"), 7

    monkeypatch.setattr(retrieval, "answer", answer)
    (record,) = retrieval.measure(None, None, "passkey", (3,), (0.5,), 4, 0)
    assert record == {"task": "passkey", "size": 3, "depth": 0.5, "tokens": 7, "repeats": 4, "accuracy": 0.5}
    assert len({prompt.answer for prompt in asked}) == 4


def test_the_answer_is_the_greedy_continuation():
    model = RecurrentGemmaForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint())
    prompt = retrieval.passkey_prompt(8, 0.5, random.Random(0))
    text, length = retrieval.answer(model, tokenizer, prompt)
    ids = tokenizer(prompt.text, return_tensors="pt").input_ids
    assert length == ids.shape[1]
    new = len(tokenizer(" " + prompt.answer, add_special_tokens=False).input_ids) + 1
    for _ in range(new):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert text == tokenizer.decode(ids[0, length:], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task haystack", "unknown task 'haystack'; there are passkey, phonebook"),
        ("--task phonebook --sizes 2", "size 2 must be 3 or more"),
        ("--task passkey --depths 2", "depth 2.0 must be from 0"),
        ("--task passkey --repeats 0", "repeats 0 must be 1 or more"),
    ],
)
def test_the_retrieval_command_names_mistakes(arguments, message):
    result = run_command("eval", "retrieval", *arguments.split())
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_the_retrieval_command_writes_its_results(tmp_path):
    arguments = "--task phonebook --sizes 3,4 --depths 0.5 --repeats 1".split()
    result = run_command("eval", "retrieval", *arguments, "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["size"] for record in records] == [3, 4]


def test_a_broken_line_of_results_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    append_record(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"b": \n')
    with pytest.raises(ValueError, match=r"line 2 is not JSON"):
        read_records(path)
