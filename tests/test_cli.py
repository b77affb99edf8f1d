"""The command line: what it writes equals what the Python API computes, and every mistake ends in one helpful line."""

import functools
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import recurrent_gemma_hf
from recurrent_gemma_hf import (
    PRESETS,
    RecurrentGemmaCache,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    demo_checkpoint,
)
from recurrent_gemma_hf.cli import conversation, shared
from tests.helpers import byte_config
from tests.helpers import run_command as run

SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
END_OF_TURN = SPECIAL_TOKENS.index("<end_of_turn>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GREEDY = ["--greedy", "--max-new-tokens", "12", "--dtype", "float32"]


# --- checkpoints and how the command is run ---


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte after the special tokens, and a beginning-of-sequence token in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        additional_special_tokens=SPECIAL_TOKENS[4:], chat_template=chat_template,
    )  # fmt: skip


def make_checkpoint(folder: Path, config: RecurrentGemmaConfig, chat_template: str | None = None) -> Path:
    torch.manual_seed(1)
    model = RecurrentGemmaForCausalLM(config)
    with torch.no_grad():  # far from its initialisation, so that greedy answers vary and are no matter of rounding
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    if chat_template:
        model.generation_config.eos_token_id = [1, END_OF_TURN]
    model.save_pretrained(folder)
    make_tokenizer(chat_template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), byte_config())


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tuned"), byte_config(), CHAT_TEMPLATE)


@pytest.fixture
def copied(checkpoint, tmp_path) -> Path:
    """A checkpoint to be spoiled."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """The number of tokens of every forward of the model."""
    lengths: list[int] = []
    original = RecurrentGemmaForCausalLM.forward

    @functools.wraps(original)  # generate() looks at the signature
    def forward(self, input_ids=None, *args, **kwargs):
        lengths.append(input_ids.shape[1])
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(RecurrentGemmaForCausalLM, "forward", forward)
    return lengths


def succeed(*arguments: object, stdin: str | None = None):
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def expected_continuation(checkpoint: Path, prompt_ids: list[int], max_new_tokens: int = 12) -> list[int]:
    """Greedy tokens without any cache."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = torch.tensor([prompt_ids])
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=False, use_cache=False
    )
    return output[0, len(prompt_ids) :].tolist()


def decode(checkpoint: Path, tokens: list[int]) -> str:
    return shared.harmless(AutoTokenizer.from_pretrained(checkpoint).decode(tokens, skip_special_tokens=True))


# --- generate ---


def test_greedy_text_is_the_prompt_and_its_continuation(checkpoint):
    ids = AutoTokenizer.from_pretrained(checkpoint)("Once upon a time")["input_ids"]
    result = succeed("generate", "Once upon a time", "--model", checkpoint, *GREEDY)
    assert result.stdout == "Once upon a time" + decode(checkpoint, expected_continuation(checkpoint, ids)) + "\n"


def test_the_same_seed_draws_the_same_text_as_the_python_api(checkpoint):
    arguments = ["generate", "Once", "-m", checkpoint, "--max-new-tokens", "30", "--dtype", "float32"]
    arguments += ["--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--device", "cpu"]
    drawn = succeed(*arguments, "--seed", "7").stdout
    assert succeed(*arguments, "--seed", "7").stdout == drawn
    assert succeed(*arguments, "--seed", "8").stdout != drawn
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    inputs = AutoTokenizer.from_pretrained(checkpoint)("Once", return_tensors="pt")
    torch.manual_seed(7)
    sampling = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95}
    output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=30, **sampling)
    assert drawn == decode(checkpoint, output[0].tolist()) + "\n"


def test_a_piped_prompt_is_the_same_as_an_argument(checkpoint):
    by_argument = succeed("generate", "two\nlines", "-m", checkpoint, *GREEDY).stdout
    assert succeed("generate", "-m", checkpoint, *GREEDY, stdin="two\nlines\n").stdout == by_argument


def test_a_long_prompt_is_read_in_chunks(checkpoint, forwards, monkeypatch):
    monkeypatch.setattr(conversation, "PREFILL_CHUNK", 16)
    text = "abcdefghij " * 5
    ids = AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"]
    result = succeed("generate", text, "--model", checkpoint, *GREEDY)
    assert [length for length in forwards if length > 1] == [16, 16, 16, 8]
    assert result.stdout == text + decode(checkpoint, expected_continuation(checkpoint, ids)) + "\n"


def test_the_speed_is_reported_beside_the_text(checkpoint):
    result = succeed("generate", "Once", "-m", checkpoint, *GREEDY)
    assert re.search(r"5 prompt tokens in \d+\.\d\d s, 12 tokens written at \d+\.\d tokens/s\n", result.stderr)
    one = succeed("generate", "Once", "-m", checkpoint, "--greedy", "--max-new-tokens", "1")
    assert "1 token written\n" in one.stderr


def test_an_instruction_tuned_model_gets_its_template_unless_raw(chat_checkpoint):
    question = "<bos><start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n"
    ids = AutoTokenizer.from_pretrained(chat_checkpoint)(question, add_special_tokens=False)["input_ids"]
    answer = decode(chat_checkpoint, expected_continuation(chat_checkpoint, ids))
    assert succeed("generate", "Who?", "-m", chat_checkpoint, *GREEDY).stdout == answer + "\n"
    raw = succeed("generate", "Who?", "-m", chat_checkpoint, "--raw", *GREEDY).stdout
    ids = AutoTokenizer.from_pretrained(chat_checkpoint)("Who?")["input_ids"]
    assert raw == "Who?" + decode(chat_checkpoint, expected_continuation(chat_checkpoint, ids)) + "\n"


def test_the_demo_writes_text_by_default():
    result = succeed("generate", "ROMEO:", "--max-new-tokens", "20", "--seed", "0")
    assert result.stdout.startswith("ROMEO:")
    assert len(result.stdout) > len("ROMEO:") + 20


# --- mistakes ---


def assert_one_line(result, message: str) -> None:
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert re.fullmatch(rf"recurrent-gemma: [^\n]*{message}[^\n]*\n", result.stderr), result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", ""], "the prompt is empty; give"),
        (["generate", " \n"], "the prompt is empty; give"),
        (["generate", "caf\udce9"], "the prompt is not UTF-8; convert it"),
        (["generate", "x", "--dtype", "float8"], "--dtype float8 is unknown; give one of auto, float32, bfloat16"),
        (["generate", "x", "--device", "abacus"], "--device abacus cannot be used here .*; leave it out"),
        (["generate", "x", "--device", "meta"], "--device meta cannot be used here .*; leave it out"),
        (["generate", "x", "--seed", "-1"], "--seed is -1; give a whole number from 0"),
        (["generate", "x", "--seed", str(2**63)], f"--seed is {2**63}; give"),
        (["generate", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0; give 1 or more"),
        (["generate", "x", "--temperature", "0"], "--temperature is 0.0; give .* --greedy"),
        (["generate", "x", "--temperature", "nan"], "--temperature is nan; give"),
        (["generate", "x", "--top-k", "-1"], "--top-k is -1; give"),
        (["generate", "x", "--top-p", "1.5"], "--top-p is 1.5; give"),
        (["generate", "x", "--greedy", "--top-p", "0.5"], "--greedy draws nothing, so --top-p has no effect; leave"),
        (["generate", "x", "--model", "no/such/folder"], "there is no folder no/such/folder; give"),
        (["generate", "x", "--model", "./nowhere"], "there is no folder ./nowhere; give"),
        (["generate", "x", "--model", "some/model"], "cannot read the config of some/model: "),
        (["chat", "--model", "nowhere"], "there is no folder nowhere; give"),
        (["chat", "--max-new-tokens", "-3"], "--max-new-tokens is -3; give 1 or more"),
        (["info", "--model", "recurrentgemma-3b"], "there is no folder recurrentgemma-3b; give"),
        (["info", "--dtype", "int8"], "--dtype int8 is unknown; give"),
    ],
)
def test_a_mistake_ends_in_one_line_with_the_remedy(arguments, message, monkeypatch, tmp_path, checkpoint):
    monkeypatch.chdir(tmp_path)
    if "--model" not in arguments:
        arguments = [*arguments, "--model", checkpoint]
    assert_one_line(run(*arguments), message)


def test_serve_without_what_it_needs_says_what_to_install(monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert_one_line(run("serve", "--port", "1"), r'run: pip install "transformers\[serving\]"')


def test_serve_is_that_of_transformers_with_our_model(checkpoint, monkeypatch):
    """tests/serving asks a server; here is what it is told."""
    calls, demo = [], demo_checkpoint()
    monkeypatch.setattr("transformers.cli.transformers.app", lambda arguments, prog_name: calls.append(arguments))
    monkeypatch.setattr("recurrent_gemma_hf.transformers_compat.wrap_server", lambda wrap: calls.append(wrap))
    # Last: what is imported after it takes its word.
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    for arguments in (
        [checkpoint, "--port", "1"],
        ["-m", checkpoint, "--port", "1"],
        ["--port", "1", "-m", checkpoint],
    ):
        succeed("serve", *arguments)
        assert calls[1:] == [["serve", str(checkpoint), "--port", "1"]]
        calls.clear()
    succeed("serve", "some/model", "--port", "1", "--help")
    succeed("serve", "--port", "1")
    assert [calls[0], calls[2]] == [["serve", "--help"], ["serve", demo, "--port", "1"]]
    assert_one_line(run("serve", "./nowhere"), "there is no folder ./nowhere; give")
    assert_one_line(run("serve", "a/b", "-m", "c/d"), "two models are given, c/d and a/b; a server has one")
    # Not the module that this file imported: transformers may have put another in its place since.
    from transformers import RecurrentGemmaForCausalLM as served

    assert served is RecurrentGemmaForCausalLM


@pytest.mark.parametrize(
    ("stdin", "message"), [("", "the prompt is empty"), (b"caf\xe9", "the text on stdin is not UTF-8")], ids=str
)
def test_stdin_that_is_no_prompt(checkpoint, stdin, message):
    assert_one_line(run("generate", "-m", checkpoint, stdin=stdin), message)


def change_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1000)


def add_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(100)])
    tokenizer.save_pretrained(folder)


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json; give the folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read the config of"),
        (lambda folder: (folder / "config.json").write_text("{}"), "cannot read the config of"),
        (lambda folder: change_config(folder, hidden_size=-1), "cannot read the config of"),
        (
            lambda folder: change_config(folder, model_type="gpt2"),
            "a gpt2 checkpoint; give one of type recurrent_gemma",
        ),
        (lambda folder: change_config(folder, num_hidden_layers=4), "cannot load .* are missing: model.layers.3"),
        (lambda folder: change_config(folder, num_hidden_layers=2), "cannot load .* are unexpected: model.layers.2"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot load"),
        (cut_weights, "cannot load"),
        (no_tokenizer, "has no tokenizer; put tokenizer.json"),
        (add_tokens, "has 362 tokens, its model 265; put the model's own"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_spoiled_checkpoint(copied, spoil, message):
    spoil(copied)
    assert_one_line(run("generate", "x", "-m", copied), message)


def test_a_file_is_no_checkpoint(checkpoint):
    assert_one_line(run("info", "-m", checkpoint / "config.json"), "is a file; give the folder it is in")


def test_bfloat16_on_a_cpu_without_it_becomes_float32(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path / "bf16", byte_config())
    RecurrentGemmaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    arguments = ["info", "-m", folder, "--json", "--device", "cpu"]
    for has_bfloat16, dtype in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda answer=has_bfloat16: answer)
        assert json.loads(succeed(*arguments).stdout)["dtype"] == dtype
        assert json.loads(succeed(*arguments, "--dtype", "bfloat16").stdout)["dtype"] == "bfloat16"
        model, _ = shared.load(str(folder), "auto", "cpu")
        assert str(model.dtype) == f"torch.{dtype}"


# --- chat ---


def expected_chat(checkpoint: Path, turns: list[str], first: str, between: str) -> str:
    """A chat recomputed from its beginning at every turn; `first` and `between` are what surrounds a user's line."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ends = RecurrentGemmaForCausalLM.from_pretrained(checkpoint).generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ids: list[int] = []
    text = ""
    for line in turns:
        new = (between if ids else first).replace("LINE", line)
        ids += tokenizer(new, add_special_tokens=False)["input_ids"]
        answer = expected_continuation(checkpoint, ids)
        text += decode(checkpoint, answer) + "\n"
        ids += [token for token in answer if token not in ends]
    return text


FIRST = "<bos><start_of_turn>user\nLINE<end_of_turn>\n<start_of_turn>model\n"
BETWEEN = "<end_of_turn>\n<start_of_turn>user\nLINE<end_of_turn>\n<start_of_turn>model\n"
TURNS = ["Hello there, I am a rather long first line.", "And again?", "Bye."]


def test_a_chat_continues_a_plain_text(checkpoint, forwards):
    result = succeed("chat", "-m", checkpoint, *GREEDY, stdin="\n".join(TURNS) + "\n")
    # Every character is a token; each turn adds a line break, but for the first, which adds <bos>.
    assert [length for length in forwards if length > 1] == [len(TURNS[0]) + 1, *(len(t) + 2 for t in TURNS[1:])]
    assert result.stdout == expected_chat(checkpoint, TURNS, "<bos>LINE", "\nLINE")


def test_a_chat_with_a_template(chat_checkpoint):
    result = succeed("chat", "-m", chat_checkpoint, *GREEDY, stdin="\n".join(TURNS) + "\n")
    assert result.stdout == expected_chat(chat_checkpoint, TURNS, FIRST, BETWEEN)


def test_a_turn_that_the_model_ends_itself(chat_checkpoint, tmp_path):
    """The model's own <end_of_turn> must not stand before the template's."""
    folder = Path(shutil.copytree(chat_checkpoint, tmp_path / "ends"))
    prompt = AutoTokenizer.from_pretrained(folder)(FIRST.replace("LINE", TURNS[0]), add_special_tokens=False)
    third = expected_continuation(folder, prompt["input_ids"])[2]
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [1, third]}))
    result = succeed("chat", "-m", folder, *GREEDY, stdin="\n".join(TURNS) + "\n")
    assert result.stdout == expected_chat(folder, TURNS, FIRST, BETWEEN)


def test_save_and_load_go_on_in_another_process(checkpoint, tmp_path):
    """And saving does not disturb the chat that is saved."""
    whole = succeed("chat", "-m", checkpoint, *GREEDY, stdin="\n".join(TURNS)).stdout
    state = tmp_path / "talk.safetensors"
    first = succeed("chat", "-m", checkpoint, *GREEDY, stdin=f"{TURNS[0]}\n{TURNS[1]}\n/save {state}\n{TURNS[2]}\n")
    assert f"saved in {state}" in first.stderr
    assert first.stdout == whole
    second = succeed("chat", "-m", checkpoint, *GREEDY, stdin=f"/load {state}\n{TURNS[2]}\n")
    tokens = 1 + sum(map(len, TURNS[:2])) + 1 + 2 * 12
    assert f"going on after {tokens} tokens" in second.stderr
    assert second.stdout
    assert whole.endswith(second.stdout)


def test_reset_forgets_and_quit_ends(checkpoint):
    result = succeed("chat", "-m", checkpoint, *GREEDY, stdin="Hello\n\n/reset\nHello\n/quit\nHello\n")
    answers = result.stdout.splitlines()
    assert result.stdout == 2 * expected_chat(checkpoint, ["Hello"], "<bos>LINE", "\nLINE"), answers
    assert "a new conversation" in result.stderr


def test_no_mistake_ends_a_chat(checkpoint, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"not a state")
    other_config = byte_config(lru_width=32)
    other = make_checkpoint(tmp_path / "other", other_config)
    state = tmp_path / "other-state"
    succeed("chat", "-m", other, *GREEDY, stdin=f"Hello\n/save {state}\n")
    pair = RecurrentGemmaCache(RecurrentGemmaConfig.from_pretrained(checkpoint))
    model = RecurrentGemmaForCausalLM.from_pretrained(checkpoint)
    model(torch.tensor([[2, 9], [2, 10]]), past_key_values=pair)
    pair.save(tmp_path / "pair")
    lines = ["/save", f"/save {tmp_path / 'x'}", "/load", f"/load {tmp_path / 'none'}", f"/load {foreign}"]
    lines += [f"/load {state}", f"/load {tmp_path / 'pair'}", "/dance", "Hello", f"/save {tmp_path / 'no' / 'folder'}"]
    lines += ["/save ~nobody-of-this-name/x", f"/save {tmp_path}", "/save /dev/full", f"/load {tmp_path}"]
    result = succeed("chat", "-m", checkpoint, *GREEDY, stdin="\n".join(lines))
    assert result.stdout == expected_chat(checkpoint, ["Hello"], "<bos>LINE", "\nLINE")
    expected = [
        "/save needs the name of a file; for instance",
        "/save failed: this cache is empty",
        "/load needs the name of a file; for instance",
        "/load failed: .*none",
        "/load failed: .*foreign",
        "/load failed: .*another config",
        "/load failed: .*pair holds 2 conversations",
        "there is no /dance; /reset starts anew",
        "/save failed: .*folder cannot be written",
        "/save failed: .*home",
        "/save failed: .*is not a file",
        "/save failed: /dev/full is not a file",
        "/load failed: ",
    ]
    errors = [line for line in result.stderr.splitlines() if "tokens/s" not in line and "token written" not in line]
    assert len(errors) == len(expected)
    for error, message in zip(errors, expected, strict=True):
        assert re.search(message, error)


def test_ctrl_c_stops_the_answer_and_not_the_chat(checkpoint, monkeypatch):
    """Interrupted after a few tokens, the chat goes on as if so many had been asked for."""
    original = conversation.Meter.put
    first: list[int] = []

    def put(self, tokens):
        original(self, tokens)
        if self.prompt_tokens == len(TURNS[0]) + 1 and tokens.ndim == 1:
            first.append(int(tokens))
            if len(first) == 4:
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(conversation.Meter, "put", put)
    result = succeed("chat", "-m", checkpoint, *GREEDY, stdin=f"{TURNS[0]}\n{TURNS[1]}\n")
    assert signal.getsignal(signal.SIGINT) is before
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(TURNS[0])["input_ids"]
    assert 4 <= len(first) <= 5  # the criterion of the fourth token may have been asked before it was shown
    assert first == expected_continuation(checkpoint, ids, len(first))
    ids += first + tokenizer("\n" + TURNS[1], add_special_tokens=False)["input_ids"]
    second = expected_continuation(checkpoint, ids)
    assert result.stdout == decode(checkpoint, first) + "\n" + decode(checkpoint, second) + "\n"


def _interrupt():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def _fail():
    raise RuntimeError("out of\nmemory")


@pytest.mark.parametrize(
    ("event", "message"), [(_interrupt, ""), (_fail, "no answer: out of memory; the conversation")]
)
def test_a_second_ctrl_c_or_an_error_leaves_the_conversation_as_it_was(checkpoint, event, message, monkeypatch):
    """In the middle of a forward, where the first layer has read the question and the others have not."""
    lost, asked = "What is lost?", []
    attention = RecurrentGemmaForCausalLM.from_pretrained(checkpoint).model.layers[2].temporal_block.__class__
    encode, forward = conversation.Conversation._encode, attention.forward

    def encode_and_note(self, text):
        asked.append(text)
        return encode(self, text)

    def forward_unless_lost(self, *args, **kwargs):
        if asked[-1] == lost:
            event()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(conversation.Conversation, "_encode", encode_and_note)
    monkeypatch.setattr(attention, "forward", forward_unless_lost)
    result = succeed("chat", "-m", checkpoint, *GREEDY, stdin="\n".join([TURNS[0], lost, TURNS[1]]))
    asked.append("")  # what the expected answers run
    expected = expected_chat(checkpoint, TURNS[:2], "<bos>LINE", "\nLINE").splitlines()
    assert [line for line in result.stdout.splitlines() if line] == expected
    assert message in result.stderr
    assert result.stderr.count("no answer") == bool(message)


def test_what_a_terminal_would_obey_is_shown_as_its_code(checkpoint, tmp_path, capsys):
    dangers, shown = "\x1b]0;owned\x07\x1b[2J\x08\x9b31m\u202e", r"\x1b]0;owned\x07\x1b[2J\x08\x9b31m\u202e"
    meter = conversation.Meter(AutoTokenizer.from_pretrained(checkpoint), echo=False)
    meter.on_finalized_text(f"a\tb\n{dangers}\r\0 é 漢 🙂", stream_end=True)
    assert capsys.readouterr().out == f"a\tb\n{shown}\\x0d\\x00 é 漢 🙂\n"
    assert_one_line(run("generate", "x", "-m", f"no{dangers}where"), re.escape(shown))
    result = succeed("chat", "-m", checkpoint, *GREEDY, stdin=f"/load {tmp_path}/{dangers}\n/{dangers}\n")
    assert result.stderr.count(shown) == 2
    assert not set(result.stderr) & set("\x1b\x07\x08\x9b\u202e")
    folder = tmp_path / "\x1b[31mred"
    shutil.copytree(checkpoint, folder)
    assert "\x1b" not in succeed("info", "-m", folder).stdout


# --- info ---


def test_info_agrees_with_the_model_and_loads_no_weights(copied):
    model = RecurrentGemmaForCausalLM.from_pretrained(copied, dtype=torch.bfloat16)
    cache = RecurrentGemmaCache(model.config)
    with torch.no_grad():
        model(torch.tensor([[2, 10, 11]]), past_key_values=cache)
    (copied / "model.safetensors").unlink()
    facts = json.loads(succeed("info", "-m", copied, "--json", "--device", "cpu", "--dtype", "float32").stdout)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert facts == {
        "model": str(copied),
        "model_type": "recurrent_gemma",
        "layers": {"recurrent": 2, "attention": 1},
        "mlp_width": 48,
        "hidden_size": 32,
        "lru_width": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "attention_window_size": 8,
        "vocab_size": 265,
        "parameters": parameters,
        "embedding_parameters": 265 * 32,
        "weight_bytes": {"bfloat16": 2 * parameters, "float32": 4 * parameters},
        "cache_bytes": cache.memory_footprint(),
        # keys and values, three layers, one head of 8, bfloat16
        "transformer_cache_bytes": {str(length): length * 2 * 3 * 8 * 2 for length in (8192, 131072)},
        "device": "cpu",
        "dtype": "float32",
        "backend": "portable",
        "backends": {
            kind: dict.fromkeys(("float32", "bfloat16"), name)
            for kind, name in {"cuda": "triton", "xpu": "triton", "mps": "portable", "cpu": "portable"}.items()
        },
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_info_knows_the_presets(preset):
    facts = json.loads(succeed("info", "-m", preset, "--json").stdout)
    config = RecurrentGemmaConfig.from_preset(preset)
    assert facts["layers"]["recurrent"] == config.layers_block_type.count("recurrent")


def test_info_of_the_2b_model():
    """Sizes by hand: 18 recurrent and 8 attention layers of width 2560, one key and value head of 256."""
    facts = json.loads(succeed("info", "-m", "recurrentgemma-2b", "--json").stdout)
    attention = 2 * (2560 * 2560) + 2 * 2560 * 256 + 2560
    recurrent = 3 * (2560 * 2560 + 2560) + 5 * 2560 + 2 * (10 * 256 * 256 + 2560) + 2560
    mlp_and_norms = 3 * 2560 * 7680 + 2 * 7680 + 2560 + 2 * 2560
    assert facts["parameters"] == 256_000 * 2560 + 8 * attention + 18 * recurrent + 26 * mlp_and_norms + 2560
    assert facts["transformer_cache_bytes"]["8192"] == 26 * 2 * 256 * 8192 * 2
    assert facts["cache_bytes"] == 8 * 2 * 2049 * 256 * 2 + 18 * 2560 * (3 * 2 + 4)


def test_the_table_shows_what_json_says():
    table = succeed("info", "-m", "recurrentgemma-2b", "--device", "cpu", "--dtype", "float32").stdout
    for text in ("26: 18 recurrent, 8 attention", "5.4 GB in bfloat16", "17.2 MB at any length", "218.1 MB at 8,192"):
        assert text in " ".join(table.split()), table


def test_info_describes_the_demo_by_default():
    facts = json.loads(succeed("info", "--json").stdout)
    assert facts["model"] == "the bundled demo"
    assert 10**6 <= facts["parameters"] <= 4 * 10**6


# --- adapters ---


@pytest.fixture
def adapter(checkpoint, tmp_path) -> Path:
    """A folder as PEFT writes it, without a tokenizer."""
    peft = pytest.importorskip("peft", reason="the adapter is PEFT's: install the train extra")
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# Transformers 5.23 has a new name for this, which peft does not know.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapters_folder_is_a_model(checkpoint, adapter, monkeypatch, forwards):
    """Of the checkpoint that it names, with that one's tokenizer unless it has its own."""
    ids = AutoTokenizer.from_pretrained(checkpoint)("Once upon a time")["input_ids"]
    assert expected_continuation(adapter, ids) != expected_continuation(checkpoint, ids)
    told = succeed("generate", "Once upon a time", "--model", adapter, *GREEDY).stdout
    assert told == "Once upon a time" + decode(checkpoint, expected_continuation(adapter, ids)) + "\n"
    forwards.clear()
    assert succeed("chat", "--model", adapter, *GREEDY, stdin="Once\n").stdout
    assert forwards
    assert json.loads(succeed("info", "--model", adapter, "--json").stdout)["hidden_size"] == 32

    both = shutil.copytree(checkpoint, adapter.with_name("both"))  # the folder that the adapter names is not read
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    change_config(both, pad_token_id=7)
    assert shared.read_config(str(both)).pad_token_id == 7
    assert shared.read_config(str(adapter)).pad_token_id != 7

    config = adapter / "adapter_config.json"
    written = config.read_text()
    config.write_text(json.dumps({**json.loads(written), "base_model_name_or_path": None}))
    assert_one_line(run("generate", "x", "-m", adapter), "adapter_config.json names no base_model_name_or_path; write")
    config.write_text("[")
    assert_one_line(run("generate", "x", "-m", adapter), "cannot read adapter_config.json of .*adapter")
    config.write_text(written)
    monkeypatch.setattr(shared, "find_spec", lambda name: None)
    assert_one_line(run("generate", "x", "-m", adapter), r"is an adapter, which needs peft: pip install .*\[train\]")


# --- the installed command ---


def test_the_installed_command():
    command = [Path(sys.executable).with_name("recurrent-gemma"), "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (shown.returncode, shown.stdout) == (0, f"recurrent-gemma-hf {recurrent_gemma_hf.__version__}\n")


LIGHT = """
import sys
from recurrent_gemma_hf.cli.app import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, end.code
print({"numpy", "torch", "transformers"} & set(sys.modules))
"""


@pytest.mark.parametrize(
    "arguments", [("--version",), ("--help",), ("chat", "--help"), ("convert", "--help"), ("eval", "--help")]
)
def test_help_and_version_import_nothing_slow(arguments):
    command = [sys.executable, "-c", LIGHT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_help_shows_flags_as_flags():
    for command in (["generate"], ["chat"], ["info"], ["memory"], ["doctor"], ["eval", "throughput"], []):
        shown = succeed(*command, "--help").stdout
        flags = re.findall(r"^.*--(?:greedy|raw|json|alone|version)\b.*$", shown, flags=re.MULTILINE)
        assert flags
        assert not [line for line in flags if "bool" in line]


def test_a_shell_completes_commands_and_options():
    program = Path(sys.executable).with_name("recurrent-gemma")
    for words, completions in (("recurrent-gemma ch", ["chat"]), ("recurrent-gemma chat --gr", ["--greedy"])):
        asked = {"_RECURRENT_GEMMA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run([program], env={**os.environ, **asked}, capture_output=True, text=True, timeout=120)
        assert done.stdout.split() == completions


def test_other_libraries_write_nothing(checkpoint):
    """torchao and bitsandbytes, where they are installed, warn when Transformers and PEFT import them."""
    program = Path(sys.executable).with_name("recurrent-gemma")
    for arguments in (["generate", "Once", "--model", checkpoint, *GREEDY], ["memory", "--tokens", "9"]):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120, check=True)
        assert [line for line in done.stderr.splitlines() if not line.startswith("recurrent-gemma: ")] == []


def test_a_chat_on_a_terminal(checkpoint):
    """Ctrl-C at the prompt does not end the program, /quit does."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "recurrent_gemma_hf.cli", "chat", "--model", str(checkpoint), *GREEDY]
    # A background job ignores SIGINT and hands that down; a terminal's program does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    signal.signal(signal.SIGINT, before)
    os.close(theirs)

    def read_until(text: bytes, otherwise=lambda: None) -> None:
        """Reads what the program writes until `text` comes; calls `otherwise` in every second that brings nothing."""
        seen = b""
        for _ in range(200):  # a cold start on a busy machine takes a minute
            if text in seen:
                return
            if select.select([ours], [], [], 1.0)[0]:
                seen += os.read(ours, 1024)
            else:
                otherwise()
        pytest.fail(f"no {text!r} in {seen!r}")

    try:
        read_until(b"\n> ")
        # One that comes just before the program waits for input is noticed with the next.
        process.send_signal(signal.SIGINT)
        read_until(b"> ", otherwise=lambda: process.send_signal(signal.SIGINT))
        os.write(ours, b"/quit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
