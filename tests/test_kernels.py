"""The kernels of convolution, RG-LRU and one token, in Triton's interpreter: against plain torch in float64, and in the
model against the official code. All results are written to memory full of NaN.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from recurrent_gemma_hf import RecurrentGemmaCache, RecurrentGemmaForCausalLM, set_backend
from recurrent_gemma_hf import causal_conv1d as conv_module
from recurrent_gemma_hf import rg_lru as module
from recurrent_gemma_hf.causal_conv1d import causal_conv1d
from recurrent_gemma_hf.rg_lru import RgLruParameters, rg_lru, rg_lru_step
from tests import reference
from tests.helpers import build, byte_config, tiny_config
from tests.kernels import needs_triton, small_programs

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    small_programs(monkeypatch)
    set_backend("triton")
    yield
    set_backend("auto")


def act(y):
    return F.gelu(y, approximate="tanh")


def drawn(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)


def make(B, T, H, d, dtype=torch.float32):
    """x, y, the parameters of the RG-LRU and h0; and all masks that there can be."""
    D = H * d
    weights = [t for _ in range(2) for t in (drawn(H, d, d, dtype=dtype, scale=d**-0.5), drawn(H, d, dtype=dtype))]
    tensors = [drawn(B, T, D, dtype=dtype), drawn(B, T, D, dtype=dtype), *weights, drawn(D, dtype=dtype), drawn(B, D)]
    return tensors, {"reset_BT": torch.rand(B, T) < 0.1, "is_padding_BT": torch.rand(B, T) < 0.1}


def ours(x, y, *rest, reset_BT=None, is_padding_BT=None):
    reset_BT = torch.zeros(1, x.shape[1], dtype=torch.bool) if reset_BT is None else reset_BT
    parameters = RgLruParameters(*rest[:5])
    return rg_lru(x, y, parameters, rest[5], reset_BT, is_padding_BT, act, is_gelu_tanh=True)[:2]


def exact(x, y, *rest, **masks):
    return reference.rg_lru(x, y, RgLruParameters(*rest[:5]), rest[5], **masks)


def results(function, tensors, **masks):
    """All results and gradients, with weights that are the same for every function."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    outs = function(*leaves, **masks)
    loss = sum((out.double() * torch.linspace(0.5, 1.5, out.numel()).view(out.shape)).sum() for out in outs)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [*outs, *torch.autograd.grad(loss, wanted)]


def in_float64(tensors):
    return [None if t is None else t.double() for t in tensors]


def assert_near(actual, expected, tolerance=1e-6):
    for index, (mine, wanted) in enumerate(zip(actual, expected, strict=True)):
        error = (mine.double() - wanted).abs().max().item()
        assert error <= tolerance * max(1.0, wanted.abs().max().item()), f"result {index}: error {error}"


# --- the RG-LRU -------------------------------------------------------------------------------------------------------

# B, T, H, d: borders of tiles and blocks, heads narrower and wider than a block of channels.
SHAPES = [(1, 1, 1, 4), (2, 2, 2, 3), (1, 3, 1, 5), (2, 7, 1, 10), (1, 8, 2, 4), (2, 17, 2, 6), (1, 31, 1, 9)]


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_plain_torch_in_float64(shape, has_state):
    tensors, masks = make(*shape)
    if not has_state:
        tensors, masks = [*tensors[:-1], None], {}
    assert_near(results(ours, tensors, **masks), results(exact, in_float64(tensors), **masks))


@pytest.mark.parametrize("wanted_programs", [1, 3, 400])
def test_any_number_of_segments(wanted_programs, monkeypatch):
    from recurrent_gemma_hf import triton_tools

    monkeypatch.setattr(triton_tools, "WANTED_PROGRAMS", wanted_programs)
    tensors, masks = make(1, 29, 1, 5)
    assert_near(results(ours, tensors, **masks), results(exact, in_float64(tensors), **masks))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """As near as the portable code in the same dtype: gates and gradients per token are rounded on their way."""
    tensors, masks = make(1, 33, 2, 8, dtype)
    expected = results(exact, in_float64(tensors), **masks)

    def errors():
        return [
            (mine.double() - wanted).norm() / wanted.norm()
            for mine, wanted in zip(results(ours, tensors, **masks), expected, strict=True)
        ]

    by_kernels = errors()
    set_backend("portable")
    for mine, portable in zip(by_kernels, errors(), strict=True):
        assert mine <= 1.2 * portable + torch.finfo(dtype).eps / 4


def test_a_reset_at_every_position():
    tensors, _ = make(1, 10, 1, 3)
    for t in range(10):
        reset = torch.zeros(1, 10, dtype=torch.bool)
        reset[0, t] = True
        expected = results(exact, in_float64(tensors), reset_BT=reset)
        assert_near(results(ours, tensors, reset_BT=reset), expected)


def test_no_row():
    tensors, _ = make(1, 3, 1, 2)
    rows = [t[:0] for t in (tensors[0], tensors[1], tensors[-1])]
    _, _, *gradients = results(ours, [*rows[:2], *tensors[2:-1], rows[2]])
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_any_strides():
    tensors, masks = make(2, 9, 2, 5)
    x, y, h0 = tensors[0], tensors[1], tensors[-1]
    channels_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    strided = [channels_first, torch.cat([y, y], 2)[..., 10:], *tensors[2:-1], h0.t().contiguous().t()]
    masks = {name: mask[:1].expand_as(mask) for name, mask in masks.items()}
    expected = results(exact, in_float64(tensors), **masks)
    assert_near(results(ours, strided, **masks), expected)
    one_row = {name: mask[:1] for name, mask in masks.items()}
    assert_near(results(ours, strided, **one_row), expected)


def test_nan_at_padding_stays_there():
    tensors, _ = make(1, 8, 1, 3)
    is_padding = torch.tensor([[0, 0, 1, 0, 0, 1, 0, 0]]).bool()
    broken = [tensors[0].masked_fill(is_padding[..., None], torch.nan), *tensors[1:]]
    (out, last), (wanted, wanted_last) = (ours(*t, is_padding_BT=is_padding) for t in (broken, tensors))
    assert torch.equal(out, wanted)
    assert torch.equal(last, wanted_last)


def test_the_same_bits_every_time():
    tensors, masks = make(2, 17, 1, 6, torch.bfloat16)
    for first, second in zip(*(results(ours, tensors, **masks) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_second_derivatives():
    tensors, masks = make(1, 5, 1, 3)

    def second(function, tensors):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out, last = function(*leaves, **masks)
        first = torch.autograd.grad(out.square().sum() + last.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)

    expected = second(exact, in_float64(tensors))
    scale = max(gradient.abs().max().item() for gradient in expected)
    for mine, wanted in zip(second(ours, tensors), expected, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-3, atol=1e-5 * scale)


def test_what_the_backward_keeps():
    """x, y, both gates, and a state for every two steps (UNROLLED); without gradients nothing."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    tensors, _ = make(1, 32, 1, 4)
    leaves = [t.requires_grad_() for t in tensors]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(*leaves)
        assert sum(t.numel() for t in kept if t.numel() >= 16 * 4) == 4 * 32 * 4 + 16 * 4
        kept.clear()
        with torch.no_grad():
            ours(*leaves)
        assert not kept


def test_operators_keep_their_promises():
    cheap = ("test_schema", "test_autograd_registration", "test_faketensor")
    tensors, masks = make(1, 3, 1, 2)
    tensors[:7] = [t.requires_grad_() for t in tensors[:7]]
    torch.library.opcheck(module._rg_lru, (*tensors, *masks.values(), True), test_utils=cheap)
    conv = drawn(1, 6, 2).requires_grad_(), drawn(4, 2), drawn(2), torch.ones(1, 3, 4), 3
    torch.library.opcheck(conv_module._conv, conv, test_utils=cheap)
    plain = [t.detach() for t in tensors[2:7]]
    states = torch.randn(1, 2, 3), torch.randn(1, 2)
    step = torch.randn(1, 2), torch.randn(1, 2), *states, drawn(2, 1, 4), drawn(2), *plain, None, None, None, None
    torch.library.opcheck(module._step, step, test_utils=cheap)


# --- the convolution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("has_past", [True, False])
@pytest.mark.parametrize("shape", [(2, 19, 10, 4), (1, 2, 3, 4), (1, 9, 3, 1)], ids=str)
def test_the_convolution(shape, has_past, has_mask):
    B, T, D, K = shape
    past = K - 1 if has_past else 0
    mask = torch.rand(B, T, K) < 0.8 if has_mask else None
    tensors = [drawn(B, past + T, D), drawn(D, 1, K), drawn(D)]
    mine = results(lambda *t: (causal_conv1d(*t, mask, past=past),), tensors)
    wanted = results(lambda *t: (reference.conv(*t, mask, past),), in_float64(tensors))
    assert_near(mine, wanted, 2e-6)


def test_the_convolution_of_any_strides_and_of_nothing():
    u, weight, bias = torch.randn(2, 9, 7), torch.randn(5, 1, 4), torch.randn(5)
    expected = causal_conv1d(u[..., :5].contiguous(), weight, bias)
    assert torch.equal(causal_conv1d(u[..., :5], weight, bias), expected)
    assert torch.equal(causal_conv1d(u.mT.contiguous().mT[..., :5], weight, bias), expected)
    nothing = u[:0, :, :5].requires_grad_()
    weight.requires_grad_()
    causal_conv1d(nothing, weight, bias).sum().backward()
    assert nothing.grad.shape == (0, 9, 5)
    assert torch.equal(weight.grad, torch.zeros(5, 1, 4))


# --- one token --------------------------------------------------------------------------------------------------------


def stepped(B, H, d, K, rows, index=None):
    """A step with masks by the kernels, states in `rows` rows of a pool; and what plain torch makes of it."""
    D = H * d
    tensors, masks = make(B, 1, H, d)
    u, y, *learned, _ = tensors
    conv_weight, conv_bias, tap_mask = drawn(D, 1, K), drawn(D), torch.rand(B, K) < 0.8
    past, h = drawn(rows, K - 1, D), drawn(rows, D)
    before, states = (past.clone(), h.clone()), (past.transpose(1, 2), h)
    addresses = [state.data_ptr() for state in states]
    reset, is_padding = (mask[:, 0] for mask in masks.values())
    out = rg_lru_step(
        u[:, 0], y[:, 0], conv_weight, conv_bias, RgLruParameters(*learned), *states,
        reset_B=reset, is_padding_B=is_padding, conv_tap_mask_BK=tap_mask, state_indices_B=index,
    )  # fmt: skip
    assert [state.data_ptr() for state in states] == addresses
    chosen = torch.arange(B) if index is None else index.long().clamp(min=0)
    full = torch.cat([before[0][chosen], u], dim=1)
    x = reference.conv(full.double(), conv_weight.double(), conv_bias.double(), tap_mask[:, None], K - 1)
    wanted, last = exact(x, y.double(), *in_float64(learned), before[1][chosen].double(), **masks)
    moved = torch.where(is_padding[:, None, None], before[0][chosen], full[:, 1:])
    return (out, past, h), (wanted[:, 0], moved, last), before


@pytest.mark.parametrize("shape", [(1, 2, 5, 4), (17, 1, 6, 4), (2, 1, 40, 2)], ids=str)
@torch.no_grad()
def test_a_step_is_a_block_of_one_token_in_place(shape):
    mine, wanted, _ = stepped(*shape, rows=shape[0])
    for actual, expected in zip(mine, wanted, strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_step_with_rows_of_a_pool():
    """Indices out of order, and padding of the batch, which changes no row and gives 0."""
    index = torch.tensor([4, -1, 0, 2, -1], dtype=torch.int32)
    (out, past, h), (wanted, moved, last), before = stepped(5, 1, 6, 4, rows=6, index=index)
    is_row = index >= 0
    rows = index[is_row].long()
    torch.testing.assert_close(out[is_row].double(), wanted[is_row], rtol=1e-6, atol=1e-6)
    assert torch.equal(out[~is_row], torch.zeros_like(out[~is_row]))
    assert torch.equal(past[rows], moved[is_row])
    torch.testing.assert_close(h[rows].double(), last[is_row], rtol=1e-6, atol=1e-6)
    others = [row for row in range(6) if row not in rows.tolist()]
    assert torch.equal(past[others], before[0][others])
    assert torch.equal(h[others], before[1][others])


@pytest.mark.parametrize("value", [-80.0, -15.0, -6.0, -1.0, 0.0, 3.0, 20.5, 90.0])
@torch.no_grad()
def test_a_step_takes_softplus_as_exactly_as_torch(value):
    """With r = 1 and a state of 1 a step returns a: nothing but softplus(Lambda) matters."""
    parameters = RgLruParameters(
        torch.zeros(1, 1, 1), torch.full((1, 1), 90.0), torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.tensor([value])
    )
    zero, h = torch.zeros(1, 1), torch.ones(1, 1)
    rg_lru_step(zero, zero, torch.zeros(1, 1, 2), torch.zeros(1), parameters, torch.zeros(1, 1, 1), h)
    log_a = -8.0 * F.softplus(torch.tensor(value, dtype=torch.float64)).item()
    torch.testing.assert_close(h.item(), math.exp(log_a), rtol=2e-7 * max(1.0, -log_a), atol=1e-37)


# --- in the model -----------------------------------------------------------------------------------------------------


def test_the_model_with_kernels_equals_the_official_one():
    oracles = pytest.importorskip("tests.oracles")
    config = tiny_config("wide_lru")
    model = build(config)
    tokens = torch.randint(config.vocab_size, (2, 9))
    official = oracles.official_torch(config, model.state_dict())
    wanted = oracles.official_torch_logits(official, tokens)
    set_backend("triton")
    logits = model(tokens).logits
    assert (logits - wanted).abs().max() < 1e-4
    weight = torch.randn(logits.shape)
    (logits * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    set_backend("portable")  # whose gradients are compared with the official ones in test_against_official.py
    (model(tokens).logits * weight).sum().backward()
    for name, parameter in model.named_parameters():
        error = (gradients[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < 1e-5, name


@pytest.fixture
def model():
    config = byte_config(num_hidden_layers=2, block_types=["recurrent", "attention"], lru_width=24)
    return RecurrentGemmaForCausalLM(config).eval()


def both(function):
    """The same by the portable code and by the kernels."""
    answers = []
    for backend in ("portable", "triton"):
        set_backend(backend)
        answers.append(function())
    return answers


def test_packed_documents_and_padding(model):
    ids = torch.randint(1, 265, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    packed = torch.cat([torch.arange(5), torch.arange(6)])[None]
    for inputs in ({"position_ids": packed}, {"attention_mask": mask, "use_cache": True}):
        expected, actual = both(lambda: model(ids, **inputs).logits.detach())  # noqa: B023 (called at once)
        is_token = mask.bool() if "attention_mask" in inputs else torch.ones_like(ids, dtype=torch.bool)
        torch.testing.assert_close(actual[is_token], expected[is_token], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_prefill_chunks_and_steps_share_one_cache(model):
    """Chunks, single tokens, a padded row that holds, and states at addresses that stay."""
    ids = torch.randint(1, 265, (2, 12))
    whole, _ = both(lambda: model(ids).logits)
    set_backend("triton")
    cache = RecurrentGemmaCache(model.config)
    pieces = [model(ids[:, :5], past_key_values=cache).logits]
    addresses = [tensor.data_ptr() for tensor in cache.layers[0].tensors().values()]
    for first, stop in ((5, 6), (6, 7), (7, 10), (10, 11), (11, 12)):
        pieces.append(model(ids[:, first:stop], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)
    assert [tensor.data_ptr() for tensor in cache.layers[0].tensors().values()] == addresses


@torch.no_grad()
def test_steps_in_bfloat16_take_the_kernels_of_one_token(model, monkeypatch):
    """Eager and compiled, a row that holds among them: as the portable code within bfloat16's rounding."""
    from recurrent_gemma_hf import rg_lru_step_triton

    model = model.bfloat16()
    ids, mask = torch.randint(1, 265, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, 6] = 0
    calls = []
    launched = rg_lru_step_triton.step
    monkeypatch.setattr(rg_lru_step_triton, "step", lambda *args: calls.append(1) or launched(*args))

    def read(run):
        cache = RecurrentGemmaCache(model.config)
        logits = [model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache).logits]
        addresses = [tensor.data_ptr() for tensor in cache.layers[0].tensors().values()]
        for t in range(5, 9):
            logits.append(run(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits)
        assert [tensor.data_ptr() for tensor in cache.layers[0].tensors().values()] == addresses
        return torch.cat(logits, dim=1)[mask.bool()], cache.layers[0].recurrent_states[0].clone()

    expected, actual = both(lambda: read(model))
    assert len(calls) == 4
    set_backend("triton")
    torch._dynamo.reset()
    compiled = read(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch._dynamo.reset()
    assert len(calls) == 8
    for mine in (actual, compiled):
        for one, other in zip(mine, expected, strict=True):
            torch.testing.assert_close(one.float(), other.float(), rtol=0.02, atol=0.04)


def test_generation_in_every_mode(model):
    ids = torch.randint(1, 265, (1, 6))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    for mode in ({}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 2}):
        expected, actual = both(lambda: model.generate(ids, **options, **mode))  # noqa: B023 (called at once)
        assert torch.equal(actual, expected), mode


def test_one_graph(model):
    """Forward and backward under torch.compile, without a break; then decoding, with states changed in place."""
    set_backend("triton")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(1, 265, (1, 9))
    answers = []
    for run in (model, compiled):
        model.zero_grad(set_to_none=True)
        run(ids, use_cache=False).logits.square().sum().backward()
        answers.append(model.model.layers[0].temporal_block.rg_lru.input_gate_weight.grad.clone())
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        caches = [RecurrentGemmaCache(model.config) for _ in range(2)]
        for cache in caches:
            model(ids, past_key_values=cache)
        for token in range(3, 6):
            tokens = torch.tensor([[token]])
            logits = [run(tokens, past_key_values=c).logits for run, c in zip((model, compiled), caches, strict=True)]
            torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_adapters_on_linear_layers_and_gates(model):
    """PEFT puts its own module around rg_lru and parametrizes the gates: the kernels see the sum."""
    peft = pytest.importorskip("peft", reason="PEFT comes with the `test` extra")
    lora = peft.LoraConfig(
        r=2,
        target_modules=["linear_x", "linear_y"],
        target_parameters=["rg_lru.input_gate_weight", "rg_lru.recurrent_gate_weight"],
        init_lora_weights=False,
    )
    ids = torch.randint(1, 265, (1, 7))
    before = model(ids).logits.detach()
    adapted = peft.get_peft_model(model, lora)

    def run():
        adapted.zero_grad(set_to_none=True)
        logits = adapted(ids).logits
        logits.square().sum().backward()
        return logits.detach(), {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}

    (expected, wanted), (actual, gradients) = both(run)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert any("rg_lru" in name for name in wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_offloaded_parameters_arrive(model):
    """accelerate brings parameters when the module that owns them is called, and takes them away afterwards."""
    from accelerate import cpu_offload

    ids = torch.randint(1, 265, (1, 7))
    expected, _ = both(lambda: model(ids).logits.detach())
    set_backend("triton")
    cpu_offload(model, execution_device="cpu")
    assert model.model.layers[0].temporal_block.conv_1d.weight.is_meta
    torch.testing.assert_close(model(ids).logits.detach(), expected, rtol=1e-5, atol=1e-5)


def test_another_activation():
    """The kernel has gelu with tanh built in: the scan and the convolution alone are kernels then."""
    model = RecurrentGemmaForCausalLM(byte_config(hidden_activation="silu", num_hidden_layers=1)).eval()
    expected, actual = both(lambda: model(torch.arange(1, 8)[None]).logits.detach())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_model_says_no(model):
    with pytest.raises(ValueError, match=r"does not take dtype torch\.float64"):
        model.double()(torch.tensor([[1, 2]]))
