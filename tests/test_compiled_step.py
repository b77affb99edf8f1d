"""One step of decoding as a compiled program: the same program and the same addresses from the first token to the
billionth, which is what a CUDA graph needs."""

import pytest
import torch

from recurrent_gemma_hf import RecurrentGemmaCache, RecurrentGemmaForCausalLM
from tests.helpers import byte_config

# Tokens seen; beyond float32's and near int32's last integer.
PLACES = (20, 1_000, 16_777_217, 1_000_000, 2_000_000_000)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def move_to(cache: RecurrentGemmaCache, tokens: int) -> None:
    """Lets the cache stand `tokens` tokens into a text; its states stay what they are."""
    cache.progress.lengths.fill_(tokens)
    cache.progress.columns = tokens


def addresses(cache: RecurrentGemmaCache) -> list[int]:
    tensors = [tensor for layer in cache.layers for tensor in layer.tensors().values()]
    return [tensor.data_ptr() for tensor in (*tensors, cache.progress.lengths, cache.progress.past_lengths)]


class Programs:
    """A backend that runs what was captured as it is, and keeps the inputs of each program that are no tensors."""

    def __init__(self) -> None:
        self.numbers: list[list[str]] = []

    def __call__(self, program: torch.fx.GraphModule, inputs: list) -> object:
        values = {n.name: n.meta["example_value"] for n in program.graph.nodes if n.op == "placeholder"}
        self.numbers.append([name for name, value in values.items() if not isinstance(value, torch.Tensor)])
        return program.forward


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@pytest.mark.parametrize("batch", [1, 2])
def test_nothing_is_compiled_again_however_far_the_text_goes(kind: str, batch: int):
    blocks = {} if kind == "griffin" else {"block_types": ["recurrent"]}
    model = RecurrentGemmaForCausalLM(byte_config(**blocks)).eval()
    prompt, ids = torch.randint(2, 265, (batch, 12)), torch.randint(2, 265, (batch, 1))
    programs = Programs()
    compiled = torch.compile(model, fullgraph=True, backend=programs)
    with torch.no_grad():
        cache = RecurrentGemmaCache(model.config)
        model(prompt, past_key_values=cache)
        before = addresses(cache)
        for place in PLACES:
            move_to(cache, place)
            copy = cache.fork()
            for _ in range(2):
                actual = compiled(ids, past_key_values=cache).logits
                expected = model(ids, past_key_values=copy).logits
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    # One program, and without an input that is a number: of those a CUDA graph is recorded for each value.
    assert programs.numbers == [[]]
    assert addresses(cache) == before
    assert cache.get_seq_length() == PLACES[-1] + 2


def test_columns_counted_by_a_compiled_step_are_not_lost(tmp_path):
    model = RecurrentGemmaForCausalLM(byte_config()).eval()
    prompt, ids = torch.randint(2, 265, (1, 12)), torch.randint(2, 265, (1, 1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        cache = RecurrentGemmaCache(model.config)
        model(prompt, past_key_values=cache)
        for _ in range(3):
            compiled(ids, past_key_values=cache)
        forked = cache.fork(2)
        cache.save(tmp_path / "state.safetensors")
        loaded = RecurrentGemmaCache.load(tmp_path / "state.safetensors", model.config)
        assert (cache.get_seq_length(), forked.get_seq_length(), loaded.get_seq_length()) == (15, 15, 15)
        model(ids, past_key_values=cache)
        compiled(ids, past_key_values=cache)
        assert cache.get_seq_length() == 17
        compiled(ids, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        assert cache.get_seq_length() == 18
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match=r"call cache.check\(model, rows\) before compiled code"
        ):
            compiled(ids, past_key_values=loaded)
        loaded.check(model, 1)
        compiled(ids, past_key_values=loaded)
        assert loaded.get_seq_length() == 16
        loaded.reset()
        assert loaded.get_seq_length() == 0


def test_a_cache_made_inside_the_program():
    """torch.compile(model, fullgraph=True)(ids), where the config turns the cache on."""
    model = RecurrentGemmaForCausalLM(byte_config()).eval()
    prompt, ids = torch.randint(2, 265, (2, 12)), torch.randint(2, 265, (2, 1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        actual, expected = compiled(prompt), model(prompt)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert actual.past_key_values.get_seq_length() == 12
        actual, expected = (model(ids, past_key_values=x.past_key_values).logits for x in (actual, expected))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
