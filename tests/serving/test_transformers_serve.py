"""Without vLLM: `recurrent-gemma serve` is `transformers serve` with our model, and `transformers chat` talks to it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pytest
import torch
from conftest import MESSAGES, Oracle, free_port, http_server
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from recurrent_gemma_hf import RecurrentGemmaForCausalLM

COMMANDS = Path(sys.executable).parent
# The tokens of an answer; the demo's generation_config.json samples.
GREEDY = '{"do_sample": false, "max_new_tokens": 16, "min_new_tokens": 16, "eos_token_id": null}'


@pytest.fixture(scope="module")
def server(chat_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(chat_demo, tmp_path_factory.mktemp("log")) as address:
        yield address


@contextmanager
def serving(model: Path, log: Path) -> Iterator[str]:
    """`recurrent-gemma serve` of a folder, on a port of its own."""
    port = free_port()
    options = ["--port", port, "--device", "cpu", "--dtype", "float32"]
    with http_server([COMMANDS / "recurrent-gemma", "serve", model, *options], log / "server.log", port) as address:
        yield address


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=300)


def test_chat(client: openai.OpenAI, chat_demo: Path, check_text):
    """The prompt is longer than the demo's window of 128, where Transformers' own model is wrong."""
    long = [*MESSAGES[:-1], {"role": "user", "content": "Stand, and unfold yourself. " * 30}]
    tokenizer = AutoTokenizer.from_pretrained(chat_demo)
    prompt = tokenizer.apply_chat_template(long, add_generation_prompt=True, return_dict=False)
    assert len(prompt) > 200
    options = {"model": str(chat_demo), "messages": long, "extra_body": {"generation_config": GREEDY}}
    answer = client.chat.completions.create(**options)
    check_text(prompt, answer.choices[0].message.content, tokens=16)
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(stream=True, **options)]
    assert "".join(pieces) == answer.choices[0].message.content


def test_transformers_chat(server: str, chat_demo: Path, demo_oracle: Oracle, tmp_path: Path):
    done = subprocess.run(
        [COMMANDS / "transformers", "chat", chat_demo, f"{server}/v1", "max_new_tokens=16", "do_sample=False"],
        input="Who goes there?\nn\n!exit\n", capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "0"},  # its client takes no address at all for reachable otherwise
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    tokenizer = AutoTokenizer.from_pretrained(chat_demo)
    prompt = tokenizer.apply_chat_template(MESSAGES[:1], add_generation_prompt=True, return_dict=False)
    expected = tokenizer.decode(demo_oracle.continuation(prompt, 16), skip_special_tokens=True)
    words = re.findall(r"\w+", expected)
    assert len(words) > 3
    assert re.search(r"\W+".join(words[:-1]), done.stdout), f"not {expected!r} in {done.stdout!r}"


def test_an_adapter(chat_demo: Path, check_text, tmp_path: Path):
    base = RecurrentGemmaForCausalLM.from_pretrained(chat_demo, dtype=torch.float32)
    settings = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(chat_demo)
    tokenizer.save_pretrained(folder)
    with serving(folder, tmp_path) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)
        options = {"model": "adapter", "prompt": "ROMEO:", "extra_body": {"generation_config": GREEDY}}
        text = client.completions.create(**options).choices[0].text
    prompt = tokenizer("ROMEO:")["input_ids"]
    assert text == tokenizer.decode(Oracle(model).continuation(prompt, 16), skip_special_tokens=True)
    with pytest.raises(AssertionError):  # the adapter changes the text
        check_text(prompt, text, tokens=16)


def test_no_other_model_and_no_bad_argument(client: openai.OpenAI, demo: str, chat_demo: Path, check_text):
    """A folder of the machine that the server was not started with is 404, though it holds a model; every bad argument
    is in tests/test_cli_guard.py."""
    options = {"prompt": "ROMEO:", "extra_body": {"generation_config": GREEDY}}
    for name in (demo, "/etc", "google/recurrentgemma-2b"):
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            client.completions.create(model=name, **options)
    for change in ({"max_tokens": -1}, {"temperature": -1.0}, {"stop": ["x"] * 40}, {"prompt": ""}, {"best_wish": 3}):
        with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError)):
            client.completions.create(model="demo", extra_body=change, prompt="ROMEO:")
    tokenizer = AutoTokenizer.from_pretrained(chat_demo)
    answer = client.completions.create(model="demo", **options)  # the folder's last name
    check_text(tokenizer("ROMEO:")["input_ids"], answer.choices[0].text, tokens=16)
    assert [model.id for model in client.models.list()] == ["demo"]
    with pytest.raises(openai.NotFoundError):
        client.post("/../reset", cast_to=object)


def test_many_connections_and_clients_that_leave(client: openai.OpenAI, server: str):
    """200 connections at a time, every fourth of which leaves in the middle of its stream; the memory does not grow."""
    process = next(
        connection.pid for connection in psutil.net_connections()
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == int(server.rsplit(":")[-1])
    )  # fmt: skip
    config = '{"do_sample": false, "max_new_tokens": 4, "min_new_tokens": 4, "eos_token_id": null}'

    def ask(i: int) -> str:
        options = {"model": "demo", "prompt": f"{i}: ROMEO", "extra_body": {"generation_config": config}}
        if i % 4:
            return client.completions.create(**options).choices[0].text
        with client.completions.create(stream=True, **options) as stream:
            next(iter(stream))
        return "left"

    sizes = []
    for _ in range(3):
        with ThreadPoolExecutor(200) as pool:
            assert all(pool.map(ask, range(200)))
        sizes.append(psutil.Process(process).memory_info().rss / 2**20)
    assert sizes[2] < sizes[1] + 30, sizes
