"""The files of a Hugging Face folder besides weights and config.json. The converter calls `write_extra_files`."""

import shutil
from pathlib import Path

from checks import ConversionError


def check_extra_files(tokenizer: Path | None) -> None:
    """Raises, before the long work starts, if `write_extra_files` could not do its part."""
    if tokenizer is not None and not tokenizer.is_file():
        raise ConversionError(f"--tokenizer {tokenizer}: there is no such file; give the archive's tokenizer.model")


def write_extra_files(folder: Path, tokenizer: Path | None) -> None:
    """Puts the tokenizer into `folder`, which already holds the weights and config.json."""
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
