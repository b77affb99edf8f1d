"""Projections: every kernel they may take computes nn.Linear, and the switch that one of them turns is turned back."""

import shutil
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recurrent_gemma_hf import RecurrentGemmaForCausalLM, cpu_linear
from recurrent_gemma_hf.cpu_linear import FEW_ROWS, linear
from tests.helpers import assert_is_linear, byte_config

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")


def layer_and_input(dtype: torch.dtype, shape: tuple[int, ...], *, bias: bool = True):
    layer = nn.Linear(shape[-1], 136, bias=bias).to(dtype)
    return layer, torch.randn(shape).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(80,), (1, 80), (1, 1, 1600), (3, 1, 80), (2, 9, 80), (1, FEW_ROWS, 80), (3, 99, 80)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_the_product_in_float64(dtype: torch.dtype, shape: tuple[int, ...], bias: bool):
    layer, x = layer_and_input(dtype, shape, bias=bias)
    with torch.no_grad():
        assert_is_linear(layer, x, linear(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_gradients_and_autocast_it_is_nn_linear(dtype: torch.dtype):
    layer, x = layer_and_input(dtype, (1, 80))
    assert torch.equal(linear(layer, x), F.linear(x, layer.weight, layer.bias))
    linear(layer, x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = linear(layer, x.float())
        assert out.dtype == torch.bfloat16


def test_whoever_listens_to_a_layer_or_replaced_its_forward_is_heard():
    (layer, x), heard = layer_and_input(torch.float32, (1, 80)), []
    layer.register_forward_pre_hook(lambda *_: heard.append("before"))
    handle = layer.register_forward_hook(lambda *_: heard.append("after"))
    with torch.no_grad():
        linear(layer, x)
    assert heard == ["before", "after"]
    handle.remove()
    (layer, x), original = layer_and_input(torch.float32, (1, 80)), nn.Linear.forward
    layer.forward = lambda x: heard.append("forward") or original(layer, x)
    with torch.no_grad():
        linear(layer, x)
    assert heard[2:] == ["forward"]


def test_every_projection_is_what_quantizers_look_for():
    """bitsandbytes replaces what is nn.Linear to the letter, and passes over subclasses."""
    layers = RecurrentGemmaForCausalLM(byte_config()).model.named_modules()
    kinds = {name: type(module) for name, module in layers if isinstance(module, nn.Linear)}
    assert len(kinds) == 3 * 3 + 2 * 3 + 4
    assert set(kinds.values()) == {nn.Linear}


def test_onednn_is_on_again_after_an_error():
    layer, _ = layer_and_input(torch.bfloat16, (1, 80))
    with torch.no_grad(), pytest.raises(RuntimeError):
        linear(layer, torch.randn(1, 81).bfloat16())
    assert torch.backends.mkldnn.enabled


def test_onednn_stays_off_for_who_switched_it_off(monkeypatch):
    layer, x = layer_and_input(torch.bfloat16, (1, 80))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with torch.no_grad():
        linear(layer, x)
    assert not torch.backends.mkldnn.enabled


def test_threads_share_the_switch():
    """One thread enters while another is inside, and leaves last."""
    entered, leave = threading.Event(), threading.Event()
    switch = cpu_linear._OneDnnOff()

    def other() -> None:
        with switch:
            entered.set()
            assert leave.wait(30)

    thread = threading.Thread(target=other)
    with switch:
        thread.start()
        assert entered.wait(30)
    inside = torch.backends.mkldnn.enabled
    leave.set()
    thread.join()
    assert not inside
    assert torch.backends.mkldnn.enabled


@needs_compiler
@pytest.mark.parametrize(("inputs", "bias"), [(80, True), (81, False), (4099, True), (7680, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_by_inductor(fresh_compiler, dtype: torch.dtype, inputs: int, bias: bool):
    """Which has no code for oneDNN's product of a weight that may change. Two values of bfloat16 are read as one word,
    where the row has an even number of them; a long sum is cut where its length allows it; the row has gaps."""
    layer, x = layer_and_input(dtype, (1, 1, inputs), bias=bias)
    x = x.repeat_interleave(2, -1)[..., ::2]
    with torch.no_grad():
        assert_is_linear(layer, x, torch.compile(linear, fullgraph=True)(layer, x))


@needs_compiler
def test_compiled_with_a_weight_that_stands_by_columns(fresh_compiler):
    layer, x = layer_and_input(torch.bfloat16, (1, 1, 80))
    layer.weight = nn.Parameter(layer.weight.t().contiguous().t())
    with torch.no_grad():
        assert_is_linear(layer, x, torch.compile(linear, fullgraph=True)(layer, x))


def test_exported_it_is_a_linear_layer():
    """Where those who quantize an exported program look for it."""

    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.x = layer_and_input(torch.float32, (1, 80))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(self.layer, x)

    module = Calling()
    with torch.no_grad():
        program = torch.export.export(module, (module.x,))
    assert torch.ops.aten.linear.default in [node.target for node in program.graph.nodes]
