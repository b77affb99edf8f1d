"""Write tokenizer, generation settings and model card beside weights and config.json."""

from pathlib import Path

from . import cards
from .checks import ConversionError


def is_instruction_tuned(checkpoint: Path) -> bool:
    """Tell whether the archive's name is an instruction-tuned model's (2b-it, 9b-it.pt); the weights do not show it."""
    return checkpoint.name.removesuffix(".pt").endswith("-it")


def check_extra_files(checkpoint: Path, tokenizer: Path | None, vocab_size: int) -> None:
    """Raise, before the conversion starts, if `write_extra_files` would fail."""
    if tokenizer is None:
        return
    if not tokenizer.is_file():
        raise ConversionError(f"--tokenizer {tokenizer}: there is no such file; give the archive's tokenizer.model")
    from .tokenizer import check_tokenizer  # needs sentencepiece, which weights alone do not

    check_tokenizer(tokenizer, vocab_size, is_instruction_tuned(checkpoint))


def write_extra_files(folder: Path, checkpoint: Path, tokenizer: Path | None, published: bool) -> None:
    """Write tokenizer and card into `folder`, which already holds the weights and config.json.

    `published`: the weights are Google's and get the card of that model; others get a card with gaps to fill.
    """
    if tokenizer is not None:
        from .tokenizer import write_tokenizer

        write_tokenizer(tokenizer, folder, is_instruction_tuned(checkpoint))
    cards.write_card(cards.published_name(checkpoint) if published else None, folder, converted_from=checkpoint.name)
