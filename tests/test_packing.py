"""Packed documents train as each by itself: loss and gradients, by every description that collators give of them."""

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from tests.helpers import VARIANTS, assert_same_gradients, build, gradients, tiny_config

LENGTHS = [1, 37, 5, 2, 16]  # below and beyond the attention window of 12, one without anything to predict
IGNORED = -100


def documents(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, tiny_config().vocab_size, (length,), generator=generator) for length in LENGTHS]


def apart(model, texts: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss over all targets and its gradients, one document after the other."""
    targets = sum(len(text) - 1 for text in texts)
    total = sum(model(text[None], labels=text[None], num_items_in_batch=targets).loss for text in texts)
    return total.detach(), gradients(model, total)


def assert_trains_as_apart(model, batch: dict[str, Tensor], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    loss = model(**batch).loss
    torch.testing.assert_close(loss.detach(), expected[0], rtol=2e-6, atol=0)
    assert_same_gradients(gradients(model, loss), expected[1])


def flattened(texts: list[Tensor], **options) -> dict[str, Tensor]:
    collate = DataCollatorWithFlattening(return_tensors="pt", **options)
    return dict(collate([{"input_ids": text.tolist()} for text in texts]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flattening_collator(variant, attention):
    model = build(tiny_config(variant), seed=3, attention=attention).train()
    texts = documents()
    expected = apart(model, texts)
    everything = {"return_flash_attn_kwargs": True, "return_seq_idx": True}
    for options in ({}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}, everything):
        batch = flattened(texts, **options)
        assert batch["input_ids"].shape == (1, sum(LENGTHS))
        assert_trains_as_apart(model, batch, expected)


@pytest.mark.parametrize("given", ["cu_seq_lens_q", "seq_idx"])
def test_without_position_ids(given):
    """Labels are not masked either: the model knows by itself that a first token is nobody's next."""
    model = build(tiny_config(), seed=3).train()
    texts = documents()
    batch = flattened(texts, return_flash_attn_kwargs=True, return_seq_idx=True, return_position_ids=False)
    assert "position_ids" not in batch
    inputs = {"input_ids": batch["input_ids"], "labels": batch["input_ids"], given: batch[given]}
    assert_trains_as_apart(model, inputs, apart(model, texts))
    hidden = model.eval().model(input_ids=batch["input_ids"], **{given: batch[given]}).last_hidden_state
    alone = torch.cat([model.model(input_ids=text[None]).last_hidden_state for text in texts], dim=1)
    torch.testing.assert_close(hidden, alone, rtol=1e-5, atol=1e-5)


def test_several_rows_of_documents_and_padding():
    """As TRL packs: rows of documents; here the second one is padded, on either side."""
    model = build(tiny_config(), seed=3).train()
    texts = documents()
    expected = apart(model, texts)
    first, second = torch.cat(texts[:2]), torch.cat(texts[2:])
    positions = [torch.cat([torch.arange(len(text)) for text in group]) for group in (texts[:2], texts[2:])]
    padding = len(first) - len(second)
    for side in ((0, padding), (padding, 0)):
        ids = torch.stack([first, torch.nn.functional.pad(second, side)])
        mask = torch.stack([torch.ones_like(first), torch.nn.functional.pad(torch.ones_like(second), side)])
        position = torch.stack([positions[0], torch.nn.functional.pad(positions[1], side)])
        labels = ids.masked_fill(mask == 0, IGNORED)
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": position, "labels": labels}
        assert_trains_as_apart(model, batch, expected)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("at_padding", ["of the neighbour", "of its own"])
def test_numbers_of_documents_beside_padding(side, at_padding):
    """The first token of a document is not where the padding before it begins."""
    model = build(tiny_config(), seed=3).train()
    texts = documents()[:2]
    expected = apart(model, texts)
    ids, documents_of = torch.cat(texts), torch.cat([torch.full_like(text, i) for i, text in enumerate(texts)])
    at = {"left": 0, "right": len(ids), "middle": len(texts[0]) - 1}[side]
    number = documents_of[min(at, len(ids) - 1)] if at_padding == "of the neighbour" else 5
    ids, documents_of, mask = (
        torch.cat([row[:at], torch.full((4,), int(padding)), row[at:]])[None]
        for row, padding in ((ids, 0), (documents_of, number), (torch.ones_like(ids), 0))
    )
    hidden = model.eval().model(input_ids=ids, attention_mask=mask, seq_idx=documents_of).last_hidden_state[mask == 1]
    alone = torch.cat([model.model(input_ids=text[None]).last_hidden_state[0] for text in texts])
    torch.testing.assert_close(hidden, alone, rtol=1e-5, atol=1e-5)
    if side != "middle":  # there padding stands between a token and its target
        batch = {"input_ids": ids, "attention_mask": mask, "seq_idx": documents_of, "labels": ids}
        assert_trains_as_apart(model.train(), {**batch, "labels": ids.masked_fill(mask == 0, IGNORED)}, expected)


@pytest.mark.parametrize("columns", [1, 4])
def test_documents_that_may_go_on_from_a_cache(columns):
    model = build(tiny_config(), seed=3)
    text = torch.cat(documents())[None]
    cache = model(text[:, :5], use_cache=True, seq_idx=torch.zeros(1, 5, dtype=torch.int32)).past_key_values
    for given in (
        {"seq_idx": torch.zeros(1, columns, dtype=torch.int32)}, {"cu_seq_lens_q": torch.tensor([0, columns])}
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"goes on with the 5 that the cache has seen: give position_ids"):
            model(text[:, 5 : 5 + columns], past_key_values=cache, **given)
    assert cache.get_seq_length() == 5
    got = model(text[:, 5 : 5 + columns], past_key_values=cache).logits
    torch.testing.assert_close(got, model(text[:, : 5 + columns]).logits[:, 5:], rtol=1e-5, atol=1e-5)


# Transformers 5.23 has a new name for it, which 5.17 does not know.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_with_checkpointing():
    model = build(tiny_config(), seed=3).train()
    texts = documents()
    expected = apart(model, texts)
    model.gradient_checkpointing_enable()
    assert_trains_as_apart(model, flattened(texts), expected)


def test_long_documents_go_through_banded_attention():
    model = build(tiny_config(), seed=3).train()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 101, (length,), generator=generator) for length in (700, 3, 900)]
    assert_trains_as_apart(model, flattened(texts), apart(model, texts))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([0, 1, 2, 3, 2, 3], r"row 1 from column 3 on are \[3, 2, 3\]: positions grow"),
        ([0, 1, 2, -1, 0, 1], r"row 1 from column 2 on are \[2, -1, 0, 1\]: positions grow"),
        ([-1, 0, 1, 2, 3, 4], r"row 1 from column 0 on are \[-1, 0, 1, 2\]: positions grow"),
        ([5, 4, 3, 2, 1, 0], r"row 1 from column 0 on are \[5, 4, 3, 2\]: positions grow"),
    ],
)
def test_positions_that_go_back_to_anything_but_0(positions, message):
    model = build(tiny_config(), seed=3)
    ids = torch.randint(3, 101, (2, 6))
    with pytest.raises(ValueError, match=message):
        model(ids, position_ids=torch.stack([torch.arange(6), torch.tensor(positions)]))


def test_positions_of_padding_do_not_matter():
    """generate() fills them with 1, collators with 0 or the last position."""
    model = build(tiny_config(), seed=3)
    ids = torch.randint(3, 101, (1, 6))
    expected = model(ids[:, 2:]).logits
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    for padding in ([1, 1], [0, 0], [7, 3]):
        positions = torch.tensor([[*padding, 0, 1, 2, 3]])
        got = model(ids, attention_mask=mask, position_ids=positions).logits[:, 2:]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "extra", "message"),
    [
        ((1, 6), {"cu_seq_lens_q": torch.tensor([0, 2, 5])}, r"\[0, 2, 5\] must begin with 0 and end with .* 6 tokens"),
        ((1, 6), {"cu_seq_lens_q": torch.tensor([1, 6])}, r"\[1, 6\] must begin with 0"),
        ((2, 3), {"cu_seq_lens_q": torch.tensor([0, 3, 6])}, r"shape \(3,\) for 2 rows.*give position_ids"),
        ((1, 6), {"seq_idx": torch.zeros(1, 5, dtype=torch.int32)}, r"seq_idx of shape \(1, 5\) must be \(1, 6\)"),
    ],
)
def test_descriptions_that_do_not_fit(shape, extra, message):
    model = build(tiny_config(), seed=3)
    with pytest.raises(ValueError, match=message):
        model(torch.randint(3, 101, shape), **extra)
