"""The recipes of examples/ end to end, a few steps each, and what they say about bad input."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from recurrent_gemma_hf import RecurrentGemmaForCausalLM, demo_checkpoint
from tests.helpers import load_file

pytestmark = [
    # Transformers 5.23 has new names for these, which 5.17, peft and trl do not know.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Trainer hands every loader pin_memory=True, on a machine without a GPU too.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"),
]
EXAMPLES = Path(__file__).parents[1] / "examples"
PARAGRAPH = "First Citizen:\nBefore we proceed any further, hear me speak, and mark how number {} is told.\n\n"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(PARAGRAPH.format(i) for i in range(800)))
    return path


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs an example as its command line would, in this process."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def call(name: str, **options):
        if name == "lora_chat":
            datasets = pytest.importorskip("datasets", reason="TRL needs datasets: install the train extra")
            monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        module = load_file(EXAMPLES / f"{name}.py")
        arguments = [f"--{option.replace('_', '-')}={value}" for option, value in options.items() if value is not True]
        arguments += [f"--{option}" for option, value in options.items() if value is True]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        return module.main()

    return call


def test_lora_chat(run, tmp_path, capsys):
    folder = tmp_path / "chat"
    run("lora_chat", data=EXAMPLES / "chat.jsonl", output=folder, epochs=0.5, merge=True)
    assert "Who are you? ->" in capsys.readouterr().out
    base = RecurrentGemmaForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": "Who are you?"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        plain = base(**ids).logits
        adapted = PeftModel.from_pretrained(base, folder)(**ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "chat-merged")(**ids).logits
    assert (adapted - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)


def test_finetune_and_resume(run, text, tmp_path, capsys):
    folder = tmp_path / "tuned"
    run("finetune", text=text, output=folder, steps=3, learning_rate=1e-3)
    before, after = capsys.readouterr().out.split("validation loss ")[1].split(" nats")[0].split(" -> ")
    assert float(after) < float(before)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    for step, state in ((7, None), (10, '{"epoch": 1')):  # of runs that were killed while they saved
        shutil.copytree(
            folder / "checkpoint-3", folder / f"checkpoint-{step}", ignore=lambda *_: ["trainer_state.json"]
        )
        if state is not None:
            (folder / "checkpoint-10" / "trainer_state.json").write_text(state)
    run("finetune", text=text, output=folder, steps=4, learning_rate=1e-3, resume=True)  # from checkpoint-3
    assert (folder / "checkpoint-4").is_dir()
    told = capsys.readouterr().out
    assert f"{folder / 'checkpoint-10'} is incomplete" in told
    assert f"{folder / 'checkpoint-7'} is incomplete" in told
    with pytest.raises(SystemExit, match=r"there is no complete checkpoint in .*other; leave --resume out"):
        run("finetune", text=text, output=tmp_path / "other", resume=True)


def test_pretrain(run, text, tmp_path, capsys):
    folder = tmp_path / "own"
    assert run("pretrain", text=text, config=EXAMPLES / "griffin.json", output=folder, steps=2, window=64) == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((EXAMPLES / "griffin.json").read_text())
    assert all(getattr(model.config, name) == value for name, value in config.items())
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder))
    assert not folder.with_name("own.partial").exists()
    assert "M parameters" in capsys.readouterr().out


def test_bad_input(run, text, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"nothing\.jsonl: no such file; give JSON lines"):
        run("lora_chat", data=tmp_path / "nothing.jsonl", output=tmp_path / "out")
    (tmp_path / "other.jsonl").write_text('{"text": "no conversation"}\n')
    with pytest.raises(SystemExit, match="lines have no completion and no prompt"):
        run("lora_chat", data=tmp_path / "other.jsonl", output=tmp_path / "out")
    short = tmp_path / "short.txt"
    short.write_text("one paragraph")
    with pytest.raises(SystemExit, match="1 paragraphs are too few; at least 20"):
        run("finetune", text=short, output=tmp_path / "out")
    bad = tmp_path / "bad.json"
    bad.write_text('{"hidden_width": 5}')
    for options, message in (
        ({"config": bad}, "RecurrentGemmaConfig has no field 'hidden_width'"),
        ({"config": tmp_path / "none.json"}, "No such file"),
        ({"config": EXAMPLES / "griffin.json", "steps": 0}, "--steps 0: at least one step"),
    ):
        assert run("pretrain", text=text, output=tmp_path / "out", **options) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
