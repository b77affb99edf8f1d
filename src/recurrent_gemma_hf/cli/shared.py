"""Tools shared by the commands: errors for the user, notes, tables, and loading the model.

Slow imports (torch, Transformers, rich) are made where they are used, so that `--help` and `--version` are fast.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from rich.table import Column
    from transformers import PreTrainedTokenizerBase

    from .. import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

DTYPES = ("auto", "float32", "bfloat16")
DEMO = "the bundled demo"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name
# For commands that pass all their arguments on, --help included.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="A checkpoint folder or a Hub id; the bundled demo by default.")
]
ConfigOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A checkpoint folder, a Hub id or a preset such as recurrentgemma-2b."),
]
DtypeOption = Annotated[
    str, typer.Option(help="auto, float32 or bfloat16. auto: the checkpoint's, or float32 where bfloat16 is emulated.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...; the accelerator by default.")]


def flag(name: str, help_text: str) -> Any:
    """Return an option without a value; with typer's own default for `metavar`, help would show one (<bool>)."""
    return typer.Option(name, help=help_text, metavar="")


class Problem(Exception):
    """An error for the user: what is wrong and the remedy, in one sentence. `main` prints it and exits with status
    2."""


@contextmanager
def reported(*kinds: type[Exception], as_: str = "{}") -> Iterator[None]:
    """Turn errors of these kinds into a Problem with message `as_`, where {} becomes the error's first line.

    Transformers adds more lines, which are dropped.
    """
    try:
        yield
    except kinds as error:
        line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise Problem(as_.replace("{}", line)) from error


@contextmanager
def using_extra(name: str) -> Iterator[None]:
    """Turn the error about a package that is not installed into a Problem that names it and its extra."""
    package = __package__.partition(".")[0]
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(package):
            raise
        distribution = package.replace("_", "-")
        raise Problem(
            f"this needs {error.name}, which is not installed: pip install '{distribution}[{name}]'"
        ) from error


# What a terminal obeys instead of showing: control characters other than tab and line feed, and marks that reverse the
# direction of what follows. Shown as their code.
_COMMANDS = [*range(9), *range(11, 32), *range(127, 160), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F),
             *range(0x2066, 0x206A)]  # fmt: skip
_SHOWN = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _COMMANDS}


def harmless(text: str) -> str:
    """Return `text` with everything that a terminal would obey shown as its code, such as \\x1b."""
    return text.translate(_SHOWN)


def note(message: str) -> None:
    """Write one line to stderr."""
    typer.echo(harmless(f"recurrent-gemma: {message}"), err=True)


def print_table(
    title: str, columns: Sequence[str | Column], rows: Iterable[Sequence[str]], caption: str = "", **style: Any
) -> None:
    """Print a table of strings; `style` goes to rich's Table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A Text, because a string would be read as markup: [...] in a path would not be shown.
    table = Table(
        *columns, title=Text(harmless(title)), caption=caption, title_justify="left", caption_justify="left", **style
    )
    for row in rows:
        table.add_row(*(Text(harmless(cell)) for cell in row))
    Console().print(table)


def locate(model: str | None) -> str:
    """Return a checkpoint's folder (for None, the demo's) or Hub id; raise a Problem for any other argument."""
    from .. import demo_checkpoint

    if model is None:
        return demo_checkpoint()
    path = Path(model).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            raise Problem(f"{model} has no config.json; give the folder that save_pretrained or a download wrote")
        return str(path)
    if path.is_file():
        raise Problem(f"{model} is a file; give the folder it is in")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise Problem(
            f"there is no folder {model}; give a checkpoint folder or a Hub id such as google/recurrentgemma-2b-it"
        )
    return model


def adapter_base(location: str) -> str | None:
    """Return the checkpoint that a folder's or Hub repository's PEFT adapter was made for. None: it is no adapter, or a
    folder of an adapter and its model, as from_pretrained takes one with a config.json."""
    from ..transformers_compat import find_adapter_config_file

    with reported(OSError, ValueError, as_=f"cannot read {ADAPTER_CONFIG} of {location}: {{}}"):
        found = find_adapter_config_file(location)
        if found is None or (Path(location) / "config.json").is_file():
            return None
        base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise Problem(f"{found} names no base_model_name_or_path; write the folder or the Hub id of its model there")
    if find_spec("peft") is None:
        raise Problem(f"{location} is an adapter, which needs peft: pip install 'recurrent-gemma-hf[train]'")
    return base


def find_config(model: str | None) -> RecurrentGemmaConfig:
    """Return the config of a preset or of a checkpoint, without reading its weights."""
    from .. import PRESETS, RecurrentGemmaConfig

    return RecurrentGemmaConfig.from_preset(model) if model in PRESETS else read_config(locate(model))


def read_config(location: str) -> RecurrentGemmaConfig:
    """Return the config of a folder or a Hub id; for an adapter, that of the checkpoint under it."""
    from transformers import AutoConfig

    from .. import RecurrentGemmaConfig

    location = adapter_base(location) or location
    with reported(OSError, ValueError, as_=f"cannot read the config of {location}: {{}}"):
        config = AutoConfig.from_pretrained(location)
    if not isinstance(config, RecurrentGemmaConfig):
        raise Problem(f"{location} is a {config.model_type} checkpoint; give one of type recurrent_gemma")
    return config


def _tokenizer_folder(location: str) -> str:
    """Return `location`, or for an adapter's folder without a tokenizer the checkpoint under the adapter."""
    has_none = Path(location).is_dir() and not (Path(location) / "tokenizer_config.json").is_file()
    return (has_none and adapter_base(location)) or location


def load(
    model: str | None, dtype: str, device: str | None
) -> tuple[RecurrentGemmaForCausalLM, PreTrainedTokenizerBase]:
    """Return the model, on its device, and its tokenizer; raise a Problem if either cannot be used."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    location = locate(model)
    config = read_config(location)
    chosen_device = pick_device(device)
    # With "auto" from_pretrained chooses: the checkpoint's dtype, float32 if this CPU emulates bfloat16.
    chosen_dtype = {} if dtype == "auto" else {"dtype": pick_dtype(dtype, chosen_device, config)}
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with reported(OSError, ValueError, RuntimeError, SafetensorError, as_=f"cannot load {location}: {{}}"):
        tokenizer = AutoTokenizer.from_pretrained(_tokenizer_folder(location))
        loaded = AutoModelForCausalLM.from_pretrained(location, device_map=str(chosen_device), **chosen_dtype)
    # AutoTokenizer makes an empty tokenizer if the files are missing.
    if tokenizer("a", add_special_tokens=False)["input_ids"] in ([], [tokenizer.unk_token_id]):
        raise Problem(f"{location} has no tokenizer; put tokenizer.json and tokenizer_config.json there")
    if len(tokenizer) > config.vocab_size:
        raise Problem(
            f"the tokenizer of {location} has {len(tokenizer)} tokens, its model {config.vocab_size}; put the "
            "model's own tokenizer there"
        )
    return loaded, tokenizer


def pick_device(name: str | None) -> torch.device:
    """Return the device called `name`, or raise a Problem if it does not work; None: the accelerator, else the CPU."""
    import torch

    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    message = f"--device {name} cannot be used here ({{}}); leave it out to use the fastest there is"
    with reported(RuntimeError, AssertionError, NotImplementedError, as_=message):
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    return device


def pick_dtype(name: str, device: torch.device, config: RecurrentGemmaConfig) -> torch.dtype:
    """Return the dtype called `name`; "auto" is the one that from_pretrained chooses."""
    import torch

    from ..cpu_linear import is_cpu_without_bfloat16

    if name not in DTYPES:
        raise Problem(f"--dtype {name} is unknown; give one of {', '.join(DTYPES)}")
    if name != "auto":
        return getattr(torch, name)
    if config.dtype is None or is_cpu_without_bfloat16(device):
        return torch.float32
    return config.dtype
