"""What stands in front of `transformers serve`: one model, bodies of bounded size, and 4xx with a reason for bad input.

Transformers' server loads whatever a request names, a folder of the machine included, and answers many bad arguments
with 500.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from jinja2 import TemplateError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)

MAX_BYTES = 16 * 2**20  # of a body: three million tokens of text
MAX_NEW_TOKENS = 2**20
MAX_SEQUENCES = 16  # beams and answers per request
MAX_STOPS = 16
ASKS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/load_model")
READS = ("/health",)


class Refused(Exception):
    """A request that is answered with an HTTP status and a reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Guard:
    """ASGI middleware that lets requests for one model through.

    Args:
        app: the application behind it.
        served: the name of its model, as `transformers serve` was given it.
        names: other names that requests may use for it.
    """

    def __init__(self, app: App, served: str, names: Iterable[str] = ()) -> None:
        self.app, self.served, self.names = app, served, (served, *names)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on with its body checked."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if scope["path"] in ASKS and scope["method"] == "POST":
                receive = _again(self._checked(await _body(scope, receive)), receive)
            elif scope["path"] == "/v1/models" and scope["method"] == "GET":
                # Transformers before 5.24 lists what is in the cache of the machine, and fails without one.
                model = {"id": self.names[-1], "object": "model", "created": 0, "owned_by": "recurrent_gemma_hf"}
                return await _answer(send, 200, {"object": "list", "data": [model]})
            elif scope["path"] not in READS or scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                raise Refused(404, f"there is no {scope['method']} {scope['path']} here")
            await self.app(scope, receive, watch)
        except Refused as refused:
            await _refuse(send, refused.status, str(refused))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, TemplateError) as error:
            if started:
                raise
            logger.warning("a request was refused", exc_info=error)
            await _refuse(send, 400, f"the request cannot be answered: {type(error).__name__}: {error}")

    def _checked(self, body: bytes) -> bytes:
        """Return the body with the served name for the model, or raise `Refused`."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is no JSON: {error}") from error
        if not isinstance(request, dict):
            raise Refused(400, "the body must be a JSON object")
        name = request.get("model", self.served)
        if name not in self.names:
            raise Refused(404, f"there is no model {name!r}; this server has {self.names[-1]!r}")
        try:
            json.dumps(request, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError as error:
            raise Refused(400, "the text holds half of a surrogate pair, which is no character") from error
        except ValueError as error:
            raise Refused(400, "NaN and infinity are no JSON numbers") from error
        check_arguments(request)
        return json.dumps({**request, "model": self.served}).encode()


def check_arguments(request: dict[str, Any]) -> None:
    """Raise `Refused` for an argument of the wrong type or out of range."""
    for name, low, high, whole in (
        ("max_tokens", 1, MAX_NEW_TOKENS, True),
        ("max_completion_tokens", 1, MAX_NEW_TOKENS, True),
        ("max_output_tokens", 1, MAX_NEW_TOKENS, True),
        ("temperature", 0, 100, False),
        ("top_p", 1e-9, 1, False),
        ("frequency_penalty", -0.99, 2, False),  # Transformers multiplies by 1 + this
        ("seed", 0, 2**63 - 1, True),
        ("n", 1, 1, True),
    ):
        if (value := request.get(name)) is not None:
            _check_number(name, value, low, high, whole)
    stops = request.get("stop")
    stops = [stops] if isinstance(stops, str) else [] if stops is None else stops
    is_text = isinstance(stops, list) and all(isinstance(stop, str) and stop for stop in stops)
    if not is_text or len(stops) > MAX_STOPS:
        raise Refused(400, f"stop={stops!r} must be a text that is not empty, or at most {MAX_STOPS} of them")
    if not isinstance(request.get("stream"), bool | None):
        raise Refused(400, f"stream={request['stream']!r} must be true or false")
    if "prompt" in request and not (isinstance(request["prompt"], str) and request["prompt"]):
        raise Refused(400, "prompt must be a text that is not empty")
    if "messages" in request:
        _check_messages(request["messages"])
    if (config := request.get("generation_config")) is not None:
        _check_generation_config(config)


def _check_number(name: str, value: Any, low: float, high: float, whole: bool) -> None:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high or math.isnan(value):
        kind = "whole number" if whole else "number"
        raise Refused(400, f"{name}={value!r} must be a {kind} from {low} to {high}")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(400, f"messages[{i}] must be an object with a role and a content")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if not isinstance(content, str | list | None) or not all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
        ):
            raise Refused(400, f"messages[{i}].content must be a text, or a list of parts with a text")


def _check_generation_config(text: Any) -> None:
    from transformers import GenerationConfig

    try:
        given = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise Refused(400, "generation_config must be a text with a JSON object")
    if unknown := sorted(given.keys() - GenerationConfig().to_dict().keys()):
        raise Refused(400, f"generation_config has no field {', '.join(map(repr, unknown))}")
    for name, high in (
        ("max_new_tokens", MAX_NEW_TOKENS), ("max_length", MAX_NEW_TOKENS), ("num_beams", MAX_SEQUENCES),
        ("num_return_sequences", MAX_SEQUENCES),
    ):  # fmt: skip
        if given.get(name) is not None:
            _check_number(f"generation_config.{name}", given[name], 1, high, True)
    try:
        GenerationConfig(**given).validate()
    except (ValueError, TypeError, AttributeError) as error:
        raise Refused(400, f"generation_config: {error}") from error


async def _body(scope: MutableMapping[str, Any], receive: Receive) -> bytes:
    """Read the body, at most MAX_BYTES of it."""
    stated = dict(scope["headers"]).get(b"content-length", b"0")
    parts, size = [], int(stated) if stated.isdigit() else 0
    more, read = size <= MAX_BYTES, 0
    while more and read <= MAX_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the client has left")
        parts.append(message.get("body", b""))
        read += len(parts[-1])
        more = message.get("more_body", False)
    if max(size, read) > MAX_BYTES:
        raise Refused(413, f"the body has more than {MAX_BYTES} bytes")
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once, and then what follows it."""
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return parts.pop() if parts else await receive()

    return replay


async def _refuse(send: Send, status: int, reason: str) -> None:
    """Send an error in the form of OpenAI's API."""
    error = {"message": " ".join(reason.split()), "type": "invalid_request_error", "code": status}
    await _answer(send, status, {"error": error})


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
