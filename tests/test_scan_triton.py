"""The Triton kernels of the linear recurrence, in Triton's interpreter: against the loop over time in float64.

All results are written to memory full of NaN, so a kernel that leaves an element out cannot pass.
"""

import pytest
import torch

from recurrent_gemma_hf import scan as module
from recurrent_gemma_hf import scan_triton as kernels
from recurrent_gemma_hf.scan import (
    linear_recurrence,
    linear_recurrence_reference,
    linear_recurrence_triton,
    linear_recurrence_varlen,
    resolve_backend,
)
from recurrent_gemma_hf.scan_triton import Tile
from tests.test_scan import assert_near, in_float64, make_inputs, make_reset, results
from tests.triton_interpreter import fast_scan, poisoned  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    monkeypatch.setattr(kernels, "allocate", poisoned)


@pytest.fixture
def small_tiles(monkeypatch):
    """Four steps and channels at a time, and segments of one or a few tiles: every border within a few steps."""
    for name in ("SUMMARY_TILE", "FORWARD_TILE", "BACKWARD_TILE"):
        monkeypatch.setattr(kernels, name, Tile(4, 4, 1, 1))
    monkeypatch.setattr(kernels, "WANTED_PROGRAMS", 5)


SHAPES = [
    (1, 1, 1),
    (2, 2, 3),
    (1, 3, 4),
    (2, 4, 5),
    (1, 5, 9),
    (3, 13, 1),
    (2, 31, 6),
    (1, 32, 4),
    (1, 33, 4),
    (1, 97, 2),
]


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_tiles_equal_the_loop(shape, with_resets, small_tiles):
    inputs = make_inputs(shape, dtype=torch.float32)
    reset = make_reset(shape) if with_resets else None
    expected = results(linear_recurrence_reference, in_float64(inputs), reset_BT=reset)
    assert_near(results(linear_recurrence_triton, inputs, reset_BT=reset), expected, 1e-6)


@pytest.mark.parametrize("shape", [(1, 63, 70), (2, 97, 5), (1, 500, 65)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_tiles_of_the_gpu_equal_the_loop(shape, dtype):
    inputs = make_inputs(shape, low=0.8, dtype=dtype)
    reset = make_reset(shape, 0.02)
    assert kernels.segments(shape[0], shape[1], kernels.FORWARD_TILE.time)[0] > 1
    expected = results(linear_recurrence_reference, in_float64(inputs), reset_BT=reset)
    actual = results(linear_recurrence_triton, inputs, reset_BT=reset, output_dtype=torch.float32)
    assert_near(
        {name: actual[name] for name in ("h", "h_last")}, {name: expected[name] for name in ("h", "h_last")}, 1e-6
    )
    assert_near(actual, expected, torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6)


def test_one_segment_where_rows_and_channels_fill_the_gpu(monkeypatch):
    assert kernels.segments(blocks=320, T=8192, tile_time=32) == (1, 8192)  # 2B, batch of 8
    assert kernels.segments(blocks=40, T=8192, tile_time=32) == (7, 1184)  # 2B, batch of 1
    assert kernels.segments(blocks=1, T=8192, tile_time=32) == (32, 256)
    assert kernels.segments(blocks=1, T=33, tile_time=32) == (2, 32)
    monkeypatch.setattr(kernels, "WANTED_PROGRAMS", 1)
    inputs = make_inputs((2, 70, 5), dtype=torch.float32)
    expected = results(linear_recurrence_reference, in_float64(inputs))
    assert_near(results(linear_recurrence_triton, inputs), expected, 1e-6)


@pytest.mark.parametrize("T", [1, 2, 9, 12])
def test_a_reset_at_every_position(T, small_tiles):
    inputs = make_inputs((1, T, 3), dtype=torch.float32)
    for t in range(T):
        reset = torch.zeros(1, T, dtype=torch.bool)
        reset[0, t] = True
        actual = results(linear_recurrence_triton, inputs, reset_BT=reset)
        assert_near(actual, results(linear_recurrence_reference, in_float64(inputs), reset_BT=reset), 1e-6)
        assert torch.equal(actual["h"][:, t], inputs[0][:, t])
        assert actual["da"][:, t].count_nonzero() == 0


@pytest.mark.parametrize("T", [1, 30])
def test_no_initial_state_means_zeros(T, small_tiles):
    x, a, h0 = make_inputs((2, T, 3), dtype=torch.float32)
    actual = results(linear_recurrence_triton, (x, a))
    expected = results(linear_recurrence_triton, (x, a, torch.zeros_like(h0).requires_grad_()))
    del expected["dh0"]
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_the_same_bits_every_time(small_tiles):
    inputs = make_inputs((2, 50, 6), dtype=torch.bfloat16)
    first, second = (results(linear_recurrence_triton, inputs, reset_BT=make_reset((2, 50, 6))) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


LAYOUTS = {
    "time first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every other step": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "one row for all": lambda t: t[:1].expand_as(t),
    "one channel for all": lambda t: t[..., :1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout, small_tiles):
    x, a, h0 = (t.detach() for t in make_inputs((2, 23, 6), dtype=torch.float32))
    reset = make_reset((1, 23, 6)).expand(2, 23)
    inputs = tuple(t.requires_grad_() for t in (layout(x), layout(a), h0.t().contiguous().t()))
    assert not inputs[0].is_contiguous()
    expected = results(linear_recurrence_reference, in_float64(inputs), reset_BT=reset)
    assert_near(results(linear_recurrence_triton, inputs, reset_BT=reset), expected, 1e-6)
    h, h_last = linear_recurrence_triton(*inputs)
    gradient = torch.autograd.grad((h, h_last), inputs[0], (layout(x), h0))[0]  # gradients with strides of their own
    wanted = torch.autograd.grad(linear_recurrence_reference(*inputs), inputs[0], (layout(x), h0))[0]
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_a_product_that_leaves_float32_makes_no_nan(small_tiles):
    x, a, h0 = torch.zeros(1, 300, 2), torch.full((1, 300, 2), 2.0), torch.zeros(1, 2)
    x[:, -50:] = 1.0
    h, _ = linear_recurrence_triton(x, a, h0)
    expected, _ = linear_recurrence_reference(x.double(), a.double(), h0.double())
    torch.testing.assert_close(h.double(), expected, rtol=1e-6, atol=0.0)


def test_gradients_of_gradients(small_tiles):
    inputs, reset = make_inputs((1, 11, 2), dtype=torch.float32), make_reset((1, 11, 2))

    def second(function, inputs):
        h, h_last = function(*inputs, reset_BT=reset)
        first = torch.autograd.grad(h.square().sum() + h_last.pow(3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)

    for mine, wanted in zip(
        second(linear_recurrence_triton, inputs), second(linear_recurrence_reference, in_float64(inputs)), strict=True
    ):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("with_resets", [False, True])
def test_operators_keep_their_promises(with_resets, small_tiles):
    cheap = ("test_schema", "test_autograd_registration", "test_faketensor")  # the rest: test_one_graph below
    x, a, h0 = make_inputs((2, 7, 3), dtype=torch.float32)
    reset = make_reset((2, 7, 3)) if with_resets else None
    torch.library.opcheck(kernels.scan, (x, a, h0, reset, torch.float32), test_utils=cheap)
    torch.library.opcheck(kernels.scan, (x, a, None, reset, torch.bfloat16), test_utils=cheap)
    torch.library.opcheck(kernels.adjoint_scan, (x, a, h0, reset), test_utils=cheap)
    plain = [t.detach() for t in (x, h0, a, x, h0)]
    torch.library.opcheck(kernels.scan_backward, (*plain, reset, torch.bfloat16), test_utils=cheap)


def test_one_graph_for_every_length(small_tiles):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(linear_recurrence_triton, fullgraph=True, dynamic=True, backend=backend)
    for T in (5, 17, 29):
        inputs = make_inputs((2, T, 3), dtype=torch.float32)
        actual, expected = results(compiled, inputs), results(linear_recurrence_triton, inputs)
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name
    assert len(graphs) == 1


@pytest.mark.parametrize("lengths", [[5, 1, 12], [3, 0, 20, 0, 2]], ids=str)
def test_sequences_one_behind_the_other(lengths, small_tiles):
    from tests.test_scan_varlen import batch, one_by_one

    inputs = batch(lengths)
    expected, pool = one_by_one(*inputs)
    h = linear_recurrence_varlen(*inputs, backend="triton")
    torch.testing.assert_close(h.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inputs[2].double(), pool, rtol=1e-6, atol=1e-6)


class TestChoice:
    def test_auto_never_interprets(self):
        assert resolve_backend("auto", "cpu", torch.float32) == "chunked"
        assert resolve_backend("triton", "cpu", torch.float32) == "triton"

    @pytest.mark.parametrize("device", ["cuda", "xpu"])
    def test_auto_takes_it_on_a_gpu(self, device):
        assert resolve_backend("auto", device, torch.bfloat16) == "triton"
        assert resolve_backend("auto", device, torch.float64) == "chunked"

    @pytest.mark.parametrize("device", ["cpu", "mps"])
    def test_refused_where_it_cannot_run(self, device, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET")
        module._triton_refusal.cache_clear()
        x = torch.zeros(1, 2, 1)
        with pytest.raises(ValueError, match=rf"'triton' does not run on {device}: move the inputs to one of \('cuda'"):
            resolve_backend("triton", device, torch.float32)
        with pytest.raises(ValueError, match="'triton' does not run on cpu"):
            linear_recurrence(x, x, backend="triton")
        module._triton_refusal.cache_clear()

    def test_refused_without_the_package(self, monkeypatch):
        module._triton_refusal.cache_clear()
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="'triton' needs the triton package: pip install triton, or choose"):
            resolve_backend("triton", "cuda", torch.float32)
        assert resolve_backend("auto", "cuda", torch.float32) == "chunked"
        module._triton_refusal.cache_clear()

    def test_float64_is_refused(self):
        with pytest.raises(ValueError, match=r"'triton' does not take dtype torch.float64"):
            resolve_backend("triton", "cuda", torch.float64)


def test_more_rows_than_the_last_axes_of_a_grid_take():
    """A GPU's grid ends at 65,535 but along its first axis."""
    x = torch.empty(70_000, 1, 1)
    assert kernels._prepare(x, x, None, kernels.FORWARD_TILE, reverse=False).grid == (70_000, 1)
