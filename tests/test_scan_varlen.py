"""Sequences one behind the other, states in a pool: each must be the same as the sequence alone."""

import pytest
import torch

from recurrent_gemma_hf.scan import linear_recurrence_reference, linear_recurrence_varlen

LENGTHS = [[1], [5, 1, 12], [1, 1, 1, 1], [3, 0, 70, 0, 0, 2], [0, 4], [0, 130, 1, 0]]


def batch(lengths, D=5, padding=0, dtype=torch.float32, pool=11, seed=0):
    """x, a, the pool, rows, cu_seqlens, has_initial_state; empty sequences share the last row of the pool."""
    random = torch.Generator().manual_seed(seed)
    N, S = sum(lengths) + padding, len(lengths)
    x, a = torch.randn(N, D, generator=random).to(dtype), torch.rand(N, D, generator=random).to(dtype)
    states = torch.randn(pool, D, generator=random)
    rows = torch.randperm(pool - 1, generator=random)[:S]
    rows = torch.where(torch.tensor(lengths) == 0, pool - 1, rows)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return x, a, states, rows, cu_seqlens, torch.rand(S, generator=random) < 0.6


def one_by_one(x, a, states, rows, cu_seqlens, has_initial_state):
    """The same by the loop over time, sequence by sequence, in float64: all states, and the pool afterwards."""
    h, pool = torch.full(x.shape, torch.nan, dtype=torch.float64), states.double()
    for s, (start, stop) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        if start == stop:
            continue
        h0 = pool[rows[s]][None] if has_initial_state[s] else None
        out, last = linear_recurrence_reference(x[None, start:stop].double(), a[None, start:stop].double(), h0)
        h[start:stop], pool[rows[s]] = out[0], last[0]
    return h, pool


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_equals_each_sequence_alone(lengths, padding):
    inputs = batch(lengths, padding=padding)
    expected, pool = one_by_one(*inputs)
    h = linear_recurrence_varlen(*inputs)
    N = sum(lengths)
    torch.testing.assert_close(h[:N].double(), expected[:N], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inputs[2].double(), pool, rtol=1e-6, atol=1e-6)
    untouched = [row for row in range(len(pool)) if row not in inputs[3].tolist() or row == len(pool) - 1]
    assert torch.equal(inputs[2][untouched], batch(lengths, padding=padding)[2][untouched])


def test_continues_where_it_stopped():
    x, a, states, rows, _, _ = batch([20, 30])
    whole = linear_recurrence_varlen(x, a, whole_states := states.clone(), rows, torch.tensor([0, 20, 50]), none(2))
    pieces = []
    for first, stop in ((0, 7), (7, 8), (8, 20)):
        part = torch.cat([torch.arange(first, stop), 20 + torch.arange(first, stop)])
        lengths = torch.tensor([0, stop - first, 2 * (stop - first)], dtype=torch.int32)
        seen = torch.full((2,), first > 0)
        pieces.append(linear_recurrence_varlen(x[part], a[part], states, rows.int(), lengths, seen))
    for s, offset in enumerate((0, 20)):
        joined = torch.cat([piece.view(2, -1, 5)[s] for piece in pieces])
        torch.testing.assert_close(joined, whole[offset : offset + 20], rtol=1e-6, atol=1e-6)
    assert not torch.equal(states, whole_states)  # sequence 1 went on to 30 tokens there


def none(S):
    return torch.zeros(S, dtype=torch.bool)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_sequence(value):
    """In a token, in a coefficient, in an initial state, in rows that nobody reads, and behind the last sequence."""
    x, a, states, rows, cu_seqlens, _ = batch([6, 3, 0, 4, 5, 1, 2], padding=2)
    has_state = torch.tensor([False, True, True, True, False, True, False])
    sound = states.clone()
    h = linear_recurrence_varlen(x, a, sound, rows, cu_seqlens, has_state)
    x[3, 1], a[10, 4], states[rows[5], 0], x[-1] = value, value, value, value
    states[rows[[0, 4]]] = value
    expected, pool = one_by_one(x, a, states, rows, cu_seqlens, has_state)
    found = linear_recurrence_varlen(x, a, states, rows, cu_seqlens, has_state)
    is_broken = torch.tensor([False] * 3 + [True] * 3 + [False] * 4 + [True] * 3 + [False] * 5 + [True] + [False] * 2)
    assert torch.equal(found[:21][~is_broken], h[:21][~is_broken])
    assert torch.equal(found[:21].isfinite(), expected[:21].isfinite())
    is_broken = torch.tensor([row in rows[[0, 3, 5]].tolist() for row in range(len(states))])
    assert torch.equal(states[~is_broken], sound[~is_broken])
    assert torch.equal(states.isfinite(), pool.isfinite())


def test_half_precision_keeps_its_states_in_float32():
    inputs = batch([40, 9], dtype=torch.bfloat16)
    expected, pool = one_by_one(*inputs)
    h = linear_recurrence_varlen(*inputs)
    assert h.dtype == torch.bfloat16
    torch.testing.assert_close(h.double(), expected, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(inputs[2].double(), pool, rtol=1e-6, atol=1e-6)


BAD_INPUTS = {
    "x with a batch": ({0: torch.zeros(1, 3, 5)}, r"x_ND has shape \(1, 3, 5\): pass two dimensions"),
    "a of another length": ({1: torch.zeros(2, 5)}, r"a_BTD has shape \(1, 2, 5\)"),
    "pool of other channels": ({2: torch.zeros(4, 4)}, r"states_PD has shape \(4, 4\).* must be \(rows, 5\)"),
    "pool in half precision": ({2: torch.zeros(4, 5).bfloat16()}, r"states_PD has dtype torch.bfloat16: .*float32"),
    "rows as floats": ({3: torch.zeros(2)}, r"state_indices_S has dtype torch.float32: pass one of"),
    "lengths instead of their sums": ({4: torch.tensor([1, 2])}, r"cu_seqlens has shape \(2,\): for 2 .* be \(3,\)"),
    "initial states as numbers": ({5: torch.zeros(2).int()}, r"has_initial_state_S has dtype torch.int32"),
    "rows elsewhere": ({3: torch.zeros(2, dtype=torch.int64, device="meta")}, r"state_indices_S is on meta but x_ND"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(change, message):
    arguments = list(batch([1, 2]))
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(ValueError, match=message):
        linear_recurrence_varlen(*arguments)
