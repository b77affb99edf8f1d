"""Without vLLM: `recurrent-gemma serve` is `transformers serve` with our model, and `transformers chat` talks to it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from conftest import MESSAGES, Oracle, free_port, http_server
from transformers import AutoTokenizer

COMMANDS = Path(sys.executable).parent
# The tokens of an answer; the demo's generation_config.json samples.
GREEDY = '{"do_sample": false, "max_new_tokens": 16, "min_new_tokens": 16, "eos_token_id": null}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    command = [COMMANDS / "recurrent-gemma", "serve", "--port", port, "--device", "cpu", "--dtype", "float32"]
    with http_server(command, tmp_path_factory.mktemp("log") / "server.log", port) as address:
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
