"""Trainer and TRL end to end: accumulation, resuming, bfloat16, checkpointing, packing, DPO, and what decays."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    GemmaConfig,
    GemmaForCausalLM,
    Trainer,
    TrainingArguments,
)

from recurrent_gemma_hf import (
    GriffinTrainerMixin,
    RecurrentGemmaForCausalLM,
    RecurrentGemmaForSequenceClassification,
    decayed_parameter_names,
    demo_checkpoint,
    parameter_groups,
)
from tests.helpers import build, tiny_config

pytestmark = [
    # Transformers 5.23 has new names for these, which 5.17, peft and trl do not know.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Trainer hands every loader pin_memory=True, on a machine without a GPU too.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"),
]


def texts(count: int = 24) -> list[dict[str, list[int]]]:
    """Documents of 2 to 40 tokens, longer and shorter than the attention window."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 41, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, 101, (length,), generator=generator).tolist()} for length in lengths]


def arguments(folder: Path, **options) -> TrainingArguments:
    defaults = {
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "max_steps": 4,
        "learning_rate": 1e-3, "disable_tqdm": True, "seed": 5,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**defaults, **options})


def train(folder: Path, collator=None, resume=None, **options) -> tuple[nn.Module, list[float]]:
    """A fresh small Griffin after training, and the loss of every step."""
    model = build(tiny_config(), seed=3)
    run = Trainer(
        model,
        arguments(folder, **options),
        train_dataset=texts(),
        data_collator=collator or DataCollatorWithFlattening(),
    )
    run.train(resume_from_checkpoint=resume)
    return model, [row["loss"] for row in run.state.log_history if "loss" in row]


def difference(one: nn.Module, other: nn.Module) -> float:
    """Largest relative difference of any parameter."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(((p - q).norm() / q.norm()).item() for p, q in pairs)


# ---------------------------------------------------------------- Trainer


def test_accumulating_gradients_equals_the_large_batch(tmp_path):
    """Documents have different lengths: only with num_items_in_batch does a token count the same in both."""
    sgd = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    large, losses = train(tmp_path, per_device_train_batch_size=4, **sgd)
    pieces, again = train(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **sgd)
    assert again == pytest.approx(losses, rel=1e-5)
    assert difference(pieces, large) < 1e-6
    assert difference(build(tiny_config(), seed=3), large) > 1e-3, "nothing was learned"


def test_checkpointing_and_padding_change_nothing(tmp_path):
    """Padded batches of one document per row against packed ones, which compute the same."""
    packed, losses = train(tmp_path, per_device_train_batch_size=4)
    # On the right: Trainer's count of targets includes the first token behind padding, which is none.
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint(), padding_side="right")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    padded, again = train(tmp_path, collator=collator, per_device_train_batch_size=4, gradient_checkpointing=True)
    assert again == pytest.approx(losses, rel=1e-4)
    assert difference(padded, packed) < 1e-3  # Adam divides by gradients that are nearly 0


def test_resuming_is_exact_to_the_bit(tmp_path):
    options = {"per_device_train_batch_size": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole, losses = train(tmp_path / "whole", **options)
    resumed, rest = train(tmp_path / "resumed", resume=str(tmp_path / "whole/checkpoint-3"), **options)
    assert rest[-3:] == losses[-3:]
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16(tmp_path, checkpointing):
    """Autocast: weights and their updates in float32. Losses stay within bfloat16's rounding of the float32 ones."""
    options = {"per_device_train_batch_size": 4, "max_steps": 3}
    _, exact = train(tmp_path, **options)
    model, losses = train(tmp_path, bf16=True, gradient_checkpointing=checkpointing, **options)
    assert losses == pytest.approx(exact, rel=0.02)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_evaluation_has_logits(tmp_path):
    """compute_metrics sees them; the evaluation loss is that of the same model in training."""
    model, seen = build(tiny_config(), seed=3), []

    def metrics(prediction) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {}

    data = [{"input_ids": row["input_ids"][:2] * 5, "labels": row["input_ids"][:2] * 5} for row in texts(4)]
    run = Trainer(model, arguments(tmp_path), eval_dataset=data, compute_metrics=metrics)
    loss = run.evaluate()["eval_loss"]
    ids = torch.tensor([row["input_ids"] for row in data])
    assert seen == [(4, 10, 101)]
    assert loss == pytest.approx(model.train()(ids, labels=ids).loss.item(), rel=1e-5)


# ---------------------------------------------------------------- weight decay


def names_by_decay(run: Trainer) -> dict[bool, set[str]]:
    names = {id(p): name for name, p in run.model.named_parameters()}
    groups = run.create_optimizer().param_groups
    result: dict[bool, set[str]] = {True: set(), False: set()}
    for group in groups:
        result[group["weight_decay"] > 0].update(names[id(p)] for p in group["params"])
    return result


def test_what_decays(tmp_path):
    """Against the official tutorial's rule, written down by hand for one layer of each kind."""
    model = build(tiny_config(), seed=3)
    decayed = {n.removeprefix("model.layers.") for n in decayed_parameter_names(n for n, _ in model.named_parameters())}
    mlp = {"mlp_block.gate_proj.weight", "mlp_block.up_proj.weight", "mlp_block.down_proj.weight"}
    recurrent = {f"temporal_block.{name}.weight" for name in ("linear_x", "linear_y", "linear_out", "conv_1d")}
    attention = {f"temporal_block.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    layers = (recurrent | mlp, recurrent | mlp, attention | mlp)
    assert decayed == {f"{i}.{name}" for i, names in enumerate(layers) for name in names}

    class GriffinTrainer(GriffinTrainerMixin, Trainer):
        pass

    options = arguments(tmp_path, weight_decay=0.1)
    ours = names_by_decay(GriffinTrainer(model, options))
    assert {name.removeprefix("model.layers.") for name in ours[True]} == decayed
    assert ours[True] | ours[False] == {name for name, _ in model.named_parameters()}
    plain = names_by_decay(Trainer(model, options))  # what the mixin is there for
    assert "model.layers.0.temporal_block.rg_lru.recurrent_param" in plain[True]


def test_parameter_groups_of_wrapped_models():
    from peft import LoraConfig, get_peft_model

    model = build(tiny_config(), seed=3)
    kept = sum(p.numel() for n, p in model.named_parameters() if n not in decayed_parameter_names([n]))
    for wrapped in (model, torch.compile(model), nn.DataParallel(model)):
        groups = parameter_groups(wrapped, weight_decay=0.3)
        assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
        assert sum(p.numel() for p in groups[1]["params"]) == kept
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    torch.optim.AdamW(parameter_groups(model), lr=1e-4, betas=(0.9, 0.96))
    adapted = get_peft_model(model, LoraConfig(r=2, use_dora=True))
    decayed, spared = parameter_groups(adapted)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}  # the lengths of DoRA
    head = RecurrentGemmaForSequenceClassification(tiny_config())
    assert any(p is head.score.weight for p in parameter_groups(head)[0]["params"])


def test_parameter_groups_refuse():
    model = build(tiny_config(), seed=3)
    with pytest.raises(ValueError, match=r"weight_decay=-0\.1 must not be negative"):
        parameter_groups(model, -0.1)
    with pytest.raises(ValueError, match="no parameter of this RecurrentGemmaForCausalLM is trainable"):
        parameter_groups(model.requires_grad_(False))


# ---------------------------------------------------------------- TRL


@pytest.fixture
def trl(monkeypatch):
    """TRL's settings inherit Trainer's; progress bars of datasets would fill the log."""
    trl = pytest.importorskip("trl", reason="fine-tuning with TRL needs the train extra")
    datasets = pytest.importorskip("datasets", reason="TRL needs datasets: install the train extra")
    datasets.disable_progress_bars()
    return trl


TRL_OPTIONS = {
    "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    "bf16": False, "gradient_checkpointing": True, "learning_rate": 1e-3,
}  # fmt: skip


def demo() -> RecurrentGemmaForCausalLM:
    return RecurrentGemmaForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32)


def test_sft_with_packing_and_completion_only_loss(trl, demo_tokenizer, tmp_path):
    from datasets import Dataset

    data = Dataset.from_list(
        [{"prompt": f"ROMEO:\nline {i}\n", "completion": "But soft, what light " * (1 + i % 4)} for i in range(16)]
    )
    options = trl.SFTConfig(
        str(tmp_path), packing=True, max_length=128, completion_only_loss=True, max_steps=6,
        per_device_train_batch_size=2, **TRL_OPTIONS,
    )  # fmt: skip
    model = demo()
    run = trl.SFTTrainer(model, options, train_dataset=data, processing_class=demo_tokenizer)
    batch = next(iter(run.get_train_dataloader()))
    starts = batch["position_ids"] == 0
    assert starts.sum() > 4, "several documents in a row"
    # TRL computes the loss itself, from the hidden states and the head's weight: it must know our soft cap.
    theirs = run.compute_loss(model.train(), dict(batch))
    torch.testing.assert_close(model(**batch).loss, theirs, rtol=1e-5, atol=0)
    # Completions only, and every document by itself.
    alone, count = 0.0, 0
    bounds = [*starts[0].nonzero().flatten().tolist(), starts.shape[1]]
    for start, stop in itertools.pairwise(bounds):
        labels = batch["labels"][:, start:stop]
        count += (labels[:, 1:] != -100).sum().item()
        alone += model(batch["input_ids"][:, start:stop], labels=labels, num_items_in_batch=1).loss
    torch.testing.assert_close(alone / count, theirs, rtol=1e-5, atol=0)
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]


def test_dpo_with_an_adapter(trl, demo_tokenizer, tmp_path):
    from datasets import Dataset
    from peft import LoraConfig

    data = Dataset.from_list(
        [{"prompt": f"ROMEO:\nline {i}\n", "chosen": "But soft!", "rejected": "zzz qqq"} for i in range(8)]
    )
    options = trl.DPOConfig(str(tmp_path), max_steps=4, per_device_train_batch_size=4, **TRL_OPTIONS)
    run = trl.DPOTrainer(
        demo(), args=options, train_dataset=data, processing_class=demo_tokenizer, peft_config=LoraConfig(r=8)
    )
    run.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)  # policy and reference are still the same
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"]
    assert rows[-1]["rewards/accuracies"] == 1


def test_an_adapter_of_another_model_is_refused(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    def adapter_of(model: nn.Module, name: str) -> str:
        get_peft_model(model, LoraConfig(r=2)).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    gemma = GemmaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=16
    )
    wide, deep, shallow, foreign = (
        adapter_of(model, name)
        for name, model in {
            "wide": RecurrentGemmaForCausalLM(tiny_config(lru_width=80)),
            "deep": RecurrentGemmaForCausalLM(tiny_config(num_hidden_layers=6)),
            "shallow": RecurrentGemmaForCausalLM(tiny_config(num_hidden_layers=2)),
            "foreign": GemmaForCausalLM(gemma),
        }.items()
    )
    with pytest.raises(RuntimeError, match=r"size mismatch for .*linear_x\.lora_B.*\[80, 2\].*\[48, 2\]"):
        PeftModel.from_pretrained(build(tiny_config(), seed=3), wide)
    with pytest.raises(ValueError, match=r"38 places that this model does not have: .*layers\.3.*other base model"):
        PeftModel.from_pretrained(build(tiny_config(), seed=3), deep)
    with pytest.warns(UserWarning, match=r"missing adapter keys .*layers\.2\."):
        PeftModel.from_pretrained(build(tiny_config(), seed=3), shallow)
    with pytest.raises((ValueError, RuntimeError), match=r"size mismatch|does not have"):
        PeftModel.from_pretrained(build(tiny_config(), seed=3), foreign)
