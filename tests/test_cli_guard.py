"""What stands in front of the server, without a server: an ASGI application that counts what reaches it."""

import asyncio
import json
import random
import re

import pytest

from recurrent_gemma_hf.cli.guard import MAX_BYTES, Guard
from tests.helpers import FUZZ_ROUNDS

SERVED = "/srv/models/mine"
GOOD = {"model": "mine", "prompt": "ROMEO:", "max_tokens": 5, "temperature": 0.5, "stop": ["x"], "stream": False}


class Behind:
    """The application behind the guard."""

    def __init__(self, error: Exception | None = None) -> None:
        self.requests: list[dict] = []
        self.error = error

    async def __call__(self, scope, receive, send):
        if scope["method"] == "POST":
            message = await receive()
            assert not message["more_body"]
            self.requests.append(json.loads(message["body"]))
        if self.error is not None:
            raise self.error
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})


def ask(body, path="/v1/completions", method="POST", behind=None, pieces=1, headers=()):
    """The status and the message of an answer."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = -(-len(body) // pieces) or 1
    parts = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    messages = [{"type": "http.request", "body": p, "more_body": i + 1 < len(parts)} for i, p in enumerate(parts)]
    sent = []

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": list(headers)}
    asyncio.run(Guard(behind or Behind(), SERVED, ["mine"])(scope, receive, send))
    answer = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], "" if sent[0]["status"] == 200 else json.loads(answer)["error"]["message"]


@pytest.mark.parametrize("name", ["mine", SERVED, None])
def test_the_served_model_is_passed_on_under_its_name(name):
    behind, request = Behind(), dict(GOOD)
    if name is None:
        del request["model"]
    assert ask({**request, **({} if name is None else {"model": name})}, behind=behind, pieces=7) == (200, "")
    assert behind.requests == [{**GOOD, "model": SERVED}]


@pytest.mark.parametrize("name", ["/etc", "other", "../mine", f"{SERVED}/", "google/gemma-2b", "", 3, None, ["mine"]])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/load_model"])
def test_any_other_model_is_404(name, path):
    behind = Behind()
    status, message = ask({**GOOD, "model": name}, path, behind=behind)
    assert (status, behind.requests) == (404, [])
    assert message == f"there is no model {name!r}; this server has 'mine'"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200), ("GET", "/v1/models", 200), ("POST", "/reset", 404), ("GET", "/docs", 404),
        ("POST", "/v1/audio/transcriptions", 404), ("POST", "/v1/systemone", 404), ("GET", "/v1/completions", 404),
        ("DELETE", "/v1/models", 404),
    ],
)  # fmt: skip
def test_other_endpoints(method, path, status):
    assert ask(GOOD, path, method)[0] == status


def test_the_list_of_models_has_one_and_not_its_folder():
    behind = Behind()
    answer = asyncio.run(_get("/v1/models", behind))
    assert [model["id"] for model in answer["data"]] == ["mine"]


async def _get(path, behind):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": "GET", "headers": []}
    await Guard(behind, SERVED, ["mine"])(scope, None, send)
    return json.loads(sent[1]["body"])


BAD = {
    "no JSON": (b"{", 400, "the body is no JSON"),
    "a list": (b"[1]", 400, "must be a JSON object"),
    "no UTF-8": (b'{"prompt": "\xff"}', 400, "the body is no JSON"),
    "deep": (b"[" * 200_000, 400, "the body is no JSON"),
    "half a pair": ({"prompt": "a\ud800"}, 400, "half of a surrogate pair"),
    "NaN": ({"temperature": float("nan")}, 400, "no JSON numbers"),
    "temperature": ({"temperature": -1}, 400, r"temperature=-1 must be a number from 0 to 100"),
    "temperature as text": ({"temperature": "hot"}, 400, r"temperature='hot' must be a number"),
    "top_p": ({"top_p": 2}, 400, r"top_p=2 must be"),
    "tokens": ({"max_tokens": 0}, 400, r"max_tokens=0 must be a whole number from 1"),
    "many tokens": ({"max_tokens": 10**12}, 400, r"max_tokens=1000000000000 must be"),
    "some tokens": ({"max_tokens": 1.5}, 400, r"max_tokens=1.5 must be"),
    "yes tokens": ({"max_tokens": True}, 400, r"max_tokens=True must be"),
    "penalty": ({"frequency_penalty": -2}, 400, r"frequency_penalty=-2 must be"),
    "seed": ({"seed": 2**70}, 400, r"seed=1180591620717411303424 must be"),
    "answers": ({"n": 3}, 400, r"n=3 must be a whole number from 1 to 1"),
    "stop": ({"stop": [""]}, 400, r"stop=\[''\] must be a text"),
    "stops": ({"stop": ["x"] * 17}, 400, r"at most 16 of them"),
    "stream": ({"stream": "yes"}, 400, r"stream='yes' must be true or false"),
    "prompt": ({"prompt": [1, 2]}, 400, "prompt must be a text"),
    "empty prompt": ({"prompt": ""}, 400, "prompt must be a text that is not empty"),
    "no messages": ({"messages": []}, 400, "at least one message"),
    "no role": ({"messages": [{"content": "x"}]}, 400, r"messages\[0\] must be an object with a role"),
    "number for content": (
        {"messages": [{"role": "user", "content": 3}]},
        400,
        r"messages\[0\].content must be a text",
    ),
    "config": ({"generation_config": {"top_k": 3}}, 400, "must be a text with a JSON object"),
    "config field": ({"generation_config": '{"topk": 3}'}, 400, "generation_config has no field 'topk'"),
    "config beams": ({"generation_config": '{"num_beams": 100000}'}, 400, r"generation_config.num_beams=100000 must"),
    "config value": ({"generation_config": '{"max_new_tokens": "x"}'}, 400, r"generation_config.max_new_tokens='x'"),
    "config mode": ({"generation_config": '{"early_stopping": "x"}'}, 400, "generation_config: "),
}


@pytest.mark.parametrize(("change", "status", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_a_reason(change, status, message):
    behind = Behind()
    found = ask(change if isinstance(change, bytes) else {**GOOD, **change}, behind=behind)
    assert found[0] == status
    assert behind.requests == []
    assert re.search(message, found[1])


@pytest.mark.parametrize("said", [True, False])
def test_bodies_are_bounded(said):
    """By the length that is said, before anything is read, and by what is read."""
    headers = [(b"content-length", str(MAX_BYTES + 1).encode())] if said else []
    body = b"{" if said else b" " * (MAX_BYTES + 1)
    assert ask(body, headers=headers, pieces=40) == (413, f"the body has more than {MAX_BYTES} bytes")


def test_errors_of_the_application():
    """What bad input raises further on is 400, unless the answer has begun; what else fails is the server's fault."""
    assert ask(GOOD, behind=Behind(ValueError("the prompt is too\nlong"))) == (
        400,
        "the request cannot be answered: ValueError: the prompt is too long",
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(GOOD, behind=Behind(RuntimeError("out of memory")))


@pytest.mark.parametrize("seed", range(200 * FUZZ_ROUNDS))
def test_any_value_of_any_argument(seed):
    """A request either reaches the application or is refused with 4xx."""
    draw = random.Random(seed)
    odd = [None, True, -1, 0, 1, 1.5, 1e400, 2**31, 10**30, "", "a", "\x1b[2J", [], ["a"], {}, {"a": 1}, [[]], [None]]
    names = [*GOOD, "messages", "generation_config", "seed", "top_p", "max_completion_tokens", "input", "tools", "\n"]
    request = {**GOOD, **{draw.choice(names): draw.choice(odd) for _ in range(draw.randint(1, 3))}}
    behind = Behind()
    status, message = ask(
        json.dumps(request).encode(), draw.choice(["/v1/completions", "/v1/chat/completions"]), behind=behind
    )
    assert status == 200 or (status in (400, 404) and message and not behind.requests)
