"""What tools expect of any model of Transformers, and of its config: names, returned values, hooks, what is counted."""

import inspect
import logging

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

from recurrent_gemma_hf import (
    RecurrentGemmaCache,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RecurrentGemmaForQuestionAnswering,
    RecurrentGemmaForSequenceClassification,
    RecurrentGemmaForTokenClassification,
    RecurrentGemmaPreTrainedModel,
)
from recurrent_gemma_hf.modeling_recurrent_gemma import RecurrentGemmaModel
from tests.helpers import build, tiny_config

IDS = torch.arange(1, 15)[None]
HEADS = (
    RecurrentGemmaForSequenceClassification,
    RecurrentGemmaForTokenClassification,
    RecurrentGemmaForQuestionAnswering,
)


@pytest.fixture
def model():
    return build(tiny_config("recurrentgemma"), seed=3)


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("pretraining_tp", 1), ("max_position_embeddings", 8192), ("sep_token_id", 3), ("own", {"a": 1})],
)
def test_a_model_whose_config_a_tool_wrote_into_loads_again(model, tmp_path, caplog, monkeypatch, name, value):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    setattr(model.config, name, value)
    model.save_pretrained(tmp_path)
    loaded = RecurrentGemmaForCausalLM.from_pretrained(tmp_path)
    assert getattr(loaded.config, name) == value
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert f"does not know; they are kept and mean nothing to the model: {name}" in caplog.text
    loaded.save_pretrained(tmp_path / "again")
    assert getattr(RecurrentGemmaConfig.from_pretrained(tmp_path / "again"), name) == value


def test_a_misspelled_field_of_a_call_is_an_error():
    with pytest.raises(ValueError, match="RecurrentGemmaConfig has no field 'lru_widht'"):
        tiny_config(lru_widht=3)


def test_derived_fields_can_be_set():
    config = tiny_config("recurrentgemma")
    config.sliding_window = 9
    assert (config.attention_window_size, config.sliding_window) == (8, 9)
    config.layer_types = ["sliding_attention", "linear_attention", "linear_attention"]
    assert config.layers_block_type == ["attention", "recurrent", "recurrent"]
    config.layers_block_type = ["recurrent", "recurrent", "attention"]
    assert config.layer_types == ["linear_attention", "linear_attention", "sliding_attention"]
    config.final_logit_softcapping = None
    assert config.logits_soft_cap == 0.0
    config.final_logit_softcapping = 5.0
    assert config.logits_soft_cap == 5.0
    RecurrentGemmaForCausalLM(config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sliding_window", None, "sliding_window=None must be a whole number from 2 on"),
        ("layer_types", ["full_attention"], r"layer_types=\['full_attention'\] must be a list of"),
        ("layers_block_type", [], r"layers_block_type=\[\] must be a list of"),
    ],
)
def test_derived_fields_refuse_what_cannot_be(name, value, message):
    with pytest.raises(ValueError, match=message):
        setattr(tiny_config(), name, value)


def test_a_file_that_contradicts_itself():
    given = tiny_config().to_dict()
    with pytest.raises(ValueError, match="sliding_window=4 contradicts the rest, of which follows 13"):
        RecurrentGemmaConfig.from_dict({**given, "sliding_window": 4})
    assert RecurrentGemmaConfig.from_dict({**given, "sliding_window": 13}).attention_window_size == 12


# --- weights that are not the stack's ---------------------------------------------------------------------------------


class WithValueHead(RecurrentGemmaPreTrainedModel):
    """A class of a user's own."""

    def __init__(self, config):
        super().__init__(config)
        self.model = RecurrentGemmaModel(config)
        self.value = nn.Linear(config.hidden_size, 1)
        self.post_init()


def test_heads_of_others_are_neither_missed_nor_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    own, info = WithValueHead.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert set(info["missing_keys"]) == {"value.weight", "value.bias"}
    assert torch.equal(own.model(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    own.save_pretrained(tmp_path / "own")
    back, info = RecurrentGemmaForCausalLM.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"value.weight", "value.bias"}
    assert torch.equal(back(IDS).logits, model(IDS).logits)


def test_weights_of_the_stack_are_required(model, tmp_path):
    state = model.state_dict()
    del state["model.layers.1.mlp_block.up_proj.bias"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"1 weights of .* are missing: model\.layers\.1\.mlp_block\.up_proj\.bias"):
        RecurrentGemmaForCausalLM.from_pretrained(tmp_path)
    _, info = RecurrentGemmaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.layers.1.mlp_block.up_proj.bias"}


# --- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [RecurrentGemmaForCausalLM, *HEADS])
def test_forward_names_the_columns_of_a_dataset(head):
    """Trainer drops columns that it does not find by their names."""
    assert {"input_ids", "inputs_embeds", "attention_mask", "position_ids"} <= set(
        inspect.signature(head.forward).parameters
    )


def test_layers_return_a_tensor(model):
    before = model(IDS).logits
    handles = [layer.register_forward_hook(lambda m, args, out: out + 0.1) for layer in model.model.layers]
    steered = model(IDS).logits
    assert (steered - before).abs().max() > 0.01
    for handle in handles:
        handle.remove()
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("indices", [[0, -1], [1], 2, [3, 0]])
def test_some_hidden_states(model, indices):
    every = model(IDS, output_hidden_states=True).hidden_states
    some = model(IDS, output_hidden_states=indices).hidden_states
    wanted = {i % 4 for i in ([indices] if isinstance(indices, int) else indices)}
    assert len(some) == len(every) == 4
    for i, (one, other) in enumerate(zip(some, every, strict=True)):
        assert one is None if i not in wanted else torch.equal(one, other)


def test_a_hidden_state_that_there_is_not(model):
    with pytest.raises(ValueError, match=r"output_hidden_states=\[0, 4\]: there are 4, from 0 to 3"):
        model(IDS, output_hidden_states=[0, 4])


def test_attention_probabilities_where_there_are_none(model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert model(IDS, output_attentions=True).attentions is None
    model.set_attn_implementation("eager")
    (weights,) = model(IDS, output_attentions=True).attentions
    assert weights.shape == (1, 4, 14, 14)


def test_the_pipeline_plan_names_modules_and_arguments(model):
    for name, (arguments, _) in model.config.base_model_pp_plan.items():
        module = getattr(model.model, name)
        first = module[0] if isinstance(module, nn.ModuleList) else module
        if name != "embed_tokens":
            assert set(arguments) <= set(inspect.signature(first.forward).parameters)


# --- training ---------------------------------------------------------------------------------------------------------


def labelled(head, count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        ids = torch.randint(1, 101, (9,), generator=generator)
        mask = torch.ones(9, dtype=torch.int64)
        mask[: 2 * i] = 0
        row = {"input_ids": ids, "attention_mask": mask}
        if head is RecurrentGemmaForSequenceClassification:
            row["labels"] = torch.tensor(i % 2)
        elif head is RecurrentGemmaForQuestionAnswering:
            row |= {"start_positions": torch.tensor(2 * i), "end_positions": torch.tensor(8)}
        else:
            labels = ids if head is RecurrentGemmaForCausalLM else ids % 2
            row["labels"] = labels.masked_fill(mask == 0, -100)
        rows.append(row)
    return rows


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
@pytest.mark.parametrize("head", [RecurrentGemmaForCausalLM, *HEADS])
def test_four_batches_of_one_are_one_batch_of_four(head, tmp_path):
    steps = []
    for size, accumulated in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        trained = head(tiny_config("recurrentgemma"))
        options = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, max_steps=1,
            use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
            optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
        )  # fmt: skip
        trainer = Trainer(trained, options, train_dataset=labelled(head, 4))
        trainer.train()
        steps.append((trainer.state.log_history[0]["loss"], [p.detach().clone() for p in trained.parameters()]))
    (loss, weights), (expected_loss, expected) = steps
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    for one, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_other_losses_know_their_share_of_a_batch(problem_type):
    model = RecurrentGemmaForSequenceClassification(tiny_config("recurrentgemma", problem_type=problem_type)).eval()
    ids, labels = torch.randint(1, 101, (4, 6)), torch.rand(4, 2).round()
    whole = model(ids, labels=labels).loss
    parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=8).loss for i in range(4)]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_text_while_training_with_checkpoints(model, use_reentrant):
    """A callback samples text: the model stays in training mode, and checkpointing stays on."""
    expected = model.generate(IDS, max_new_tokens=6, do_sample=False)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), expected)
    model(IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match="gradient checkpointing would run the cache twice"):
        model(IDS, past_key_values=RecurrentGemmaCache(model.config))


def test_a_cache_that_inference_mode_began(model):
    whole = model(IDS).logits
    cache = RecurrentGemmaCache(model.config)
    with torch.inference_mode():
        first = model(IDS[:, :6], past_key_values=cache).logits
    with torch.no_grad():
        parts = [model(IDS[:, t : t + 2], past_key_values=cache).logits for t in (6, 8)]
        parts += [model(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(10, 14)]
    torch.testing.assert_close(torch.cat([first, *parts], dim=1), whole, rtol=1e-5, atol=1e-5)


# --- who watches ------------------------------------------------------------------------------------------------------

LINEAR_LAYERS = 20  # of the tiny model: three MLPs, two recurrent blocks, one of attention, the head


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_every_linear_layer_is_seen(model):
    """Without gradients on a CPU, where a faster matmul takes the place of some."""
    expected = model(IDS).logits
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(module) if isinstance(module, nn.Linear) else None
    )
    model(IDS)
    handle.remove()
    assert len(seen) == LINEAR_LAYERS
    with Functions() as functions:
        assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
    assert functions.seen.count(nn.functional.linear) == LINEAR_LAYERS


@torch.no_grad()
def test_a_replaced_forward_of_every_linear_layer(model, monkeypatch):
    plain, seen = nn.Linear.forward, []
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: seen.append(self) or plain(self, x))
    model(IDS)
    assert len(seen) == LINEAR_LAYERS - 1  # the head has a forward of its own


def test_flops_are_counted_alike_with_and_without_gradients(model):
    counts = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            model(IDS, use_cache=False)
        counts.append(counter.get_total_flops())
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert counts[0] == counts[1] >= 2 * IDS.numel() * matrices


@torch.no_grad()
def test_a_wrong_width_names_both_shapes(model):
    with pytest.raises(ValueError, match=r"inputs_embeds of shape \(1, 14, 47\) must end with hidden_size=48"):
        model(inputs_embeds=torch.randn(1, 14, 47))
    with pytest.raises(RuntimeError, match=r"1x47 and 48x"):
        model.model.layers[0].mlp_block(torch.randn(1, 1, 47))
