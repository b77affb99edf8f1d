"""The linear recurrence: every result and every gradient, by both implementations, against the loop in float64.

The kernels run in Triton's interpreter, with few channels and steps per program, and write to memory full of NaN.
"""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from recurrent_gemma_hf import linear_recurrence
from recurrent_gemma_hf import scan as module
from recurrent_gemma_hf.scan import linear_recurrence_reference
from tests.helpers import FUZZ_ROUNDS, load_file
from tests.kernels import needs_triton

DTYPES = {"portable": (torch.float64, torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16)}


# B, T, D: one step, the shortest scans, primes, squares and their neighbours (chunk borders), and full chunks of 64.
SHAPES = [
    (1, 1, 1), (3, 1, 5), (2, 2, 3), (2, 3, 3), (1, 4, 2), (2, 5, 7), (3, 13, 1), (2, 24, 8), (2, 25, 8), (2, 26, 8),
    (1, 63, 9), (2, 97, 11),
]  # fmt: skip
LONG = [(2, 1000, 17), (1, 4096, 3), (1, 4097, 3), (1, 4500, 2)]


def make_inputs(shape, *, low=0.0, high=1.0, dtype=torch.float32, seed=0):
    """x, a (uniform between low and high, one in seven exactly 0) and h0, all asking for gradients."""
    random = torch.Generator().manual_seed(seed)
    B, _, D = shape
    x = torch.randn(shape, generator=random, dtype=torch.float64)
    a = low + (high - low) * torch.rand(shape, generator=random, dtype=torch.float64)
    a[torch.rand(shape, generator=random) < 1 / 7] = 0.0
    h0 = torch.randn(B, D, generator=random, dtype=torch.float64)
    return tuple(t.to(dtype).requires_grad_() for t in (x, a, h0))


def results(function, inputs, **options):
    """Both results and the gradients of all inputs through both results, by name."""
    h, h_last = function(*inputs, **options)
    random = torch.Generator().manual_seed(2)
    weights = [torch.randn(t.shape, generator=random, dtype=torch.float64) for t in (h, h_last)]
    gradients = torch.autograd.grad((h.double() * weights[0]).sum() + (h_last.double() * weights[1]).sum(), inputs)
    for gradient, tensor in zip(gradients, inputs, strict=True):
        assert gradient.dtype == tensor.dtype
    return dict(zip(("h", "h_last", "dx", "da", "dh0"), (h, h_last, *gradients), strict=False))


def in_float64(inputs):
    return tuple(t.detach().double().requires_grad_() for t in inputs)


def assert_near(actual, expected, tolerance):
    """Each result within `tolerance` of the largest value of what is expected."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        error = (actual[name].detach().double() - wanted.detach()).abs().max().item()
        assert error <= tolerance * max(1.0, wanted.detach().abs().max().item()), f"{name}: error {error}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_loop_in_float64(shape, backend):
    for dtype in DTYPES[backend]:
        inputs = make_inputs(shape, dtype=dtype)
        actual, expected = results(linear_recurrence, inputs), results(linear_recurrence_reference, in_float64(inputs))
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 3 * torch.finfo(dtype).eps)
        assert actual["h"].dtype == dtype
        assert actual["h_last"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_near(actual, expected, tolerance)
        if dtype == torch.bfloat16:  # the state itself is not rounded
            assert_near({"h_last": actual["h_last"]}, {"h_last": expected["h_last"]}, 1e-6)


@pytest.mark.parametrize("shape", LONG, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_long_sequences_in_plain_torch(shape, dtype):
    inputs = make_inputs(shape, dtype=dtype)
    expected = results(linear_recurrence_reference, in_float64(inputs))
    assert_near(results(linear_recurrence, inputs), expected, 1e-13 if dtype == torch.float64 else 1e-6)


@needs_triton
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("wanted", [1, 3, 5, 400])
def test_any_number_of_segments(wanted, monkeypatch, backend):
    from recurrent_gemma_hf import triton_tools

    monkeypatch.setattr(triton_tools, "WANTED_PROGRAMS", wanted)
    inputs = make_inputs((1, 29, 5), low=0.8)
    assert_near(results(linear_recurrence, inputs), results(linear_recurrence_reference, in_float64(inputs)), 1e-6)


@needs_triton
def test_more_rows_than_the_last_axes_of_a_grid_take(monkeypatch):
    """A GPU's grid ends at 65,535 but along its first axis."""
    from recurrent_gemma_hf import scan_triton

    class Kernel:
        def __getitem__(self, grid):
            assert grid == (70_000, 1)
            return lambda *arguments, **constants: None

    monkeypatch.setattr(scan_triton, "scan_kernel", Kernel())
    scan_triton.scan(torch.empty(70_000, 2, 1), torch.empty(70_000, 2, 1), None)


@pytest.mark.parametrize(("low", "high"), [(0.99, 1.0), (-1.0, 1.0), (-2.0, 2.0)])
def test_wide_ranges_of_coefficients(low, high):
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        inputs = make_inputs((2, 1000, 17), low=low, high=high, dtype=dtype)
        expected = results(linear_recurrence_reference, in_float64(inputs))
        assert_near(results(linear_recurrence, inputs), expected, tolerance)


@pytest.mark.parametrize("value", [-2.0, -1.0, 0.0, 1e-30, 1.0, 2.0])
def test_constant_coefficients_leave_no_nan(value, backend):
    """Products of coefficients stay finite, and no state is lost where they underflow."""
    T = 300 if backend == "triton" else 5000
    x, a, h0 = torch.zeros(1, T, 2), torch.full((1, T, 2), value), torch.zeros(1, 2)
    x[:, -50:] = 1.0
    h, h_last = linear_recurrence(x, a, h0)
    expected, expected_last = linear_recurrence_reference(x.double(), a.double(), h0.double())
    torch.testing.assert_close(h.double(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(h_last.double(), expected_last, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("T", [1, 2, 12])
def test_a_coefficient_of_0_forgets_the_past(T, backend):
    x, a, h0 = make_inputs((1, T, 3))
    for t in range(T):
        cut = a.detach().clone()
        cut[:, t] = 0.0
        cut.requires_grad_()
        actual = results(linear_recurrence, (x, cut, h0))
        assert torch.equal(actual["h"][:, t], x[:, t])
        alone, _ = linear_recurrence(x[:, t:], cut[:, t:])
        torch.testing.assert_close(actual["h"][:, t:], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("T", [1, 2, 50])
def test_no_initial_state_means_zeros(T, backend):
    x, a, h0 = make_inputs((2, T, 3))
    actual = results(linear_recurrence, (x, a))
    expected = results(linear_recurrence, (x, a, torch.zeros_like(h0).requires_grad_()))
    del expected["dh0"]
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("T", [1, 2, 30])
@pytest.mark.parametrize("used", [0, 1], ids=["h", "h_last"])
def test_gradients_through_one_result_alone(used, T, backend):
    inputs = make_inputs((2, T, 3))
    actual, expected = (
        torch.autograd.grad(function(*inputs)[used].square().sum(), inputs)
        for function in (linear_recurrence, linear_recurrence_reference)
    )
    for mine, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["x", "a", "h0"])
def test_gradient_of_one_input_alone(wanted, backend):
    inputs = make_inputs((2, 30, 3))
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
    h, h_last = linear_recurrence(*alone)
    expected, expected_last = linear_recurrence_reference(*inputs)
    (mine,) = torch.autograd.grad(h.square().sum() + h_last.sum(), alone[wanted])
    (theirs,) = torch.autograd.grad(expected.square().sum() + expected_last.sum(), inputs[wanted])
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("T", [1, 2, 3, 7])
def test_gradcheck(T, has_state):
    inputs = make_inputs((2, T, 2), low=-1.5, high=1.5, dtype=torch.float64)[: 3 if has_state else 2]
    assert torch.autograd.gradcheck(linear_recurrence, inputs)
    assert torch.autograd.gradgradcheck(linear_recurrence, inputs)


@needs_triton
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_gradients_of_gradients_with_kernels(backend):
    inputs = make_inputs((1, 11, 2))

    def second(function, inputs):
        h, h_last = function(*inputs)
        first = torch.autograd.grad(h.square().sum() + h_last.pow(3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)

    expected = second(linear_recurrence_reference, in_float64(inputs))
    for mine, wanted in zip(second(linear_recurrence, inputs), expected, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@settings(deadline=None, max_examples=60 * FUZZ_ROUNDS)
@given(st.data())
def test_any_split_in_time_carries_the_state(data):
    T = data.draw(st.integers(1, 90), "T")
    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1)) if T > 1 else st.just(set()), "cuts"))
    shape = (data.draw(st.integers(1, 3), "B"), T, data.draw(st.integers(1, 4), "D"))
    seed = data.draw(st.integers(0, 1000), "seed")
    inputs = make_inputs(shape, low=-1.2, high=1.2, dtype=torch.float64, seed=seed)

    def in_pieces(x, a, h0):
        pieces, state = [], h0
        for start, stop in zip([0, *cuts], [*cuts, T], strict=True):
            h, state = linear_recurrence(x[:, start:stop], a[:, start:stop], state)
            pieces.append(h)
        return torch.cat(pieces, dim=1), state

    assert_near(results(in_pieces, inputs), results(linear_recurrence, inputs), 1e-12)


LAYOUTS = {
    "time first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every other step": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "every other channel": lambda t: t.repeat_interleave(2, 2)[..., ::2],
    "one row for all": lambda t: t[:1].expand_as(t),
    "one channel for all": lambda t: t[..., :1].expand_as(t),
}


@pytest.mark.parametrize("T", [1, 23])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout, T, backend):
    x, a, h0 = (t.detach() for t in make_inputs((2, T, 6)))
    inputs = tuple(t.requires_grad_() for t in (layout(x), layout(a), h0.t().contiguous().t()))
    assert_near(results(linear_recurrence, inputs), results(linear_recurrence_reference, in_float64(inputs)), 1e-6)
    h, h_last = linear_recurrence(*inputs)
    gradient = torch.autograd.grad((h, h_last), inputs[0], (layout(x), h0))[0]  # gradients with strides of their own
    wanted = torch.autograd.grad(linear_recurrence_reference(*inputs), inputs[0], (layout(x), h0))[0]
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 2, 500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_rounding_the_float32_loop(T, dtype):
    inputs = make_inputs((2, T, 64), dtype=dtype)
    exact = results(linear_recurrence_reference, in_float64(inputs))
    single = tuple(t.detach().float().requires_grad_() for t in inputs)
    loop = results(linear_recurrence_reference, single)
    actual = results(linear_recurrence, inputs)
    error = (actual["h"].double() - exact["h"]).abs().max()
    assert error <= 1.001 * (loop["h"].to(dtype).double() - exact["h"]).abs().max()
    assert (actual["h_last"].double() - exact["h_last"]).abs().max() <= 1e-6


@pytest.mark.parametrize("T", [1, 20])
def test_dtypes_of_the_results(T):
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    cases = [
        ((half, half, half), (half, single)),
        ((half, single, single), (half, single)),
        ((torch.float16, half, single), (torch.float16, single)),
        ((single, single, double), (single, double)),
        ((double, half, half), (double, double)),
        ((half, double, single), (half, double)),
    ]
    for dtypes, wanted in cases:
        inputs = [
            t.detach().to(dtype).requires_grad_() for t, dtype in zip(make_inputs((2, T, 3)), dtypes, strict=True)
        ]
        h, h_last = linear_recurrence(*inputs)
        assert (h.dtype, h_last.dtype) == wanted
        expected = linear_recurrence_reference(*(t.detach().double() for t in inputs))
        torch.testing.assert_close(h_last.double(), expected[1], rtol=1e-6, atol=1e-6)
        (h.double().sum() + h_last.double().sum()).backward()
        assert [t.grad.dtype for t in inputs] == list(dtypes)


def test_autocast_changes_nothing():
    inputs = make_inputs((2, 40, 3))
    expected = results(linear_recurrence, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = results(linear_recurrence, inputs)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("T", [1, 2, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_stay_as_they_are(dtype, T, backend):
    inputs = make_inputs((2, T, 3), dtype=dtype)
    before = [t.detach().clone() for t in inputs]
    actual = results(linear_recurrence, inputs)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == 0
    addresses = {t.untyped_storage().data_ptr() for t in inputs}
    assert actual["h"].untyped_storage().data_ptr() not in addresses
    assert actual["h_last"].untyped_storage().data_ptr() not in addresses


def test_the_same_bits_every_time(backend):
    inputs = make_inputs((2, 40, 9))
    first, second = (results(linear_recurrence, inputs) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_large_results_do_not_share_memory(backend):
    h, h_last = linear_recurrence(torch.randn(1, 20, 3), torch.rand(1, 20, 3))
    assert h.untyped_storage().data_ptr() != h_last.untyped_storage().data_ptr()
    assert h.is_contiguous()


def test_empty_batch(backend):
    h, h_last = linear_recurrence(torch.randn(0, 20, 3), torch.rand(0, 20, 3))
    assert h.shape == (0, 20, 3)
    assert h_last.shape == (0, 3)


def test_what_the_backward_keeps_grows_linearly(backend):
    """x, a, all states and the initial one: nothing else, and no T x T."""
    B, T, D = 2, 100, 5
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_recurrence(*make_inputs((B, T, D)))
    assert sum(kept) == 3 * B * T * D + B * D


@pytest.mark.parametrize("backwards", [False, True])
def test_few_operations_for_many_steps(backwards):
    """Plain torch goes through time in chunks: a loop over time would launch an operation or more for every step."""

    class Operations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += not func.is_view
            return func(*args, **(kwargs or {}))

    x, a, h0, out = torch.randn(1, 16_384, 1), torch.rand(1, 16_384, 1), torch.zeros(1, 1), torch.empty(1, 16_384, 1)
    with Operations() as operations:
        module._chunked_scan(x, a, h0, out, backwards=backwards)
    assert operations.count < 16_384 / 16


def test_one_graph_for_every_length(backend):
    torch._dynamo.reset()
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(linear_recurrence, fullgraph=True, dynamic=True, backend=compiler)
    for T in (50, 97, 5):  # none equal to B or D, which torch would take for the same symbol
        inputs = make_inputs((2, T, 3))
        actual, expected = results(compiled, inputs), results(linear_recurrence, inputs)
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name
    assert len(graphs) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(linear_recurrence, fullgraph=True)
    for T in (1, 40):
        inputs = make_inputs((2, T, 3))
        assert_near(results(compiled, inputs), results(linear_recurrence_reference, in_float64(inputs)), 1e-6)


# Torch 2.14's opcheck looks at the .grad of tensors that it computed itself, and no longer hides that from "error".
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_operators_keep_their_promises(backend):
    """torch's own check of schema, shapes without data, gradient registration and tracing."""
    x, a, h0 = make_inputs((2, 7, 3))
    # Interpreted kernels cannot be traced; test_one_graph_for_every_length compiles them.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    options = {} if backend == "portable" else {"test_utils": checks}
    for state in (h0, None):
        torch.library.opcheck(module._scan, (x, a, state, backend == "triton"), **options)
        state = None if state is None else state.detach()
        plain = (x.detach(), h0.detach(), a.detach(), x.detach(), state, backend == "triton")
        torch.library.opcheck(module._scan_backward, plain, test_utils=checks)


def test_two_copies_of_the_file_live_side_by_side():
    """A checkpoint's remote code brings this file a second time, under another name."""
    copy = load_file(Path(module.__file__), "recurrent_gemma_hf.some-checkpoint")
    inputs = make_inputs((2, 20, 3))
    first, second = (results(function, inputs) for function in (copy.linear_recurrence, linear_recurrence))
    for name in first:
        assert torch.equal(first[name], second[name]), name


BAD_INPUTS = {
    "x of two dimensions": ({"x_BTD": torch.zeros(4, 3)}, r"x_BTD has shape \(4, 3\): pass three dimensions"),
    "no time step": (
        {"x_BTD": torch.zeros(2, 0, 3), "a_BTD": torch.zeros(2, 0, 3)},
        r"x_BTD has shape \(2, 0, 3\): pass at least one time step",
    ),
    "a of another length": ({"a_BTD": torch.zeros(2, 5, 3)}, r"a_BTD has shape \(2, 5, 3\).* must be \(2, 4, 3\)"),
    "a that would broadcast": ({"a_BTD": torch.zeros(2, 4, 1)}, r"a_BTD has shape \(2, 4, 1\).* must be \(2, 4, 3\)"),
    "h0 with time": ({"h0_BD": torch.zeros(2, 1, 3)}, r"h0_BD has shape \(2, 1, 3\).* must be \(2, 3\)"),
    "h0 of another batch": ({"h0_BD": torch.zeros(1, 3)}, r"h0_BD has shape \(1, 3\).* must be \(2, 3\)"),
    "x of integers": (
        {"x_BTD": torch.zeros(2, 4, 3, dtype=torch.int64)},
        r"x_BTD has dtype torch.int64: convert it to one of",
    ),
    "a of booleans": (
        {"a_BTD": torch.zeros(2, 4, 3, dtype=torch.bool)},
        r"a_BTD has dtype torch.bool: convert it to one of",
    ),
    "complex h0": ({"h0_BD": torch.zeros(2, 3, dtype=torch.complex64)}, r"h0_BD has dtype torch.complex64: convert it"),
    "a elsewhere": (
        {"a_BTD": torch.zeros(2, 4, 3, device="meta")},
        r"a_BTD is on meta but x_BTD is on cpu: move it with \.to\(x_BTD\.device\)",
    ),
    "h0 elsewhere": ({"h0_BD": torch.zeros(2, 3, device="meta")}, r"h0_BD is on meta but x_BTD is on cpu"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(change, message, backend):
    arguments = {"x_BTD": torch.zeros(2, 4, 3), "a_BTD": torch.zeros(2, 4, 3), **change}
    with pytest.raises(ValueError, match=message):
        linear_recurrence(**arguments)
