"""The linear recurrence: every result and every gradient of the fast path against the loop over time in float64."""

import importlib.util
import logging
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from recurrent_gemma_hf import scan as module
from recurrent_gemma_hf import set_backend
from recurrent_gemma_hf.scan import (
    available_backends,
    linear_recurrence,
    linear_recurrence_chunked,
    linear_recurrence_reference,
    resolve_backend,
)

PORTABLE = ("chunked", "reference")  # the kernels have a file of their own: test_scan_triton.py

# B, T, D: one step, the shortest scans, primes, squares and their neighbours (chunk borders), and full chunks of 64.
SHAPES = [
    (1, 1, 1),
    (3, 1, 5),
    (2, 2, 3),
    (2, 3, 3),
    (1, 4, 2),
    (2, 5, 7),
    (3, 13, 1),
    (2, 24, 8),
    (2, 25, 8),
    (2, 26, 8),
    (1, 63, 500),
    (2, 97, 11),
    (2, 1000, 17),
    (1, 4096, 3),
    (1, 4097, 3),
    (1, 4500, 2),
]


def make_inputs(shape, *, low=0.0, high=1.0, dtype=torch.float64, seed=0):
    """x, a (uniform between low and high, one in seven exactly 0) and h0, all asking for gradients."""
    random = torch.Generator().manual_seed(seed)
    B, _, D = shape
    x = torch.randn(shape, generator=random, dtype=torch.float64)
    a = low + (high - low) * torch.rand(shape, generator=random, dtype=torch.float64)
    a[torch.rand(shape, generator=random) < 1 / 7] = 0.0
    h0 = torch.randn(B, D, generator=random, dtype=torch.float64)
    return tuple(t.to(dtype).requires_grad_() for t in (x, a, h0))


def make_reset(shape, probability=0.1, seed=1):
    return torch.rand(shape[:2], generator=torch.Generator().manual_seed(seed)) < probability


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


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_loop_in_float64(shape, with_resets):
    inputs = make_inputs(shape)
    reset = make_reset(shape) if with_resets else None
    expected = results(linear_recurrence_reference, inputs, reset_BT=reset)
    assert_near(results(linear_recurrence_chunked, inputs, reset_BT=reset), expected, 1e-13)


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_near_the_loop_in_float64(shape, with_resets):
    inputs = make_inputs(shape, dtype=torch.float32)
    reset = make_reset(shape) if with_resets else None
    expected = results(linear_recurrence_reference, in_float64(inputs), reset_BT=reset)
    for backend in ("auto", *PORTABLE):
        actual = results(linear_recurrence, inputs, reset_BT=reset, backend=backend)
        assert actual["h"].dtype == actual["h_last"].dtype == torch.float32
        assert_near(actual, expected, 1e-6)


@pytest.mark.parametrize(("low", "high"), [(0.99, 1.0), (-1.0, 1.0), (-2.0, 2.0)])
def test_wide_ranges_of_coefficients(low, high):
    shape = (2, 1000, 17)
    inputs = make_inputs(shape, low=low, high=high)
    expected = results(linear_recurrence_reference, inputs)
    assert_near(results(linear_recurrence_chunked, inputs), expected, 1e-13)
    single = tuple(t.detach().float().requires_grad_() for t in inputs)
    expected = results(linear_recurrence_reference, in_float64(single))
    assert_near(results(linear_recurrence_chunked, single), expected, 1e-5)


@pytest.mark.parametrize("value", [-2.0, -1.0, 0.0, 1e-30, 1.0, 2.0])
def test_constant_coefficients_leave_no_nan(value):
    """Products of 64 coefficients stay finite, and no state is lost where they underflow."""
    x, a, h0 = torch.zeros(1, 5000, 2), torch.full((1, 5000, 2), value), torch.zeros(1, 2)
    x[:, -100:] = 1.0
    h, h_last = linear_recurrence_chunked(x, a, h0)
    expected, expected_last = linear_recurrence_reference(x.double(), a.double(), h0.double())
    torch.testing.assert_close(h.double(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(h_last.double(), expected_last, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("T", [1, 2, 9, 12])
def test_a_reset_at_every_position(T):
    inputs = make_inputs((1, T, 3))
    for t in range(T):
        reset = torch.zeros(1, T, dtype=torch.bool)
        reset[0, t] = True
        actual = results(linear_recurrence_chunked, inputs, reset_BT=reset)
        assert_near(actual, results(linear_recurrence_reference, inputs, reset_BT=reset), 1e-14)
        assert torch.equal(actual["h"][:, t], inputs[0][:, t])
        assert actual["da"][:, t].count_nonzero() == 0
        # What follows a reset is the sequence that starts there.
        alone, _ = linear_recurrence_chunked(inputs[0][:, t:], inputs[1][:, t:], reset_BT=reset[:, t:])
        torch.testing.assert_close(actual["h"][:, t:], alone, rtol=1e-14, atol=1e-14)


def test_resets_everywhere_give_x():
    x, a, h0 = make_inputs((2, 30, 3))
    reset = torch.ones(2, 30, dtype=torch.bool)
    h, h_last = linear_recurrence_chunked(x, a, h0, reset_BT=reset)
    assert torch.equal(h, x)
    assert torch.equal(h_last, x[:, -1])


@pytest.mark.parametrize("T", [1, 2, 50])
@pytest.mark.parametrize("backend", PORTABLE)
def test_no_initial_state_means_zeros(backend, T):
    x, a, h0 = make_inputs((2, T, 3))
    actual = results(linear_recurrence, (x, a), backend=backend)
    expected = results(linear_recurrence, (x, a, torch.zeros_like(h0).requires_grad_()), backend=backend)
    del expected["dh0"]
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("T", [1, 2, 30])
@pytest.mark.parametrize("used", [0, 1], ids=["h", "h_last"])
def test_gradients_through_one_result_alone(used, T):
    inputs = make_inputs((2, T, 3))
    actual, expected = (
        torch.autograd.grad(function(*inputs)[used].square().sum(), inputs)
        for function in (linear_recurrence_chunked, linear_recurrence_reference)
    )
    for mine, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["x", "a", "h0"])
def test_gradient_of_one_input_alone(wanted):
    inputs = make_inputs((2, 30, 3))
    reset = make_reset((2, 30, 3))
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
    h, h_last = linear_recurrence_chunked(*alone, reset_BT=reset)
    expected, expected_last = linear_recurrence_reference(*inputs, reset_BT=reset)
    (mine,) = torch.autograd.grad(h.square().sum() + h_last.sum(), alone[wanted])
    (theirs,) = torch.autograd.grad(expected.square().sum() + expected_last.sum(), inputs[wanted])
    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("T", [1, 2, 3, 7])
def test_gradcheck(T, with_resets):
    inputs = make_inputs((2, T, 2), low=-1.5, high=1.5)
    reset = make_reset((2, T, 2), 0.3) if with_resets else None

    def function(*tensors):
        return linear_recurrence_chunked(*tensors, reset_BT=reset)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gradgradcheck_without_initial_state():
    x, a, _ = make_inputs((1, 5, 2))
    assert torch.autograd.gradgradcheck(linear_recurrence_chunked, (x, a))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_split_in_time_carries_the_state(data):
    T = data.draw(st.integers(1, 90), "T")
    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1)) if T > 1 else st.just(set()), "cuts"))
    shape = (data.draw(st.integers(1, 3), "B"), T, data.draw(st.integers(1, 4), "D"))
    inputs = make_inputs(shape, low=-1.2, high=1.2, seed=data.draw(st.integers(0, 1000), "seed"))
    reset = make_reset(shape, data.draw(st.sampled_from([0.0, 0.1, 0.5]), "resets"))

    def in_pieces(x, a, h0):
        pieces, state = [], h0
        for start, stop in zip([0, *cuts], [*cuts, T], strict=True):
            times = slice(start, stop)
            h, state = linear_recurrence(x[:, times], a[:, times], state, reset_BT=reset[:, times])
            pieces.append(h)
        return torch.cat(pieces, dim=1), state

    assert_near(results(in_pieces, inputs), results(linear_recurrence, inputs, reset_BT=reset), 1e-12)


def test_rows_and_channels_are_independent():
    x, a, h0 = make_inputs((3, 40, 5))
    reset = make_reset((3, 40, 5))
    h, h_last = linear_recurrence_chunked(x, a, h0, reset_BT=reset)
    for b in range(3):
        row, last = linear_recurrence_chunked(
            x[b : b + 1, :, 1:2], a[b : b + 1, :, 1:2], h0[b : b + 1, 1:2], reset_BT=reset[b : b + 1]
        )
        torch.testing.assert_close(row[0, :, 0], h[b, :, 1], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(last[0, 0], h_last[b, 1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("T", [1, 50])
def test_inputs_of_any_layout(T):
    x, a, h0 = make_inputs((2, T, 6))
    reset = make_reset((2, T, 6))

    def spread(t):
        """The same values in every second place of a larger tensor, the last two dimensions exchanged in memory."""
        larger = t.new_full((t.shape[0], *[2 * n for n in t.shape[:0:-1]]), float("nan")).transpose(1, -1)
        larger[(slice(None), *[slice(None, None, 2)] * (t.dim() - 1))] = t
        return larger[(slice(None), *[slice(None, None, 2)] * (t.dim() - 1))].detach().requires_grad_()

    strided = tuple(spread(t.detach()) for t in (x, a, h0))
    assert not any(t.is_contiguous() for t in strided)
    expected = results(linear_recurrence_reference, (x, a, h0), reset_BT=reset)
    every_other = torch.stack((reset, ~reset), dim=-1)[..., 0]
    assert_near(results(linear_recurrence_chunked, strided, reset_BT=every_other), expected, 1e-13)


def test_expanded_inputs():
    x, a, h0 = torch.randn(1, 50, 1), torch.rand(1, 1, 4), torch.randn(1, 4)
    expanded = (x.expand(3, 50, 4), a.expand(3, 50, 4), h0.expand(3, 4))
    h, h_last = linear_recurrence_chunked(*expanded)
    wanted, wanted_last = linear_recurrence_chunked(*[t.contiguous() for t in expanded])
    assert torch.equal(h, wanted)
    assert torch.equal(h_last, wanted_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 2, 500])
def test_half_precision_is_as_good_as_rounding_the_float32_loop(T, dtype):
    inputs = make_inputs((2, T, 64), dtype=dtype)
    reset = make_reset((2, T, 64))
    exact = results(linear_recurrence_reference, in_float64(inputs), reset_BT=reset)
    single = tuple(t.detach().float().requires_grad_() for t in inputs)
    loop = results(linear_recurrence_reference, single, reset_BT=reset)
    actual = results(linear_recurrence_chunked, inputs, reset_BT=reset)
    assert actual["h"].dtype == dtype
    assert actual["h_last"].dtype == torch.float32
    # The state is not rounded at all; h is rounded once.
    loop_h, loop_h_last = loop["h"].to(dtype).double(), loop["h_last"].double()
    assert (actual["h"].double() - exact["h"]).abs().max() <= 1.001 * (loop_h - exact["h"]).abs().max()
    assert (actual["h_last"].double() - exact["h_last"]).abs().max() <= 1e-6
    assert (loop_h_last - exact["h_last"]).abs().max() <= 1e-6


@pytest.mark.parametrize("T", [1, 2, 500])
def test_bfloat16_gradients_are_as_good_as_rounding_those_of_the_float32_loop(T):
    inputs = make_inputs((2, T, 64), dtype=torch.bfloat16)
    exact = results(linear_recurrence_reference, in_float64(inputs))
    single = tuple(t.detach().float().requires_grad_() for t in inputs)
    loop = results(linear_recurrence_reference, single)
    # With output_dtype float32 the incoming gradient is not rounded, so that one rounding at the end is all there is.
    actual = results(linear_recurrence_chunked, inputs, output_dtype=torch.float32)
    for name in ("dx", "da", "dh0"):
        error = (actual[name].double() - exact[name]).abs().max()
        assert error <= 1.001 * (loop[name].bfloat16().double() - exact[name]).abs().max(), name


@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize("T", [1, 20])
def test_dtypes_of_the_results(T, backend):
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    cases = [
        ((half, half, half), None, (half, single)),
        ((half, single, single), None, (half, single)),
        ((half, single, single), single, (single, single)),
        ((single, half, half), half, (half, single)),
        ((torch.float16, half, single), None, (torch.float16, single)),
        ((single, single, double), None, (single, double)),
        ((double, half, half), single, (single, double)),
        ((half, double, single), None, (half, double)),
    ]
    for dtypes, output_dtype, wanted in cases:
        inputs = [
            t.detach().to(dtype).requires_grad_() for t, dtype in zip(make_inputs((2, T, 3)), dtypes, strict=True)
        ]
        h, h_last = linear_recurrence(*inputs, output_dtype=output_dtype, backend=backend)
        assert (h.dtype, h_last.dtype) == wanted
        (h.double().sum() + h_last.double().sum()).backward()
        assert [t.grad.dtype for t in inputs] == list(dtypes)


def test_mixed_dtypes_accumulate_in_the_widest():
    x, a, h0 = (t.detach() for t in make_inputs((2, 40, 3)))
    h, h_last = linear_recurrence_chunked(x.float(), a.bfloat16(), h0, output_dtype=torch.float64)
    expected, expected_last = linear_recurrence_reference(x.float().double(), a.bfloat16().double(), h0)
    torch.testing.assert_close(h, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(h_last, expected_last, rtol=1e-14, atol=1e-14)


def test_autocast_changes_nothing():
    inputs = make_inputs((2, 40, 3), dtype=torch.float32)
    expected = results(linear_recurrence_chunked, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = results(linear_recurrence_chunked, inputs)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("T", [1, 2, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", PORTABLE)
def test_inputs_stay_as_they_are(backend, dtype, T):
    inputs = make_inputs((2, T, 3), dtype=dtype)
    reset = make_reset((2, T, 3), 0.3)
    before = [t.detach().clone() for t in (*inputs, reset)]
    actual = results(linear_recurrence, inputs, reset_BT=reset, backend=backend)
    for tensor, copy in zip((*inputs, reset), before, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == 0
    addresses = {t.untyped_storage().data_ptr() for t in (*inputs, reset)}
    assert actual["h"].untyped_storage().data_ptr() not in addresses
    assert actual["h_last"].untyped_storage().data_ptr() not in addresses


def test_the_same_bits_every_time():
    inputs = make_inputs((2, 300, 33), dtype=torch.float32)
    first, second = (results(linear_recurrence_chunked, inputs) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_large_results_do_not_share_memory():
    h, h_last = linear_recurrence_chunked(torch.randn(1, 20, 3), torch.rand(1, 20, 3))
    assert h.untyped_storage().data_ptr() != h_last.untyped_storage().data_ptr()
    assert h.is_contiguous()


def test_empty_batch():
    h, h_last = linear_recurrence_chunked(torch.randn(0, 20, 3), torch.rand(0, 20, 3))
    assert h.shape == (0, 20, 3)
    assert h_last.shape == (0, 3)


def test_what_the_backward_keeps_grows_linearly():
    """a and all states, the initial state and the resets: nothing else, and no T x T."""
    B, T, D = 2, 700, 5
    inputs = make_inputs((B, T, D), dtype=torch.float32)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_recurrence_chunked(*inputs, reset_BT=make_reset((B, T, D)))
        assert sum(kept) == 2 * B * T * D + B * D + B * T
        kept.clear()
        linear_recurrence_chunked(inputs[0], inputs[1].detach(), inputs[2])
        assert sum(kept) == B * T * D + B * D


@pytest.mark.parametrize("backwards", [False, True])
def test_few_operations_for_many_steps(backwards):
    class Operations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket in (torch.ops.aten.addcmul, torch.ops.aten.mul_)
            return func(*args, **(kwargs or {}))

    counts = []
    for T in (4096, 8192, 16384):
        x, a, h0, out = torch.randn(1, T, 1), torch.rand(1, T, 1), torch.zeros(1, 1), torch.empty(1, T, 1)
        with Operations() as operations:
            module._chunked_scan(x, a, None, h0, out, backwards=backwards)
        counts.append(operations.count)
    # Three for each of the 64 places in a chunk (less the first's two), one for each chunk that has a next one.
    assert counts == [3 * 64 - 2 + T // 64 - 1 for T in (4096, 8192, 16384)]


class TestCompile:
    @pytest.mark.parametrize("with_resets", [False, True])
    def test_one_graph_for_every_length(self, with_resets):
        torch._dynamo.reset()
        graphs = []

        def backend(graph, example_inputs):
            graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

        compiled = torch.compile(linear_recurrence, fullgraph=True, dynamic=True, backend=backend)
        for T in (50, 97, 5, 1000):  # none equal to B or D, which torch would take for the same symbol
            inputs = make_inputs((2, T, 3), dtype=torch.float32)
            options = {"reset_BT": make_reset((2, T, 3))} if with_resets else {}
            actual, expected = results(compiled, inputs, **options), results(linear_recurrence, inputs, **options)
            for name in expected:
                assert torch.equal(actual[name], expected[name]), name
        assert len(graphs) == 1

    @pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
    @pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's import
    def test_inductor(self):
        torch._dynamo.reset()
        compiled = torch.compile(linear_recurrence, fullgraph=True)
        for T in (1, 40):
            inputs = make_inputs((2, T, 3), dtype=torch.float32)
            assert_near(results(compiled, inputs), results(linear_recurrence_reference, in_float64(inputs)), 1e-6)

    # Torch 2.14's opcheck looks at the .grad of tensors that it computed itself, and no longer hides that from "error".
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    @pytest.mark.parametrize("with_resets", [False, True])
    def test_operators_keep_their_promises(self, with_resets):
        """torch's own check of schema, shapes without data, gradient registration and tracing, for both operators."""
        x, a, h0 = make_inputs((2, 7, 3))
        reset = make_reset((2, 7, 3)) if with_resets else None
        torch.library.opcheck(module._scan, (x, a, h0, reset))
        torch.library.opcheck(module._scan, (x, a, None, reset))
        torch.library.opcheck(module._adjoint_scan, (x, a, h0, reset))


def test_two_copies_of_the_file_live_side_by_side():
    """A checkpoint's remote code brings this file a second time, under another name."""
    spec = importlib.util.spec_from_file_location("some-checkpoint.scan", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy._NAMESPACE != module._NAMESPACE
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
    "reset of another shape": (
        {"reset_BT": torch.zeros(2, 4, 3, dtype=torch.bool)},
        r"reset_BT has shape \(2, 4, 3\).* must be \(2, 4\)",
    ),
    "reset of integers": (
        {"reset_BT": torch.zeros(2, 4, dtype=torch.int64)},
        r"reset_BT has dtype torch.int64: pass torch.bool",
    ),
    "x of integers": (
        {"x_BTD": torch.zeros(2, 4, 3, dtype=torch.int64)},
        r"x_BTD has dtype torch.int64: convert it to one of",
    ),
    "a of booleans": (
        {"a_BTD": torch.zeros(2, 4, 3, dtype=torch.bool)},
        r"a_BTD has dtype torch.bool: convert it to one of",
    ),
    "complex h0": ({"h0_BD": torch.zeros(2, 3, dtype=torch.complex64)}, r"h0_BD has dtype torch.complex64: convert it"),
    "output of integers": ({"output_dtype": torch.int32}, r"output_dtype is torch.int32: choose one of"),
    "a elsewhere": (
        {"a_BTD": torch.zeros(2, 4, 3, device="meta")},
        r"a_BTD is on meta but x_BTD is on cpu: move it with \.to\(x_BTD\.device\)",
    ),
    "h0 elsewhere": ({"h0_BD": torch.zeros(2, 3, device="meta")}, r"h0_BD is on meta but x_BTD is on cpu"),
    "reset elsewhere": (
        {"reset_BT": torch.zeros(2, 4, dtype=torch.bool, device="meta")},
        r"reset_BT is on meta but x_BTD is on cpu",
    ),
}


@pytest.mark.parametrize("function", [linear_recurrence_chunked, linear_recurrence_reference])
@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(change, message, function):
    arguments = {"x_BTD": torch.zeros(2, 4, 3), "a_BTD": torch.zeros(2, 4, 3), **change}
    with pytest.raises(ValueError, match=message):
        function(**arguments)
    with pytest.raises(ValueError):
        linear_recurrence(**arguments)


def portable():
    return {name: module._BACKENDS[name] for name in PORTABLE}


class TestBackends:
    def test_names(self):
        assert available_backends() == ("triton", *PORTABLE)

    @pytest.mark.parametrize("name", PORTABLE)
    def test_explicit_names_stand(self, name):
        assert resolve_backend(name, "cpu", torch.float32) == name
        assert resolve_backend(name, torch.device("cuda", 0), torch.bfloat16) == name

    @pytest.mark.parametrize("device", ["cpu", "mps"])
    def test_auto_is_the_fast_path(self, device):
        assert resolve_backend("auto", device, torch.float32) == "chunked"

    def test_unknown_name(self):
        message = r"unknown backend 'fast': choose one of \('triton', 'chunked', 'reference', 'auto'\)"
        with pytest.raises(ValueError, match=message):
            resolve_backend("fast", "cpu", torch.float32)
        with pytest.raises(ValueError, match=message):
            linear_recurrence(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), backend="fast")

    @pytest.mark.parametrize("name", ["auto", "chunked", "reference"])
    def test_dtype_that_no_backend_takes(self, name):
        with pytest.raises(ValueError, match=r"dtype torch\.int64.*: convert the inputs to one of"):
            resolve_backend(name, "cpu", torch.int64)

    def test_a_backend_for_one_device_is_chosen_there_and_refused_elsewhere(self, monkeypatch):
        kernel = module._Backend(linear_recurrence_reference, ("cuda",), (torch.bfloat16, torch.float32))
        monkeypatch.setattr(module, "_BACKENDS", {"kernel": kernel, **portable()})
        assert resolve_backend("auto", "cuda", torch.bfloat16) == "kernel"
        assert resolve_backend("kernel", "cuda", torch.float32) == "kernel"
        assert resolve_backend("auto", "cuda", torch.float64) == "chunked"
        assert resolve_backend("auto", "cpu", torch.float32) == "chunked"
        with pytest.raises(
            ValueError, match=r"'kernel' does not run on cpu: move the inputs to one of \('cuda',\), or"
        ):
            linear_recurrence(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), backend="kernel")
        with pytest.raises(
            ValueError, match=r"'kernel' does not take dtype torch.float64: convert the inputs to one of"
        ):
            resolve_backend("kernel", "cuda", torch.float64)

    def test_the_state_counts_for_the_choice(self, monkeypatch):
        """A float64 state makes the accumulation float64, which a kernel may not offer."""
        kernel = module._Backend(linear_recurrence_reference, ("cpu",), (torch.float32,))
        monkeypatch.setattr(module, "_BACKENDS", {"kernel": kernel, **portable()})
        x = torch.zeros(1, 2, 1)
        with pytest.raises(ValueError, match=r"does not take dtype torch\.float64"):
            linear_recurrence(x, x, torch.zeros(1, 1, dtype=torch.float64), backend="kernel")

    def test_auto_says_once_what_it_chose(self, caplog, monkeypatch):
        monkeypatch.setattr(module, "_announced", set())
        with caplog.at_level(logging.INFO, logger=module.__name__):
            for _ in range(3):
                linear_recurrence(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1))
        assert caplog.messages == ["linear_recurrence: backend 'chunked' for torch.float32 on cpu"]


@pytest.fixture
def asked_for():
    yield set_backend
    set_backend("auto")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="without triton there is one backend only")
def test_what_set_backend_asks_for_reaches_every_scan(asked_for):
    """Also those of context parallelism and vLLM, which name no backend."""
    assert module.resolve_backend("auto", "cuda", torch.float32) == "triton"
    asked_for("portable")
    assert module.resolve_backend("auto", "cuda", torch.float32) == "chunked"
    assert module.resolve_backend("triton", "cuda", torch.float32) == "triton", "asked for by name, here and now"
    asked_for("triton")
    x, a = torch.randn(1, 5, 3, dtype=torch.float64), torch.rand(1, 5, 3, dtype=torch.float64)
    refusal = r'backend "?.triton.* does not take dtype torch.float64.* call set_backend\("auto"\)'
    with pytest.raises(ValueError, match=refusal):
        linear_recurrence(x, a)
    pool, rows, ends = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0]), torch.tensor([0, 5])
    with pytest.raises(ValueError, match=refusal):
        module.linear_recurrence_varlen(x[0], a[0], pool, rows, ends, torch.tensor([False]))
