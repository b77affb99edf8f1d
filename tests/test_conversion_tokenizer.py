"""The converted tokenizer is SentencePiece to the id, on hard strings and on random ones; bad files are named."""

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig

import recurrent_gemma_hf  # noqa: F401 (registers the model type that AutoTokenizer finds in config.json)
from recurrent_gemma_hf.conversion import tokenizer as converter
from recurrent_gemma_hf.conversion.tokenizer import HARD_TEXTS, check_tokenizer, read_sentencepiece, write_tokenizer

CONTROL = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
NAMES = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"}
# As in Gemma's vocabulary: the turn tokens are 106 and 107, then runs of newlines, of spaces, and HTML.
USER_DEFINED = [
    *("<mask>", "<2mass>", "[@BOS@]"),
    *(f"<unused{i}>" for i in range(99)),
    *("<start_of_turn>", "<end_of_turn>"),
    *("\n" * count for count in range(1, 8)),
    *("▁" * count for count in range(2, 10)),
    *("<table>", "</table>", "<b>", "</b>", "<html>", "\t\t", "\t\t\t"),
]
GEMMA = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "byte_fallback": True,
    "vocab_size": 900,
}
# What hypothesis makes texts from: pieces of the vocabulary meet at their edges.
WORDS = ["the", "ha", "a", "b", " ", "\n", "\t", "▁", "<", ">", "of_turn", "é", "語", "0"]
FRAGMENTS = [*HARD_TEXTS, *USER_DEFINED, *WORDS]


def training_text() -> list[str]:
    """Words with repeats and overlaps, so that many merges compete."""
    dice = random.Random(0)
    syllables = "ha ab ba the th he er re in an nd on aa ana é 日本 本語".split()
    words = ["".join(dice.choices(syllables, k=dice.randint(1, 4))) for _ in range(400)]
    return [" ".join(dice.choices(words, k=dice.randint(1, 12))) for _ in range(1500)]


def train(path: Path, **overrides) -> Path:
    options = {**GEMMA, **CONTROL, **NAMES, "user_defined_symbols": USER_DEFINED, **overrides}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text()), model_writer=model, minloglevel=2, **options
    )
    path.write_bytes(model.getvalue())
    return path


def checkpoint_folder(path: Path, vocab_size: int = GEMMA["vocab_size"]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "recurrent_gemma", "vocab_size": vocab_size}))
    return path


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model")


@pytest.fixture(scope="module")
def reference(tokenizer_model: Path):
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))


@pytest.fixture(scope="module")
def folder(tokenizer_model: Path, tmp_path_factory) -> Path:
    output = checkpoint_folder(tmp_path_factory.mktemp("converted") / "it")
    write_tokenizer(tokenizer_model, output, instruction_tuned=True)
    return output


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def test_special_tokens_have_gemmas_ids(tokenizer):
    texts = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    assert tokenizer.convert_tokens_to_ids(texts) == [0, 1, 2, 3, 106, 107]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.unk_token_id == 3
    assert len(tokenizer) == GEMMA["vocab_size"]
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_are_encoded_as_by_sentencepiece_and_come_back(tokenizer, reference, text: str):
    ids = tokenizer(text)["input_ids"]
    assert ids == [2, *reference.encode(text)]
    assert 3 not in ids, "with byte fallback nothing is unknown"
    assert tokenizer.decode(ids[1:]) == reference.decode(ids[1:]) == text.replace("▁", " ")


@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=12).map("".join))
def test_any_text_is_encoded_as_by_sentencepiece(tokenizer, reference, text: str):
    for control in NAMES.values():  # the one agreed difference: see the next test
        text = text.replace(control, "")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_competing_merges_follow_the_scores(tokenizer, reference):
    dice = random.Random(1)
    texts = ["".join(dice.choices("abehnrt ", k=40)) for _ in range(3000)]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == reference.encode(texts)


def test_the_text_of_a_control_token_is_that_token(tokenizer, reference):
    assert tokenizer("<bos>x<eos>", add_special_tokens=False)["input_ids"][0] == 2
    assert 2 not in reference.encode("<bos>x<eos>"), "SentencePiece would spell it out"


@pytest.mark.parametrize("broken", [b"\xff", b"ab\xc3(", b"\xf0\x9f", b"caf\xe9 \x80"])
def test_invalid_utf8_is_replaced_as_by_sentencepiece(tokenizer, reference, broken: bytes):
    one_mark_per_byte = "".join(
        char if not "\udc80" <= char <= "\udcff" else "\ufffd" for char in broken.decode("utf-8", "surrogateescape")
    )
    assert tokenizer(one_mark_per_byte, add_special_tokens=False)["input_ids"] == reference.encode(broken)


def test_bytes_that_are_no_text_are_marked_in_the_decoded_text(tokenizer, reference):
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "€".encode()])
    assert tokenizer.decode(ids) == reference.decode(ids) == "€"
    assert tokenizer.decode(ids[:2]) == reference.decode(ids[:2]) == "\ufffd\ufffd"


def test_special_tokens_can_be_left_out_of_the_decoded_text(tokenizer):
    ids = tokenizer("<start_of_turn>user\nhi<end_of_turn>")["input_ids"]
    assert tokenizer.decode(ids) == "<bos><start_of_turn>user\nhi<end_of_turn>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"


def test_a_padded_batch_has_its_padding_on_the_left(tokenizer):
    batch = tokenizer(["the", "the the the"], padding=True)
    assert batch["input_ids"][0][0] == 0
    assert batch["attention_mask"][0][0] == 0
    assert batch["attention_mask"][0][-1] == 1


TALK = [
    {"role": "user", "content": " Knock knock. "},
    {"role": "assistant", "content": "Who's there?"},
    {"role": "user", "content": "Gemma."},
]


def test_chat_template_writes_gemmas_turns(tokenizer):
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<bos><start_of_turn>user\nKnock knock.<end_of_turn>\n"
        "<start_of_turn>model\nWho's there?<end_of_turn>\n"
        "<start_of_turn>user\nGemma.<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    ids = tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    assert (ids.count(2), ids.count(106), ids.count(107)) == (1, 4, 3)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "system", "content": "Be kind."}], "turn 1 must be from 'user', not from 'system'"),
        (TALK[:1] * 2, "turn 2 must be from 'assistant', not from 'user'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "turn 1 must be a string"),
    ],
)
def test_chat_template_refuses_turns_that_the_model_never_saw(tokenizer, turns, message: str):
    with pytest.raises(Exception, match=message):  # jinja2's own error type
        tokenizer.apply_chat_template(turns)


def test_instruction_tuned_models_stop_at_the_end_of_the_turn(folder: Path):
    config = GenerationConfig.from_pretrained(folder)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 2, [1, 107])


def test_a_base_model_has_no_chat_template_and_stops_at_eos(tokenizer_model: Path, tmp_path: Path):
    output = checkpoint_folder(tmp_path / "base")
    write_tokenizer(tokenizer_model, output, instruction_tuned=False)
    assert AutoTokenizer.from_pretrained(output).chat_template is None
    assert GenerationConfig.from_pretrained(output).eos_token_id == 1
    names = {path.name for path in output.iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_wrong_conversion_is_noticed(tokenizer_model: Path, tmp_path: Path, monkeypatch):
    """The negative control: with the merges in the wrong order, or the first of them lost, the comparison must fail."""
    in_order = list(converter._merges(read_sentencepiece(tokenizer_model)))
    for number, merges in enumerate([in_order[::-1], in_order[1:]]):
        monkeypatch.setattr(converter, "_merges", lambda _model, merges=merges: merges)
        with pytest.raises(ValueError, match=r"differs from SentencePiece on \d+ of \d+ texts"):
            write_tokenizer(tokenizer_model, checkpoint_folder(tmp_path / str(number)), instruction_tuned=False)


def test_missing_files_are_named(tokenizer_model: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*nowhere"):
        write_tokenizer(tmp_path / "nowhere", checkpoint_folder(tmp_path / "out"), instruction_tuned=False)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*nowhere"):
        check_tokenizer(tmp_path / "nowhere", 900, instruction_tuned=False)
    with pytest.raises(FileNotFoundError, match="write the model's config first"):
        write_tokenizer(tokenizer_model, tmp_path, instruction_tuned=False)


@pytest.mark.parametrize("content", [b"", b"{}", b"not a model at all", b"\x80\x04pickle"])
def test_a_file_that_is_no_sentencepiece_model(content: bytes, tmp_path: Path):
    wrong = tmp_path / "tokenizer.model"
    wrong.write_bytes(content)
    with pytest.raises(ValueError, match="is no SentencePiece model"):
        write_tokenizer(wrong, checkpoint_folder(tmp_path / "out"), instruction_tuned=False)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_model(tokenizer_model: Path, kept: float, tmp_path: Path):
    whole = tokenizer_model.read_bytes()
    part = tmp_path / "tokenizer.model"
    part.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=r"only a part of one|not a tokenizer of the Gemma family"):
        write_tokenizer(part, checkpoint_folder(tmp_path / "out"), instruction_tuned=False)


def test_a_vocabulary_of_another_size(tokenizer_model: Path, tmp_path: Path):
    output = checkpoint_folder(tmp_path / "out", vocab_size=256_000)
    with pytest.raises(ValueError, match="has 900 pieces and the model a vocab_size of 256000"):
        write_tokenizer(tokenizer_model, output, instruction_tuned=False)
    assert [path.name for path in output.iterdir()] == ["config.json"], "nothing is left behind"


def test_an_it_model_needs_the_turn_tokens(tmp_path: Path):
    model = train(tmp_path / "tokenizer.model", user_defined_symbols=["\n"])
    with pytest.raises(ValueError, match="lacks <end_of_turn>, <start_of_turn>"):
        write_tokenizer(model, checkpoint_folder(tmp_path / "out"), instruction_tuned=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model_type": "unigram", "vocab_size": 700}, "which has: BPE pieces$"),
        ({"byte_fallback": False}, "which has: byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "no normalisation of characters"),
        ({"add_dummy_prefix": True, "remove_extra_whitespaces": True}, "add_dummy_prefix off.*; .*whitespaces off"),
        ({"pad_id": 3, "unk_id": 0}, "<pad>, <eos>, <bos>, <unk> as tokens 0 to 3"),
    ],
)
def test_other_kinds_of_sentencepiece_models_are_refused(overrides, message: str, tmp_path: Path):
    model = train(tmp_path / "tokenizer.model", **overrides)
    with pytest.raises(ValueError, match=message):
        write_tokenizer(model, checkpoint_folder(tmp_path / "out"), instruction_tuned=False)
