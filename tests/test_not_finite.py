"""NaN and infinity stay in the document that they are in: every result and every gradient of the others is the same as
with finite values there. In the recurrence, the convolution and the model; in plain torch and by kernels.
"""

import random

import pytest
import torch
from torch import Tensor

from recurrent_gemma_hf import RecurrentGemmaCache, linear_recurrence
from recurrent_gemma_hf.causal_conv1d import causal_conv1d
from recurrent_gemma_hf.rg_lru import RgLruParameters, rg_lru, rg_lru_step
from recurrent_gemma_hf.scan import linear_recurrence_reference
from tests.helpers import FUZZ_ROUNDS, build, tiny_config
from tests.kernels import needs_triton, small_programs

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # interpreter

VALUES = (float("nan"), float("inf"), -float("inf"))


def lengths_of(draw: random.Random, total: int) -> list[int]:
    """Draw the lengths of the documents of one row."""
    cuts = sorted(draw.sample(range(1, total), k=draw.randint(1, min(4, total - 1))))
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, total], strict=True)]


def results(function, inputs: list[Tensor], sound: Tensor) -> list[Tensor]:
    """Return what `function` returns and the gradients of the inputs, through the columns `sound` (T,) of (B, T, D)
    results alone."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outs = function(*leaves)
    kept = [out[:, sound] if out.ndim == 3 else out for out in outs]
    weights = [torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape) for out in kept]
    loss = sum((out.double() * weight).sum() for out, weight in zip(kept, weights, strict=True))
    return [*outs, *torch.autograd.grad(loss, leaves)]


def assert_sound(found: list[Tensor], wanted: list[Tensor], sound: Tensor, tolerance: float = 1e-6) -> None:
    """Compare the columns `sound` of (B, T, D) results; other results hold nothing of broken documents."""
    for index, (mine, exact) in enumerate(zip(found, wanted, strict=True)):
        mine, exact = (mine[:, sound], exact[:, sound]) if mine.ndim == 3 else (mine, exact)
        torch.testing.assert_close(mine.double(), exact.double(), rtol=tolerance, atol=tolerance, msg=f"result {index}")


# --- the recurrence, the convolution, the RG-LRU ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(25 * FUZZ_ROUNDS))
def test_the_recurrence(seed, backend):
    """Broken inputs, coefficients and initial states before a coefficient of 0, against the loop over time."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    T, D = draw.choice([2, 3, 9, 26, 70, 150] if backend == "portable" else [2, 5, 11, 23]), 5
    lengths = lengths_of(draw, T)
    x, a, h0 = torch.randn(2, T, D), torch.rand(2, T, D), torch.randn(2, D)
    starts = [sum(lengths[:i]) for i in range(1, len(lengths))]
    a[:, starts] = 0.0
    if draw.random() < 0.3:
        a = torch.where(torch.rand(a.shape) < 0.7, a * 1e-30, a)  # products underflow to 0, which drops nothing
    broken = draw.randrange(len(lengths) - 1)  # not the last, whose state is a result
    start, stop = sum(lengths[:broken]), sum(lengths[: broken + 1])
    sound = torch.ones(T, dtype=torch.bool)
    sound[start:stop] = False
    inputs = [x, a, h0]
    wanted = results(linear_recurrence_reference, [t.double() for t in inputs], sound)
    where, t, value = draw.choice("xah" if broken == 0 else "xa"), draw.randrange(start, stop), draw.choice(VALUES)
    if where == "h":
        h0[0, 1] = value
    elif where == "a" and t not in starts:
        a[1, t, 2] = value
    else:
        x[1, t, 2] = value
    found, loop = results(linear_recurrence, inputs, sound), linear_recurrence_reference(*inputs)
    assert found[3][:, stop].isfinite().all()  # the gradient of the 0 is that of the state which it drops
    found[3][:, stop] = wanted[3][:, stop] = 0.0
    if broken == 0:  # the gradient of the state before it may be broken
        wanted, found = wanted[:-1], found[:-1]
    assert_sound(found, wanted, sound)
    for mine, exact in zip(found[:2], loop, strict=True):  # nothing vanishes that is not finite
        assert torch.equal(mine.isfinite(), exact.isfinite())


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("T", [2, 30])
def test_a_gradient_that_is_not_finite_does_not_pass_a_coefficient_of_0(T, value, backend):
    x, a, h0 = (t.requires_grad_() for t in (torch.randn(1, T, 3), torch.rand(1, T, 3), torch.randn(1, 3)))
    with torch.no_grad():
        a[:, T // 2] = 0.0
    h, last = linear_recurrence(x, a, h0)
    before = torch.arange(T) < T // 2
    gradient = torch.ones_like(h)
    wanted = torch.autograd.grad((h, last), (x, a, h0), (gradient, torch.ones_like(last)), retain_graph=True)
    gradient[:, T // 2 :] = value
    found = torch.autograd.grad((h, last), (x, a, h0), (gradient, torch.full_like(last, value)))
    assert_sound(list(found), list(wanted), before)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("past", [0, 3])
def test_the_convolution(past, value, backend):
    """Forwards from earlier documents, and backwards from later ones."""
    T, K = 20, 4
    position = torch.cat([torch.arange(7), torch.arange(1), torch.arange(12)])
    mask = (position[:, None] >= torch.arange(K - 1, -1, -1))[None]
    u, weight, bias = torch.randn(2, past + T, 5), torch.randn(5, 1, K), torch.randn(5)
    sound = torch.arange(T) >= 7

    def conv(u):
        return (causal_conv1d(u, weight, bias, mask, past=past),)

    wanted = results(conv, [u], sound)
    u[1, past + 5, 2] = value
    found = results(conv, [u], sound)
    assert_sound(found[:1], wanted[:1], sound)
    assert_sound(found[1:], wanted[1:], torch.cat([torch.zeros(past, dtype=torch.bool), sound]))
    out = conv(leaf := torch.randn(2, past + T, 5, requires_grad=True))[0]
    (gradient,) = torch.autograd.grad(out, leaf, torch.where(sound[:, None], torch.tensor(value), 1.0).expand_as(out))
    assert gradient[:, past : past + 7].isfinite().all()


@pytest.mark.parametrize("value", VALUES)
def test_the_rg_lru(value, backend):
    B, T, H, d = 2, 22, 2, 4
    weights = [torch.randn(H, d, d), torch.randn(H, d), torch.randn(H, d, d), torch.randn(H, d), torch.randn(H * d)]
    inputs = [torch.randn(B, T, H * d), torch.randn(B, T, H * d)]
    reset, sound = torch.zeros(1, T, dtype=torch.bool), torch.ones(T, dtype=torch.bool)
    reset[:, [0, 6, 15]], sound[6:15] = True, False

    def block(x, y):
        gelu = torch.nn.GELU("tanh")
        return rg_lru(x, y, RgLruParameters(*weights), torch.ones(B, H * d), reset, None, gelu, is_gelu_tanh=True)[:2]

    wanted = results(block, inputs, sound)
    inputs[0][0, 9, 3], inputs[1][1, 8, 5] = value, value
    assert_sound(results(block, inputs, sound), wanted, sound)


@needs_triton
@pytest.mark.parametrize("value", VALUES)
def test_the_step_of_a_new_document(value, monkeypatch):
    small_programs(monkeypatch)
    B, H, d, K = 3, 2, 4, 4
    D = H * d
    weights = [torch.randn(H, d, d), torch.randn(H, d), torch.randn(H, d, d), torch.randn(H, d), torch.randn(D)]
    u, y, conv, bias = torch.randn(B, D), torch.randn(B, D), torch.randn(D, 1, K), torch.randn(D)
    taps = torch.zeros(B, K, dtype=torch.bool)
    taps[:, -1] = True

    def step(fill):
        conv_state, h = torch.full((B, D, K - 1), fill), torch.full((B, D), fill)
        out = rg_lru_step(
            u, y, conv, bias, RgLruParameters(*weights), conv_state, h,
            reset_B=torch.ones(B, dtype=torch.bool), conv_tap_mask_BK=taps,
        )  # fmt: skip
        return out, h

    for mine, exact in zip(step(value), step(0.5), strict=True):
        assert torch.equal(mine, exact)


# --- the model --------------------------------------------------------------------------------------------------------


PACKED = [("portable", seed) for seed in range(8 * FUZZ_ROUNDS)]
PACKED += [pytest.param("triton", seed, marks=needs_triton) for seed in range(FUZZ_ROUNDS)]  # 10 seconds each


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("backend", "seed"), PACKED, indirect=["backend"])
def test_packed_documents(seed, attention, backend):
    """The others' hidden states and gradients, without a cache, with one, and in the tokens that follow."""
    draw = random.Random(seed)
    blocks = draw.choice([["recurrent", "attention"], ["attention"], ["recurrent"]])
    model = build(tiny_config(num_hidden_layers=2, block_types=blocks), seed=seed, attention=attention).model
    lengths = lengths_of(draw, draw.choice([9, 30]))
    T, broken = sum(lengths), draw.randrange(len(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])[None]
    sound = torch.ones(T, dtype=torch.bool)
    sound[sum(lengths[:broken]) : sum(lengths[: broken + 1])] = False
    torch.manual_seed(seed)
    x, more = torch.randn(1, T, 48), torch.randn(1, 3, 48)

    def run(x):
        return (model(inputs_embeds=x, position_ids=position, use_cache=False).last_hidden_state,)

    def go_on(x):
        cache, found = RecurrentGemmaCache(model.config), []
        cut = draw.randrange(1, T)
        with torch.no_grad():
            for part, start in ((x[:, :cut], 0), (x[:, cut:], cut)):
                where = position[:, start : start + part.shape[1]]
                found.append(model(inputs_embeds=part, position_ids=where, cache=cache).last_hidden_state)
            for i in range(3):
                where = torch.tensor([[lengths[-1] + i]])
                found.append(model(inputs_embeds=more[:, i : i + 1], position_ids=where, cache=cache).last_hidden_state)
        return [torch.cat(found, 1)]

    state = draw.getstate()
    wanted, wanted_on = results(run, [x], sound), go_on(x)
    draw.setstate(state)
    x[0, draw.randrange(*sorted((~sound).nonzero()[[0, -1], 0].add(torch.tensor([0, 1])).tolist()))] = draw.choice(
        VALUES
    )
    found = results(run, [x], sound)
    draw.setstate(state)
    assert_sound(found, wanted, sound, 2e-5)
    assert not found[0][:, ~sound].isfinite().all()
    assert_sound(go_on(x), wanted_on, torch.cat([sound, sound[-1:].expand(3)]), 2e-5)


@pytest.mark.parametrize("value", VALUES)
def test_long_documents_in_bands(value):
    """Attention block by block, where a band of keys holds several documents."""
    model = build(tiny_config(num_hidden_layers=1, block_types=["attention"], attention_window_size=20)).model
    lengths = [700, 15, 600]
    position = torch.cat([torch.arange(length) for length in lengths])[None]
    x, sound = torch.randn(1, sum(lengths), 48), torch.ones(sum(lengths), dtype=torch.bool)
    sound[700:715] = False

    def run(x):
        return (model(inputs_embeds=x, position_ids=position, use_cache=False).last_hidden_state,)

    wanted = results(run, [x], sound)
    x[0, 706] = value
    found = results(run, [x], sound)
    assert_sound(found, wanted, sound, 2e-5)
    assert found[0][0, 706:715].isnan().all()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding(attention, value):
    """Whatever stands at padding, on any side, in every row: hidden states, gradients and the tokens that follow."""
    model = build(tiny_config(), attention=attention).model
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[0, :6], mask[1, 15:], mask[2, 5:9] = 0, 0, 0
    x = torch.randn(3, 20, 48)

    def run(x):
        cache = RecurrentGemmaCache(model.config)
        out = model(inputs_embeds=x, attention_mask=mask, cache=cache).last_hidden_state
        longer = torch.cat([mask, mask.new_ones(3, 1)], 1)
        more = model(inputs_embeds=x[:1, 10:11].expand(3, 1, -1), attention_mask=longer, cache=cache).last_hidden_state
        return [out.masked_fill(mask[..., None] == 0, 0.0), more.flatten(1)]

    everything = torch.ones(20, dtype=torch.bool)
    wanted = results(run, [x], everything)
    found = results(run, [x.masked_fill(mask[..., None] == 0, value)], everything)
    assert_sound(found, wanted, everything, 1e-6)
