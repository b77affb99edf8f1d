"""What a token sees and what comes back: outputs, masks, windows, attention implementations, caches, bad input. That
the numbers are those of the official code is test_against_official.py's business.

Shape suffixes: B batch, T time, E hidden_size, H heads, K keys, V vocabulary.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
)

from recurrent_gemma_hf import (
    RecurrentGemmaCache,
    RecurrentGemmaForSequenceClassification,
)
from tests.helpers import (
    CLOSE,
    assert_same_gradients,
    build,
    gradients,
    head_of,
    model_of,
    padded,
    tiny_config,
    tokens_of,
)

WINDOW = tiny_config().attention_window_size


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_hidden_states():
    model, ids = model_of(), tokens_of(2, 30)
    outputs = model(ids, output_hidden_states=True)
    states = outputs.hidden_states
    assert [tuple(state.shape) for state in states] == [(2, 30, model.config.hidden_size)] * 4
    scale = torch.tensor(model.config.hidden_size**0.5).bfloat16().float()
    torch.testing.assert_close(states[0], model.model.embed_tokens(ids) * scale)
    assert torch.equal(states[-1], model.model(ids).last_hidden_state)
    seen = []
    handles = [layer.register_forward_hook(lambda *a: seen.append(a[2])) for layer in model.model.layers]
    model(ids)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(state, output) for state, output in zip(states[1:-1], seen[:-1], strict=True))
    torch.testing.assert_close(states[-1], model.model.final_norm(seen[-1]))
    assert model(ids).hidden_states is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_and_attentions_stand_in_the_columns_of_the_caller(side):
    model = model_of("attention_first", "eager")
    ids, mask, rows = padded([7, 30, 18], side)
    outputs = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    for i, row in enumerate(rows):
        alone = model(row, output_hidden_states=True, output_attentions=True)
        own = mask[i].bool()
        for got, expected in zip(outputs.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(got[i, own], expected[0], **CLOSE)
        for got, expected in zip(outputs.attentions, alone.attentions, strict=True):
            assert got.shape == (3, 4, 30, 30)
            torch.testing.assert_close(got[i][:, own][:, :, own], expected[0], **CLOSE)
            assert not got[i][:, own][:, :, ~own].any(), "a token attends to padding"


def attention_by_hand(block: nn.Module, x_TE: Tensor, window: int, theta: float, share: float) -> Tensor:
    """Probabilities (H, T, T): rotation as multiplication of complex numbers, the window as a loop."""
    T, h = x_TE.shape[0], block.head_dim
    r = int(h * share) // 2
    angle = torch.arange(T, dtype=torch.float64)[:, None] * theta ** (-torch.arange(r, dtype=torch.float64) / r)

    def project(layer: nn.Linear) -> Tensor:
        x = layer(x_TE).double().view(T, -1, h)
        turned = torch.complex(x[..., :r], x[..., r : 2 * r]) * torch.polar(
            torch.ones(T, 1, r).double(), angle[:, None]
        )
        return torch.cat([turned.real, turned.imag, x[..., 2 * r :]], dim=-1)

    q, k = project(block.q_proj), project(block.k_proj)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    probabilities = torch.zeros(q.shape[1], T, T, dtype=torch.float64)
    for t in range(T):
        keys = slice(max(0, t - window), t + 1)
        scores = torch.einsum("Hh,KHh->HK", q[t], k[keys]) / math.sqrt(h)
        probabilities[:, t, keys] = scores.softmax(-1)
    return probabilities


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_probabilities_by_hand(groups):
    model = build(tiny_config(num_key_value_heads=groups, rope_theta=100.0), seed=5, attention="eager")
    ids, block, inputs = tokens_of(2, 40), model.model.layers[2].temporal_block, []
    handle = block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
        handle.remove()
        assert len(attentions) == 1, "one attention layer"
        for row in range(2):
            expected = attention_by_hand(block, inputs[0][row], WINDOW, 100.0, 0.5)
            torch.testing.assert_close(attentions[0][row].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 4, 40))


@pytest.mark.parametrize("chunks", [[20, 1, 1, 1], [5, 9, 20], [1] * 30], ids=str)
def test_attention_probabilities_while_decoding(chunks):
    model, ids = model_of("attention_first", "eager"), tokens_of(2, sum(chunks))
    window = model.config.attention_window_size
    whole = model(ids, output_attentions=True).attentions
    cache, start = RecurrentGemmaCache(model.config), 0
    for size in chunks:
        new = ids[:, start : start + size]
        attentions = model(new, past_key_values=cache, output_attentions=True).attentions
        end, keys = start + size, min(start, window) + size
        for got, expected in zip(attentions, whole, strict=True):
            assert got.shape == (2, 4, size, keys)
            torch.testing.assert_close(got, expected[:, :, start:end, end - keys : end], **CLOSE)
        start = end


def test_attention_probabilities_while_decoding_padded_rows():
    model = model_of("attention_first", "eager")
    ids, mask, rows = padded([7, 30, 18], "left")
    cache = RecurrentGemmaCache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    new, mask = tokens_of(3, 1, seed=9), torch.cat([mask, torch.ones(3, 1).long()], dim=1)
    attentions = model(new, attention_mask=mask, past_key_values=cache, output_attentions=True).attentions
    for i, row in enumerate(rows):
        alone = model(torch.cat([row, new[i : i + 1]], 1), output_attentions=True).attentions
        for got, expected in zip(attentions, alone, strict=True):
            seen = min(row.shape[1], model.config.attention_window_size) + 1
            torch.testing.assert_close(got[i, :, 0, -seen:], expected[0, :, -1, -seen:], **CLOSE)
            torch.testing.assert_close(got[i].sum(-1), torch.ones(4, 1))


def test_use_cache_by_default_and_while_training():
    model, ids = build(tiny_config()), tokens_of(1, 5)
    assert isinstance(model(ids).past_key_values, RecurrentGemmaCache)
    assert model(ids, use_cache=False).past_key_values is None
    model.train()
    assert model(ids).past_key_values is None
    assert isinstance(model(ids, use_cache=True).past_key_values, RecurrentGemmaCache)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_to_keep(side):
    model = model_of()
    ids, mask, _ = padded([9, 20], side)
    whole = model(ids, attention_mask=mask).logits
    for keep, expected in (
        (0, whole),
        (1, whole[:, -1:]),
        (5, whole[:, -5:]),
        (torch.tensor([3, 0, 19]), whole[:, [3, 0, 19]]),
        (torch.tensor([[8, 2], [19, 0]]), torch.stack([whole[0, [8, 2]], whole[1, [19, 0]]])),
    ):
        got = model(ids, attention_mask=mask, logits_to_keep=keep).logits
        torch.testing.assert_close(got, expected, **CLOSE)


def test_inputs_embeds_are_rows_of_the_embedding():
    model, ids = model_of(), tokens_of(2, 30)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits, rtol=0, atol=0)


# --- attention implementations and masks ------------------------------------------------------------------------------


@pytest.fixture
def eager_flex():
    """Compiling flex attention takes a minute on a CPU; uncompiled it computes the same and says that it is slow."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@pytest.mark.usefixtures("eager_flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@torch.no_grad()
def test_implementations_agree(implementation):
    """Plain, packed, padded, and in chunks and token by token over a cache."""
    model, reference = model_of("attention_first", implementation), model_of("attention_first")
    assert (model.config._attn_implementation, reference.config._attn_implementation) == (implementation, "sdpa")
    ids, mask, _ = padded([7, 30, 18], "left")
    positions = torch.cat([torch.arange(n) for n in (11, 1, 18)])[None]
    for inputs in (
        {"input_ids": ids},
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "position_ids": positions},
    ):
        own = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        torch.testing.assert_close(model(**inputs).logits[own], reference(**inputs).logits[own], **CLOSE)
    caches = [RecurrentGemmaCache(m.config) for m in (model, reference)]
    for new in tokens_of(3, 22).split([10, 9, 1, 1, 1], dim=1):
        got, expected = (
            m(new, past_key_values=c).logits for m, c in zip((model, reference), caches, strict=True)
        )  # fmt: skip
        torch.testing.assert_close(got, expected, **CLOSE)


def window_mask(T: int, window: int, lengths: list[int] | None = None) -> Tensor:
    """(1, 1, T, T) bool: what the model sees without being told; `lengths` are those of packed documents."""
    document = torch.repeat_interleave(torch.arange(len(lengths or [T])), torch.tensor(lengths or [T]))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return ((distance >= 0) & (distance <= window) & (document[:, None] == document))[None, None]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bool", "additive", "per_head"])
def test_a_4d_mask_replaces_the_window(attention, kind):
    model, ids = model_of("attention_only", attention), tokens_of(2, 60)
    wide = build(tiny_config("attention_only", attention_window_size=100), seed=3, attention=attention)
    for reference, window in ((model, 16), (wide, 100)):
        mask = window_mask(60, window)
        if kind == "additive":
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        elif kind == "per_head":
            mask = mask.expand(2, 4, -1, -1)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, reference(ids).logits, **CLOSE)
    assert (model(ids).logits - wide(ids).logits).abs().max() > 0.01, "the window makes no difference here"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_4d_mask_with_a_cache(attention):
    """Token 3 is hidden from all others, in one forward and in pieces."""
    model, ids = model_of("attention_only", attention), tokens_of(2, 14)
    mask = window_mask(14, 16)
    mask[..., 4:, 3] = False
    whole = model(ids, attention_mask=mask).logits
    assert (whole - model(ids).logits)[:, 4:].abs().max() > 0.01
    cache, steps = RecurrentGemmaCache(model.config), []
    for start, end in ((0, 9), (9, 12), (12, 13), (13, 14)):
        piece = mask[:, :, start:end, :end]
        steps.append(model(ids[:, start:end], attention_mask=piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)


@pytest.mark.parametrize("shape", [(2, 1, 19, 20), (2, 1, 20, 19), (2, 1, 20, 21), (2, 1, 1, 20)], ids=str)
def test_a_4d_mask_of_the_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"a 4D attention_mask of shape .* must be \(batch or 1, heads or 1, 20, 20\)"):
        model_of()(tokens_of(2, 20), attention_mask=torch.ones(shape, dtype=torch.bool))


def test_a_4d_mask_with_the_wrong_implementation():
    with pytest.raises(ValueError, match="needs attn_implementation 'eager' or 'sdpa', not 'flex_attention'"):
        model_of("attention_first", "flex_attention")(tokens_of(2, 20), attention_mask=window_mask(20, 8))


@pytest.fixture
def registered_attention():
    """A function of the user's, registered with Transformers, and what it was called with."""
    calls = []

    def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **kwargs):
        calls.append((attention_mask.shape, sliding_window))
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~attention_mask, -math.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("mine", attend)
    yield calls
    del AttentionInterface._global_mapping["mine"]


def test_a_registered_attention_function(registered_attention):
    model, reference = build(tiny_config("attention_first"), seed=3, attention="mine"), model_of("attention_first")
    ids, mask, _ = padded([7, 30, 18], "left")
    got = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(got, reference(ids, attention_mask=mask).logits[mask.bool()], **CLOSE)
    assert len(registered_attention) == 2
    assert registered_attention[0][1] == model.config.attention_window_size + 1
    assert torch.equal(model.generate(ids[1:2], max_new_tokens=5), reference.generate(ids[1:2], max_new_tokens=5))


def test_the_implementation_can_be_changed_and_is_checked():
    model = build(tiny_config())
    for implementation in ("eager", "sdpa", "flex_attention", "eager"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == model.model.config._attn_implementation == implementation
    with pytest.raises(ValueError, match="falsh_attention"):
        model.set_attn_implementation("falsh_attention")


# --- long texts: attention in bands -----------------------------------------------------------------------------------

LONG = WINDOW + 2 * 512 + 77


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", [None, [5, 600, 1, LONG - 606]], ids=["one_text", "packed"])
def test_banded_attention_equals_the_full_mask(attention, lengths):
    model, ids = build(tiny_config(), seed=3, attention=attention), tokens_of(1, LONG)
    positions = None if lengths is None else torch.cat([torch.arange(n) for n in lengths])[None]
    results = []
    for mask in (None, window_mask(LONG, WINDOW, lengths)):
        outputs = model(ids, attention_mask=mask, position_ids=positions, labels=ids, use_cache=False)
        outputs.loss.backward()
        results.append((outputs.logits, gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0], **CLOSE)
    assert_same_gradients(results[0][1], results[1][1])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_banded_attention_in_chunks_and_padded(attention):
    model, ids = model_of("recurrentgemma", attention), tokens_of(2, 2 * LONG)
    whole = model(ids, attention_mask=window_mask(2 * LONG, WINDOW), use_cache=False).logits
    cache, chunks = RecurrentGemmaCache(model.config), ids.split([LONG, 3, LONG - 3], dim=1)
    got = torch.cat([model(chunk, past_key_values=cache).logits for chunk in chunks], dim=1)
    torch.testing.assert_close(got, whole, **CLOSE)
    mask = torch.ones_like(ids)
    mask[1, :100] = 0
    row = model(ids[1:, 100:], use_cache=False).logits
    torch.testing.assert_close(model(ids, attention_mask=mask, use_cache=False).logits[1:, 100:], row, **CLOSE)


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("told_by", ["mask", "pad_token_id"])
def test_sequence_classification_reads_the_last_token(side, told_by):
    model = head_of(RecurrentGemmaForSequenceClassification, num_labels=3)
    ids, mask, rows = padded([5, 30, 17], side)
    if told_by == "pad_token_id" and side == "left":
        mask = (
            None  # padding on the left without a mask is text that comes before: it counts, but not as the last token
        )
        rows = list(ids.split(1))
    elif told_by == "pad_token_id":
        mask = None
    got = model(ids, attention_mask=mask).logits
    expected = torch.cat([model(row).logits for row in rows])
    torch.testing.assert_close(got, expected, **CLOSE)
    assert got.std() > 0.1


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": None}, "give exactly one of input_ids and inputs_embeds"),
        ({"inputs_embeds": torch.zeros(2, 5, 48)}, "give exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.ones(2, 0).long()}, r"shape \(2, 0\).*an empty prompt needs at least its BOS token"),
        ({"input_ids": torch.ones(0, 5).long()}, r"shape \(0, 5\)"),
        ({"input_ids": torch.ones(5).long()}, r"shape \(5,\); it must be \(batch, tokens\) ids"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(5, 48)}, r"shape \(5, 48\).*\(batch, tokens, width\)"),
        ({"input_ids": torch.tensor([[3, 101]])}, "token ids from 3 to 101 do not fit vocab_size=101"),
        ({"input_ids": torch.tensor([[-1, 5]])}, "token ids from -1 to 5 do not fit vocab_size=101"),
        ({"position_ids": torch.arange(4)[None]}, r"position_ids of shape \(1, 4\) must be \(2 or 1, 5\)"),
        ({"position_ids": torch.arange(5)}, r"position_ids of shape \(5,\) must be \(2 or 1, 5\)"),
        ({"attention_mask": torch.ones(2, 6)}, r"attention_mask of shape \(2, 6\) must be .*\(2, 0 \+ 5\), or 4D"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask of shape \(1, 5\)"),
        ({"attention_mask": torch.ones(2, 5, 5)}, r"attention_mask of shape \(2, 5, 5\)"),
        ({"past_key_values": ()}, "past_key_values is a tuple; it must be a Cache, best a RecurrentGemmaCache"),
        ({"past_key_values": {}}, "past_key_values is a dict"),
    ],
)
def test_bad_input(inputs, message):
    with pytest.raises(ValueError, match=message):
        model_of()(**{"input_ids": torch.ones(2, 5).long(), **inputs})


def test_a_mask_that_forgets_the_past():
    model, cache = model_of(), RecurrentGemmaCache(tiny_config())
    model(tokens_of(2, 7), past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 1\) must be .*\(2, 7 \+ 1\)"):
        model(tokens_of(2, 1), attention_mask=torch.ones(2, 1), past_key_values=cache)


@pytest.mark.parametrize("kind", ["DynamicCache()", "DynamicCache(config)", "StaticCache", "StaticCache, allocated"])
def test_an_empty_cache_of_transformers_becomes_ours(kind: str):
    model = model_of()
    cache = DynamicCache() if kind == "DynamicCache()" else DynamicCache(config=model.config)
    if "Static" in kind:
        cache = StaticCache(config=model.config, max_cache_len=20)
    if "allocated" in kind:
        heads = model.config.num_key_value_heads, model.config.head_dim
        cache.early_initialization(2, *heads, torch.float32, torch.device("cpu"))
    ids, mask, _ = padded([5, 9], "right")
    output = model(ids, attention_mask=mask, past_key_values=cache)
    assert output.cache is cache
    assert type(cache) is RecurrentGemmaCache
    assert cache.is_compileable == ("Static" in kind)
    reference = RecurrentGemmaCache(model.config)
    assert torch.equal(output.logits, model(ids, attention_mask=mask, cache=reference).logits)
    new, mask = tokens_of(2, 3), F.pad(mask, (0, 3), value=1)
    logits = [model(new, attention_mask=mask, cache=c).logits for c in (cache, reference)]
    assert torch.equal(*logits)
    assert cache.fork().get_seq_length() == 12


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_of_transformers_that_holds_something_is_refused(kind: type):
    model = model_of()
    options = {"max_cache_len": 20} if kind is StaticCache else {}
    cache = kind(config=model.config, **options)
    attention = model.config.layers_block_type.index("attention")
    keys = torch.zeros(1, model.config.num_key_value_heads, 3, model.config.head_dim)
    cache.update(keys, keys, attention)
    with pytest.raises(ValueError, match=rf"this {kind.__name__} already holds keys or states .* give an empty one"):
        model(tokens_of(1, 4), past_key_values=cache)
    assert type(cache) is kind, "refused, and left as it was"
    cache = kind(config=model.config, **options)
    cache.update_conv_state(torch.zeros(1, model.config.lru_width, 3), 0, conv_kernel_size=3)
    with pytest.raises(ValueError, match="already holds keys or states"):
        model(tokens_of(1, 4), past_key_values=cache)


def test_a_cache_for_an_encoder_and_a_decoder_is_refused():
    model = model_of()
    with pytest.raises(ValueError, match="a EncoderDecoderCache is for an encoder and a decoder"):
        model(tokens_of(1, 4), past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))


def test_a_custom_mask_cannot_show_keys_that_the_cache_has_dropped():
    model = build(tiny_config("attention_only"))
    tokens = torch.randint(0, 101, (1, 40), generator=torch.Generator().manual_seed(0))
    cache = RecurrentGemmaCache(model.config)
    with torch.no_grad():
        model(tokens[:, :30], past_key_values=cache)
        causal = torch.ones(40, 40, dtype=torch.bool).tril()[None, None, 30:]
        for mask in (causal, torch.zeros(1, 1, 10, 40).masked_fill(~causal, torch.finfo(torch.float32).min)):
            with pytest.raises(ValueError, match="no longer holds"):
                model(tokens[:, 30:], attention_mask=mask, past_key_values=cache)
        assert cache.get_seq_length() == 30, "a refused forward leaves the cache as it was"


def test_the_loss_of_packed_and_padded_texts_is_that_of_each_alone():
    model = build(tiny_config())
    texts = [torch.randint(3, 101, (1, n), generator=torch.Generator().manual_seed(n)) for n in (7, 12, 9)]
    with torch.no_grad():
        alone = sum(model(text, labels=text).loss * (text.shape[1] - 1) for text in texts)
        alone = alone / sum(text.shape[1] - 1 for text in texts)
        packed = torch.cat(texts, dim=1)
        positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
        torch.testing.assert_close(model(packed, position_ids=positions, labels=packed).loss, alone)
        for side in ("left", "right"):
            ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
            for row, text in enumerate(texts):
                n = text.shape[1]
                columns = slice(12 - n, None) if side == "left" else slice(0, n)
                ids[row, columns], mask[row, columns] = text[0], 1
            labels = ids.masked_fill(mask == 0, -100)
            torch.testing.assert_close(model(ids, attention_mask=mask, labels=labels).loss, alone)
