"""The operators that touch a request's state, against a loop over each sequence."""

from types import SimpleNamespace

import pytest
import torch

from recurrent_gemma_hf import vllm_model
from recurrent_gemma_hf.vllm_model import conv1d_decode, conv1d_varlen

D, ROWS = 6, 9


@pytest.fixture(params=[1, 2, 4], ids=lambda taps: f"{taps} taps")
def conv(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight (K, D), bias (D,), pool (ROWS, K - 1 or 1, D)."""
    torch.manual_seed(request.param)
    taps = request.param
    return torch.randn(taps, D), torch.randn(D), torch.randn(ROWS, max(taps - 1, 1), D)


def by_hand(x_TD: torch.Tensor, weight_KD: torch.Tensor, bias_D: torch.Tensor, past_KD: torch.Tensor):
    """out_t = bias + sum over k of weight_k * x_{t - (K - 1) + k}, and the last K - 1 inputs."""
    context = len(weight_KD) - 1
    full = torch.cat([past_KD[:context], x_TD])
    out = torch.stack([(full[t : t + context + 1] * weight_KD).sum(0) + bias_D for t in range(len(x_TD))])
    return out, full[len(full) - context :]


def test_varlen_convolution(conv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
    """Sequences shorter than the context, with and without a past; other rows of the pool stay as they are."""
    weight, bias, pool = conv
    context = len(weight) - 1
    lengths, rows = [1, 5, 2, 3, 1], torch.tensor([4, 0, 7, 2, 8])
    has_state = torch.tensor([True, False, True, True, False])
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    x = torch.randn(sum(lengths), D)
    expected_pool, expected = pool.clone(), []
    for i, sequence in enumerate(x.split(lengths)):
        past = pool[rows[i]] if has_state[i] else torch.zeros_like(pool[0])
        out, last = by_hand(sequence, weight, bias, past)
        expected.append(out)
        expected_pool[rows[i], :context] = last
    found = conv1d_varlen(x, weight, bias, pool, rows, cu_seqlens, has_state)
    torch.testing.assert_close(found, torch.cat(expected))
    torch.testing.assert_close(pool, expected_pool)


def test_one_more_token_of_each(conv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
    weight, bias, pool = conv
    context = len(weight) - 1
    rows, x = torch.tensor([3, 1, 6]), torch.randn(3, D)
    expected_pool, expected = pool.clone(), []
    for i, row in enumerate(rows):
        out, last = by_hand(x[i : i + 1], weight, bias, pool[row])
        expected.append(out)
        expected_pool[row, :context] = last
    torch.testing.assert_close(conv1d_decode(x, weight, bias, pool, rows), torch.cat(expected))
    torch.testing.assert_close(pool, expected_pool)


def test_a_new_request_reads_nothing_of_its_row(monkeypatch: pytest.MonkeyPatch):
    """Not even with the coefficient 0 of its first token: 0 * NaN is NaN."""
    pools = SimpleNamespace(
        decodes=0, prompt_tokens=3, tokens=3, state_PD=torch.full((ROWS, D), torch.nan), rows=torch.tensor([4]),
        cu_seqlens=torch.tensor([0, 3], dtype=torch.int32), has_state=torch.tensor([False]),
    )  # fmt: skip
    monkeypatch.setattr(vllm_model, "_pools", lambda layer_name: (None, pools))
    x, a = torch.randn(3, D), torch.rand(3, D)
    a[0] = 0
    out = torch.empty(3, D)
    vllm_model._rg_lru(x, a, out, "any")
    expected = [x[0]]
    for t in (1, 2):
        expected.append(a[t] * expected[-1] + x[t])
    torch.testing.assert_close(out, torch.stack(expected))
    torch.testing.assert_close(pools.state_PD[4], expected[-1])
