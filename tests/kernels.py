"""How tests run the Triton kernels: in its interpreter, with small programs, and memory full of NaN for results."""

import importlib.util

import pytest
import torch

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the kernels are written in Triton: install the `test` extra"
)


def poisoned(shape, dtype, device):
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def small_programs(monkeypatch):
    """Four channels and two steps at a time, and several segments of time: every border within a few steps. What a
    kernel does not write is NaN."""
    from recurrent_gemma_hf import causal_conv1d_triton, rg_lru_step_triton, rg_lru_triton, scan_triton, triton_tools

    for module in (scan_triton, rg_lru_triton, causal_conv1d_triton, rg_lru_step_triton, triton_tools):
        monkeypatch.setattr(module, "allocate", poisoned)
    for module in (scan_triton, rg_lru_triton, causal_conv1d_triton):
        monkeypatch.setattr(module, "CHANNELS", 4)
    for module in (scan_triton, rg_lru_triton, triton_tools):
        monkeypatch.setattr(module, "UNROLLED", 2)
    monkeypatch.setattr(causal_conv1d_triton, "STEPS", 4)
    monkeypatch.setattr(triton_tools, "WANTED_PROGRAMS", 9)
