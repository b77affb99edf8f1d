"""The heads: shapes, losses by hand, checkpoints there and back, and weights that are tied or are not."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recurrent_gemma_hf import (
    RecurrentGemmaForCausalLM,
    RecurrentGemmaForQuestionAnswering,
    RecurrentGemmaForSequenceClassification,
    RecurrentGemmaForTokenClassification,
    RecurrentGemmaModel,
)
from tests.helpers import (
    CLOSE,
    HEADS,
    build,
    head_of,
    model_of,
    perturb,
    tiny_config,
    tokens_of,
)

WINDOW = tiny_config().attention_window_size


def run_head(model: nn.Module, ids: Tensor, **inputs):
    """The outputs and the loss of a head with suitable labels."""
    if isinstance(model, RecurrentGemmaForQuestionAnswering):
        positions = torch.arange(ids.shape[0])
        return model(ids, start_positions=positions, end_positions=positions + 1, **inputs)
    if isinstance(model, RecurrentGemmaForSequenceClassification):
        return model(ids, labels=torch.arange(ids.shape[0]) % model.num_labels, **inputs)
    if isinstance(model, RecurrentGemmaForTokenClassification):
        return model(ids, labels=ids % model.num_labels, **inputs)
    return model(ids, labels=ids, **inputs)


@pytest.mark.parametrize("head", HEADS)
def test_forward_loss_and_gradients(head):
    model, ids = head_of(head, num_labels=3).train(), tokens_of(2, 2 * WINDOW)
    outputs = run_head(model, ids)
    assert outputs.loss.isfinite()
    outputs.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    shapes = {
        RecurrentGemmaForCausalLM: {"logits": (2, 24, 101)},
        RecurrentGemmaForSequenceClassification: {"logits": (2, 3)},
        RecurrentGemmaForTokenClassification: {"logits": (2, 24, 3)},
        RecurrentGemmaForQuestionAnswering: {"start_logits": (2, 24), "end_logits": (2, 24)},
    }
    outputs = run_head(model.eval(), ids)  # the language model has no logits while it trains
    for name, shape in shapes[head].items():
        assert outputs[name].shape == shape


@pytest.mark.parametrize("head", HEADS)
def test_return_dict_false(head):
    model, ids = head_of(head, num_labels=3), tokens_of(2, 9)
    expected = run_head(model, ids, use_cache=False).to_tuple()
    got = run_head(model, ids, use_cache=False, return_dict=False)
    assert isinstance(got, tuple)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    bare = RecurrentGemmaModel(tiny_config()).eval()
    assert isinstance(bare(ids, return_dict=False), tuple)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_save_and_load(head, tie, tmp_path):
    model, ids = head_of(head, num_labels=3, tie_word_embeddings=tie), tokens_of(2, 9)
    model.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    expected, got = (run_head(m, ids, use_cache=False).to_tuple() for m in (model, loaded))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_base_checkpoint_loads_into_a_head_and_back(tmp_path):
    base, ids = RecurrentGemmaModel(tiny_config()).eval(), tokens_of(1, 9)
    perturb(base, 1).save_pretrained(tmp_path / "base")
    model = RecurrentGemmaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    expected = base(ids).last_hidden_state
    torch.testing.assert_close(model.model(ids).last_hidden_state, expected, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "head")
    back = RecurrentGemmaModel.from_pretrained(tmp_path / "head", dtype=torch.float32)
    torch.testing.assert_close(back(ids).last_hidden_state, expected, rtol=0, atol=0)


def test_sequence_classification_by_hand():
    model, ids = head_of(RecurrentGemmaForSequenceClassification, num_labels=3), tokens_of(2, 20)
    hidden = model.model(ids).last_hidden_state
    torch.testing.assert_close(model(ids).logits, hidden[:, -1] @ model.score.weight.T, **CLOSE)
    embeds = model.model.embed_tokens(ids)
    mask = torch.ones_like(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, model(ids).logits, **CLOSE)
    with pytest.raises(ValueError, match="the last token of each row is unknown"):
        model(inputs_embeds=embeds)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match=r"give an attention_mask, or set config\.pad_token_id"):
        model(ids)
    torch.testing.assert_close(model(ids[:1]).logits, hidden[:1, -1] @ model.score.weight.T, **CLOSE)


def test_losses_by_hand():
    ids = tokens_of(2, 20)
    classify = head_of(RecurrentGemmaForSequenceClassification, num_labels=3)
    labels = torch.tensor([2, 0])
    outputs = classify(ids, labels=labels)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    several = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    outputs = head_of(RecurrentGemmaForSequenceClassification, num_labels=3)(ids, labels=several)
    torch.testing.assert_close(outputs.loss, F.binary_cross_entropy_with_logits(outputs.logits, several))
    outputs = head_of(RecurrentGemmaForSequenceClassification, num_labels=1)(ids, labels=torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(outputs.loss, F.mse_loss(outputs.logits[:, 0], torch.tensor([0.5, 2.0])))
    tag, labels = head_of(RecurrentGemmaForTokenClassification, num_labels=3), ids % 3
    labels[:, :4] = -100
    outputs = tag(ids, labels=labels)
    torch.testing.assert_close(
        outputs.loss, F.cross_entropy(outputs.logits[:, 4:].flatten(0, 1), labels[:, 4:].flatten())
    )
    answer = head_of(RecurrentGemmaForQuestionAnswering)
    start, end = torch.tensor([3, 5]), torch.tensor([4, 19])
    outputs = answer(ids, start_positions=start, end_positions=end)
    expected = (F.cross_entropy(outputs.start_logits, start) + F.cross_entropy(outputs.end_logits, end)) / 2
    torch.testing.assert_close(outputs.loss, expected)


def test_language_model_loss_by_hand():
    model, ids = model_of(), tokens_of(2, 30)
    labels = ids.clone()
    labels[0, :7] = -100
    outputs = model(ids, labels=labels)
    targets = labels[:, 1:].flatten()
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets)
    torch.testing.assert_close(outputs.loss, expected)
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss  # as Trainer accumulates gradients
    torch.testing.assert_close(summed * 100, expected * (targets != -100).sum())


# --- tied weights -----------------------------------------------------------------------------------------------------


def is_tied(model: nn.Module) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_weights_stay_tied(tmp_path):
    model, ids = build(tiny_config()), tokens_of(1, 9)
    assert is_tied(model)
    model.save_pretrained(tmp_path)
    loaded = RecurrentGemmaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert is_tied(loaded)
    before = loaded(ids).logits
    for size in (150, 101):
        loaded.resize_token_embeddings(size, mean_resizing=False)
        assert is_tied(loaded)
        assert loaded.config.vocab_size == loaded.lm_head.out_features == len(loaded.lm_head.weight) == size
        torch.testing.assert_close(loaded(ids).logits[..., :101], before, **CLOSE)
    loaded.resize_token_embeddings(150, mean_resizing=False)
    loaded(torch.tensor([[149]]), labels=torch.tensor([[149]]))
    with pytest.raises(ValueError, match="do not fit vocab_size=150"):
        loaded(torch.tensor([[150]]))


def test_untied_weights(tmp_path):
    model, ids = build(tiny_config(tie_word_embeddings=False)), tokens_of(1, 9)
    assert not is_tied(model)
    hidden = model.model(ids).last_hidden_state
    expected = 3.0 * torch.tanh(hidden @ model.lm_head.weight.T / 3.0)
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    model.save_pretrained(tmp_path)
    loaded = RecurrentGemmaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not is_tied(loaded)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
