"""generate() in every mode: token by token what recomputing the whole text without a cache gives.

Two references. The official PyTorch model, recomputing everything for each token, decides what greedy decoding and
constrained decoding must write. Our own model with `use_cache=False` decides for the modes that draw random numbers or
search with beams, after `test_greedy` has compared it with the official one.

The window is 8 tokens and every text grows past 30, so attention forgets and the ring of keys turns over several times.
Our models run in float64, so that the path taken through the cache cannot turn the choice between two tokens.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CompileConfig,
    DynamicCache,
    PreTrainedTokenizerFast,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
)

from recurrent_gemma_hf import RecurrentGemmaCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from tests.helpers import build, pad, tiny_config
from tests.oracles import official_torch, official_torch_logits

WINDOW = 8
PROMPT = 11  # longer than the window
NEW = 30  # the ring of 9 slots turns over more than three times
VARIANTS = ["recurrentgemma", "wide_lru", "hawk", "attention_first", "attention_only"]
SEED = 3


def config_of(variant: str) -> RecurrentGemmaConfig:
    return tiny_config(variant, attention_window_size=WINDOW, eos_token_id=None)


@functools.cache
def model_of(variant: str = "recurrentgemma", seed: int = SEED) -> RecurrentGemmaForCausalLM:
    """In float64, shared by the tests, which do not change it."""
    return build(config_of(variant), seed).double()


@functools.cache
def official_of(variant: str):
    return official_torch(config_of(variant), build(config_of(variant), SEED).state_dict())


def prompts(rows: int = 3, length: int = PROMPT) -> Tensor:
    """Ids (rows, length); the id of the padding token is none of them."""
    return torch.randint(1, 101, (rows, length), generator=torch.Generator().manual_seed(SEED))


@torch.no_grad()
def recompute(
    variant: str, ids_BT: Tensor, new: int = NEW, allowed: Callable[[int, Tensor], list[int]] | None = None
) -> Tensor:
    """(B, T + new): greedy decoding by the official model, which reads the whole text again for each token."""
    for _ in range(new):
        logits_BV = official_torch_logits(official_of(variant), ids_BT)[:, -1]
        if allowed is not None:
            forbidden = torch.ones_like(logits_BV, dtype=torch.bool)
            for row, text in enumerate(ids_BT):
                forbidden[row, allowed(row, text)] = False
            logits_BV = logits_BV.masked_fill(forbidden, -torch.inf)
        ids_BT = torch.cat([ids_BT, logits_BV.argmax(-1, keepdim=True)], dim=1)
    return ids_BT


@functools.cache
def greedy_texts(variant: str) -> Tensor:
    return recompute(variant, prompts())


def write(model: RecurrentGemmaForCausalLM, *inputs: Tensor, **options):
    """Greedy `generate` of NEW tokens; `options` come on top."""
    return model.generate(*inputs, **{"max_new_tokens": NEW, "do_sample": False, **options})


# --- Greedy decoding --------------------------------------------------------------------------------------------------

MODES = {
    "default": {},
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "quantized": {"cache_implementation": "quantized"},
    "without a cache": {"use_cache": False},
    "prefill in chunks of 1": {"prefill_chunk_size": 1},
    "prefill in chunks of 4": {"prefill_chunk_size": 4},
    "prefill in chunks longer than the window": {"prefill_chunk_size": WINDOW + 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy(variant: str, mode: str):
    assert torch.equal(write(model_of(variant), prompts(), **MODES[mode]), greedy_texts(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_token_prompt(variant: str):
    ids = prompts(length=1)
    assert torch.equal(write(model_of(variant), ids), recompute(variant, ids))


def test_attentions_and_hidden_states_come_with_the_text():
    model = copy.deepcopy(model_of())
    model.set_attn_implementation("eager")
    output = write(
        model, prompts(), output_attentions=True, output_hidden_states=True, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(output.sequences, greedy_texts("recurrentgemma"))
    assert len(output.attentions) == len(output.hidden_states) == len(output.logits) == NEW
    with torch.no_grad():
        logits = model(output.sequences, use_cache=False).logits[:, PROMPT - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), logits.float(), atol=2e-6, rtol=0)


def test_offloading_is_said_once_to_do_nothing(caplog):
    from transformers.utils import logging

    logging.warning_once.cache_clear()
    for _ in range(2):
        write(model_of(), prompts(), cache_implementation="offloaded", max_new_tokens=2)
    messages = [record.message for record in caplog.records if "offloaded" in record.message]
    assert len(messages) == 1
    assert "constant size" in messages[0]


# --- Padding ----------------------------------------------------------------------------------------------------------

LENGTHS = (PROMPT, 5, 1)


def rows_of_different_lengths() -> list[Tensor]:
    return [row[:length] for row, length in zip(prompts(), LENGTHS, strict=True)]


@functools.cache
def continuations_alone(variant: str) -> Tensor:
    """(B, NEW): what each row of `rows_of_different_lengths` goes on with when it is alone."""
    return torch.cat([recompute(variant, row[None])[:, len(row) :] for row in rows_of_different_lengths()])


# Padding on the right and prefill_chunk_size: see test_padding_on_the_right_that_fills_the_last_chunk_is_refused.
PADDED_MODES = [("left", mode) for mode in MODES] + [
    ("right", mode) for mode, options in MODES.items() if "prefill_chunk_size" not in options
]


@pytest.mark.parametrize(("side", "mode"), PADDED_MODES)
@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk", "attention_first"])
def test_padding(variant: str, side: str, mode: str):
    ids, mask = pad(rows_of_different_lengths(), side)
    written = write(model_of(variant), ids, attention_mask=mask, **MODES[mode])
    assert torch.equal(written[:, PROMPT:], continuations_alone(variant))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_with_embeddings(side: str):
    model = model_of()
    ids, mask = pad(rows_of_different_lengths(), side)
    written = write(model, inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    assert torch.equal(written, continuations_alone("recurrentgemma"))


# --- Caches of Transformers -------------------------------------------------------------------------------------------

FOREIGN_CACHES = {
    "DynamicCache": lambda config: DynamicCache(config=config),
    "DynamicCache without a config": lambda config: DynamicCache(),
    "StaticCache": lambda config: StaticCache(config=config, max_cache_len=PROMPT + NEW),
}


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("kind", FOREIGN_CACHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_caches_of_transformers_become_ours(variant: str, kind: str, chunk: int | None):
    model = model_of(variant)
    cache = FOREIGN_CACHES[kind](model.config)
    written = write(model, prompts(), past_key_values=cache, prefill_chunk_size=chunk)
    assert torch.equal(written, greedy_texts(variant))
    assert type(cache) is RecurrentGemmaCache
    # The caller goes on with it.
    text = torch.cat([written, prompts(length=3)], dim=1)
    assert torch.equal(write(model, text, cache=cache, max_new_tokens=5), recompute(variant, text, 5))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", FOREIGN_CACHES)
@pytest.mark.parametrize("variant", ["recurrentgemma", "attention_first"])
def test_caches_of_transformers_with_padding(variant: str, kind: str, side: str):
    model = model_of(variant)
    ids, mask = pad(rows_of_different_lengths(), side)
    written = write(model, ids, attention_mask=mask, past_key_values=FOREIGN_CACHES[kind](model.config))
    assert torch.equal(written[:, PROMPT:], continuations_alone(variant))


# --- Sampling, beams, constraints -------------------------------------------------------------------------------------

SEARCHES = {
    "sampling": {"do_sample": True},
    "sampling, 3 sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams, 2 sequences": {"num_beams": 4, "num_return_sequences": 2},
    "beams, length penalty, stopping early": {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "beam sampling, 2 sequences": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "repetition penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}


def seeded(model: RecurrentGemmaForCausalLM, *inputs: Tensor, **options) -> Tensor:
    torch.manual_seed(SEED)
    return write(model, *inputs, **options)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk", "attention_first"])
def test_searches(variant: str, search: str):
    model, options = model_of(variant), SEARCHES[search]
    written = seeded(model, prompts(), **options)
    assert written.shape == (3 * options.get("num_return_sequences", 1), PROMPT + NEW)
    assert torch.equal(written, seeded(model, prompts(), use_cache=False, **options))


@pytest.mark.parametrize("mode", ["static", "left", "right"])
@pytest.mark.parametrize("search", ["sampling, 3 sequences", "beams, 2 sequences", "beam sampling"])
def test_searches_with_a_static_cache_or_padding(search: str, mode: str):
    ids, mask = (prompts(), None) if mode == "static" else pad(rows_of_different_lengths(), mode)
    cache = {"cache_implementation": "static"} if mode == "static" else {}
    written, expected = (
        seeded(model_of(), ids, attention_mask=mask, **how, **SEARCHES[search]) for how in (cache, {"use_cache": False})
    )
    assert torch.equal(written, expected)


def test_beams_of_a_padded_batch_are_those_of_each_row_alone():
    ids, mask = pad(rows_of_different_lengths(), "left")
    written = write(model_of(), ids, attention_mask=mask, num_beams=3)[:, PROMPT:]
    for row, text in zip(rows_of_different_lengths(), written, strict=True):
        assert torch.equal(write(model_of(), row[None], num_beams=3)[0, len(row) :], text)


def other_parity_and_row(row: int, text: Tensor) -> list[int]:
    """After an even token an odd one, after an odd one an even one; each row has a range of its own."""
    return list(range(11 + 20 * row + (int(text[-1]) + 1) % 2, 41 + 20 * row, 2))


@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk", "attention_first"])
def test_constrained(variant: str):
    written = write(model_of(variant), prompts(), prefix_allowed_tokens_fn=other_parity_and_row)
    assert torch.equal(written, recompute(variant, prompts(), allowed=other_parity_and_row))
    assert not torch.equal(written, greedy_texts(variant))


def test_constrained_beams():
    options = {"prefix_allowed_tokens_fn": other_parity_and_row, "num_beams": 3}
    written = write(model_of(), prompts(), **options)
    assert torch.equal(written, write(model_of(), prompts(), use_cache=False, **options))


# --- Speculation: a draft model, prompt lookup ------------------------------------------------------------------------


@contextmanager
def forwards_of(model: RecurrentGemmaForCausalLM) -> Iterator[list[int]]:
    """A list of the number of tokens that each forward of the model reads."""
    read: list[int] = []

    def note(module: RecurrentGemmaForCausalLM, args: tuple, inputs: dict) -> None:
        read.append(inputs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    yield read
    handle.remove()


def draft_of(kind: str, variant: str, schedule: str, tokens: int) -> RecurrentGemmaForCausalLM:
    draft = {
        "same": lambda: copy.deepcopy(model_of(variant)),
        "different": lambda: copy.deepcopy(model_of(variant, seed=SEED + 1)),
        "hawk": lambda: copy.deepcopy(model_of("hawk", seed=SEED + 1)),
        # Right now and then: the model's own weights with noise.
        "similar": lambda: _noisy(copy.deepcopy(model_of(variant))),
    }[kind]()
    draft.generation_config.num_assistant_tokens_schedule = schedule
    draft.generation_config.num_assistant_tokens = tokens
    draft.generation_config.assistant_confidence_threshold = 0.0  # drafts are never cut short
    return draft


@torch.no_grad()
def _noisy(model: RecurrentGemmaForCausalLM) -> RecurrentGemmaForCausalLM:
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(("schedule", "tokens"), [("constant", 5), ("constant", 12), ("heuristic", 3)])
@pytest.mark.parametrize("kind", ["same", "similar", "different", "hawk"])
@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk", "attention_first"])
def test_assisted(variant: str, kind: str, schedule: str, tokens: int):
    draft = draft_of(kind, variant, schedule, tokens)
    with forwards_of(model_of(variant)) as read:
        written = write(model_of(variant), prompts()[:1], assistant_model=draft)
    assert torch.equal(written, greedy_texts(variant)[:1])
    if kind == "same":
        assert len(read) <= NEW / (tokens + 1) + 1, "the drafts are right, so each forward takes them all"
    if kind in ("different", "hawk"):
        assert sum(read) > written.shape[1], "wrong drafts have to be taken back"


def test_a_draft_is_its_own_model():
    """The model may draft for itself: state lives in two caches, not in the model."""
    assert torch.equal(write(model_of(), prompts()[:1], assistant_model=model_of()), greedy_texts("recurrentgemma")[:1])


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "similar"}])
def test_speculation_with_padding_and_with_a_cache_of_transformers(options: dict):
    if "assistant_model" in options:
        options = {"assistant_model": draft_of("similar", "recurrentgemma", "constant", 5)}
    rows = [rows_of_different_lengths()[1], prompts()[0]]
    ids, mask = pad(rows, "left")
    written = write(model_of(), ids[:1], attention_mask=mask[:1], **options)
    assert torch.equal(written[0, PROMPT:], continuations_alone("recurrentgemma")[1])
    written = write(model_of(), prompts()[:1], past_key_values=DynamicCache(config=model_of().config), **options)
    assert torch.equal(written, greedy_texts("recurrentgemma")[:1])
    ids, mask = pad(rows, "right")
    with pytest.raises(ValueError, match=r"padding on the right.*prompt-lookup decoding.*pad on the left"):
        write(model_of(), ids[:1], attention_mask=mask[:1], **options)


@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk"])
def test_the_first_layers_draft(variant: str):
    """LayerSkip's self-speculation: `assistant_early_exit` layers draft, all layers confirm."""
    first, last = [0], [0]
    layers = model_of(variant).model.layers
    handles = [
        layer.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        for layer, count in ((layers[0], first), (layers[-1], last))
    ]
    written = write(model_of(variant), prompts()[:1], assistant_early_exit=2)
    for handle in handles:
        handle.remove()
    assert torch.equal(written, greedy_texts(variant)[:1])
    assert last[0] < first[0]


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "similar"}])
def test_speculation_behind_pad_tokens_that_are_text(options: dict):
    """A mask of ones says that they are text. generate() drops such masks, and a draft must not infer padding again."""
    if "assistant_model" in options:
        options = {"assistant_model": draft_of("similar", "recurrentgemma", "constant", 5)}
    ids = prompts()[:1].clone()
    ids[:, -3:] = 0
    written = write(model_of(), ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    assert torch.equal(written, recompute("recurrentgemma", ids))
    with pytest.raises(ValueError, match=r"if these pad tokens are text, pass an attention_mask of ones"):
        write(model_of(), ids, pad_token_id=0, **options)


@pytest.mark.parametrize("kind", ["same", "similar", "different"])
def test_assisted_sampling_of_the_likeliest_token(kind: str):
    """With top_k=1 the accept-or-resample rule of speculative sampling leaves no choice either."""
    draft = draft_of(kind, "recurrentgemma", "constant", 5)
    written = write(model_of(), prompts()[:1], assistant_model=draft, do_sample=True, top_k=1)
    assert torch.equal(written, greedy_texts("recurrentgemma")[:1])


@pytest.mark.parametrize("tokens", [3, 10])
@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk", "attention_first"])
def test_prompt_lookup(variant: str, tokens: int):
    """The prompt holds what the model will write, then another text: lookups are right at times, wrong at others."""
    text = greedy_texts(variant)[0]
    ids = torch.cat([text[:25], prompts()[1], text[:15]])[None]
    with forwards_of(model_of(variant)) as read:
        written = write(model_of(variant), ids, prompt_lookup_num_tokens=tokens)
    assert torch.equal(written, recompute(variant, ids))
    assert len(read) < NEW, "some lookups are right"
    assert sum(read) > written.shape[1], "and some are wrong"


def test_speculation_with_a_constraint():
    draft = draft_of("similar", "recurrentgemma", "constant", 4)
    written = write(model_of(), prompts()[:1], assistant_model=draft, prefix_allowed_tokens_fn=other_parity_and_row)
    assert torch.equal(written, recompute("recurrentgemma", prompts()[:1], allowed=other_parity_and_row))


# --- Embeddings as the prompt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk", "attention_first"])
@pytest.mark.parametrize("mode", ["default", "static", "without a cache"])
def test_inputs_embeds(variant: str, mode: str):
    model, ids = model_of(variant), prompts()
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(write(model, ids, inputs_embeds=embeds, **MODES[mode]), greedy_texts(variant))
    assert torch.equal(write(model, inputs_embeds=embeds, **MODES[mode]), greedy_texts(variant)[:, PROMPT:])


def test_inputs_embeds_with_beams():
    model, ids = model_of(), prompts()
    written = write(model, inputs_embeds=model.get_input_embeddings()(ids), num_beams=3)
    assert torch.equal(written, write(model, ids, num_beams=3, use_cache=False)[:, PROMPT:])


# --- Streaming --------------------------------------------------------------------------------------------------------


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One word per id."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")


def words_of(ids: Tensor) -> list[str]:
    return [f"w{i}" for i in ids.tolist()]


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}])
def test_streaming_to_the_screen(capsys, options: dict):
    write(model_of(), prompts()[:1], streamer=TextStreamer(tokenizer(), skip_prompt=True), **options)
    assert capsys.readouterr().out.split() == words_of(greedy_texts("recurrentgemma")[0, PROMPT:])


def test_streaming_to_an_iterator():
    streamer = TextIteratorStreamer(tokenizer(), timeout=60)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(write, model_of(), prompts()[:1], streamer=streamer)
        pieces = list(streamer)
    assert "".join(pieces).split() == words_of(greedy_texts("recurrentgemma")[0])
    assert len(pieces) > NEW, "the text comes token by token"


def test_two_texts_at_a_time_from_two_threads():
    """One model, one cache per call: threads do not see each other."""
    with ThreadPoolExecutor(3) as threads:
        written = threads.map(lambda ids: write(model_of(), ids), prompts().split(1))
    assert torch.equal(torch.cat(list(written)), greedy_texts("recurrentgemma"))


# --- Continuing a conversation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk", "attention_first"])
def test_conversation(variant: str, chunk: int | None):
    model, text, cache = model_of(variant), prompts(), None
    for turn in range(3):
        user = prompts(length=PROMPT + turn)[:, : 6 * turn + 1]
        text = torch.cat([text, user], dim=1)
        output = write(
            model, text, past_key_values=cache, prefill_chunk_size=chunk, max_new_tokens=12,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert torch.equal(output.sequences, recompute(variant, text, 12))
        text, cache = output.sequences, output.past_key_values
        assert isinstance(cache, RecurrentGemmaCache)
        assert cache.get_seq_length() == text.shape[1] - 1, "the last token has been written, not read"


def test_conversation_with_only_the_new_tokens_passed():
    first = write(model_of(), prompts(), return_dict_in_generate=True)
    new = torch.cat([first.sequences[:, -1:], prompts(length=4)], dim=1)  # the last token has not been read yet
    text = torch.cat([first.sequences[:, :-1], new], dim=1)
    written = write(
        model_of(), new, attention_mask=torch.ones_like(text), past_key_values=first.past_key_values, max_new_tokens=12
    )
    assert torch.equal(torch.cat([first.sequences[:, :-1], written], dim=1), recompute("recurrentgemma", text, 12))


@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk", "attention_first"])
@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": "similar"}])
def test_conversation_after_speculation(variant: str, options: dict):
    model, text = model_of(variant), prompts()[:1]
    cache = None
    for turn in ("speculative", "plain", "speculative"):
        chosen = dict(options) if turn == "speculative" else {}
        if "assistant_model" in chosen:
            chosen["assistant_model"] = draft_of("similar", variant, "constant", 4)
        output = write(model, text, past_key_values=cache, max_new_tokens=13, return_dict_in_generate=True, **chosen)
        assert torch.equal(output.sequences, recompute(variant, text, 13))
        cache = output.past_key_values
        text = torch.cat([output.sequences, prompts(length=5)[:1]], dim=1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk", "attention_first"])
def test_conversation_of_a_padded_batch(variant: str, side: str):
    """Rows of different lengths in both turns: after the second there is padding amid the text."""
    model = model_of(variant)
    ids, mask = pad(rows_of_different_lengths(), side)
    first = write(model, ids, attention_mask=mask, max_new_tokens=12, return_dict_in_generate=True)
    users = [row[:length] for row, length in zip(prompts(length=15), (2, 15, 6), strict=True)]
    user_ids, user_mask = pad(users, side)
    written = write(
        model,
        torch.cat([first.sequences, user_ids], dim=1),
        attention_mask=torch.cat([mask, torch.ones(3, 12, dtype=torch.long), user_mask], dim=1),
        past_key_values=first.past_key_values,
    )
    for i, row in enumerate(rows_of_different_lengths()):
        alone = torch.cat([row, first.sequences[i, PROMPT:], users[i]])[None]
        assert torch.equal(written[i, -NEW:], recompute(variant, alone)[0, -NEW:])


def test_beams_go_on_from_the_copies_of_one_prompt():
    model, ids = model_of(), prompts()[:1]
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
    samples = seeded(model, ids.repeat(3, 1), past_key_values=cache.fork(3), do_sample=True)
    assert torch.equal(samples, seeded(model, ids.repeat(3, 1), use_cache=False, do_sample=True))
    assert cache.get_seq_length() == PROMPT - 1, "the prompt's own cache is as it was"


# --- Ends of sequences ------------------------------------------------------------------------------------------------


def ended(texts: Tensor, ends: list[int], pad: int = 0) -> Tensor:
    """`texts` (B, PROMPT + NEW) cut after each row's first end token, filled with padding, as short as the longest."""
    texts, longest = texts.clone(), 0
    for text in texts:
        hits = torch.isin(text[PROMPT:], torch.tensor(ends)).nonzero().flatten()
        end = PROMPT + int(hits[0]) + 1 if len(hits) else len(text)
        text[end:] = pad
        longest = max(longest, end)
    return texts[:, :longest]


def ends_at_different_times(variant: str) -> list[int]:
    texts = greedy_texts(variant)
    return [int(texts[0, PROMPT + 4]), int(texts[1, PROMPT + 17]), int(texts[2, PROMPT + 23])]


@pytest.mark.parametrize("mode", ["default", "static", "without a cache", "prefill in chunks of 4"])
@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk", "attention_first"])
def test_rows_end_at_different_times(variant: str, mode: str):
    ends = ends_at_different_times(variant)
    expected = ended(greedy_texts(variant), ends)
    assert len({int((row[PROMPT:] != 0).sum()) for row in expected}) > 1, "the rows are to end at different times"
    written = write(model_of(variant), prompts(), eos_token_id=ends, pad_token_id=0, **MODES[mode])
    assert torch.equal(written, expected)


@pytest.mark.parametrize("kind", ["same", "similar"])
def test_speculation_ends_amid_a_draft(kind: str):
    ends = ends_at_different_times("recurrentgemma")[:1]
    draft = draft_of(kind, "recurrentgemma", "constant", 12)
    output = write(
        model_of(), prompts()[:1], eos_token_id=ends, pad_token_id=0, assistant_model=draft,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(output.sequences, ended(greedy_texts("recurrentgemma")[:1], ends))
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1


def test_beams_end_at_different_times():
    options = {"num_beams": 3, "eos_token_id": ends_at_different_times("recurrentgemma"), "pad_token_id": 0}
    written = write(model_of(), prompts(), **options)
    assert torch.equal(written, write(model_of(), prompts(), use_cache=False, **options))


# --- torch.compile ----------------------------------------------------------------------------------------------------


class Written:
    """As a streamer, counts what generate() writes (the prompt is the first piece); `backend` runs what dynamo captured
    as it is, and notes when it was captured.
    """

    def __init__(self) -> None:
        self.pieces = 0
        self.compiled_at: list[int] = []

        def backend(graph, inputs):  # not a method: generate() copies the backend, and with it would copy the counts
            self.compiled_at.append(self.pieces)
            return graph.forward

        self.backend = backend

    def put(self, tokens: Tensor) -> None:
        self.pieces += 1

    def end(self) -> None:
        pass


def compiled(backend: Callable | str) -> CompileConfig:
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # generate() compiles on a CPU only when told to
    return config


@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk", "attention_first"])
@pytest.mark.parametrize("padding", [False, True])
def test_compiled_decoding(fresh_compiler, variant: str, padding: bool):
    """A whole graph, and none is captured after the second token, although 45 tokens pass the window."""
    model, text = copy.deepcopy(model_of(variant)), Written()
    inputs = {"input_ids": prompts()[:1, :5]}
    if padding:
        inputs["input_ids"], inputs["attention_mask"] = (x[1:2] for x in pad(rows_of_different_lengths(), "left"))
    new = 45
    written = write(
        model, **inputs, max_new_tokens=new, cache_implementation="static", compile_config=compiled(text.backend),
        streamer=text,
    )  # fmt: skip
    row = rows_of_different_lengths()[1] if padding else inputs["input_ids"][0]
    assert torch.equal(written[:, -new:], recompute(variant, row[None], new)[:, -new:])
    assert text.pieces == 1 + new
    assert text.compiled_at, "nothing was compiled"
    assert max(text.compiled_at) <= 3, f"captured again after {text.compiled_at} pieces (the prompt is the first)"


def test_a_second_text_compiles_nothing_new(fresh_compiler):
    model, text = copy.deepcopy(model_of()), Written()
    options = {"cache_implementation": "static", "compile_config": compiled(text.backend)}
    write(model, prompts(), **options)
    before = len(text.compiled_at)
    other = prompts().flip(1)
    assert torch.equal(write(model, other, **options), recompute("recurrentgemma", other))
    assert len(text.compiled_at) == before


def test_compiled_decoding_with_a_static_cache_of_transformers(fresh_compiler):
    model, text = copy.deepcopy(model_of()), Written()
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
    written = write(model, prompts()[:1], past_key_values=cache, compile_config=compiled(text.backend), streamer=text)
    assert torch.equal(written, greedy_texts("recurrentgemma")[:1])
    assert text.compiled_at
    assert max(text.compiled_at) <= 3


def test_compiled_decoding_with_writes_to_the_cache_made_explicit(fresh_compiler):
    """aot_eager turns writes in place into values that the graph returns, as inductor does, without its compiler."""
    model = copy.deepcopy(model_of())
    written = write(model, prompts(), cache_implementation="static", compile_config=compiled("aot_eager"))
    assert torch.equal(written, greedy_texts("recurrentgemma"))


# --- Bad input --------------------------------------------------------------------------------------------------------


def with_token(bad: int) -> Tensor:
    ids = prompts()
    ids[1, 3] = bad
    return ids


def mask_of(*shape: int) -> Tensor:
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, 0] = 0  # generate() drops a mask of ones, whatever its shape
    return mask


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), {}, r"\(1, 0\).*at least one token.*BOS"),
        (with_token(-1), {}, "-1.*vocab_size=101"),
        (with_token(101), {}, "101.*vocab_size=101"),
        *(
            (
                prompts(),
                {"attention_mask": mask_of(*shape)},
                rf"of shape \({shape[0]}, {shape[1]}\).*\(3, 0 \+ {PROMPT}\)",
            )
            for shape in ((3, PROMPT - 1), (2, PROMPT), (3, PROMPT + 1))
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused(ids: Tensor, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        write(model_of(), ids, **options)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_padding_on_the_right_that_fills_the_last_chunk_is_refused(size: int):
    """Its logits would be those of padding."""
    ids, mask = pad(rows_of_different_lengths(), "right")
    match = rf"row \d of the prompts has only padding in .*\(prefill_chunk_size={size}\); pad prompts on the left"
    with pytest.raises(ValueError, match=match):
        write(model_of(), ids, attention_mask=mask, prefill_chunk_size=size)


@pytest.mark.parametrize("new", [1, 2])
def test_a_turn_of_padding_is_refused(new: int):
    cache, ids = RecurrentGemmaCache(model_of().config), prompts()
    with torch.no_grad():
        model_of()(ids, cache=cache)
    mask = torch.ones(3, PROMPT + new, dtype=torch.long)
    mask[1, PROMPT:] = 0
    with pytest.raises(ValueError, match=rf"row 1 of the prompts has only padding in the last {new} columns; pad"):
        write(model_of(), torch.cat([ids, ids[:, :new]], dim=1), attention_mask=mask, cache=cache)
