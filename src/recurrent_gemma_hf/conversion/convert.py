"""Convert in both directions, and parse the command line of the four conversions."""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from .. import PRESETS, RecurrentGemmaConfig
from . import checks, mapping
from .cards import published_name
from .checks import Claims, ConversionError
from .extras import check_extra_files, write_extra_files
from .mapping import Dialect, Row
from .sources import DTYPES, HfSource, OfficialSource, OrbaxSource, Source, TorchSource
from .targets import OrbaxFolder, Plan, SafetensorsFolder, Spec, Target, TorchFile, pieces, staged, total_bytes
from .upload import check_repository, push
from .verification import check_can_verify, verify_bits, verify_logits

_SOURCES: dict[Dialect, Callable[[Path], OfficialSource]] = {"jax": OrbaxSource, "torch": TorchSource}
_TARGETS: dict[Dialect, Callable[[Path, Plan], Target]] = {"jax": OrbaxFolder, "torch": TorchFile}

Direction = Callable[[Dialect, Path, Path, "Options"], RecurrentGemmaConfig]

_SHOWN = 4000  # characters of an error: names in a damaged file can be of any length


class Options(NamedTuple):
    """Holds the options of the command line besides the two paths."""

    claims: Claims = Claims()
    tokenizer: Path | None = None
    dtype: torch.dtype | None = None  # None: as in the checkpoint
    verify: bool = False
    push_to_hub: str | None = None  # owner/name of a repository


def official_to_hf(dialect: Dialect, checkpoint: Path, output: Path, options: Options) -> RecurrentGemmaConfig:
    """Convert a checkpoint of the official code to a folder that `from_pretrained` loads."""
    with _readable(checkpoint):
        source = _SOURCES[dialect](checkpoint)
    if dialect == "jax":
        _warn_of_no_checksums(checkpoint, "an Orbax checkpoint")
    config = checks.infer_config(source.shapes, dialect, options.claims)
    check_extra_files(checkpoint, options.tokenizer, config.vocab_size)
    if options.tokenizer is None:
        _note(f"without --tokenizer {output} gets no tokenizer, which the code in its README.md needs")
    if options.push_to_hub is not None:
        check_repository(options.push_to_hub)
    rows = mapping.table(config, dialect)
    ours = checks.our_shapes(config)
    checks.check_bijection(rows, ours, _official_shapes(rows, ours), source.shapes)
    dtype_of = {row.official: options.dtype or source.dtypes[row.official] for row in rows}
    plan = {name: Spec(ours[name], dtype_of[row.official]) for row in rows for name in row.ours}
    _check_can_verify(options, dialect, ours)
    # from_pretrained casts all parameters to this dtype, so it is the one that holds each of them exactly.
    config.dtype = max(dtype_of.values(), key=lambda dtype: dtype.itemsize)
    config.architectures = ["RecurrentGemmaForCausalLM"]
    with staged(output, total_bytes(plan)) as folder:
        _copy(SafetensorsFolder(folder, plan), rows, source, plan, _to_ours)
        config.save_pretrained(folder)
        write_extra_files(folder, checkpoint, options.tokenizer, published=_is_published(checkpoint, options.claims))
        _verify(options, source, folder, rows, plan, config)
    if options.push_to_hub is not None:
        _push(output, options.push_to_hub)
    return config


def _push(output: Path, repo_id: str) -> None:
    try:
        print(f"pushed: {push(output, repo_id)}")
    except (ValueError, OSError) as error:
        resume = f"recurrent-gemma convert upload {output} {repo_id}"
        raise ConversionError(f"{error}\n{output} is complete; push it with: {resume}") from error


def _is_published(checkpoint: Path, claims: Claims) -> bool:
    """Tell whether archive name and preset agree that this is one of Google's released models."""
    name = published_name(checkpoint)
    return name is not None and claims.preset == name.removesuffix("-it")


def hf_to_official(dialect: Dialect, checkpoint: Path, output: Path, options: Options) -> RecurrentGemmaConfig:
    """Convert a folder of `save_pretrained` to a checkpoint of the official code."""
    with _readable(checkpoint):
        source = HfSource(checkpoint)
    _warn_of_no_checksums(checkpoint, "a safetensors folder")
    try:
        config = RecurrentGemmaConfig.from_pretrained(checkpoint)
    except (ValueError, OSError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{checkpoint}/config.json is no RecurrentGemma config: {error}") from error
    checks.check_official_can_express(config, options.claims)
    rows = mapping.table(config, dialect)
    ours = checks.our_shapes(config)
    checks.check_bijection(rows, ours, ours, source.shapes)
    _check_can_verify(options, dialect, ours)
    shapes = _official_shapes(rows, ours)
    plan = {row.official: Spec(shapes[row.official], options.dtype or _widest(source, row)) for row in rows}
    with staged(output, total_bytes(plan)) as path:
        _copy(_TARGETS[dialect](path, plan), rows, source, plan, _to_official)
        _verify(options, _SOURCES[dialect](path), checkpoint, rows, plan, config)
    return config


@contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
    """Turn what malformed metadata raises anywhere (a list where a dict should be, a missing key) into one error."""
    try:
        yield
    except ConversionError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ConversionError(
            f"the metadata of {checkpoint} are malformed ({type(error).__name__}: {error}): copy or download the "
            "checkpoint again"
        ) from error


def _warn_of_no_checksums(checkpoint: Path, kind: str) -> None:
    """Say that flipped bits in the weights would not be noticed."""
    _note(
        f"{kind} has no checksums of its weights, so damage in {checkpoint} can go unnoticed; compare its files with "
        "the hashes that their publisher gives"
    )


def _note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def _official_shapes(rows: list[Row], ours: checks.Shapes) -> checks.Shapes:
    """Apply `checks.official_shapes` to the rows whose parameters exist; `check_bijection` reports the others."""
    return checks.official_shapes([row for row in rows if all(name in ours for name in row.ours)], ours)


def _widest(source: Source, row: Row) -> torch.dtype:
    return max((source.dtypes[name] for name in row.ours), key=lambda dtype: dtype.itemsize)


def _to_ours(row: Row, part: slice, source: Source) -> dict[str, torch.Tensor]:
    return dict(zip(row.ours, row.layout.to_ours(source.read(row.official, part)), strict=True))


def _to_official(row: Row, part: slice, source: Source) -> dict[str, torch.Tensor]:
    return {row.official: row.layout.to_official(*(source.read(name, part) for name in row.ours))}


def _copy(target: Target, rows: list[Row], source: Source, plan: Plan, convert: Callable) -> None:
    """Stream all pieces from `source` to `target`, reading the next while writing one: two pieces are in memory."""

    def read(row: Row, part: slice) -> dict[str, torch.Tensor]:
        return {name: tensor.to(plan[name].dtype).contiguous() for name, tensor in convert(row, part, source).items()}

    progress = tqdm(total=total_bytes(plan), unit="B", unit_scale=True, disable=None)
    try:
        with progress, ThreadPoolExecutor(max_workers=1) as reader:
            first, *rest = pieces(rows, plan)
            coming = reader.submit(read, *first)
            for following in [*rest, None]:
                tensors = coming.result()
                if following is not None:
                    coming = reader.submit(read, *following)
                while tensors:  # popped, so that each tensor is freed as soon as it is written
                    name = next(iter(tensors))
                    tensor = tensors.pop(name)
                    target.write(name, tensor)
                    progress.update(tensor.nbytes)
                    del tensor
    finally:
        target.close()


def _check_can_verify(options: Options, dialect: Dialect, ours: checks.Shapes) -> None:
    if options.verify:
        check_can_verify(dialect, sum(math.prod(shape) for shape in ours.values()))


def _verify(
    options: Options, official: OfficialSource, folder: Path, rows: list[Row], plan: Plan, config: RecurrentGemmaConfig
) -> None:
    if options.verify:
        verify_bits(official, HfSource(folder), rows, plan, options.dtype)
        verify_logits(official, folder, config, options.dtype)


# --- the command line -------------------------------------------------------------------------------------------------


def main(direction: Direction, dialect: Dialect, description: str, arguments: list[str] | None = None) -> None:
    """Run one of the four scripts: `run`, with an error as one message."""
    try:
        run(direction, dialect, description, arguments)
    except (ConversionError, ValueError, OSError) as error:  # also from the tokenizer, the disk and the Hub
        sys.exit(f"error: {shown(error)}")


def shown(error: Exception) -> str:
    """Return the message of an error, cut off where it is endless."""
    text = str(error)
    return f"{text[:_SHOWN]}{'...' if len(text) > _SHOWN else ''}"


def run(
    direction: Direction,
    dialect: Dialect,
    description: str,
    arguments: list[str] | None = None,
    program: str | None = None,
) -> None:
    """Convert as the arguments say, by default those of the process.

    `direction`: `official_to_hf` or `hf_to_official`. `program`: its name in `--help`, by default the script's.

    Raises:
        ValueError, OSError: whatever prevents the conversion.
        SystemExit: after `--help`, after arguments that cannot be understood, and after Ctrl-C.
    """
    parser = _parser(description, with_tokenizer=direction is official_to_hf, program=program)
    given = parser.parse_args(arguments)
    options = Options(
        Claims(given.preset, given.attention_window_size, given.logits_soft_cap, given.scale_embeddings),
        getattr(given, "tokenizer", None),
        DTYPES.get(given.dtype),
        given.verify,
        getattr(given, "push_to_hub", None),
    )
    try:
        config = direction(dialect, given.checkpoint, given.output, options)
    except KeyboardInterrupt:
        sys.exit(f"interrupted: nothing was left in {given.output.absolute().parent}")
    verified = ", verified" if given.verify else ""
    print(f"{given.output}: {config.num_hidden_layers} layers of width {config.hidden_size}{verified}")


def _parser(description: str, with_tokenizer: bool, program: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("--preset", choices=PRESETS, help="the published architecture that it is (checked)")
    parser.add_argument("--attention-window-size", type=int, metavar="N", help="how many tokens back a query sees")
    parser.add_argument("--logits-soft-cap", type=float, metavar="C", help="c in c tanh(logits / c); 0: none")
    parser.add_argument(
        "--scale-embeddings",
        action=argparse.BooleanOptionalAction,
        help="whether embeddings are multiplied by sqrt(width): yes for RecurrentGemma, no in the Griffin paper",
    )
    if with_tokenizer:
        parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="the archive's tokenizer.model")
        parser.add_argument(
            "--push-to-hub", metavar="REPO", help="upload the result to owner/name; run again to resume"
        )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the result (default: as in the checkpoint)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the result again, compare every bit, and compare logits with the official code in float32",
    )
    return parser
