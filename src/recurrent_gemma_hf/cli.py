"""The `recurrent-gemma` command: `generate` writes text, `chat` talks, `serve` answers over HTTP, `info` describes a
model without loading it, `memory` says what training it takes, `eval` measures one.

Whatever the user got wrong ends in one line on stderr, with the remedy, and exit code 2. What is slow to import
(torch, Transformers) is imported where it is used.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .evaluation.commands import app as evaluation_app

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, TextStreamer

    from . import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

DTYPES = ("auto", "float32", "bfloat16")
# Tokens of a prompt that are read at once, so that a book takes no more memory than a page.
PREFILL_CHUNK = 4096
# The lengths at which `info` states what a transformer's cache would take.
COMPARED_LENGTHS = (8 * 1024, 128 * 1024)

app = typer.Typer(
    help="RecurrentGemma, Griffin and Hawk on Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(evaluation_app, name="eval")

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="A checkpoint folder or a Hub id; the bundled demo by default.")
]
MaxNewTokensOption = Annotated[int, typer.Option(help="Stop after so many new tokens.")]
TemperatureOption = Annotated[float | None, typer.Option(help="Above 1 bolder, below 1 safer.")]
TopKOption = Annotated[int | None, typer.Option(help="Choose among the K likeliest tokens; 0 for all.")]
TopPOption = Annotated[float | None, typer.Option(help="Choose among the likeliest tokens of total probability P.")]
SeedOption = Annotated[int | None, typer.Option(help="The same seed writes the same text.")]
GreedyOption = Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")]
RawOption = Annotated[bool, typer.Option("--raw", help="Continue the text as it is: no chat template.")]
DtypeOption = Annotated[
    str, typer.Option(help="auto, float32 or bfloat16. auto is the checkpoint's, where this CPU is fast in it.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...; the fastest here by default.")]


def main() -> None:
    """The entry point of the `recurrent-gemma` command."""
    app()


def _fail(problem: str) -> NoReturn:
    """Ends the command with one line that says what is wrong and what to do."""
    _note(" ".join(problem.split()))
    raise typer.Exit(2)


def _note(message: str) -> None:
    typer.echo(f"recurrent-gemma: {message}", err=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"recurrent-gemma-hf {version('recurrent-gemma-hf')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """RecurrentGemma, Griffin and Hawk on Hugging Face Transformers."""


# --- generate ---


@app.command()
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
    """Continue PROMPT, or answer it where the model is instruction-tuned, writing as the text comes."""
    settings = _generation_settings(max_new_tokens, temperature, top_k, top_p, greedy)
    text = _read_prompt(prompt)
    _seed(seed)
    conversation = _Conversation(*_load(model, dtype, device), settings, raw)
    # A continuation reads on from its prompt, so the prompt is printed too; an answer stands alone.
    _note(conversation.ask(text, echo=not conversation.has_template))


def _read_prompt(prompt: str | None) -> str:
    if prompt is None:
        if sys.stdin.isatty():
            _fail('no prompt; give one (recurrent-gemma generate "Once upon a time") or pipe a text in')
        prompt = _read_stdin(sys.stdin.read).removesuffix("\n")
    elif any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python passes on undecodable bytes
        _fail("the prompt is not UTF-8; convert it, for instance with iconv")
    if not prompt.strip():
        _fail("the prompt is empty; give at least one word")
    return prompt


def _read_stdin(read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        _fail(f"the text on stdin is not UTF-8 ({error}); convert it, for instance with iconv")


def _generation_settings(
    max_new_tokens: int, temperature: float | None, top_k: int | None, top_p: float | None, greedy: bool
) -> dict[str, Any]:
    """What `model.generate` is told; where the user said nothing, the checkpoint's generation_config.json decides."""
    if max_new_tokens < 1:
        _fail(f"--max-new-tokens is {max_new_tokens}; give 1 or more")
    if temperature is not None and not 0 < temperature < float("inf"):
        _fail(f"--temperature is {temperature}; give a number above 0, or --greedy for the likeliest token")
    if top_k is not None and top_k < 0:
        _fail(f"--top-k is {top_k}; give 1 or more, or 0 for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        _fail(f"--top-p is {top_p}; give a number above 0, at most 1")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if greedy and sampling:
        option = "--" + next(iter(sampling)).replace("_", "-")
        _fail(f"--greedy draws nothing, so {option} has no effect; leave one of the two out")
    return {"max_new_tokens": max_new_tokens, "do_sample": not greedy, **sampling}


def _seed(seed: int | None) -> None:
    if seed is None:
        return
    if not 0 <= seed < 2**63:
        _fail(f"--seed is {seed}; give a whole number from 0 to {2**63 - 1}")
    import torch

    torch.manual_seed(seed)


# --- chat ---

CHAT_HELP = "/reset starts anew, /save FILE and /load FILE keep and restore the conversation, /quit ends."


@app.command()
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
    """Talk to a model. The state of the conversation has a constant size, however long the talk."""
    settings = _generation_settings(max_new_tokens, temperature, top_k, top_p, greedy)
    _seed(seed)
    conversation = _Conversation(*_load(model, dtype, device), settings, raw)
    interactive = sys.stdin.isatty()
    if interactive:
        _note(CHAT_HELP)
    while True:
        try:
            line = _read_stdin(lambda: input("> " if interactive else "")).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            typer.echo()
            continue
        if line == "/quit":
            return
        if line.startswith("/"):
            _note(_obey(conversation, line))
        elif line:
            conversation.ask(line)


def _obey(conversation: _Conversation, line: str) -> str:
    """Carries out a line that begins with a slash and returns what to tell the user; no mistake ends the chat."""
    command, _, argument = line.partition(" ")
    path = Path(argument.strip()).expanduser()
    if command == "/reset":
        conversation.reset()
        return "a new conversation"
    if command not in ("/save", "/load"):
        return f"there is no {command}; {CHAT_HELP}"
    if not argument.strip():
        return f"{command} needs the name of a file; for instance {command} talk.safetensors"
    try:
        if command == "/save":
            conversation.save(path)
            return f"saved in {path}; recurrent-gemma chat with the same model and /load {path} go on from here"
        return f"going on after {conversation.load(path)} tokens"
    except (OSError, ValueError) as error:
        return f"{command} failed: {error}"


class _Conversation:
    """A model, its tokenizer and ONE cache: every turn runs the model over the new tokens alone.

    The last token of an answer is drawn but never read by the model, so it waits in `pending` for the next turn. An
    end-of-sequence token is dropped instead: the chat template closes the turn, and a plain text goes on.
    """

    def __init__(
        self, model: RecurrentGemmaForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], raw: bool
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.has_template = bool(tokenizer.chat_template) and not raw
        self.reset()

    def reset(self) -> None:
        """Forgets everything said so far."""
        from . import RecurrentGemmaCache

        self.cache = RecurrentGemmaCache(self.model.config)
        self.pending: list[int] = []

    def ask(self, text: str, *, echo: bool = False) -> str:
        """Prints the answer to `text` as it comes, after `text` itself with `echo`; returns a line about the speed."""
        import torch
        from transformers import StoppingCriteriaList, TextStreamer

        past = self.cache.get_seq_length()
        new = self.pending + self._encode(text)
        meter = _Meter(TextStreamer(self.tokenizer, skip_prompt=not echo, skip_special_tokens=True))
        with _interrupt_as_criterion() as interrupted:
            output = self.model.generate(
                torch.tensor([new], device=self.model.device),
                # The mask of the whole conversation tells generate() that these are the new tokens alone.
                attention_mask=torch.ones(1, past + len(new), dtype=torch.long, device=self.model.device),
                cache=self.cache,
                streamer=meter,
                stopping_criteria=StoppingCriteriaList([interrupted]),
                prefill_chunk_size=PREFILL_CHUNK,
                **self.settings,
            )
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        unread = output[0, self.cache.get_seq_length() - past :].tolist()
        self.pending = [token for token in unread if token not in ends]
        return meter.report()

    def save(self, path: Path) -> None:
        """Writes the state to `path`, whose size does not depend on the length of the conversation."""
        import torch

        if self.pending:
            with torch.no_grad():
                pending = torch.tensor([self.pending], device=self.model.device)
                self.model(pending, cache=self.cache, logits_to_keep=1)
            self.pending = []
        self.cache.save(path)

    def load(self, path: Path) -> int:
        """Goes on from what `save` wrote; returns the number of tokens in it. Raises OSError or ValueError."""
        from . import RecurrentGemmaCache

        cache = RecurrentGemmaCache.load(path, self.model.config, device=self.model.device)
        if cache.batch_size != 1:
            raise ValueError(f"{path} holds {cache.batch_size} conversations; a chat goes on from exactly one")
        self.cache, self.pending = cache, []
        return cache.get_seq_length()

    def _encode(self, text: str) -> list[int]:
        """The tokens that `text` adds to the conversation."""
        begins = not self.pending and self.cache.get_seq_length() == 0
        if self.has_template:
            # A template writes its own beginning-of-sequence token.
            return self.tokenizer(self._turn(text, begins), add_special_tokens=False)["input_ids"]
        return self.tokenizer(text if begins else f"\n{text}", add_special_tokens=begins)["input_ids"]

    def _turn(self, text: str, begins: bool) -> str:
        """What the chat template writes for `text`: at the beginning, or between an answer and the next one."""
        question = {"role": "user", "content": text}
        if begins:
            return self.tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        # What was said before is in the cache, so any earlier turn will do to learn what follows an answer.
        answer = "an earlier answer"
        earlier = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        turns = self.tokenizer.apply_chat_template([*earlier, question], tokenize=False, add_generation_prompt=True)
        return turns.partition(answer)[2]


class _Meter:
    """A streamer that hands everything on to `printer` and takes the time."""

    def __init__(self, printer: TextStreamer) -> None:
        self.printer = printer
        self.prompt_tokens = 0
        self.times = [time.perf_counter()]

    def put(self, tokens: torch.Tensor) -> None:
        """Called by generate() with the prompt first (1, T), then with every new token (1,)."""
        if self.prompt_tokens:
            self.times.append(time.perf_counter())
        else:
            self.prompt_tokens = tokens.numel()
        self.printer.put(tokens)

    def end(self) -> None:
        """Called by generate() after the last token."""
        self.printer.end()

    def report(self) -> str:
        """How long the prompt took, and how many tokens came per second after the first one."""
        start, first, last = self.times[0], self.times[1], self.times[-1]
        prompt = f"{self.prompt_tokens} prompt tokens in {first - start:.2f} s"
        written = len(self.times) - 1
        if written == 1:
            return f"{prompt}, 1 token written"
        return f"{prompt}, {written} tokens written at {(written - 1) / (last - first):.1f} tokens/s"


@contextmanager
def _interrupt_as_criterion() -> Iterator[Callable[..., torch.Tensor]]:
    """The first Ctrl-C ends the answer between two tokens, where the cache is whole; a second one ends the program."""
    import torch

    stopped = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    def is_stopped(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), stopped, device=input_ids.device)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield is_stopped
    finally:
        signal.signal(signal.SIGINT, previous)


# --- info ---


@app.command()
def info(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A checkpoint folder, a Hub id or a preset such as recurrentgemma-2b."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Describe a model: its shape, its memory beside a transformer's, and what it computes with here."""
    from . import PRESETS, RecurrentGemmaConfig

    config = RecurrentGemmaConfig.from_preset(model) if model in PRESETS else _read_config(_locate(model))
    facts = {"model": model or "the bundled demo", **_describe(config), **_describe_computation(config, dtype, device)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print_table(facts)


def _describe(config: RecurrentGemmaConfig) -> dict[str, Any]:
    """Shape, parameters and memory in bytes, without loading or allocating any weight."""
    import torch

    from . import RecurrentGemmaForCausalLM

    with torch.device("meta"):
        model = RecurrentGemmaForCausalLM(config)
    model.tie_weights()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    blocks = config.layers_block_type
    names = ("hidden_size", "lru_width", "num_attention_heads", "num_key_value_heads", "head_dim",
             "attention_window_size", "vocab_size")  # fmt: skip
    # Two bytes each for the key and the value of every token in every layer.
    transformer_bytes_per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {
        "model_type": config.model_type,
        "layers": {kind: blocks.count(kind) for kind in ("recurrent", "attention")},
        "mlp_width": config.intermediate_size // 2,
        **{name: getattr(config, name) for name in names},
        "parameters": parameters,
        "embedding_parameters": model.get_input_embeddings().weight.numel(),
        "weight_bytes": {"bfloat16": 2 * parameters, "float32": 4 * parameters},
        "cache_bytes": _cache_bytes(config),
        "transformer_cache_bytes": {length: length * transformer_bytes_per_token for length in COMPARED_LENGTHS},
    }


def _cache_bytes(config: RecurrentGemmaConfig) -> int:
    """Bytes of a RecurrentGemmaCache for one sequence of any length, in bfloat16 with float32 recurrent states."""
    recurrent = (config.conv1d_width - 1) * config.lru_width * 2 + config.lru_width * 4
    attention = 2 * config.sliding_window * config.num_key_value_heads * config.head_dim * 2
    size = {"recurrent": recurrent, "attention": attention}
    return sum(size[block] for block in config.layers_block_type)


def _describe_computation(config: RecurrentGemmaConfig, dtype: str, device: str | None) -> dict[str, Any]:
    import torch

    from .recurrent_block import resolve_block_backend
    from .scan import resolve_backend

    head_width = config.lru_width // config.num_attention_heads

    def block_backend(device: torch.device | str, dtype: torch.dtype) -> str:
        return resolve_block_backend(device, dtype, head_width, config.hidden_activation)

    chosen_device = _pick_device(device)
    chosen_dtype = _pick_dtype(dtype, chosen_device, config)
    recurrence_dtype = torch.promote_types(chosen_dtype, torch.float32)  # gates and states are never narrower
    return {
        "device": str(chosen_device),
        "dtype": str(chosen_dtype).removeprefix("torch."),
        "recurrence_backend": resolve_backend("auto", chosen_device, recurrence_dtype),
        "block_backend": block_backend(chosen_device, chosen_dtype),
        "block_backends": {
            kind: {name: block_backend(kind, getattr(torch, name)) for name in DTYPES if name != "auto"}
            for kind in ("cuda", "xpu", "mps", "cpu")
        },
    }


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    layers, lengths = facts["layers"], facts["transformer_cache_bytes"]
    attention = {
        "attention heads": f"{facts['num_attention_heads']} of width {facts['head_dim']}, "
        f"{facts['num_key_value_heads']} for keys and values",
        "attention window": f"{facts['attention_window_size']} tokens before the query",
    }
    rows = {
        "type": facts["model_type"],
        "layers": f"{sum(layers.values())}: {layers['recurrent']} recurrent, {layers['attention']} attention",
        "width": f"{facts['hidden_size']}, recurrence {facts['lru_width']}, MLP {facts['mlp_width']}",
        **(attention if layers["attention"] else {}),
        "vocabulary": f"{facts['vocab_size']:,}",
        "parameters": f"{facts['parameters']:,}, of them {facts['embedding_parameters']:,} in the embedding",
        "weights": ", ".join(f"{_readable(size)} in {dtype}" for dtype, size in facts["weight_bytes"].items()),
        "cache per sequence": f"{_readable(facts['cache_bytes'])} at any length",
        "a transformer's cache": ", ".join(
            f"{_readable(size)} at {length:,} tokens" for length, size in lengths.items()
        ),
        "computes here": f"on {facts['device']} in {facts['dtype']}, recurrent blocks by {facts['block_backend']!r}, "
        f"recurrence alone by {facts['recurrence_backend']!r}",
        "recurrent blocks": "; ".join(
            f"{name!r} on {', '.join(places)}" for name, places in _places_by_backend(facts["block_backends"]).items()
        ),
    }
    table = Table(title=Text(facts["model"]), show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    table.caption = (
        "Caches in bfloat16, recurrent states in float32. The transformer has the same layers, each with the same "
        "key and value heads: 2 x layers x heads x width of a head x 2 bytes for every token."
    )
    table.caption_justify = "left"
    Console().print(table)


def _places_by_backend(backends: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    """{"triton": ["cuda", ...]}: the devices that a backend serves, with the dtype where it does not serve all."""
    places: dict[str, list[str]] = {}
    for device, names in backends.items():
        for dtype, name in names.items():
            is_all = len(set(names.values())) == 1
            place = device if is_all else f"{device} in {dtype}"
            if place not in places.setdefault(name, []):
                places[name].append(place)
    return places


def _readable(size: int) -> str:
    """Bytes in decimal units: 16,900,000 is "16.9 MB"."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


# --- memory ---


@app.command()
def memory(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A checkpoint folder, a Hub id or a preset such as recurrentgemma-2b."),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="full-fp32, full-amp, full-bf16, lora or qlora; all of them by default.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of a row.")] = 8192,
    batch_size: Annotated[int, typer.Option(help="Rows on each device.")] = 1,
    devices: Annotated[int, typer.Option(help="Sharded over so many (FSDP).")] = 1,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line instead of a table.")] = False,
) -> None:
    """State what one training step with AdamW takes on each device, without and with activation checkpointing."""
    from dataclasses import asdict

    from . import PRESETS, RecurrentGemmaConfig
    from .memory import STRATEGIES, training_memory

    config = RecurrentGemmaConfig.from_preset(model) if model in PRESETS else _read_config(_locate(model))
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name in [strategy] if strategy is not None else STRATEGIES:
        for checkpointing in (False, True):
            try:
                result = training_memory(
                    config, name, tokens=tokens, batch_size=batch_size, checkpointing=checkpointing, devices=devices,
                    rank=rank,
                )  # fmt: skip
            except ValueError as error:
                _fail(str(error))
            except ModuleNotFoundError as error:
                if strategy is not None:
                    _fail(f"{error}: the adapters of {name} are peft's; pip install peft")
                left_out.append(name)
                break
            rows.append({"strategy": name, "checkpointing": checkpointing, **asdict(result)})
    if as_json:
        typer.echo("\n".join(json.dumps(row) for row in rows))
    else:
        _print_memory(model or "the bundled demo", rows, f"{batch_size} x {tokens:,} tokens, {devices} device(s)")
    if left_out:
        _note(f"left out: {', '.join(left_out)}, whose adapters are peft's; pip install peft")


def _print_memory(name: str, rows: list[dict[str, Any]], size: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from .memory import STRATEGIES

    names = ("weights", "gradients", "optimizer", "activations", "loss", "gathered", "peak")
    columns = [column for column in names if any(row[column] for row in rows)]
    # Narrow enough for 80 columns: the unit once, and nothing between the columns.
    unit, divisor = ("GB", 1e9) if max(row["peak"] for row in rows) >= 1e9 else ("MB", 1e6)
    table = Table(
        "strategy", "checkpointing", title=f"{name}: {size}, in {unit}", title_justify="left", box=SIMPLE_HEAD
    )
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        checkpointing = "yes" if row["checkpointing"] else "no"
        table.add_row(row["strategy"], checkpointing, *(f"{row[column] / divisor:.2f}" for column in columns))
    used = dict.fromkeys(row["strategy"] for row in rows)
    table.caption = "Not all of it exists at a time: the peak is less than the sum. " + "; ".join(
        f"{strategy}: {STRATEGIES[strategy].explanation}" for strategy in used
    )
    table.caption_justify = "left"
    Console().print(table)


# --- serve ---


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Serve over HTTP: `transformers serve`, its arguments and options (try --help), with this package's model."""
    from . import RecurrentGemmaForCausalLM
    from .transformers_compat import transformers_command

    try:
        command = transformers_command(RecurrentGemmaForCausalLM)
    except ModuleNotFoundError as error:
        _fail(str(error))
    command(["serve", *context.args], prog_name="recurrent-gemma")


# --- what the commands share ---


def _locate(model: str | None) -> str:
    """The checkpoint that the user means: the demo, a folder, or else a Hub id."""
    from . import demo_checkpoint

    if model is None:
        return demo_checkpoint()
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            _fail(f"{model} has no config.json; give the folder that save_pretrained or a download wrote")
        return str(path)
    if path.is_file():
        _fail(f"{model} is a file; give the folder it is in")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        _fail(f"there is no folder {model}; give a checkpoint folder or a Hub id such as google/recurrentgemma-2b-it")
    return model


def _read_config(location: str) -> RecurrentGemmaConfig:
    from transformers import AutoConfig

    from . import RecurrentGemmaConfig

    try:
        config = AutoConfig.from_pretrained(location)
    except (OSError, ValueError) as error:
        _fail(f"cannot read the config of {location}: {_first_line(error)}")
    if not isinstance(config, RecurrentGemmaConfig):
        _fail(f"{location} is a {config.model_type} checkpoint; give one of type recurrent_gemma")
    return config


def _load(
    model: str | None, dtype: str, device: str | None
) -> tuple[RecurrentGemmaForCausalLM, PreTrainedTokenizerBase]:
    """The model, ready on its device, and its tokenizer."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    location = _locate(model)
    config = _read_config(location)
    chosen_device = _pick_device(device)
    # Left out, from_pretrained chooses: the checkpoint's dtype, float32 where this CPU is slow in bfloat16.
    chosen_dtype = {} if dtype == "auto" else {"dtype": _pick_dtype(dtype, chosen_device, config)}
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(location)
        loaded = AutoModelForCausalLM.from_pretrained(location, device_map=str(chosen_device), **chosen_dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        _fail(f"cannot load {location}: {_first_line(error)}")
    # Without its files, AutoTokenizer makes an empty tokenizer, to which every text is unknown.
    if tokenizer("a", add_special_tokens=False)["input_ids"] in ([], [tokenizer.unk_token_id]):
        _fail(f"{location} has no tokenizer; put tokenizer.json and tokenizer_config.json there")
    if len(tokenizer) > config.vocab_size:
        _fail(
            f"the tokenizer of {location} has {len(tokenizer)} tokens, its model {config.vocab_size}; put the "
            "model's own tokenizer there"
        )
    return loaded, tokenizer


def _pick_device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        _fail(f"--device {name} cannot be used here ({_first_line(error)}); leave it out to use the fastest there is")
    return device


def _pick_dtype(name: str, device: torch.device, config: RecurrentGemmaConfig) -> torch.dtype:
    """The dtype that `name` asks for; "auto" is what from_pretrained takes."""
    import torch

    from .cpu_linear import is_cpu_without_bfloat16

    if name not in DTYPES:
        _fail(f"--dtype {name} is unknown; give one of {', '.join(DTYPES)}")
    if name != "auto":
        return getattr(torch, name)
    if config.dtype is None or is_cpu_without_bfloat16(device):
        return torch.float32
    return config.dtype


def _first_line(error: BaseException) -> str:
    """The message of `error` without what Transformers writes below it."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


if __name__ == "__main__":
    main()
