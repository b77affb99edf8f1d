"""The fused recurrent block and its step, in Triton's interpreter: against plain torch in float64, and in the model
against the official code. All results are written to memory full of NaN.
"""

import math

import pytest
import torch
from small_models import build, tiny_config

from recurrent_gemma_hf import RecurrentGemmaCache, RecurrentGemmaForCausalLM, scan, set_backend
from recurrent_gemma_hf import modeling_recurrent_gemma as modeling
from recurrent_gemma_hf import recurrent_block as module
from recurrent_gemma_hf import recurrent_block_triton as kernels
from recurrent_gemma_hf import scan_triton as scan_kernels
from recurrent_gemma_hf.recurrent_block import (
    RecurrentBlockParameters,
    causal_conv1d,
    recurrent_block,
    recurrent_block_reference,
    recurrent_block_step,
    resolve_block_backend,
)
from recurrent_gemma_hf.scan_triton import Tile
from tests.triton_interpreter import fast_scan, poisoned  # noqa: F401 (a fixture)

GPU_TILES = kernels.FORWARD_TILES, kernels.BACKWARD_TILES, kernels.CONV_TILE


def use_tiles(monkeypatch, forward, backward, conv):
    monkeypatch.setattr(kernels, "FORWARD_TILES", forward)
    monkeypatch.setattr(kernels, "BACKWARD_TILES", backward)
    monkeypatch.setattr(kernels, "CONV_TILE", conv)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Eight steps and 16 channels at a time, and results in memory full of NaN."""
    use_tiles(monkeypatch, (Tile(8, 16, 1),) * 2, (Tile(8, 16, 1),) * 2, Tile(8, 16, 1))
    for kernel_module in (kernels, scan_kernels):
        monkeypatch.setattr(kernel_module, "allocate", poisoned)


@pytest.fixture(autouse=True)
def leave_the_choice_as_it_was():
    yield
    set_backend("auto")


def make(B, T, H, d, K=4, *, dtype=torch.float32, seed=0):
    """u, y, parameters, states, flags: all that there can be."""
    random, D = torch.Generator().manual_seed(seed), H * d

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype).requires_grad_()

    parameters = RecurrentBlockParameters(
        normal(D, 1, K, scale=0.5), normal(D, scale=0.3), normal(H, d, d, scale=d**-0.5), normal(H, d, scale=0.3),
        normal(H, d, d, scale=d**-0.5), normal(H, d, scale=0.3), normal(D),
    )  # fmt: skip
    states = {"context_BCD": normal(B, K - 1, D) if K > 1 else None, "h0_BD": normal(B, D)}
    flags = {
        "reset_BT": torch.rand(B, T, generator=random) < 0.1,
        "is_padding_BT": torch.rand(B, T, generator=random) < 0.1,
        "conv_tap_mask_BTK": (torch.rand(B, T, K, generator=random) < 0.8).to(dtype),
    }
    return normal(B, T, D), normal(B, T, D), parameters, states, flags


def in_float64(tensor):
    return None if tensor is None else tensor.detach().double().requires_grad_(tensor.is_floating_point())


def results(function, u, y, parameters, states, flags):
    """Both results and all gradients through both, by name."""
    out, last = function(u, y, parameters, **states, **flags)
    random = torch.Generator().manual_seed(2)
    weights = [torch.randn(t.shape, generator=random, dtype=torch.float64) for t in (out, last)]
    inputs = {"u": u, "y": y, **parameters._asdict(), **{k: v for k, v in states.items() if v is not None}}
    loss = (out.double() * weights[0]).sum() + (last.double() * weights[1]).sum()
    gradients = dict(zip(inputs, torch.autograd.grad(loss, inputs.values()), strict=True))
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype, name
    return {"out": out.detach(), "last": last.detach(), **gradients}


def exact(u, y, parameters, states, flags):
    parameters = RecurrentBlockParameters(*map(in_float64, parameters))
    states = {name: in_float64(state) for name, state in states.items()}
    return results(recurrent_block_reference, in_float64(u), in_float64(y), parameters, states, flags)


def assert_near(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        error = (actual[name].double() - wanted).abs().max().item()
        assert error <= tolerance * max(1.0, wanted.abs().max().item()), f"{name}: error {error}"


# B, T, H, d, K: tile borders and primes, heads narrower and wider than a block of channels, blocks that are not full.
SHAPES = [
    (1, 1, 1, 4, 4), (2, 2, 2, 3, 4), (1, 3, 1, 5, 2), (2, 7, 1, 10, 4), (1, 8, 2, 4, 3), (1, 9, 2, 4, 1),
    (2, 17, 2, 10, 4), (1, 31, 1, 18, 4), (1, 10, 1, 80, 4),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_plain_torch_in_float64(shape):
    inputs = make(*shape)
    assert_near(results(recurrent_block, *inputs), exact(*inputs), 1e-6)


@pytest.mark.parametrize("wanted_programs", [1, 3, 40])
def test_any_number_of_segments(wanted_programs, monkeypatch):
    monkeypatch.setattr(scan_kernels, "WANTED_PROGRAMS", wanted_programs)
    assert scan_kernels.segments(1, 29, 8) == {1: (1, 32), 3: (2, 16), 40: (4, 8)}[wanted_programs]
    inputs = make(1, 29, 1, 5)
    assert_near(results(recurrent_block, *inputs), exact(*inputs), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_tiles_of_the_gpu(dtype, monkeypatch):
    use_tiles(monkeypatch, *GPU_TILES)
    inputs = make(1, 499 if dtype == torch.float32 else 131, 1, 5, dtype=dtype)
    actual, expected = results(recurrent_block, *inputs), exact(*inputs)
    # In half precision the convolution is rounded before the gates, and gradients per token are rounded on their way.
    assert_near(actual, expected, 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


def test_half_precision_is_as_good_as_the_portable_code(tiny_config):
    """Errors against float64, kernel beside modules, in bfloat16."""
    block = RecurrentGemmaForCausalLM(tiny_config(lru_width=32)).bfloat16().model.layers[0].temporal_block
    x, positions = torch.randn(2, 19, 32).bfloat16(), torch.arange(19)[None]
    errors = {}
    step = step_of(positions, torch.float64)
    wanted = block.double()(x.double(), step, None)[0]
    block.bfloat16()
    for backend in ("portable", "triton"):
        set_backend(backend)
        errors[backend] = (block(x, step_of(positions, torch.bfloat16), None)[0].double() - wanted).abs().mean().item()
    assert errors["triton"] <= 1.05 * errors["portable"]


def step_of(positions, dtype):
    from recurrent_gemma_hf.modeling_recurrent_gemma import Step

    return Step(None, None, (positions == 0)[..., None], None, None, None)


def test_a_reset_at_every_position():
    u, y, parameters, states, _ = make(1, 10, 1, 3)
    for t in range(10):
        reset = torch.zeros(1, 10, dtype=torch.bool)
        reset[0, t] = True
        inputs = u, y, parameters, states, {"reset_BT": reset}
        assert_near(results(recurrent_block, *inputs), exact(*inputs), 1e-6)


def test_nothing_but_the_inputs():
    u, y, parameters, *_ = make(2, 11, 1, 6)
    nothing = {"context_BCD": None, "h0_BD": None}
    assert_near(results(recurrent_block, u, y, parameters, nothing, {}), exact(u, y, parameters, nothing, {}), 1e-6)


def test_no_token_and_no_row():
    u, y, parameters, *_ = make(1, 1, 1, 2)
    with pytest.raises(ValueError, match=r"\(1, 0, 2\): pass at least one token"):
        recurrent_block(u[:, :0], y[:, :0], parameters)
    out, last = recurrent_block(u[:0], y[:0], parameters)
    (out.sum() + last.sum()).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in parameters)


def test_any_strides():
    u, y, parameters, states, flags = make(2, 9, 2, 5)
    full = torch.cat([states["context_BCD"], u], dim=1).detach()
    both = torch.cat([y, y], dim=2).detach()
    views = full[:, 3:], both[..., 10:], full[:, :3], states["h0_BD"].detach().t().contiguous().t()
    u, y, context, h0 = (view.requires_grad_() for view in views)
    flags = {name: flag[:1].expand_as(flag) for name, flag in flags.items()}
    inputs = u, y, parameters, {"context_BCD": context, "h0_BD": h0}, flags
    assert_near(results(recurrent_block, *inputs), exact(*inputs), 1e-6)
    channels_first = u.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    inputs = channels_first, y, parameters, inputs[3], {"reset_BT": flags["reset_BT"][:1]}
    assert_near(results(recurrent_block, *inputs), exact(*inputs), 1e-6)


def test_the_same_bits_every_time():
    inputs = make(2, 17, 1, 6, dtype=torch.bfloat16)
    first, second = (results(recurrent_block, *inputs) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_what_the_backward_keeps():
    """u, y and the state that enters each tile: nothing else grows with the length."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    u, y, parameters, *_ = make(1, 32, 1, 4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        recurrent_block(u, y, parameters)
    large = [tensor for tensor in kept if tensor.numel() >= 32 * 4]
    assert {id(tensor) for tensor in large} == {id(u), id(y)}
    assert sum(tensor.shape == (1, 4, 4) for tensor in kept) == 3  # states for each 8 steps, and two gate matrices


def test_operators_keep_their_promises():
    u, y, parameters, states, flags = make(1, 3, 1, 2, 2)
    prepared = module._kernel_parameters(parameters, u.dtype)
    cheap = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels.block, (u, y, *states.values(), *prepared, *flags.values()), test_utils=cheap)
    plain = [parameter.detach() for parameter in parameters]
    arguments = u.detach()[:, 0], y.detach()[:, 0], torch.randn(1, 2, 1), torch.randn(1, 2)
    torch.library.opcheck(kernels.decode, (*arguments, *plain, None, None, None), test_utils=cheap)
    conv_inputs = torch.cat([states["context_BCD"], u], dim=1), flags["conv_tap_mask_BTK"], prepared[0], prepared[1]
    torch.library.opcheck(kernels.conv, conv_inputs, test_utils=cheap)


@pytest.mark.parametrize("has_conv_tap_mask", [True, False])
@pytest.mark.parametrize("shape", [(2, 19, 1, 20, 4), (1, 1, 1, 3, 4), (1, 9, 1, 3, 1)], ids=str)
def test_the_convolution_by_itself(shape, has_conv_tap_mask):
    (B, T, H, d, K), (u, _, parameters, _, flags) = shape, make(*shape)
    full = torch.randn(B, K - 1 + T, H * d, requires_grad=True)
    conv_tap_mask = flags["conv_tap_mask_BTK"] if has_conv_tap_mask else None
    inputs = full, parameters.conv_weight_D1K, parameters.conv_bias_D
    weight = torch.randn(u.shape)
    out = causal_conv1d(*inputs, conv_tap_mask)
    gradients = torch.autograd.grad((out * weight).sum(), inputs)

    full, conv_weight, bias = doubles = [in_float64(tensor) for tensor in inputs]
    taps = torch.ones(B, T, K, dtype=torch.float64) if conv_tap_mask is None else conv_tap_mask.double()
    wanted = bias + sum(full[:, k : k + T] * taps[..., k, None] * conv_weight[:, 0, k] for k in range(K))
    torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(gradients, torch.autograd.grad((wanted * weight).sum(), doubles), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_the_convolution_of_any_strides_and_of_nothing():
    full, weight, bias = torch.randn(2, 9, 7), torch.randn(5, 1, 4), torch.randn(5)
    expected = causal_conv1d(full[..., :5].contiguous(), weight, bias)
    assert torch.equal(causal_conv1d(full[..., :5], weight, bias), expected)
    assert torch.equal(causal_conv1d(full.mT.contiguous().mT[..., :5], weight, bias), expected)
    nothing = full[:0, :, :5].requires_grad_()
    weight.requires_grad_()
    causal_conv1d(nothing, weight, bias).sum().backward()
    assert nothing.grad.shape == (0, 9, 5)
    assert torch.equal(weight.grad, torch.zeros(5, 1, 4))


@pytest.mark.parametrize("with_flags", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 2, 5, 4), (17, 1, 1, 6, 4), (2, 1, 1, 40, 2)], ids=str)
@torch.no_grad()
def test_a_step_is_a_block_of_one_token_in_place(shape, with_flags):
    u, y, parameters, states, flags = make(*shape)
    conv_state = states["context_BCD"].detach().clone().transpose(1, 2)  # (B, D, C) as the cache has it
    h = states["h0_BD"].detach().clone()
    options = flags if with_flags else {}
    expected, last = recurrent_block_reference(
        u.double(), y.double(), RecurrentBlockParameters(*map(in_float64, parameters)),
        **{name: state.double() for name, state in states.items()}, **options,
    )  # fmt: skip
    names = {"reset_BT": "reset_B", "is_padding_BT": "is_padding_B", "conv_tap_mask_BTK": "conv_tap_mask_BK"}
    addresses = conv_state.data_ptr(), h.data_ptr()
    out = recurrent_block_step(
        u[:, 0], y[:, 0], parameters, conv_state, h, **{names[name]: flag[:, 0] for name, flag in options.items()}
    )
    torch.testing.assert_close(out.double(), expected[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(h.double(), last, rtol=1e-6, atol=1e-6)
    shifted = torch.cat([states["context_BCD"], u], dim=1)[:, 1:].transpose(1, 2)
    held = flags["is_padding_BT"][..., None] if with_flags else torch.zeros(shape[0], 1, 1, dtype=torch.bool)
    assert torch.equal(conv_state, torch.where(held, states["context_BCD"].transpose(1, 2), shifted))
    assert (conv_state.data_ptr(), h.data_ptr()) == addresses


@pytest.mark.parametrize("value", [-80.0, -15.0, -6.0, -1.0, 0.0, 3.0, 20.5, 90.0])
@torch.no_grad()
def test_a_step_takes_softplus_as_exactly_as_torch(value):
    """With r = 1 and a state of 1 a step returns a: nothing but softplus(Lambda) matters."""
    parameters = RecurrentBlockParameters(
        torch.zeros(1, 1, 2), torch.zeros(1), torch.zeros(1, 1, 1), torch.full((1, 1), 90.0), torch.zeros(1, 1, 1),
        torch.zeros(1, 1), torch.tensor([value]),
    )  # fmt: skip
    h = torch.ones(1, 1)
    recurrent_block_step(torch.zeros(1, 1), torch.zeros(1, 1), parameters, torch.zeros(1, 1, 1), h)
    log_a = -8.0 * torch.nn.functional.softplus(torch.tensor(value, dtype=torch.float64)).item()
    rounding = 2e-7 * max(1.0, -log_a)
    torch.testing.assert_close(h.item(), math.exp(log_a), rtol=rounding, atol=1e-37)


# --- in the model -----------------------------------------------------------------------------------------------------


def test_the_model_with_kernels_equals_the_official_one():
    oracles = pytest.importorskip("oracles")
    config = tiny_config("wide_lru")
    model = build(config)
    tokens = torch.randint(config.vocab_size, (2, 17))
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
def model(tiny_config):
    config = tiny_config(num_hidden_layers=2, block_types=["recurrent", "attention"], lru_width=24)
    return RecurrentGemmaForCausalLM(config).eval()


def both(function):
    """The same by the portable code and by the kernels."""
    answers = []
    for backend in ("portable", "triton"):
        set_backend(backend)
        answers.append(function())
    return answers


@pytest.mark.parametrize("packed", [False, True])
def test_where_the_block_is_not_fused_the_convolution_is_a_kernel(model, monkeypatch, packed):
    """As on GPUs of Ampere, and with a cache that records: the modules one by one."""
    monkeypatch.setattr(modeling, "resolve_block_backend", lambda *_: "portable")
    ids, weight = torch.randint(1, 265, (2, 9)), torch.randn(2, 9, 265)
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None] if packed else None

    def run():
        model.zero_grad(set_to_none=True)
        logits = model(ids, position_ids=positions, use_cache=False).logits
        (logits * weight).sum().backward()
        return [logits.detach(), *(parameter.grad for parameter in model.parameters())]

    set_backend("portable")
    expected = run()
    monkeypatch.setattr(modeling.CausalConv1d, "compute", None)
    set_backend("triton")
    for actual, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    with torch.no_grad():  # a step of decoding: in torch
        conv, step = model.model.layers[0].temporal_block.conv_1d, torch.randn(2, 4, 24)
        with pytest.raises(TypeError, match="NoneType"):
            conv(step)


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


class TestChoice:
    def test_auto(self):
        arguments = torch.bfloat16, 256, "gelu_pytorch_tanh"
        assert resolve_block_backend("cpu", *arguments) == "portable"
        assert resolve_block_backend("mps", *arguments) == "portable"
        assert resolve_block_backend("cuda", *arguments) == "triton"
        assert resolve_block_backend("xpu", *arguments) == "triton"
        set_backend("portable")
        assert resolve_block_backend("cuda", *arguments) == "portable"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("cuda", torch.float64, 256, "gelu_pytorch_tanh"), r"does not take dtype torch\.float64: convert"),
            (("cuda", torch.bfloat16, 257, "gelu_pytorch_tanh"), r"at most 256 .* = 257: use more heads"),
            (("cuda", torch.bfloat16, 256, "silu"), r"built in, not hidden_activation='silu'"),
            (("mps", torch.bfloat16, 256, "gelu_pytorch_tanh"), r"does not run on mps: move"),
        ],
    )
    def test_what_kernels_cannot_do_is_refused_by_name_and_portable_by_itself(self, arguments, message):
        assert resolve_block_backend(*arguments) == "portable"
        set_backend("triton")
        with pytest.raises(ValueError, match=rf'backend "triton" .*{message}.*set_backend\("auto"\)'):
            resolve_block_backend(*arguments)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"unknown backend 'fast': choose one of \('triton', 'portable', 'auto'\)"):
            set_backend("fast")

    def test_a_model_says_no(self, model):
        set_backend("triton")
        with pytest.raises(ValueError, match=r"does not take dtype torch\.float64"):
            model.double()(torch.tensor([[1, 2]]))


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "portable"), ((8, 0), "portable"), ((9, 0), "triton")])
def test_auto_leaves_gpus_whose_registers_are_too_few(monkeypatch, capability: tuple[int, int], chosen: str):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    caches = module._suits, scan._triton_refusal
    for cache in caches:
        cache.cache_clear()
    try:
        asked = torch.device("cuda"), torch.bfloat16, 256, "gelu_pytorch_tanh"
        assert module.resolve_block_backend(*asked) == chosen
        if capability == (8, 0):
            module.set_backend("triton")
            assert module.resolve_block_backend(*asked) == "triton"
    finally:
        module.set_backend("auto")
        for cache in caches:
            cache.cache_clear()
