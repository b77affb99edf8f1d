"""Our model against the official PyTorch and JAX code on the same random weights, every parameter moved off its initial
value.

Tolerances: float32 logits (standard deviation of order 1) agree to 1e-4; the gradient of every parameter agrees to 1e-4
of its own norm; the mean bfloat16 error is no larger than the official one's.
`test_every_parameter_shows_in_the_logits` is the control: no parameter could be wrong without being seen at these
tolerances.
"""

import functools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from recurrent_gemma_hf import RecurrentGemmaCache, RecurrentGemmaForCausalLM
from tests import oracles
from tests.helpers import (
    VARIANTS,
    assert_same_gradients,
    build,
    gradients,
    model_of,
    packed_positions,
    pad,
    tiny_config,
)
from tests.oracles import official_torch, official_torch_logits

LOGITS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4
ATTENTION = ["eager", "sdpa"]
SEED = 1


@functools.cache
def official_of(variant: str) -> nn.Module:
    """The official PyTorch model with the weights of `model_of(variant)`."""
    return official_torch(tiny_config(variant), model_of(variant).state_dict())


def random_tokens(variant: str, rows: int = 2) -> Tensor:
    """Tokens (rows, 5 windows + 1); every id may occur, that of the padding token too."""
    config = tiny_config(variant)
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, config.vocab_size, (rows, 5 * config.attention_window_size + 1), generator=generator)


@torch.no_grad()
def our_logits(model: nn.Module, tokens_BT: Tensor, **inputs) -> Tensor:
    return model(input_ids=tokens_BT, use_cache=False, **inputs).logits


def assert_logits_agree(ours: Tensor, official: Tensor, what: str) -> None:
    assert ours.shape == official.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(official.shape)}"
    error = (ours.float() - official.float()).abs().max().item()
    assert error <= LOGITS_TOLERANCE, f"{what}: logits off by {error:.2e}, more than {LOGITS_TOLERANCE:.0e}"


def test_every_parameter_shows_in_the_logits():
    """The control: with any single parameter put to zero, the official logits move a hundred times the tolerance or
    more.
    """
    config, tokens_BT = tiny_config(), random_tokens("recurrentgemma")
    state = model_of("recurrentgemma").state_dict()
    right = official_torch_logits(official_of("recurrentgemma"), tokens_BT)
    for name in state.keys() - {"lm_head.weight"}:
        wrong_state = {key: value for key, value in state.items() if key != "lm_head.weight"}
        wrong_state[name] = torch.zeros_like(state[name])
        wrong = official_torch_logits(official_torch(config, wrong_state), tokens_BT)
        assert (wrong - right).abs().max() >= 100 * LOGITS_TOLERANCE, f"{name} could be wrong without being noticed"


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_below_and_beyond_the_window(variant, attention):
    """Five windows and one token against both official models, and each shorter length of interest by itself."""
    model, tokens_BT = model_of(variant, attention), random_tokens(variant)
    window = model.config.attention_window_size
    official = official_torch_logits(official_of(variant), tokens_BT)
    assert 0.3 < official.std() < 3, "the tolerance is meant for logits of order 1"
    full = our_logits(model, tokens_BT)
    assert_logits_agree(full, official, "five windows, PyTorch")
    assert_logits_agree(
        full, oracles.official_jax_logits(model.config, model.state_dict(), tokens_BT), "five windows, JAX"
    )
    for length in (1, 2, 3, 4, window - 1, window, window + 1, window + 2, 2 * window + 1):
        assert_logits_agree(
            our_logits(model, tokens_BT[:, :length]), official[:, :length], f"{length} tokens, window {window}"
        )


@pytest.mark.parametrize("attention", ATTENTION)
def test_logits_at_the_published_head_dim_and_window(attention):
    """head_dim 256 and a window of 2048 as in the 2B and 9B models, three tokens beyond the window."""
    sizes = {"hidden_size": 512, "lru_width": 512, "num_attention_heads": 2, "head_dim": 256, "intermediate_size": 512}
    config = tiny_config(
        **sizes,
        attention_window_size=2048,
        logits_soft_cap=30.0,
        block_types=["recurrent", "attention"],
        num_hidden_layers=2,
    )
    model = build(config, SEED, attention)
    tokens_BT = torch.randint(0, config.vocab_size, (1, 2051), generator=torch.Generator().manual_seed(SEED))
    official = official_torch_logits(official_torch(config, model.state_dict()), tokens_BT)
    assert_logits_agree(our_logits(model, tokens_BT), official, "2051 tokens, window 2048")


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("variant", ["recurrentgemma", "attention_only"])
@pytest.mark.parametrize("start", [2000, 8000, 100_000])
def test_logits_far_into_a_text(variant, attention, start):
    """Position ids from `start` on: at large angles RoPE has to round as the official code does, in each operation."""
    model, tokens_BT = model_of(variant, attention), random_tokens(variant)
    positions_BT = oracles.positions_of(tokens_BT).long() + start
    ours = our_logits(model, tokens_BT, position_ids=positions_BT)
    official = official_torch_logits(official_of(variant), tokens_BT, positions_BT)
    assert_logits_agree(ours, official, f"positions from {start} on, PyTorch")
    jax_logits = oracles.official_jax_logits(model.config, model.state_dict(), tokens_BT, positions_BT)
    assert_logits_agree(ours, jax_logits, f"positions from {start} on, JAX")


# --- packed documents -------------------------------------------------------------------------------------------------


def packed_lengths(total: int) -> list[list[int]]:
    """Two rows of document lengths that sum to `total` (at least 41): single tokens, shorter than the convolution,
    longer than the window.
    """
    return [[1, 1, 2, 3, 17, 9, total - 33], [total - 40, 4, 1, 29, 6]]


def restarting_positions(total: int) -> Tensor:
    """Position ids (2, total) that restart at 0 with every document of `packed_lengths`."""
    return torch.stack([packed_positions(*lengths) for lengths in packed_lengths(total)])


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents(variant, attention):
    """Several documents per row equal both official models, and every document equals itself alone."""
    model, tokens_BT = model_of(variant, attention), random_tokens(variant)
    total = tokens_BT.shape[1]
    positions_BT = restarting_positions(total)
    packed = our_logits(model, tokens_BT, position_ids=positions_BT)
    assert_logits_agree(packed, official_torch_logits(official_of(variant), tokens_BT, positions_BT), "packed, PyTorch")
    jax_logits = oracles.official_jax_logits(model.config, model.state_dict(), tokens_BT, positions_BT)
    assert_logits_agree(packed, jax_logits, "packed, JAX")
    for row, lengths in enumerate(packed_lengths(total)):
        for document, alone in zip(packed[row].split(lengths), tokens_BT[row].split(lengths), strict=True):
            official = official_torch_logits(official_of(variant), alone[None])
            assert_logits_agree(document[None], official, f"document of {len(alone)} tokens in row {row}")


@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk", "attention_first"])
def test_decoding_after_packed_documents(variant):
    """A packed prompt goes into the cache; what is decoded after it continues the last document only."""
    model, tokens_BT = model_of(variant), random_tokens(variant)
    total = tokens_BT.shape[1]
    positions_BT = restarting_positions(total)
    official = official_torch_logits(official_of(variant), tokens_BT, positions_BT)
    # Cuts inside the last documents: two tokens after a start, and just before the end of the row.
    for prompt in (total - 4, total - 1):
        assert_logits_agree(
            our_decode(model, tokens_BT, prompt, position_ids=positions_BT),
            official,
            f"packed prompt of {prompt}, then token by token",
        )


# --- padding ----------------------------------------------------------------------------------------------------------

PADDED_LENGTHS = [40, 39, 14, 3, 1]


def padded_batch(variant: str, side: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows of `PADDED_LENGTHS` tokens padded on `side` with a token of nonzero embedding: tokens, mask (5, 40) and the
    rows alone.
    """
    drawn = random_tokens(variant, rows=len(PADDED_LENGTHS))
    rows = [row[:length] for row, length in zip(drawn, PADDED_LENGTHS, strict=True)]
    return *pad(rows, side, value=7), rows


def positions_by_generate(mask_BT: Tensor) -> Tensor:
    """Position ids (B, T) as `generate` derives them from the mask: 0 for padding as for the first real token."""
    return (mask_BT.cumsum(-1) - 1).masked_fill(mask_BT == 0, 0)


@pytest.mark.parametrize("positions", ["given", "derived"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing(variant, attention, side, positions):
    """Every padded row equals the official model on the row alone, with the position ids of `generate` and with
    none.
    """
    tokens_BT, mask_BT, rows = padded_batch(variant, side)
    inputs = {"position_ids": positions_by_generate(mask_BT)} if positions == "given" else {}
    logits = our_logits(model_of(variant, attention), tokens_BT, attention_mask=mask_BT, **inputs)
    for row, alone in enumerate(rows):
        official = official_torch_logits(official_of(variant), alone[None])
        assert_logits_agree(
            logits[row][mask_BT[row] == 1][None], official, f"row of {len(alone)} tokens, {side} padding"
        )


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("variant", ["recurrentgemma", "wide_lru", "hawk", "attention_first"])
def test_decoding_after_left_padding(variant, attention):
    """A left-padded prompt of 40, then 21 tokens one by one: every row equals the official model on the row alone."""
    prompt_BT, mask_BT, rows = padded_batch(variant, "left")
    more_BT = torch.randint(0, 101, (len(rows), 21), generator=torch.Generator().manual_seed(SEED + 1))
    tokens_BT = torch.cat([prompt_BT, more_BT], dim=1)
    mask_BT = torch.cat([mask_BT, torch.ones_like(more_BT)], dim=1)
    positions_BT = positions_by_generate(mask_BT)
    logits = our_decode(model_of(variant, attention), tokens_BT, 40, attention_mask=mask_BT, position_ids=positions_BT)
    for row, alone in enumerate(rows):
        official = official_torch_logits(official_of(variant), torch.cat([alone, more_BT[row]])[None])
        assert_logits_agree(logits[row][mask_BT[row] == 1][None], official, f"row of {len(alone)} prompt tokens")


# --- decoding ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def in_chunks(
    model: nn.Module,
    tokens_BT: Tensor,
    ends: Iterable[int],
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: RecurrentGemmaCache | None = None,
) -> Tensor:
    """Logits (B, T, V) in chunks that end before `ends`; mask and positions (B, T) are cut as `generate` cuts them."""
    logits, start = [], 0
    for end in ends:
        output = model(
            input_ids=tokens_BT[:, start:end],
            attention_mask=None if attention_mask is None else attention_mask[:, :end],
            position_ids=None if position_ids is None else position_ids[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = output.past_key_values, end
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def our_decode(model: nn.Module, tokens_BT: Tensor, prompt: int, **inputs) -> Tensor:
    """Logits (B, T, V) of `prompt` tokens at once and the rest one by one."""
    return in_chunks(model, tokens_BT, range(prompt, tokens_BT.shape[1] + 1), **inputs)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_then_token_by_token(variant, attention):
    """Decoding equals the official model's own decoding and its recomputation without a cache, for prompts around the
    window.
    """
    model, tokens_BT = model_of(variant, attention), random_tokens(variant)[:, :49]
    window = model.config.attention_window_size
    full = official_torch_logits(official_of(variant), tokens_BT)
    for prompt in (1, 2, 3, window - 1, window, window + 1, 2 * window + 3):
        decoded = our_decode(model, tokens_BT, prompt, cache=RecurrentGemmaCache(model.config))
        assert_logits_agree(
            decoded,
            oracles.official_torch_decode(official_of(variant), tokens_BT, prompt),
            f"prompt {prompt}, decoding",
        )
        assert_logits_agree(decoded, full, f"prompt {prompt}, recomputation")


# --- gradients --------------------------------------------------------------------------------------------------------


def assert_loss_and_gradients_agree(model: nn.Module, loss: Tensor, official_loss: Tensor, official: dict) -> None:
    assert abs(loss.item() - official_loss.item()) <= 1e-5 * official_loss.item()
    assert all(gradient.norm() > 0 for gradient in official.values()), "a gradient of zero shows nothing"
    assert_same_gradients(gradients(model, loss), official, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("documents", ["one", "packed"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_every_parameter(variant, attention, documents):
    """Gradients of the model's own loss (some labels ignored) against the official PyTorch model's."""
    model, tokens_BT = model_of(variant, attention), random_tokens(variant)
    positions_BT = (
        restarting_positions(tokens_BT.shape[1]) if documents == "packed" else oracles.positions_of(tokens_BT).long()
    )
    labels_BT = tokens_BT.masked_fill(positions_BT == 0, -100)  # the first token of a document is nobody's next token
    official_loss, official = oracles.official_torch_gradients(
        model.config, official_of(variant), tokens_BT, labels_BT, positions_BT
    )
    output = model(input_ids=tokens_BT, labels=labels_BT, position_ids=positions_BT, use_cache=False)
    assert_loss_and_gradients_agree(model, output.loss, official_loss, official)


@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk"])
def test_gradients_ignore_left_padding(variant):
    """Eleven tokens of padding in front: the same loss and gradients as the official model on the row alone."""
    model, row_BT = model_of(variant), random_tokens(variant, rows=1)[:, :40]
    official_loss, official = oracles.official_torch_gradients(model.config, official_of(variant), row_BT, row_BT)
    padded_BT = nn.functional.pad(row_BT, (11, 0), value=7)
    mask_BT = nn.functional.pad(torch.ones_like(row_BT), (11, 0))
    # The label of the first real token stays out: its logits would come from padding.
    labels_BT = nn.functional.pad(row_BT[:, 1:], (12, 0), value=-100)
    output = model(input_ids=padded_BT, attention_mask=mask_BT, labels=labels_BT, use_cache=False)
    assert_loss_and_gradients_agree(model, output.loss, official_loss, official)


@pytest.mark.parametrize("recurrent_param", [-12.0, -16.0, -20.0, -25.0])
def test_gradient_of_the_square_root_is_bounded(recurrent_param):
    """Channels that forget next to nothing, 1 - a^2 from 1e-5 down to where it rounds to 0, as the official code has
    them.

    The derivative of sqrt(1 - a^2) is bounded from 1 - a^2 = 2.5e-7 on; without the bound it is infinite at -25.
    """
    config = tiny_config("hawk", num_hidden_layers=1)
    model = build(config, SEED)
    with torch.no_grad():
        model.model.layers[0].temporal_block.rg_lru.recurrent_param[::2] = recurrent_param
    tokens_BT = random_tokens("hawk")
    official = official_torch(config, model.state_dict())
    what = f"Lambda {recurrent_param}"
    assert_logits_agree(our_logits(model, tokens_BT), official_torch_logits(official, tokens_BT), what)
    loss, official_gradients = oracles.official_torch_gradients(config, official, tokens_BT, tokens_BT)
    ours = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
    assert_loss_and_gradients_agree(model, ours, loss, official_gradients)


# --- long texts -------------------------------------------------------------------------------------------------------

# Our attention goes block by block, and our recurrence chunk by chunk, only from some hundreds of tokens on. The
# windows are shorter than a block and longer than one; the lengths are no multiple of anything.
LONG_CASES = [(12, 1637), (700, 1801)]


@functools.cache
def long_case(window: int, length: int, attention: str) -> tuple[RecurrentGemmaForCausalLM, nn.Module, Tensor, Tensor]:
    """Our model, the official one, tokens (2, length) and positions of long and short documents (2, length)."""
    model = build(tiny_config("attention_first", attention_window_size=window, num_hidden_layers=2), SEED, attention)
    official = official_torch(model.config, model.state_dict())
    tokens_BT = torch.randint(0, 101, (2, length), generator=torch.Generator().manual_seed(SEED))
    rows = [[1, 30, 511, 2, 3, length - 547], [length - 600, 600]]
    positions_BT = torch.stack([packed_positions(*row) for row in rows])
    return model, official, tokens_BT, positions_BT


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("window", "length"), LONG_CASES)
def test_logits_of_long_texts(window, length, attention):
    """Alone, packed, left-padded, and in a cache whose second chunk is long as well."""
    model, official, tokens_BT, positions_BT = long_case(window, length, attention)
    plain = official_torch_logits(official, tokens_BT)
    assert_logits_agree(our_logits(model, tokens_BT), plain, "one document")
    packed = official_torch_logits(official, tokens_BT, positions_BT)
    assert_logits_agree(our_logits(model, tokens_BT, position_ids=positions_BT), packed, "packed")
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[1, : length - 1100] = 0
    padded = our_logits(model, tokens_BT, attention_mask=mask_BT)
    assert_logits_agree(padded[:1], plain[:1], "the row without padding")
    alone = official_torch_logits(official, tokens_BT[1:, -1100:])
    assert_logits_agree(padded[1:, -1100:], alone, "the row with left padding")
    for ends, positions_ids, expected in (
        ((37, length - 2, length - 1, length), None, plain),
        ((length - 5, length - 4, length), positions_BT, packed),
    ):
        cached = in_chunks(model, tokens_BT, ends, position_ids=positions_ids)
        assert_logits_agree(cached, expected, f"chunks that end at {ends}")


@pytest.mark.parametrize("documents", ["one", "packed"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("window", "length"), LONG_CASES)
def test_gradients_of_long_texts(window, length, attention, documents):
    model, official, tokens_BT, positions_BT = long_case(window, length, attention)
    positions_BT = positions_BT if documents == "packed" else None
    # Ours leaves out by itself what a document would have to predict of the next; the official code has no loss.
    labels_BT = tokens_BT if positions_BT is None else tokens_BT.masked_fill(positions_BT == 0, -100)
    loss, official_gradients = oracles.official_torch_gradients(
        model.config, official, tokens_BT, labels_BT, positions_BT
    )
    ours = model(input_ids=tokens_BT, labels=tokens_BT, position_ids=positions_BT, use_cache=False).loss
    assert_loss_and_gradients_agree(model, ours, loss, official_gradients)


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


def bfloat16_errors(variant: str, seed: int) -> tuple[Tensor, Tensor]:
    """Absolute errors of the bfloat16 logits against the same model in float32: ours and the official one's.

    The weights are rounded to bfloat16 first, so that both precisions compute with the same weights.
    """
    model = build(tiny_config(variant), seed).to(torch.bfloat16)
    tokens_BT = torch.randint(0, 101, (4, 61), generator=torch.Generator().manual_seed(seed))
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    ours_low = our_logits(model, tokens_BT).float()
    ours = our_logits(model.float(), tokens_BT)
    official_low = official_torch_logits(official_torch(model.config, state, torch.bfloat16), tokens_BT).float()
    official = official_torch_logits(official_torch(model.config, state), tokens_BT)
    return (ours_low - ours).abs(), (official_low - official).abs()


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_no_worse_than_the_official_one(variant, record_testsuite_property):
    """Over four models, the mean error of our bfloat16 logits and the mean of the largest errors are at most the
    official ones.
    """
    pairs = [bfloat16_errors(variant, seed) for seed in range(4)]
    ours, official = (torch.stack(errors).flatten(1) for errors in zip(*pairs, strict=True))
    for what, mine, theirs in (
        ("mean", ours.mean().item(), official.mean().item()),
        ("largest", ours.amax(1).mean().item(), official.amax(1).mean().item()),
    ):
        record_testsuite_property(f"bfloat16 {variant} {what}", f"ours {mine:.2e}, official {theirs:.2e}")
        assert mine <= theirs, f"{what} error of bfloat16 logits {mine:.2e}, official {theirs:.2e}"
