"""What a Hugging Face folder holds besides weights and config.json: tokenizer, generation settings, model card."""

from pathlib import Path

import cards
from checks import ConversionError


def is_instruction_tuned(checkpoint: Path) -> bool:
    """Told by the archive's name (2b-it, 9b-it.pt): nothing in the weights says so."""
    return checkpoint.name.removesuffix(".pt").endswith("-it")


def check_extra_files(checkpoint: Path, tokenizer: Path | None, vocab_size: int) -> None:
    """Raises, before the long work starts, if `write_extra_files` could not do its part."""
    if tokenizer is None:
        return
    if not tokenizer.is_file():
        raise ConversionError(f"--tokenizer {tokenizer}: there is no such file; give the archive's tokenizer.model")
    from tokenizer import check_tokenizer  # needs sentencepiece, which weights alone do not

    check_tokenizer(tokenizer, vocab_size, is_instruction_tuned(checkpoint))


def write_extra_files(folder: Path, checkpoint: Path, tokenizer: Path | None, published: bool) -> None:
    """Puts tokenizer and card into `folder`, which already holds the weights and config.json.

    `published`: these are Google's weights by name and preset, and get the card of that model; else one with gaps.
    """
    if tokenizer is not None:
        from tokenizer import write_tokenizer

        write_tokenizer(tokenizer, folder, is_instruction_tuned(checkpoint))
    cards.write_card(cards.published_name(checkpoint) if published else None, folder, converted_from=checkpoint.name)
