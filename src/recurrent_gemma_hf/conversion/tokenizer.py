"""Convert SentencePiece's `tokenizer.model` to the files that `AutoTokenizer` and `generate()` read.

`write_tokenizer` writes `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and, for an
instruction-tuned model, `chat_template.jinja` beside the weights. This file builds the tokenizer itself, because no way
of Transformers 5.23 reproduces SentencePiece: `GemmaTokenizer.from_pretrained` reads a `tokenizer.model`, but merges
runs of spaces, which are user-defined symbols in Gemma's vocabulary, with ordinary merges (2 of the `HARD_TEXTS` below
differ), and `GemmaConverter` raises an AttributeError.

The steps of SentencePiece (`sentencepiece/src/bpe_model.cc`, `normalizer.cc`) and their equivalents here:

1. spaces become "▁", nothing else is normalised           -> `normalizers.Replace`
2. user-defined symbols are cut out, the longest first      -> added tokens, looked up after 1 ("▁▁" is one of them)
3. the pair that makes the piece of the highest score is
   merged, the leftmost of equals, until none is left       -> `models.BPE`, merges in the order of the scores
4. a character that is no piece becomes its UTF-8 bytes     -> `byte_fallback`

Three things differ, as in every tokenizer on the Hub. `<bos>` is prepended. The text of a control token ("<bos>") is
encoded as that token; a chat template needs this. If a model generates byte tokens that are not UTF-8, `decode`
replaces each byte of the run by U+FFFD, SentencePiece only the invalid bytes; no encoded text contains them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

Piece = ModelProto.SentencePiece

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")  # their ids are 0, 1, 2 and 3
TURN_TOKENS = ("<start_of_turn>", "<end_of_turn>")  # 106 and 107 in the published vocabulary

# Strings on which tokenizers tend to differ. Every converted tokenizer must encode them as SentencePiece does.
HARD_TEXTS = (
    "",
    " ",
    "  two before, three after   ",
    "a  b   c    d          e",
    "line\nline\n\nline\n\n\n\n\r\nline",
    "\ttab\t\ttabs \t mixed\t ",
    "nul \x00, bell \x07, escape \x1b[0m, delete \x7f, next line \x85, no-break\xa0space",
    "1234567890 3.14159 -1e-10 ½ ٣٤٥",
    "naïve café, combining e\u0301, ligature \ufb01, fullwidth \uff21\uff22\uff23",
    "日本語とひらがな、한국어, 中文字符。العربية, עברית, हिन्दी, ไทย",
    "😀 \U0001f469\u200d\U0001f469\u200d\U0001f467 🇨🇭 \u2702\ufe0f \U0001f9d1\U0001f3fd",
    "\u200bzero\u200dwidth\ufeff \u202eright to left\u202c",
    "replaced \ufffd\ufffd bytes, private \ue000, last \U0010ffff",
    "▁ a literal ▁▁ low block ▁",
    "<0x41> is no byte, <start_of_turn>user\nhi<end_of_turn>\n <end_of_turn> <start_of_turnx>",
    "<html><b>tags</b></html> [[brackets]] {braces} `ticks` \\ \"quotes\" 'and' _under_",
    "aaaaaaaaaaaaaaaaaaaaaaa abababababababab hahahahaha",
)

# Gemma's turns. Roles must alternate, starting with "user"; these models were trained without a system turn.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- set expected = "user" if loop.index0 is even else "assistant" -%}
    {%- if message["role"] != expected -%}
        {{- raise_exception("turn " ~ loop.index ~ " must be from '" ~ expected ~ "', not from '" ~ message["role"]
            ~ "': turns alternate from the user's on, and there is no system turn") -}}
    {%- endif -%}
    {%- if message["content"] is not string -%}
        {{- raise_exception("turn " ~ loop.index ~ " must be a string: the model reads text alone") -}}
    {%- endif -%}
    {{- "<start_of_turn>" ~ ("user" if expected == "user" else "model") ~ "\\n" -}}
    {{- message["content"] | trim ~ "<end_of_turn>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<start_of_turn>model\\n" -}}
{%- endif -%}
"""


def write_tokenizer(tokenizer_model: Path, output: Path, instruction_tuned: bool) -> None:
    """Write the tokenizer and generation settings of a checkpoint folder.

    Args:
        tokenizer_model: the SentencePiece model that came with the checkpoint.
        output: the checkpoint folder with its `config.json`, whose vocabulary size is checked.
        instruction_tuned: whether this is an -it model, which gets the chat template and also stops at `<end_of_turn>`.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the file is no SentencePiece model, has other settings than Gemma's or another number of pieces than
            the config's vocab_size, lacks the turn tokens of an -it model, or the result differs from SentencePiece.
    """
    config = output / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"no {config}: write the model's config first, the vocabulary is compared with it")
    vocab_size = json.loads(config.read_text(encoding="utf-8"))["vocab_size"]
    model = check_tokenizer(tokenizer_model, vocab_size, instruction_tuned)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(model),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE if instruction_tuned else None,
    )
    tokenizer.save_pretrained(output)
    _check_equal(model, output)
    _generation_config(tokenizer, instruction_tuned).save_pretrained(output)


def check_tokenizer(tokenizer_model: Path, vocab_size: int, instruction_tuned: bool) -> ModelProto:
    """Return the SentencePiece model if `write_tokenizer` can convert it for this vocabulary size, else raise.

    Call it before the long conversion of the weights.
    """
    model = read_sentencepiece(tokenizer_model)
    _check_settings(model, tokenizer_model)
    _check_vocabulary(model, tokenizer_model, vocab_size, instruction_tuned)
    return model


def read_sentencepiece(path: Path) -> ModelProto:
    """Read a SentencePiece model; raise FileNotFoundError or ValueError if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: give the tokenizer.model that came with the checkpoint")
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(
            f"{path} is no SentencePiece model, or only a part of one ({error}): copy tokenizer.model again"
        ) from error
    if not model.pieces:
        raise ValueError(f"{path} is no SentencePiece model: it has no pieces; give the checkpoint's tokenizer.model")
    return model


def build_tokenizer(model: ModelProto) -> Tokenizer:
    """Build the `tokenizers` pipeline that encodes as the SentencePiece BPE model, with `<bos>` prepended."""
    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, list(_merges(model)), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos>:1 $B:1",
        special_tokens=[("<bos>", vocabulary["<bos>"])],
    )
    special = [text for text in (*SPECIAL_TOKENS, *TURN_TOKENS) if text in vocabulary]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    user_defined = [piece.piece for piece in model.pieces if piece.type == Piece.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in user_defined if text not in TURN_TOKENS])
    return tokenizer


def _merges(model: ModelProto) -> Iterator[tuple[str, str]]:
    """Return every pair of pieces that forms a piece, ordered by the score of the merged piece, highest first.

    User-defined symbols are excluded: SentencePiece never merges them with their neighbours.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == Piece.NORMAL}
    for text in sorted(scores, key=lambda text: -scores[text]):
        for cut in range(1, len(text)):
            if text[:cut] in scores and text[cut:] in scores:
                yield text[:cut], text[cut:]


def _check_settings(model: ModelProto, path: Path) -> None:
    """Raise one error that names every setting in which the model differs from Gemma's."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = {piece.type for piece in model.pieces}
    conditions = {
        "BPE pieces": trainer.model_type == TrainerSpec.BPE,
        "byte fallback, with all 256 bytes": trainer.byte_fallback
        and sum(piece.type == Piece.BYTE for piece in model.pieces) == 256,
        "no normalisation of characters": not normalizer.precompiled_charsmap,
        "no space put in front (add_dummy_prefix off)": not normalizer.add_dummy_prefix,
        "no space dropped (remove_extra_whitespaces off)": not normalizer.remove_extra_whitespaces,
        "spaces escaped": normalizer.escape_whitespaces,
        "the space at the front of words": not trainer.treat_whitespace_as_suffix,
        "no unused pieces": Piece.UNUSED not in kinds,
        f"{', '.join(SPECIAL_TOKENS)} as tokens 0 to 3": tuple(piece.piece for piece in model.pieces[:4])
        == SPECIAL_TOKENS,
    }
    unmet = [wanted for wanted, met in conditions.items() if not met]
    if unmet:
        raise ValueError(f"{path} is not a tokenizer of the Gemma family, which has: {'; '.join(unmet)}")


def _check_vocabulary(model: ModelProto, path: Path, vocab_size: int, instruction_tuned: bool) -> None:
    """Raise unless the embedding has one row per piece, and an -it model has the tokens of its turns."""
    if len(model.pieces) != vocab_size:
        raise ValueError(
            f"{path} has {len(model.pieces)} pieces and the model a vocab_size of {vocab_size}: "
            "this tokenizer belongs to another model"
        )
    missing = set(TURN_TOKENS) - {piece.piece for piece in model.pieces}
    if instruction_tuned and missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: it cannot belong to an instruction-tuned model")


def _check_equal(model: ModelProto, output: Path) -> None:
    """Read the written files back and compare them with SentencePiece on `HARD_TEXTS` and on every piece."""
    reference = SentencePieceProcessor(model_proto=model.SerializeToString())
    tokenizer = AutoTokenizer.from_pretrained(output)
    kinds = (Piece.NORMAL, Piece.USER_DEFINED)
    texts = [*HARD_TEXTS, *(piece.piece.replace("▁", " ") for piece in model.pieces if piece.type in kinds)]
    encodings = tokenizer(texts, add_special_tokens=False)["input_ids"]
    different = [text for text, ids in zip(texts, encodings, strict=True) if ids != reference.encode(text)]
    if different:
        raise ValueError(
            f"the converted tokenizer differs from SentencePiece on {len(different)} of {len(texts)} texts, first "
            f"{different[:3]!r}: please report this with the tokenizer.model; do not use {output / 'tokenizer.json'}"
        )


def _generation_config(tokenizer: PreTrainedTokenizerFast, instruction_tuned: bool) -> GenerationConfig:
    """Return settings for greedy decoding until `<eos>` or the end of the model's turn."""
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    return GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end_of_turn] if instruction_tuned else tokenizer.eos_token_id,
    )
