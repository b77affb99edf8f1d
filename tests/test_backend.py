"""The choice between the kernels and plain torch."""

import pytest
import torch

from recurrent_gemma_hf import backend as module
from recurrent_gemma_hf import linear_recurrence, set_backend
from recurrent_gemma_hf.backend import get_backend, use_triton
from recurrent_gemma_hf.scan import linear_recurrence_varlen
from tests.kernels import needs_triton

BF16 = torch.bfloat16
CUDA, XPU, MPS, CPU = map(torch.device, ("cuda", "xpu", "mps", "cpu"))


@pytest.fixture(autouse=True)
def leave_the_choice_as_it_was():
    module._triton_refusal.cache_clear()
    yield
    module._triton_refusal.cache_clear()
    set_backend("auto")


@needs_triton
def test_auto_takes_kernels_on_gpus_alone():
    assert use_triton(CUDA, BF16)
    assert use_triton(XPU, torch.float32)
    assert not use_triton(CPU, BF16), "the interpreter is for tests, by name"
    assert not use_triton(MPS, BF16)
    assert not use_triton(CUDA, torch.float64)


@needs_triton
def test_what_is_asked_for_by_name():
    set_backend("portable")
    assert get_backend() == "portable"
    assert not use_triton(CUDA, BF16)
    set_backend("triton")
    assert use_triton(CPU, BF16)
    with pytest.raises(
        ValueError, match=r'"triton" does not take dtype torch.float64: convert .*set_backend\("auto"\)'
    ):
        use_triton(CUDA, torch.float64)


@needs_triton
@pytest.mark.parametrize("device", [CPU, MPS])
def test_refused_where_it_cannot_run(device, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    set_backend("triton")
    with pytest.raises(
        ValueError, match=rf"does not run on {device.type}: move the inputs to one of \('cuda', 'xpu'\)"
    ):
        use_triton(device, BF16)


def test_refused_without_the_package(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert not use_triton(CUDA, BF16)
    set_backend("triton")
    with pytest.raises(ValueError, match="needs the triton package: pip install triton, or call"):
        use_triton(CUDA, BF16)


@needs_triton
@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_old_gpus_take_plain_torch(monkeypatch, capability, runs):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert use_triton(CUDA, BF16) is runs


def test_unknown_name():
    with pytest.raises(ValueError, match=r"unknown backend 'fast': choose one of \('triton', 'portable', 'auto'\)"):
        set_backend("fast")


@needs_triton
def test_the_choice_reaches_every_scan():
    """Also those of context parallelism and vLLM."""
    set_backend("triton")
    x, a = torch.randn(1, 5, 3, dtype=torch.float64), torch.rand(1, 5, 3, dtype=torch.float64)
    refusal = r'"triton" does not take dtype torch.float64.* call set_backend\("auto"\)'
    with pytest.raises(ValueError, match=refusal):
        linear_recurrence(x, a)
    with pytest.raises(ValueError, match=refusal):  # the state counts
        linear_recurrence(x.float(), a.float(), torch.zeros(1, 3, dtype=torch.float64))
    pool, rows, ends = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0]), torch.tensor([0, 5])
    with pytest.raises(ValueError, match=refusal):
        linear_recurrence_varlen(x[0], a[0], pool, rows, ends, torch.tensor([False]))
