"""The inside of a recurrent block on vLLM, without an engine: a step's tokens against each request alone."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from recurrent_gemma_hf import rg_lru_step_triton, set_backend
from recurrent_gemma_hf.causal_conv1d import causal_conv1d
from recurrent_gemma_hf.rg_lru import rg_lru
from recurrent_gemma_hf.vllm import model as module
from recurrent_gemma_hf.vllm.model import OPERATORS, Positions, Prompts, RecurrentBlock

H, d, P = 2, 3, 10
D = H * d
NAN = float("nan")
# Rows of the pools, and tokens: decoding requests, padding of a captured batch among them; then prompts, some of which
# go on from a state, one shorter than the convolution; the last is padding.
DECODING = [4, 0, 7]
PROMPTS = [(2, 5, True), (9, 1, False), (1, 6, False), (5, 2, True), (0, 0, False)]
N = len(DECODING) + sum(tokens for _, tokens, _ in PROMPTS)


@pytest.fixture(autouse=True)
def _plain_torch_afterwards():
    yield
    set_backend("auto")


def make(taps: int = 4, dtype: torch.dtype = torch.float32, layers: int = 1) -> list[RecurrentBlock]:
    """Blocks whose linear layers hand through what they get, so that they are called with (y, u)."""
    torch.manual_seed(0)
    blocks = []
    for i in range(layers):
        block = RecurrentBlock.__new__(RecurrentBlock)
        torch.nn.Module.__init__(block)
        block.layer_name, block.context, block.is_gelu_tanh = f"block {i}", taps - 1, True
        block.linear_yx = block.linear_out = lambda x: (x, None)
        block.act_fn = torch.nn.GELU(approximate="tanh")
        block.conv_1d, block.rg_lru = torch.nn.Module(), torch.nn.Module()
        block.rg_lru.learned = lambda rg_lru=block.rg_lru: module.RgLru.learned(rg_lru)
        shapes = {
            block.conv_1d: {"weight": (D, 1, taps), "bias": (D,)},
            block.rg_lru: {
                "recurrent_param": (D,), "input_gate_weight": (H, d, d), "input_gate_bias": (H, d),
                "recurrent_gate_weight": (H, d, d), "recurrent_gate_bias": (H, d),
            },
        }  # fmt: skip
        for owner, parameters in shapes.items():
            for name, shape in parameters.items():
                setattr(owner, name, torch.nn.Parameter(torch.randn(shape, dtype=dtype), requires_grad=False))
        block.kv_cache = (torch.randn(P, max(taps - 1, 1), D, dtype=dtype), torch.randn(P, D))
        blocks.append(block)
    return blocks


def metadata() -> SimpleNamespace:
    """What vLLM says of a step."""
    rows, tokens, has_state = (torch.tensor(column) for column in zip(*PROMPTS, strict=True))
    return SimpleNamespace(
        num_decode_tokens=len(DECODING), num_prefill_tokens=N - len(DECODING),
        state_indices_tensor_d=torch.tensor(DECODING, dtype=torch.int32)[:, None],
        state_indices_tensor_p=rows.int(), has_initial_states_p=has_state,
        query_start_loc_p=torch.cat([torch.zeros(1), tokens.cumsum(0)]).int(),
    )  # fmt: skip


def is_first() -> torch.Tensor:
    flags = [False] * len(DECODING)
    for _, tokens, has_state in PROMPTS:
        flags += [not has_state and t == 0 for t in range(tokens)]
    return torch.tensor(flags)


@torch.inference_mode()
def run(monkeypatch: pytest.MonkeyPatch, blocks: list[RecurrentBlock], yu: torch.Tensor, step: SimpleNamespace):
    """The results of all blocks; two more tokens than requests have, as in a captured batch."""
    context = SimpleNamespace(
        no_compile_layers={block.layer_name: block for block in blocks},
        attn_metadata={block.layer_name: step for block in blocks},
    )
    monkeypatch.setattr(module, "get_forward_context", lambda: context)
    first = torch.cat([is_first(), torch.tensor([False, False])])
    return [block(yu, Positions(yu, yu, first)) for block in blocks]


def tokens(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N + 2, 2 * D).to(dtype)


@torch.inference_mode()
def alone(
    block: RecurrentBlock, yu: torch.Tensor, decoding: Sequence[int] = DECODING
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each request by itself, in plain torch: the results, and the pools afterwards."""
    y, u = yu[:N].chunk(2, dim=-1)
    out, conv, state = torch.zeros_like(u), block.conv_PCD.clone(), block.kv_cache[1].clone()
    requests = [(row, 1, True) for row in decoding] + [prompt for prompt in PROMPTS if prompt[1]]
    stop = 0
    for row, count, has_state in requests:
        start, stop = stop, stop + count
        if row == 0:
            continue
        past, h0 = (pool[row : row + 1] if has_state else torch.zeros_like(pool[:1]) for pool in (conv, state))
        full = torch.cat([past, u[None, start:stop]], dim=1)
        x = causal_conv1d(full, block.conv_1d.weight, block.conv_1d.bias, past=block.context)
        out[start:stop], state[row], _ = rg_lru(
            x, y[None, start:stop], block.rg_lru.learned(), h0, is_first()[None, start:stop], None, block.act_fn,
            is_gelu_tanh=True,
        )  # fmt: skip
        conv[row] = full[0, count:]
    return out, conv, state


OWN_ROWS = [row for row in range(P) if row > 0]  # row 0 is the null block: what is in it is nobody's business
REAL = [i for i in range(N) if i != DECODING.index(0)]


@pytest.mark.parametrize("dim_first", [False, True], ids=["(K - 1, D)", "(D, K - 1)"])
@pytest.mark.parametrize("taps", [1, 2, 4, 6])
def test_a_step_equals_each_request_alone(monkeypatch: pytest.MonkeyPatch, taps: int, dim_first: bool):
    (block,), yu = make(taps), tokens()
    if dim_first:  # VLLM_SSM_CONV_STATE_LAYOUT
        block.kv_cache = (block.kv_cache[0].transpose(1, 2).contiguous(), block.kv_cache[1])
        monkeypatch.setattr(module, "is_conv_state_dim_first", lambda: True)
    expected, conv, state = alone(block, yu)
    (found,) = run(monkeypatch, [block], yu, metadata())
    torch.testing.assert_close(found[:N][REAL], expected[REAL], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[N:], torch.zeros(2, D))
    torch.testing.assert_close(block.conv_PCD[OWN_ROWS], conv[OWN_ROWS])
    torch.testing.assert_close(block.kv_cache[1][OWN_ROWS], state[OWN_ROWS], rtol=1e-5, atol=1e-6)


def test_nothing_while_vllm_measures_memory(monkeypatch: pytest.MonkeyPatch):
    (block,) = make()
    context = SimpleNamespace(no_compile_layers={block.layer_name: block}, attn_metadata=None)
    monkeypatch.setattr(module, "get_forward_context", lambda: context)
    out = torch.full((5, D), NAN)
    torch.ops.recurrent_gemma_vllm.conv1d(torch.randn(5, D), out, block.layer_name)
    assert torch.equal(out, torch.zeros(5, D))


def test_layers_share_what_they_compute_of_a_step(monkeypatch: pytest.MonkeyPatch):
    """Once for all of them, and again in the next pass with the same object: it may be one that is captured."""
    calls, of = [], Prompts.of
    monkeypatch.setattr(Prompts, "of", staticmethod(lambda *args: calls.append(1) or of(*args)))
    blocks, step, yu = make(layers=4), metadata(), tokens()
    run(monkeypatch, blocks, yu, step)
    assert len(calls) == 1
    step.state_indices_tensor_d[0] = 8
    expected, _, _ = alone(blocks[2], yu, decoding=[8, *DECODING[1:]])
    found = run(monkeypatch, blocks, yu, step)[2]
    assert len(calls) == 2
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)


# --- The kernels, in Triton's interpreter ---


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every launch of the kernels of a decoding step."""
    calls, launched = [], rg_lru_step_triton.step
    monkeypatch.setattr(rg_lru_step_triton, "step", lambda *args: calls.append(1) or launched(*args))
    return calls


def test_the_choice_of_backend_reaches_vllm(monkeypatch: pytest.MonkeyPatch, steps: list[int]):
    """Kernels where they are asked for and serve, plain torch elsewhere, with the same results and states."""
    yu, found = tokens(torch.bfloat16), {}
    for name, launches in (("auto", 0), ("portable", 0), ("triton", 1)):
        set_backend(name)
        (block,) = make(dtype=torch.bfloat16)
        (out,) = run(monkeypatch, [block], yu, metadata())
        assert len(steps) == launches
        found[name] = out[:N][REAL], block.conv_PCD[OWN_ROWS], block.kv_cache[1][OWN_ROWS]
    for mine, expected in zip(found["triton"], found["portable"], strict=True):
        torch.testing.assert_close(mine.float(), expected.float(), rtol=0.02, atol=0.04)


@pytest.mark.parametrize("change", [{"is_gelu_tanh": False}, {"taps": 1}, {"dtype": torch.float32}], ids=str)
def test_what_no_kernel_steps_for_is_left_to_plain_torch(
    monkeypatch: pytest.MonkeyPatch, steps: list[int], change: dict
):
    options = {"dtype": torch.bfloat16, **change}
    is_gelu_tanh = options.pop("is_gelu_tanh", True)
    (block,), yu = make(**options), tokens(options["dtype"])
    block.is_gelu_tanh = is_gelu_tanh
    expected, _, _ = alone(block, yu)
    set_backend("triton")
    (found,) = run(monkeypatch, [block], yu, metadata())
    assert not steps
    torch.testing.assert_close(found[:N][REAL].float(), expected[REAL].float(), rtol=0.02, atol=0.04)


def test_one_prompt_takes_the_kernel_of_the_whole_block(monkeypatch: pytest.MonkeyPatch):
    """Further chunks of a prompt, and its first: as the portable code within bfloat16's rounding."""
    (block,), yu = make(dtype=torch.bfloat16), tokens(torch.bfloat16)
    fresh = {row: block.kv_cache[1][row].clone() for row in (2, 9)}
    for row, count, has_state in PROMPTS[:2]:
        step = SimpleNamespace(
            num_decode_tokens=0, num_prefill_tokens=count, state_indices_tensor_p=torch.tensor([row]).int(),
            has_initial_states_p=torch.tensor([has_state]), query_start_loc_p=torch.tensor([0, count]).int(),
        )  # fmt: skip
        results = []
        for name in ("portable", "triton"):
            set_backend(name)
            block.kv_cache[1][row], block.kv_cache[0][row] = fresh[row], 0.5
            context = SimpleNamespace(no_compile_layers={"block 0": block}, attn_metadata={"block 0": step})
            monkeypatch.setattr(module, "get_forward_context", lambda context=context: context)
            first = torch.tensor([not has_state] + [False] * (count - 1))
            with torch.inference_mode():
                out = block(yu[:count], Positions(yu, yu, first))
            results.append((out, block.kv_cache[1][row].clone()))
        for mine, expected in zip(*results, strict=True):
            torch.testing.assert_close(mine.float(), expected.float(), rtol=0.02, atol=0.04)


# --- NaN and inf stay in the request where they are ---


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("backend", ["portable", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_a_broken_request_breaks_no_other(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype, value: float
):
    """A decoding request and one prompt meet the value in their tokens, another prompt in its state."""
    set_backend(backend)
    yu = tokens(dtype)
    (good,), (bad,) = make(dtype=dtype), make(dtype=dtype)
    broken = yu.clone()
    broken[0], broken[len(DECODING) + 5 + 1 + 2, D + 1] = value, value  # of row 4; of row 1, its third token
    bad.kv_cache[1][5, 2] = value
    for pool in bad.kv_cache:
        pool[[0, 9]] = value  # the null block, and the row of a new request
    for _ in range(2):  # the second step finds what the first has left
        (expected,) = run(monkeypatch, [good], yu, metadata())
        (found,) = run(monkeypatch, [bad], broken, metadata())
        sound = [i for i in range(N) if i in (1, 2) or len(DECODING) <= i < len(DECODING) + 8]
        assert torch.equal(found[sound], expected[sound])
        assert torch.equal(found[N:], expected[N:])
        assert not found[len(DECODING) + 8].isfinite().all()
        assert not found[N - 1].isfinite().all()
        for mine, theirs in zip(bad.kv_cache, good.kv_cache, strict=True):
            assert torch.equal(mine[[2, 3, 6, 7, 8, 9]], theirs[[2, 3, 6, 7, 8, 9]])


def test_vllm_splits_its_graphs_at_the_operators():
    assert {name.split("::")[1] for name in OPERATORS} == {"conv1d", "scan", "block"}
    for name in OPERATORS:
        assert hasattr(torch.ops.recurrent_gemma_vllm, name.split("::")[1])
