"""RecurrentGemmaCache: full = chunked = token by token, whatever else happens to the cache in between.

The window is 8 tokens, so most texts here are several windows long. The models run in float64, where two orders of
summation differ by less than 1e-9 while a state that is off by one token differs in the first digit; where both sides
do the very same operations, the comparison is bit for bit.

Shapes: B batch, T tokens (columns), V vocabulary.
"""

import copy
import functools
import gc
import itertools
import os
import pickle
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recurrent_gemma_hf import RecurrentGemmaCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from recurrent_gemma_hf.cache_file import write_file
from tests import helpers
from tests.helpers import FUZZ_ROUNDS, build, gradients, tiny_config

WINDOW = 8
VARIANTS = ["recurrentgemma", "wide_lru", "hawk", "attention_first", "attention_only"]
PAD = 0
SEED = 5
TOLERANCE = 1e-9


def config_of(variant: str, **overrides) -> RecurrentGemmaConfig:
    return tiny_config(variant, attention_window_size=WINDOW, **overrides)


@functools.cache
def model_of(variant: str = "recurrentgemma", dtype: torch.dtype = torch.float64) -> RecurrentGemmaForCausalLM:
    """Shared by the tests, which do not change it. The padding token has an embedding that shows if it leaks."""
    model = build(config_of(variant), SEED)
    with torch.no_grad():
        model.get_input_embeddings().weight[PAD] = 50.0
    return model.to(dtype)


def tokens(rows: int, columns: int, seed: int = SEED) -> Tensor:
    """Ids (rows, columns) without that of padding; more columns go on from fewer."""
    return torch.randint(1, 101, (columns, rows), generator=torch.Generator().manual_seed(seed)).T.contiguous()


def padding(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    """A mask (rows, columns) bool of one kind, with rows of different lengths; a row may have no token at all."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "holes":
        return torch.rand(rows, columns, generator=generator) < 0.6
    lengths = torch.randint(0, columns + 1, (rows, 1), generator=generator)
    if kind == "left":
        return torch.arange(columns) >= columns - lengths
    return torch.arange(columns) < lengths if kind == "right" else torch.ones(rows, columns, dtype=torch.bool)


@torch.no_grad()
def forward(
    model: RecurrentGemmaForCausalLM, cache: RecurrentGemmaCache, ids: Tensor, mask: Tensor | None, start: int, end: int
) -> Tensor:
    """Logits (B, end - start, V) of columns `start` to `end`, the columns before them being in the cache."""
    seen = None if mask is None else mask[:, :end]
    return model(ids[:, start:end], attention_mask=seen, past_key_values=cache).logits


@torch.no_grad()
def alone(model: RecurrentGemmaForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits (B, T, V) of each row without its padding and without a cache; zeros at padding."""
    logits = torch.zeros(*ids.shape, model.config.vocab_size, dtype=model.dtype)
    for i in range(ids.shape[0]):
        if mask[i].any():
            logits[i, mask[i]] = model(ids[i, mask[i]][None], use_cache=False).logits[0]
    return logits


def assert_same(actual: Tensor, expected: Tensor, mask: Tensor | None = None) -> None:
    """Equal at the tokens."""
    if mask is not None:
        actual, expected = actual[mask], expected[mask]
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def tensors_of(cache: RecurrentGemmaCache) -> dict[str, Tensor]:
    return {f"{i}.{name}": tensor for i, layer in enumerate(cache.layers) for name, tensor in layer.tensors().items()}


def prefilled(
    variant: str = "recurrentgemma", columns: int = 20, rows: int = 2, dtype: torch.dtype = torch.float64, **options
) -> RecurrentGemmaCache:
    """A cache that has seen `columns` columns."""
    model = model_of(variant, dtype)
    cache = RecurrentGemmaCache(model.config, **options)
    forward(model, cache, tokens(rows, columns), None, 0, columns)
    return cache


# --- Any split of the text, any padding -------------------------------------------------------------------------------

KINDS = ["none", "left", "right", "holes"]


@settings(max_examples=60 * FUZZ_ROUNDS)
@given(
    variant=st.sampled_from(VARIANTS),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
    cuts=st.sets(st.integers(1, 33)),
)
def test_any_split_is_the_whole_and_each_row_alone(variant: str, kind: str, seed: int, cuts: set[int]):
    model, ids, mask = model_of(variant), tokens(3, 34, seed), padding(kind, 3, 34, seed)
    ids[~mask] = PAD
    expected = alone(model, ids, mask)
    with torch.no_grad():
        assert_same(model(ids, attention_mask=mask, use_cache=False).logits, expected, mask)
    cache = RecurrentGemmaCache(model.config)
    bounds = [0, *sorted(cuts), 34]
    given_mask = None if kind == "none" else mask
    pieces = [forward(model, cache, ids, given_mask, *piece) for piece in itertools.pairwise(bounds)]
    assert_same(torch.cat(pieces, dim=1), expected, mask)
    assert cache.get_seq_length() == 34


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_token_by_token(variant: str, kind: str):
    model, ids, mask = model_of(variant), tokens(3, 40), padding(kind, 3, 40, SEED)
    ids[~mask] = PAD
    cache = RecurrentGemmaCache(model.config)
    steps = [forward(model, cache, ids, mask, t, t + 1) for t in range(40)]
    assert_same(torch.cat(steps, dim=1), alone(model, ids, mask), mask)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_float32_stays_within_its_precision(attention: str):
    model = build(config_of("recurrentgemma"), SEED, attention)
    assert model.config._attn_implementation == attention
    ids, cache = tokens(2, 100), RecurrentGemmaCache(model.config)
    steps = [forward(model, cache, ids, None, t, t + 1) for t in range(100)]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=2e-5, rtol=0)


def test_padding_would_show_if_it_leaked():
    """The control of all tests above: with the mask left out, padding changes every later token."""
    model, ids, mask = model_of(), tokens(1, 20), padding("none", 1, 20, SEED)
    mask[0, 3], ids[0, 3] = False, PAD
    with torch.no_grad():
        error = (model(ids, use_cache=False).logits - alone(model, ids, mask))[0, 4:].abs().amax(-1)
    assert error.min() > 1e-3


def test_a_row_without_tokens_leaves_its_state_empty():
    model, ids = model_of(), tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1] = False
    cache = RecurrentGemmaCache(model.config)
    for start, end in ((0, 5), (5, 6), (6, 12)):
        forward(model, cache, ids, mask, start, end)
    assert cache.progress.lengths.tolist() == [12, 0]
    assert all(not tensor[1].any() for tensor in tensors_of(cache).values())


# --- Several caches on one model --------------------------------------------------------------------------------------


@settings(max_examples=20 * FUZZ_ROUNDS)
@given(
    turns=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 9)), min_size=2, max_size=12), seed=st.integers(0, 99)
)
def test_two_interleaved_caches(turns: list[tuple[int, int]], seed: int):
    model = model_of()
    texts = [tokens(2, 120, seed), tokens(2, 120, seed + 1)]
    caches, pieces = [RecurrentGemmaCache(model.config) for _ in texts], [[], []]
    for which, columns in turns:
        start = caches[which].get_seq_length()
        pieces[which].append(forward(model, caches[which], texts[which], None, start, start + columns))
    for text, cache, logits in zip(texts, caches, pieces, strict=True):
        if logits:
            kept = text[:, : cache.get_seq_length()]
            assert_same(torch.cat(logits, dim=1), alone(model, kept, torch.ones_like(kept, dtype=torch.bool)))


def test_two_caches_from_two_threads():
    """Bit for bit what each thread gets when it is alone, with chunks and single tokens."""
    model, bounds = model_of(dtype=torch.float32), [0, 11, *range(12, 40), 60]

    def run(seed: int) -> Tensor:
        cache, ids = RecurrentGemmaCache(model.config), tokens(2, 60, seed)
        return torch.cat([forward(model, cache, ids, None, *b) for b in itertools.pairwise(bounds)], dim=1)

    expected = [run(seed) for seed in range(4)]
    results: list[Tensor | None] = [None] * 4
    barrier = threading.Barrier(4)

    def work(seed: int) -> None:
        barrier.wait()
        results[seed] = run(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))


# --- Rollback ---------------------------------------------------------------------------------------------------------


@settings(max_examples=80 * FUZZ_ROUNDS)
@given(data=st.data())
def test_crop_is_never_having_seen(data: st.DataObject):
    """Rounds of forwards (single tokens and chunks, up to 40 columns, so beyond the window and what is kept) and a crop
    of 0 to all that is recorded; padding anywhere, also among the removed columns.
    """
    variant = data.draw(st.sampled_from(VARIANTS), label="variant")
    kind = data.draw(st.sampled_from(KINDS), label="padding")
    seed = data.draw(st.integers(0, 10**6), label="seed")
    max_rollback = data.draw(st.sampled_from([1, 4, 2 * WINDOW, 512]), label="max_rollback")
    model = model_of(variant)
    cache = RecurrentGemmaCache(model.config, max_rollback=max_rollback)
    ids, mask = torch.zeros(3, 0, dtype=torch.long), torch.zeros(3, 0, dtype=torch.bool)

    def read(columns: int) -> Tensor:
        nonlocal ids, mask, seed
        seed += 1
        ids = torch.cat([ids, tokens(3, columns, seed)], dim=1)
        mask = torch.cat([mask, padding(kind, 3, columns, seed)], dim=1)
        ids[~mask] = PAD
        return forward(model, cache, ids, None if kind == "none" else mask, ids.shape[1] - columns, ids.shape[1])

    for columns in data.draw(st.lists(st.integers(1, 20), max_size=2), label="before recording"):
        read(columns)
    cache.activate_past_recording()
    for _ in range(data.draw(st.integers(1, 2), label="rounds")):
        chunks = data.draw(st.lists(st.sampled_from([1, 1, 1, 2, 5, 12, 40]), min_size=1, max_size=5), label="forwards")
        for columns in chunks:
            read(columns)
        removed = data.draw(st.integers(0, min(sum(chunks), max_rollback)), label="removed")
        kept = ids.shape[1] - removed
        cache.crop(-removed)
        ids, mask = ids[:, :kept], mask[:, :kept]
        assert cache.get_seq_length() == kept
        assert cache.progress.lengths.tolist() == mask.sum(1).tolist()
    columns = data.draw(st.sampled_from([1, 2, 13]), label="after the crop")
    logits = torch.cat([read(columns), read(1)], dim=1)
    new = slice(ids.shape[1] - columns - 1, None)
    assert_same(logits, alone(model, ids, mask)[:, new], mask[:, new])


@pytest.mark.parametrize("variant", VARIANTS)
def test_crop_restores_every_state_of_one_long_forward(variant: str):
    """A forward of window + max_rollback + 10 tokens; every rollback from it is exact."""
    model, limit = model_of(variant), 12
    ids = tokens(2, WINDOW + limit + 10)
    T = ids.shape[1]
    for removed in range(limit + 1):
        cache = RecurrentGemmaCache(model.config, max_rollback=limit)
        cache.activate_past_recording()
        forward(model, cache, ids, None, 0, T)
        cache.crop(torch.tensor(-removed))  # a tensor, as assisted decoding gives it
        assert cache.get_seq_length() == T - removed
        assert type(cache.get_seq_length()) is int
        fresh = RecurrentGemmaCache(model.config)
        forward(model, fresh, ids, None, 0, T - removed)
        for name, state in tensors_of(cache).items():
            if "keys" not in name and "values" not in name:  # a slot that has left the window may hold anything
                assert_same(state, tensors_of(fresh)[name])
        more = tokens(2, T + 20, seed=SEED + 1)
        for t in range(T - removed, T - removed + 12):
            assert_same(forward(model, cache, more, None, t, t + 1), forward(model, fresh, more, None, t, t + 1))


def test_crop_of_everything_recorded_from_the_first_token_on():
    cache = RecurrentGemmaCache(model_of().config)
    cache.activate_past_recording()
    ids = tokens(2, 25)
    expected = forward(model_of(), cache, ids, None, 0, 25)
    cache.crop(-25)
    assert cache.get_seq_length() == 0
    assert_same(forward(model_of(), cache, ids, None, 0, 25), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [[2, 2, 0], [1], [0, 0, 1, 1, 2, 2]], ids=str)
def test_crop_after_the_rows_were_chosen_anew(kind: str, order: list[int]):
    """What is recorded moves with its row, and so does the padding among it."""
    model, ids, mask = model_of(), tokens(3, 30), torch.ones(3, 30, dtype=torch.bool)
    mask[:, 21:26] = padding(kind, 3, 5, SEED)
    cache = prefilled(columns=20, rows=3)
    cache.activate_past_recording()
    forward(model, cache, ids, mask, 20, 26)
    cache.batch_select_indices(torch.tensor(order))
    ids, mask = ids[order], mask[order]
    forward(model, cache, ids, mask, 26, 28)
    cache.crop(-5)
    assert_same(forward(model, cache, ids, mask, 23, 30), alone(model, ids, mask)[:, 23:], mask[:, 23:])


def test_what_is_recorded_is_bounded_and_let_go():
    model, limit = model_of(), 6
    cache = prefilled(max_rollback=limit)
    plain = cache.memory_footprint()
    cache.activate_past_recording()
    ids, sizes = tokens(2, 120), []
    for t in range(20, 120):
        forward(model, cache, ids, None, t, t + 1)
        sizes.append(cache.memory_footprint())
    assert sizes[-1] > plain
    assert max(sizes) == sizes[limit] == sizes[-1]
    long = tokens(2, 420)
    forward(model, cache, long, None, 120, 420)
    assert cache.memory_footprint() == sizes[-1]
    for tape in (tape.tensor for layer in cache.layers for tape in layer.tapes()):
        assert tape.untyped_storage().nbytes() == tape.nbytes, "a view keeps the whole text alive"
    cache.crop(0)
    assert cache.memory_footprint() == plain


# --- Rows of the batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "rows",
    [[2, 0, 1], [1, 1, 1], [2], [0, 0, 1, 1, 2, 2], [True, False, True], "repeat", "reorder"],
    ids=str,
)
def test_choosing_rows(variant: str, kind: str, rows):
    model, ids, mask = model_of(variant), tokens(3, 30), padding(kind, 3, 30, SEED)
    ids[~mask] = PAD
    cache = RecurrentGemmaCache(model.config)
    forward(model, cache, ids, mask, 0, 14)
    if rows == "repeat":
        index = torch.arange(3).repeat_interleave(3)
        cache.batch_repeat_interleave(3)
    elif rows == "reorder":
        index = torch.tensor([2, 0, 0])
        cache.reorder_cache(index)
    else:
        index = torch.tensor(rows)
        cache.batch_select_indices(index)
    ids, mask = ids[index], mask[index]
    assert cache.batch_size == len(ids)
    logits = torch.cat([forward(model, cache, ids, mask, 14, 25), forward(model, cache, ids, mask, 25, 26)], dim=1)
    assert_same(logits, alone(model, ids[:, :26], mask[:, :26])[:, 14:], mask[:, 14:26])


def test_rows_of_an_empty_cache():
    cache = RecurrentGemmaCache(model_of().config)
    assert cache.batch_size == -1
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory_footprint() == 0


# --- Copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("duplicate", [RecurrentGemmaCache.fork, copy.deepcopy], ids=["fork", "deepcopy"])
def test_a_copy_is_independent(variant: str, duplicate):
    model, cache = model_of(variant), prefilled(variant)
    before = {name: tensor.clone() for name, tensor in tensors_of(cache).items()}
    ids = tokens(2, 40)
    other = torch.cat([ids[:, :20], tokens(2, 20, SEED + 1)], dim=1)
    copied = duplicate(cache)
    pieces = [forward(model, copied, other, None, 20, 21), forward(model, copied, other, None, 21, 40)]
    assert_same(torch.cat(pieces, dim=1), alone(model, other, other > 0)[:, 20:])
    assert cache.get_seq_length() == 20
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(cache).items())
    assert_same(forward(model, cache, ids, None, 20, 40), alone(model, ids, ids > 0)[:, 20:])


def test_fork_with_repeats():
    model, cache = model_of(), prefilled(rows=2)
    ids = tokens(2, 20).repeat_interleave(3, 0)
    ids = torch.cat([ids, tokens(6, 12, SEED + 1)], dim=1)
    assert_same(forward(model, cache.fork(3), ids, None, 20, 32), alone(model, ids, ids > 0)[:, 20:])
    assert cache.batch_size == 2


def test_a_fork_can_take_back_what_its_origin_recorded():
    model, ids = model_of(), tokens(2, 40)
    cache = prefilled()
    cache.activate_past_recording()
    forward(model, cache, ids, None, 20, 30)
    fork = cache.fork()
    fork.crop(-7)
    assert_same(forward(model, fork, ids, None, 23, 40), alone(model, ids, ids > 0)[:, 23:])
    assert cache.get_seq_length() == 30
    cache.crop(-10)
    assert_same(forward(model, cache, ids, None, 20, 40), alone(model, ids, ids > 0)[:, 20:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_reset_is_a_new_cache_at_the_same_address(variant: str):
    model, cache = model_of(variant), prefilled(variant)
    cache.activate_past_recording()
    forward(model, cache, tokens(2, 25), None, 20, 25)
    addresses = {name: tensor.data_ptr() for name, tensor in tensors_of(cache).items()}
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = tokens(2, 30, SEED + 1)
    logits = torch.cat([forward(model, cache, ids, None, 0, 3), forward(model, cache, ids, None, 3, 30)], dim=1)
    assert_same(logits, alone(model, ids, ids > 0))
    assert {name: tensor.data_ptr() for name, tensor in tensors_of(cache).items()} == addresses


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "holes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(tmp_path: Path, variant: str, dtype: torch.dtype, kind: str):
    """The continuation is the same bit for bit: through single tokens, a chunk, and a crop."""
    model, ids, mask = model_of(variant, dtype), tokens(2, 60), padding(kind, 2, 60, SEED)
    cache = RecurrentGemmaCache(model.config)
    forward(model, cache, ids, mask, 0, 21)
    cache.save(tmp_path / "prompt.safetensors")
    loaded = RecurrentGemmaCache.load(tmp_path / "prompt.safetensors", model.config)
    assert loaded.get_seq_length() == cache.get_seq_length() == 21
    assert loaded.batch_size == 2
    for name, tensor in tensors_of(cache).items():
        assert tensors_of(loaded)[name].dtype == tensor.dtype
        assert torch.equal(tensors_of(loaded)[name], tensor)
    for state in (cache, loaded):
        state.activate_past_recording()
    for start, end in ((21, 22), (22, 23), (23, 45), (45, 46)):
        expected = forward(model, cache, ids, mask, start, end)
        assert torch.equal(forward(model, loaded, ids, mask, start, end), expected)
    for state in (cache, loaded):
        state.crop(-9)
    assert torch.equal(forward(model, loaded, ids, mask, 37, 60), forward(model, cache, ids, mask, 37, 60))


def test_the_config_may_come_from_a_file(tmp_path: Path):
    model, cache = model_of(), prefilled()
    cache.save(tmp_path / "prompt.safetensors")
    model.config.save_pretrained(tmp_path)
    config = RecurrentGemmaConfig.from_pretrained(tmp_path)
    ids = tokens(2, 30)
    loaded = RecurrentGemmaCache.load(str(tmp_path / "prompt.safetensors"), config)
    assert_same(forward(model, loaded, ids, None, 20, 30), alone(model, ids, ids > 0)[:, 20:])


def test_the_size_of_the_file_does_not_depend_on_the_length_of_the_text(tmp_path: Path):
    sizes = set()
    for columns in (10, 99):
        prefilled(columns=columns).save(tmp_path / "prompt.safetensors")
        sizes.add((tmp_path / "prompt.safetensors").stat().st_size)
    assert len(sizes) == 1


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path, monkeypatch):
    path = tmp_path / "prompt.safetensors"
    prefilled(columns=10).save(path)
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("recurrent_gemma_hf.cache_file.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        prefilled(columns=12).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["prompt.safetensors"]


# --- Sizes and addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_size_and_addresses_are_constant_from_the_first_token_on(variant: str):
    model, ids = model_of(variant), tokens(2, 300)
    cache = RecurrentGemmaCache(model.config)

    def now() -> tuple[int, list[int]]:
        addresses = [tensor.data_ptr() for tensor in (*tensors_of(cache).values(), cache.progress.lengths)]
        return cache.memory_footprint(), addresses

    forward(model, cache, ids, None, 0, 1)
    first = now()
    forward(model, cache, ids, None, 1, 2)
    forward(model, cache, ids, None, 2, 250)
    for t in range(250, 260):
        forward(model, cache, ids, None, t, t + 1)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([0, 0]))
    assert now() == first
    cache.activate_past_recording()
    forward(model, cache, ids, None, 260, 270)
    cache.crop(-4)
    assert now() == first


def test_size_for_the_2b_model():
    """One sequence in bfloat16: 17 MB of keys and values, 0.2 MB of float32 state, 0.3 MB of inputs of convolutions."""
    config = RecurrentGemmaConfig.from_preset("recurrentgemma-2b")
    cache = RecurrentGemmaCache(config)
    cache.begin_forward(1, 1, torch.device("cpu"))
    key = torch.zeros(1, 1, 1, 256, dtype=torch.bfloat16)
    for i, kind in enumerate(config.layers_block_type):
        if kind == "attention":
            cache.update(key, key, i)
        else:
            cache.update_conv_state(torch.zeros(1, 2560, 1, dtype=torch.bfloat16), i)
            cache.update_recurrent_state(torch.zeros(1, 2560), i)
    window = 8 * 2 * 2049 * 256 * 2  # layers, keys and values, slots, head_dim, bytes
    state, convolution = 18 * 2560 * 4, 18 * 3 * 2560 * 2
    assert cache.memory_footprint() == window + state + convolution
    assert round(window / 1e6, 1) == 16.8
    assert round(state / 1e6, 1) == 0.2


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_length_counts_columns(variant: str):
    cache = RecurrentGemmaCache(model_of(variant).config)
    assert cache.get_seq_length() == 0
    ids, mask = tokens(2, 30), padding("left", 2, 30, SEED)
    for end in (1, 2, 20, 30):
        forward(model_of(variant), cache, ids, mask, cache.get_seq_length(), end)
        assert cache.get_seq_length() == cache.get_seq_length(1) == end
    assert cache.get_max_length() == -1, "no text is too long"


def test_the_model_makes_its_own_cache():
    with torch.no_grad():
        output = model_of()(tokens(2, 10))
        assert isinstance(output.past_key_values, RecurrentGemmaCache)
        assert output.past_key_values.get_seq_length() == 10
        assert model_of()(tokens(2, 10), use_cache=False).past_key_values is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_of_a_bfloat16_model_is_float32(variant: str):
    cache = prefilled(variant, dtype=torch.bfloat16)
    for name, tensor in tensors_of(cache).items():
        assert tensor.dtype == (torch.float32 if name.endswith("recurrent") else torch.bfloat16), name


# --- Gradients --------------------------------------------------------------------------------------------------------


assert_same_gradients = functools.partial(helpers.assert_same_gradients, tolerance=1e-9)


@pytest.mark.parametrize("kind", ["none", "holes"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_with_a_cache(variant: str, kind: str):
    model = copy.deepcopy(model_of(variant)).train()
    ids, mask = tokens(2, 30), padding(kind, 2, 30, SEED)
    # What padding would predict is no output, so the token behind it is no target.
    labels = ids.masked_fill(~mask | ~mask.roll(1, dims=1), -100)
    cache = RecurrentGemmaCache(model.config)
    actual = gradients(model, model(ids, attention_mask=mask, labels=labels, past_key_values=cache).loss)
    expected = gradients(model, model(ids, attention_mask=mask, labels=labels, use_cache=False).loss)
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("columns", [1, 12])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_on_text_that_follows_a_cache(variant: str, columns: int):
    """Truncated backpropagation: state carries no gradient, so the gradients of two forwards add up, although the
    second has overwritten the state that the first one read.
    """
    model = copy.deepcopy(model_of(variant)).train()
    ids, origin = tokens(2, 20 + 2 * columns), prefilled(variant)
    pieces = [ids[:, 20 : 20 + columns], ids[:, 20 + columns :]]

    def loss(piece: Tensor, cache: RecurrentGemmaCache) -> Tensor:
        return model(piece, past_key_values=cache).logits.square().mean()

    cache = origin.fork()
    together = gradients(model, loss(pieces[0], cache) + loss(pieces[1], cache))
    cache = origin.fork()
    first = gradients(model, loss(pieces[0], cache))
    second = gradients(model, loss(pieces[1], cache))
    assert_same_gradients(together, {name: first[name] + second[name] for name in first})


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_without_no_grad_builds_no_growing_graph(variant: str):
    def nodes(tensor: Tensor) -> int:
        seen, todo = set(), [tensor.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo.extend(parent for parent, _ in node.next_functions)
        return len(seen)

    model, cache, ids = model_of(variant), RecurrentGemmaCache(model_of(variant).config), tokens(2, 40)
    sizes = [nodes(model(ids[:, t : t + 1], past_key_values=cache).logits) for t in range(40)]
    assert sizes[2] > 10
    assert len(set(sizes[2:])) == 1
    assert not any(tensor.requires_grad for tensor in tensors_of(cache).values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_with_gradients_enabled_gives_the_same_logits(variant: str):
    model, cache, ids = model_of(variant), RecurrentGemmaCache(model_of(variant).config), tokens(2, 30)
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits.detach() for t in range(30)]
    assert_same(torch.cat(steps, dim=1), alone(model, ids, ids > 0))


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "difference",
    [{"attention_window_size": WINDOW + 1}, {"lru_width": 128}, {"num_hidden_layers": 4}, {"vocab_size": 99}],
)
def test_the_cache_of_another_config_is_refused(difference: dict):
    cache = RecurrentGemmaCache(tiny_config(**{"attention_window_size": WINDOW, **difference}))
    with pytest.raises(ValueError, match=r"made for another config.*RecurrentGemmaCache\(model.config\)"):
        forward(model_of(), cache, tokens(2, 5), None, 0, 5)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_another_batch_size_is_refused(rows: int):
    cache = prefilled(rows=2)
    with pytest.raises(ValueError, match=rf"a batch of 2 sequences, the input has {rows}.*batch_repeat_interleave"):
        forward(model_of(), cache, tokens(rows, 25), None, 20, 25)
    assert cache.get_seq_length() == 20


def test_a_mask_of_another_shape_leaves_the_cache_as_it_was():
    cache, ids = prefilled(), tokens(2, 30)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 10\).*\(2, 20 \+ 10\)"):
        model_of()(ids[:, 20:], attention_mask=torch.ones(2, 10), past_key_values=cache)
    assert_same(forward(model_of(), cache, ids, None, 20, 30), alone(model_of(), ids, ids > 0)[:, 20:])


def test_something_else_than_a_cache_is_refused():
    with pytest.raises(ValueError, match=r"past_key_values is a tuple.*RecurrentGemmaCache"):
        model_of()(tokens(1, 5), past_key_values=())


def test_crop_beyond_what_is_recorded_is_refused():
    cache, ids = prefilled(max_rollback=6), tokens(2, 40)
    cache.activate_past_recording()
    forward(model_of(), cache, ids, None, 20, 24)
    with pytest.raises(ValueError, match=r"crop\(-5\): 4 tokens are recorded.*since the last crop.*max_rollback=6"):
        cache.crop(-5)
    forward(model_of(), cache, ids, None, 24, 32)
    with pytest.raises(ValueError, match=r"crop\(-7\): 6 tokens are recorded.*max_rollback=6"):
        cache.crop(-7)
    cache.crop(-6)
    with pytest.raises(ValueError, match=r"crop\(-1\): 0 tokens are recorded"):
        cache.crop(-1)
    assert_same(forward(model_of(), cache, ids, None, 26, 40), alone(model_of(), ids, ids > 0)[:, 26:])


def test_crop_without_recording_is_refused():
    with pytest.raises(ValueError, match=r"crop\(-1\): 0 tokens are recorded; call activate_past_recording\(\)"):
        prefilled().crop(-1)


def test_a_positive_crop_is_refused():
    cache = prefilled()
    with pytest.raises(ValueError, match=r"crop\(3\): give the number of tokens to remove as a negative number"):
        cache.crop(3)
    cache.crop(0)
    assert cache.get_seq_length() == 20


def test_max_rollback_must_be_positive():
    with pytest.raises(ValueError, match="max_rollback=0 must be at least 1"):
        RecurrentGemmaCache(model_of().config, max_rollback=0)


def test_an_empty_cache_is_not_saved(tmp_path: Path):
    with pytest.raises(ValueError, match="this cache is empty; run the model over a prompt"):
        RecurrentGemmaCache(model_of().config).save(tmp_path / "empty.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int):
    path = tmp_path / "prompt.safetensors"
    prefilled().save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=r"prompt.safetensors is not a complete safetensors file.*save the cache again"
    ):
        RecurrentGemmaCache.load(path, model_of().config)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_foreign_safetensors_file_is_refused(tmp_path: Path, metadata: dict | None):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(3)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"model.safetensors was not written by RecurrentGemmaCache.save"):
        RecurrentGemmaCache.load(path, model_of().config)


def metadata_of(path: Path) -> dict[str, str]:
    """What `write_file` was given."""
    with safe_open(path, "pt") as file:
        return {name: value for name, value in file.metadata().items() if name not in ("format", "contents")}


def test_a_file_of_another_config_is_refused(tmp_path: Path):
    path = tmp_path / "prompt.safetensors"
    prefilled("wide_lru").save(path)
    with pytest.raises(ValueError, match=r"prompt.safetensors belongs to another config.*the model that wrote it"):
        RecurrentGemmaCache.load(path, model_of().config)


def test_a_file_with_other_tensors_is_refused(tmp_path: Path):
    path = tmp_path / "prompt.safetensors"
    cache = prefilled()
    cache.save(path)
    tensors = load_file(path)
    tensors["layers.9.keys"] = tensors.pop("layers.2.keys")
    write_file(path, tensors, metadata_of(path))
    with pytest.raises(ValueError, match=r"lacks or has too many tensors: layers.2.keys, layers.9.keys"):
        RecurrentGemmaCache.load(path, model_of().config)


DAMAGE = {
    "state in bfloat16": ("layers.0.recurrent", lambda x: x.bfloat16(), r"layers.0.recurrent as torch.bfloat16"),
    "keys in int8": ("layers.2.keys", lambda x: x.to(torch.int8), r"layers.2.keys as torch.int8"),
    "another row": (
        "layers.0.conv",
        lambda x: x[:1].contiguous(),
        r"layers.0.conv as .* \(1, .*must be a float of shape",
    ),
    "a slot too few": ("layers.2.values", lambda x: x[:, :, 1:].contiguous(), r"layers.2.values as .*must be a float"),
    "flat": ("layers.0.recurrent", lambda x: x.flatten(), r"layers.0.recurrent as .*must be a float of shape"),
    "counts of floats": ("lengths", lambda x: x.float(), r"has no token counts"),
    "counts of nobody": ("lengths", lambda x: x[:0].clone(), r"has no token counts"),
    "more tokens than columns": ("lengths", lambda x: x + 1, r"counts \[21, 21\] tokens in 20 columns"),
    "fewer than none": ("lengths", lambda x: x - 30, r"counts \[-10, -10\] tokens in 20 columns"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors_are_refused(tmp_path: Path, damage: str):
    path, (name, change, message) = tmp_path / "prompt.safetensors", DAMAGE[damage]
    prefilled().save(path)
    tensors, metadata = load_file(path), metadata_of(path)
    tensors[name] = change(tensors[name])
    write_file(path, tensors, metadata)
    with pytest.raises(ValueError, match=rf"prompt.safetensors .*{message}"):
        RecurrentGemmaCache.load(path, model_of().config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": "many"}, "is damaged: its contents do not have the fingerprint"),
        ({"columns": None}, "is damaged: "),
        ({"fingerprint": None}, "is damaged: "),
        ({"weights": "{}"}, "is damaged: "),
        ({"contents": None}, "is damaged: "),
        ({"format": "recurrent_gemma_cache_v1"}, "was written by an older version, without fingerprints"),
        ({"format": "recurrent_gemma_cache_v0"}, "was not written by RecurrentGemmaCache.save"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, changes: dict, message: str):
    path = tmp_path / "prompt.safetensors"
    prefilled().save(path)
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **changes}
    save_file(load_file(path), path, metadata={k: v for k, v in metadata.items() if v is not None})
    with pytest.raises(ValueError, match=rf"prompt.safetensors {message}"):
        RecurrentGemmaCache.load(path, model_of().config)


def test_every_flipped_bit_is_found(tmp_path: Path):
    """In the header and in the tensors, and every kind of end."""
    path, broken = tmp_path / "prompt.safetensors", tmp_path / "broken.safetensors"
    prefilled().save(path)
    content, draw = path.read_bytes(), random.Random(0)
    header = int.from_bytes(content[:8], "little") + 8
    for i in range(300 * FUZZ_ROUNDS):
        place = draw.randrange(header) if i % 3 == 0 else draw.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        broken.write_bytes(changed if i % 5 else content[:place] + content[place + draw.randrange(1, 9) :])
        with pytest.raises(ValueError, match=r"broken.safetensors (is|belongs|was|has|lacks)"):
            RecurrentGemmaCache.load(broken, model_of().config)


def test_a_save_that_is_killed_leaves_the_file_before_or_after_it(tmp_path: Path):
    """50 processes are killed while they save two states in turns, after a random time within one save."""
    path, draw, found = tmp_path / "state.safetensors", random.Random(1), set()
    model = build(config_of("recurrentgemma", lru_width=4096))
    caches = [RecurrentGemmaCache(model.config) for _ in range(2)]
    for columns, cache in enumerate(caches, start=1):
        forward(model, cache, tokens(1, 2), None, 0, columns)
    wanted = {cache.get_seq_length(): tensors_of(cache) for cache in caches}
    caches[0].save(path)
    start = time.perf_counter()
    caches[0].save(path)
    seconds = time.perf_counter() - start
    for _ in range(50):
        child = os.fork()
        if child == 0:
            while True:
                for cache in caches:
                    cache.save(path)
        time.sleep(draw.uniform(0.5, 6) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = RecurrentGemmaCache.load(path, model.config)
        found.add(loaded.get_seq_length())
        for name, tensor in tensors_of(loaded).items():
            assert torch.equal(tensor, wanted[loaded.get_seq_length()][name])
    assert found == {1, 2}


def test_other_weights_of_the_same_shape_are_refused(tmp_path: Path):
    model, ids = copy.deepcopy(model_of()), tokens(2, 30)
    prefilled().save(tmp_path / "prompt.safetensors")

    def go_on(model):
        cache = RecurrentGemmaCache.load(tmp_path / "prompt.safetensors", model.config)
        cache.save(tmp_path / "again.safetensors")  # nothing is lost where no model has run
        return forward(model, RecurrentGemmaCache.load(tmp_path / "again.safetensors", model.config), ids, None, 20, 30)

    assert_same(go_on(model), alone(model_of(), ids, ids > 0)[:, 20:])
    go_on(copy.deepcopy(model).bfloat16())  # the same checkpoint in another dtype
    with torch.no_grad():
        model.model.layers[2].temporal_block.q_proj.weight.mul_(1.01)  # one matrix, as an adapter changes it
    with pytest.raises(
        ValueError, match=r"other weights \(layers.2.temporal_block.q_proj.weight differ\): load it with"
    ):
        go_on(model)
    cache = RecurrentGemmaCache.load(tmp_path / "prompt.safetensors", model.config)
    with pytest.raises(ValueError, match="other weights"):
        cache.check(model, 2)


def test_a_cache_whose_model_is_gone_is_not_saved(tmp_path: Path):
    model = copy.deepcopy(model_of())
    cache = RecurrentGemmaCache(model.config)
    forward(model, cache, tokens(2, 5), None, 0, 5)
    copies = [cache, cache.fork(), pickle.loads(pickle.dumps(cache))]
    del model
    gc.collect()
    for each in copies:
        with pytest.raises(ValueError, match=r"the model that filled this cache is gone .* call cache.check\(model"):
            each.save(tmp_path / "prompt.safetensors")
    cache.check(model_of(), 2)
    cache.fork(3).save(tmp_path / "prompt.safetensors")


def test_a_link_stays_and_nothing_but_a_file_is_replaced(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    prefilled().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert RecurrentGemmaCache.load(tmp_path / "file", model_of().config).get_seq_length() == 20
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ValueError, match=r"is not a file \(a folder or a device\); give the name of a file"):
            prefilled().save(path)
    with pytest.raises(OSError, match=r"no/such/folder/x cannot be written"):
        prefilled().save(tmp_path / "no/such/folder/x")
