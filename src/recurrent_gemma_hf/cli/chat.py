"""`recurrent-gemma generate` and `recurrent-gemma chat`: one answer, and a conversation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shared import DeviceOption, DtypeOption, ModelOption, Problem, flag, load, note, reported

if TYPE_CHECKING:
    from .conversation import Conversation

MaxNewTokensOption = Annotated[int, typer.Option(help="Generate at most this many tokens.")]
TemperatureOption = Annotated[float | None, typer.Option(help="Temperature: above 1 more random, below 1 less.")]
TopKOption = Annotated[int | None, typer.Option(help="Sample from the K likeliest tokens; 0 for all.")]
TopPOption = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of total probability P.")]
SeedOption = Annotated[int | None, typer.Option(help="Sampling seed: the same seed gives the same text.")]
GreedyOption = Annotated[bool, flag("--greedy", "Always take the likeliest token.")]
RawOption = Annotated[bool, flag("--raw", "Continue the text as it is: no chat template.")]

CHAT_HELP = "/reset starts anew, /save FILE and /load FILE keep and restore the conversation, /quit ends."


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; read from stdin when left out.")] = None,
    model: ModelOption = None,
    max_new_tokens: MaxNewTokensOption = 200,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    greedy: GreedyOption = False,
    seed: SeedOption = None,
    raw: RawOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Continue PROMPT, or answer it if the model is instruction-tuned. Tokens are printed as they come."""
    settings = _generation_settings(max_new_tokens, temperature, top_k, top_p, greedy)
    text = _read_prompt(prompt)
    conversation = _begin(model, dtype, device, settings, raw, seed)
    # A continuation is read together with its prompt, so that is printed too; an answer is printed alone.
    note(conversation.ask(text, echo=not conversation.has_template))


def chat(
    model: ModelOption = None,
    max_new_tokens: MaxNewTokensOption = 200,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    greedy: GreedyOption = False,
    seed: SeedOption = None,
    raw: RawOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Chat with a model. The state of a conversation has a constant size at any length."""
    settings = _generation_settings(max_new_tokens, temperature, top_k, top_p, greedy)
    conversation = _begin(model, dtype, device, settings, raw, seed)
    interactive = sys.stdin.isatty()
    if interactive:
        note(CHAT_HELP)
    while True:
        try:
            line = _read_stdin(lambda: input("> " if interactive else "")).strip()
            if line == "/quit":
                return
            if line.startswith("/"):
                note(_execute(conversation, line))
            elif line:
                conversation.ask(line)
        except EOFError:
            return
        except KeyboardInterrupt:
            typer.echo()
        except BrokenPipeError:  # nobody reads any more
            raise
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            note(f"no answer: {_one_line(error)}; the conversation is as before the question")


def _execute(conversation: Conversation, line: str) -> str:
    """Execute a command of the chat and return the message for the user; no error ends the chat."""
    command, _, argument = line.partition(" ")
    if command == "/reset":
        conversation.reset()
        return "a new conversation"
    if command not in ("/save", "/load"):
        return f"there is no {command}; {CHAT_HELP}"
    if not argument.strip():
        return f"{command} needs the name of a file; for instance {command} talk.safetensors"
    try:
        path = Path(argument.strip()).expanduser()
        if command == "/save":
            conversation.save(path)
            return f"saved in {path}; recurrent-gemma chat with the same model and /load {path} go on from here"
        return f"going on after {conversation.load(path)} tokens"
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a home folder that there is not
        return f"{command} failed: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _read_prompt(prompt: str | None) -> str:
    if prompt is None:
        if sys.stdin.isatty():
            raise Problem('no prompt; give one (recurrent-gemma generate "Once upon a time") or pipe a text in')
        prompt = _read_stdin(sys.stdin.read).removesuffix("\n")
    elif any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python represents undecodable bytes
        raise Problem("the prompt is not UTF-8; convert it, for instance with iconv")
    if not prompt.strip():
        raise Problem("the prompt is empty; give at least one word")
    return prompt


def _read_stdin(read: Callable[[], str]) -> str:
    with reported(UnicodeDecodeError, as_="the text on stdin is not UTF-8 ({}); convert it, for instance with iconv"):
        return read()


def _generation_settings(
    max_new_tokens: int, temperature: float | None, top_k: int | None, top_p: float | None, greedy: bool
) -> dict[str, Any]:
    """Return the arguments of `model.generate`, or raise a Problem; generation_config.json sets the others."""
    if max_new_tokens < 1:
        raise Problem(f"--max-new-tokens is {max_new_tokens}; give 1 or more")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise Problem(f"--temperature is {temperature}; give a number above 0, or --greedy for the likeliest token")
    if top_k is not None and top_k < 0:
        raise Problem(f"--top-k is {top_k}; give 1 or more, or 0 for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise Problem(f"--top-p is {top_p}; give a number above 0, at most 1")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if greedy and sampling:
        option = "--" + next(iter(sampling)).replace("_", "-")
        raise Problem(f"--greedy draws nothing, so {option} has no effect; leave one of the two out")
    return {"max_new_tokens": max_new_tokens, "do_sample": not greedy, **sampling}


def _begin(
    model: str | None, dtype: str, device: str | None, settings: dict[str, Any], raw: bool, seed: int | None
) -> Conversation:
    if seed is not None and not 0 <= seed < 2**63:
        raise Problem(f"--seed is {seed}; give a whole number from 0 to {2**63 - 1}")
    import torch

    from .conversation import Conversation

    if seed is not None:
        torch.manual_seed(seed)
    return Conversation(*load(model, dtype, device), settings, raw)
