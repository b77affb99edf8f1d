"""Layers see the caller's columns: padding moves no token, is nobody's key, changes no state, whatever stands there."""

import pytest
import torch
from torch import Tensor

from recurrent_gemma_hf import RecurrentGemmaCache
from tests.helpers import build, tiny_config

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Padding on the left, on the right, on both sides, nowhere, of a whole row; and between tokens, where rows are moved.
MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]],
    "both": [[0, 0, 1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]],
    "between": [[0, 1, 1, 0, 0, 1, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]],
}


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return build(tiny_config("recurrentgemma", attention_window_size=4), seed=3, attention=request.param)


def embedded(model, mask: Tensor, value: float = 0.0) -> Tensor:
    """(B, T, E) inputs with `value` at padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, mask.shape, generator=generator)
    return model.get_input_embeddings()(ids).detach().masked_fill(mask[..., None] == 0, value)


@pytest.mark.parametrize("value", [7.0, torch.nan, torch.inf])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_hidden_states_of_a_padded_row_are_those_of_the_row_alone(model, kind, value, use_cache):
    mask = torch.tensor(MASKS[kind])
    x = embedded(model, mask, value)
    outputs = model(inputs_embeds=x, attention_mask=mask, output_hidden_states=True, use_cache=use_cache)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    for row, is_token in enumerate(mask.bool()):
        if is_token.any():
            alone = model(inputs_embeds=x[row : row + 1, is_token], output_hidden_states=True)
            for state, expected in zip(outputs.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(state[row, is_token], expected[0], **CLOSE)
            torch.testing.assert_close(outputs.logits[row, is_token], alone.logits[0], **CLOSE)


@pytest.mark.parametrize("kind", MASKS)
@torch.no_grad()
def test_a_text_goes_on_behind_padding_of_any_kind(model, kind):
    """Every split in two chunks and a last token; NaN at padding."""
    mask = torch.tensor(MASKS[kind])
    mask = torch.cat([mask, torch.tensor([[1], [0], [1]])], dim=1)
    x = embedded(model, mask, torch.nan)
    for cut in range(1, 10):
        cache, pieces = RecurrentGemmaCache(model.config), []
        for start, stop in ((0, cut), (cut, 10), (10, 11)):
            given = {"inputs_embeds": x[:, start:stop], "attention_mask": mask[:, :stop]}
            pieces.append(model(**given, past_key_values=cache).logits)
        logits = torch.cat(pieces, dim=1)
        for row, is_token in enumerate(mask.bool()):
            if is_token.any():
                alone = model(inputs_embeds=x[row : row + 1, is_token]).logits[0]
                torch.testing.assert_close(logits[row, is_token], alone, **CLOSE)


@pytest.mark.parametrize("kind", MASKS)
def test_what_stands_at_padding_reaches_no_gradient(model, kind):
    mask = torch.tensor(MASKS[kind])
    weight = torch.randn(*mask.shape, model.config.vocab_size).masked_fill(mask[..., None] == 0, 0.0)
    found = []
    for value in (0.0, torch.nan):
        model.zero_grad(set_to_none=True)
        x = embedded(model, mask, value).requires_grad_()
        logits = model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits
        (logits * weight).sum().backward()
        assert torch.equal(x.grad[mask == 0], torch.zeros_like(x.grad[mask == 0]))
        found.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_hidden_states_are_what_the_layers_read(model):
    """The very tensors, also with a mask: their gradients exist, and a hook sees the caller's columns."""
    mask = torch.tensor(MASKS["left"])
    seen = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = embedded(model, mask).requires_grad_()
    outputs = model(inputs_embeds=x, attention_mask=mask, output_hidden_states=True)
    assert all(state is read for state, read in zip(outputs.hidden_states[:-1], seen, strict=True))
    for state in outputs.hidden_states:
        state.retain_grad()
    outputs.logits[mask.bool()].sum().backward()
    assert all(state.grad is not None and state.grad[mask.bool()].abs().max() > 0 for state in outputs.hidden_states)


@torch.no_grad()
def test_what_counts_columns_from_the_right_end(model):
    """An activation steered at the last column, as adapters do: the same with padding in front as without."""
    mask = torch.tensor(MASKS["left"])
    x = embedded(model, mask)
    direction = torch.randn(model.config.hidden_size)

    def steer(module, args):
        steered = args[0].clone()
        steered[:, -2:] += direction
        return (steered, *args[1:])

    model.model.layers[1].register_forward_pre_hook(steer)
    logits = model(inputs_embeds=x, attention_mask=mask).logits[0, mask[0].bool()]
    torch.testing.assert_close(logits, model(inputs_embeds=x[:1, mask[0].bool()]).logits[0], **CLOSE)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@torch.no_grad()
def test_an_adapter_that_begins_at_an_invocation(model):
    """aLoRA is active from its invocation tokens on, which PEFT finds in the ids, counted from the right end."""
    peft = pytest.importorskip("peft", reason="PEFT comes with the `test` extra")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        alora_invocation_tokens=[5, 6],
        target_modules=["linear_x", "q_proj", "up_proj"],
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, config).eval()
    ids = torch.tensor([[0, 0, 0, 9, 8, 7, 5, 6, 11, 12], [9, 8, 7, 21, 22, 23, 24, 5, 6, 13]])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    logits = adapted(input_ids=ids, attention_mask=mask).logits
    for row in range(2):
        alone = ids[row : row + 1, mask[row].bool()]
        wanted = adapted(input_ids=alone).logits
        torch.testing.assert_close(logits[row, mask[row].bool()], wanted[0], **CLOSE)
        with adapted.disable_adapter():
            plain = adapted(input_ids=alone).logits
        invoked = (alone[0] == 5).nonzero().item()
        assert torch.equal(wanted[0, :invoked], plain[0, :invoked])
        assert (wanted - plain)[0, invoked:].abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_compiled_where_nothing_can_be_looked_at(model):
    """One graph takes every kind of mask: rows are moved inside it."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for kind, rows in MASKS.items():
        mask = torch.tensor(rows)
        x = embedded(model, mask, torch.nan)
        logits = compiled(inputs_embeds=x, attention_mask=mask, use_cache=False).logits
        expected = model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **CLOSE, msg=kind)
    torch._dynamo.reset()
