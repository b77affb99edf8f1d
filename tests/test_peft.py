"""Adapters: which layers they go on, on the gates of the RG-LRU, DoRA, merged, saved, switched; quantized bases."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import constants
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from recurrent_gemma_hf import (
    RecurrentGemmaForCausalLM,
    RecurrentGemmaForSequenceClassification,
    demo_checkpoint,
    peft_defaults,
)
from tests.helpers import VARIANTS, build, tiny_config

# peft asks for it under the old name, which Transformers 5.23 is about to retire.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(3, 43)[None]
GATES = ["rg_lru.input_gate_weight", "rg_lru.recurrent_gate_weight"]
MLP = {"gate_proj", "up_proj", "down_proj"}
LINEAR = {
    "recurrent": MLP | {"linear_x", "linear_y", "linear_out"},
    "attention": MLP | {"q_proj", "k_proj", "v_proj", "o_proj"},
}
KINDS = {
    "default": {},
    "all-linear": {"target_modules": "all-linear"},
    "dora": {"use_dora": True},
    "gates": {"target_modules": [], "target_parameters": GATES},
    "gates and layers": {"target_modules": "all-linear", "target_parameters": GATES},
}


def base(variant: str = "wide_lru") -> RecurrentGemmaForCausalLM:
    return build(tiny_config(variant), seed=3)


def adapted(kind: str, variant: str = "wide_lru", **options) -> PeftModel:
    """With adapters that do something from the start."""
    torch.manual_seed(7)
    return get_peft_model(base(variant), LoraConfig(r=4, init_lora_weights=False, **{**KINDS[kind], **options})).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- what is adapted


@pytest.mark.parametrize("kind", ["default", "all-linear"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_linear_layer_and_nothing_else(kind, variant):
    model = adapted(kind, variant)
    got = {
        name.split(".lora_")[0].removeprefix("base_model.model.model.layers.")
        for name, _ in model.named_parameters()
        if ".lora_" in name
    }
    got = {(int(name.split(".")[0]), name.split(".")[-1]) for name in got}
    blocks = model.config.layers_block_type if hasattr(model.config, "layers_block_type") else None
    assert got == {(i, layer) for i, block in enumerate(blocks) for layer in LINEAR[block]}


def test_a_classifier_keeps_its_head_out_of_all_linear():
    model = RecurrentGemmaForSequenceClassification(tiny_config())
    model = get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear"))
    assert not any("score" in name and "lora" in name for name, _ in model.named_parameters())
    assert any("score.modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)


# ---------------------------------------------------------------- defaults of every method


def tables_for_gemma(module: ModuleType) -> dict[str, dict]:
    return {name: table for name, table in vars(module).items() if isinstance(table, dict) and "gemma" in table}


# The methods that have a default for Gemma, each by the tables that its tuner reads.
METHODS = {
    kind.value: tables
    for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
    if (tables := tables_for_gemma(sys.modules[tuner.__module__]))
}
# What a method cannot do without, and sizes that fit a model 48 wide where its defaults are for larger ones.
OPTIONS = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 12},
    "FOURIERFT": {"n_frequency": 50},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 12},
    "WAVEFT": {"n_frequency": 50},
}


def test_no_table_is_left_out():
    assert set().union(*METHODS.values()) == set(tables_for_gemma(constants))


@pytest.mark.parametrize("table", tables_for_gemma(constants).values(), ids=tables_for_gemma(constants))
def test_every_table_with_gemma_has_us(table):
    """And names modules of the model alone: where Gemma's are its norms, ours are all norms, and so on."""
    modules = dict(base().named_modules())
    ends = {name.split(".")[-1] for name in modules}
    assert set(table["recurrent_gemma"]) <= ends
    expected = {
        ("q_proj", "v_proj"): set(peft_defaults.LINEAR_LAYERS),
        ("input_layernorm", "post_attention_layernorm", "norm"): {e for e in ends if e.endswith("_norm")},
        ("q_proj", "v_proj", "down_proj"): {"q_proj", "v_proj", "linear_x", "linear_y", "down_proj"},
        ("v_proj",): {"v_proj", "linear_x"},
        ("down_proj",): {"down_proj"},
    }
    assert set(table["recurrent_gemma"]) == expected.get(tuple(table["gemma"]), set(peft_defaults.LINEAR_LAYERS))


# PEFT's own: what a method adjusts, cannot merge, or would do faster with a compiler for CUDA.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_without_target_modules(method):
    """All of what it adds has gradients, and one step of gradient descent lowers the loss."""
    torch.manual_seed(7)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)](task_type="CAUSAL_LM", **OPTIONS.get(method, {}))
    model = get_peft_model(build(tiny_config(), seed=3), config).train()
    inputs = {"input_ids": IDS, "labels": IDS} | ({"task_ids": torch.tensor([0])} if method == "POLY" else {})
    before = model(**inputs).loss
    before.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    square = sum(p.grad.square().sum() for p in trained.values())
    assert square > 0
    with torch.no_grad():
        for parameter in trained.values():
            parameter -= 0.01 * parameter.grad / square.sqrt()
    assert model.eval()(**inputs).loss < before
    adapted = {name.split(".")[-1] for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    assert adapted == {name for table in METHODS[method].values() for name in table["recurrent_gemma"]}


@pytest.mark.parametrize("first", ["recurrent_gemma_hf", "peft"])
def test_defaults_are_there_in_any_order_of_imports_and_cost_none(first):
    second = {"recurrent_gemma_hf": "peft", "peft": "recurrent_gemma_hf"}[first]
    code = f"""
import sys, {first}
assert {first == "peft"} or "peft" not in sys.modules, "importing the package must not import peft"
import {second}
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import constants
from recurrent_gemma_hf import peft_defaults
assert constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["recurrent_gemma"] == peft_defaults.LINEAR_LAYERS
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-1500:]


# ---------------------------------------------------------------- merged, disabled, saved, switched


@pytest.mark.parametrize("kind", KINDS)
def test_merging_changes_nothing(kind, tmp_path):
    model = adapted(kind)
    plain, with_adapter = logits(base()), logits(model)
    assert (with_adapter - plain).abs().max() > 0.1
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=0)
    model.merge_adapter()
    assert_close(logits(model), with_adapter)
    model.unmerge_adapter()
    assert_close(logits(model), with_adapter)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(again), with_adapter, rtol=1e-6, atol=1e-5)
    merged = again.merge_and_unload()
    assert type(merged) is RecurrentGemmaForCausalLM
    assert_close(logits(merged), with_adapter)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(logits(RecurrentGemmaForCausalLM.from_pretrained(tmp_path / "merged")), with_adapter)


def test_an_adapter_finds_its_base(tmp_path):
    """The class comes from `task_type`; without one PEFT wants to be told that it may import this package."""
    base().save_pretrained(tmp_path / "base")
    for task, folder in (("CAUSAL_LM", "adapter"), (None, "adapter without a task")):
        model = get_peft_model(
            RecurrentGemmaForCausalLM.from_pretrained(tmp_path / "base"),
            LoraConfig(r=4, init_lora_weights=False, task_type=task),
        ).eval()
        model.save_pretrained(tmp_path / folder)
        if task is not None:
            again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / folder).eval()
            assert type(again.get_base_model()) is RecurrentGemmaForCausalLM
            torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    again = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter without a task", import_allowlist=["recurrent_gemma_hf"]
    ).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["default", "gates"])
def test_gradients_of_adapters_are_those_of_the_merged_weights(kind):
    """d loss / d A = scale * B^T dW, d loss / d B = scale * dW A^T: the chain rule, by hand, from the merged model."""
    model = adapted(kind).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if ".lora_" in name}
    assert gradients
    assert all(p.grad is None for name, p in model.named_parameters() if ".lora_" not in name)
    assert all(gradient.norm() > 0 for gradient in gradients.values())
    if kind == "gates":
        return
    merged = adapted(kind).merge_and_unload().train().requires_grad_(True)
    merged(input_ids=IDS, labels=IDS).loss.backward()
    whole = {name: p.grad for name, p in merged.named_parameters()}
    weights = dict(model.named_parameters())
    for name, gradient in gradients.items():
        stem, which = name.removeprefix("base_model.model.").removesuffix(".default.weight").rsplit(".lora_", 1)
        other = weights[name.replace(f"lora_{which}", "lora_B" if which == "A" else "lora_A")]
        dW = whole[f"{stem}.weight"] * 2.0  # lora_alpha / r
        expected = other.t() @ dW if which == "A" else dW @ other.t()
        assert (gradient - expected).norm() <= 1e-4 * expected.norm(), name


# Transformers 5.23 has a new name for it, which 5.17 does not know.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(kind):
    results = []
    for checkpointing in (False, True):
        model = adapted(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, labels=IDS).loss.backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_switching_adapters(tmp_path):
    """Two adapters of one base: each by itself, in turns, also while generating; the cache tells the models apart."""
    model = adapted("default")
    first = logits(model)
    torch.manual_seed(8)
    model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False, target_modules=["linear_x", "q_proj"]))
    model.set_adapter("other")
    other = logits(model)
    assert (first - other).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    for name, expected in (("default", first), ("other", other), ("default", first)):
        again.set_adapter(name)
        assert_close(logits(again), expected)
    again.set_adapter("other")
    again.delete_adapter("default")
    assert_close(logits(again), other)
    assert again.generate(input_ids=IDS, max_new_tokens=4, do_sample=False).shape == (1, 44)


# ---------------------------------------------------------------- quantized bases

FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
BITS = {
    4: {**FOUR, "bnb_4bit_compute_dtype": torch.float32},
    8: {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """Widths are multiples of 64: bitsandbytes' 4-bit products on a CPU with AVX-512 take no others."""
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes: install the train extra")
    config = tiny_config(
        hidden_size=128, head_dim=32, lru_width=192, intermediate_size=512, logits_soft_cap=30.0, vocab_size=300
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    build(config, seed=3).save_pretrained(folder)
    return str(folder)


def quantized(checkpoint: str, bits: int) -> RecurrentGemmaForCausalLM:
    return RecurrentGemmaForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**BITS[bits])
    )


# bitsandbytes says that 8-bit products round their inputs to float16.
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("bits", BITS)
def test_what_is_quantized(checkpoint, bits):
    """The linear layers of the blocks; embedding, head, norms, convolution, gates and Lambda keep their values."""
    model, plain = quantized(checkpoint, bits), RecurrentGemmaForCausalLM.from_pretrained(checkpoint)
    whole = dict(plain.named_parameters())
    changed = {n for n, p in model.named_parameters() if p.shape != whole[n].shape or not torch.equal(p, whole[n])}
    linear = {f"model.{n}.weight" for n, module in plain.model.named_modules() if isinstance(module, nn.Linear)}
    assert changed == linear
    with torch.no_grad():
        difference = model(IDS).logits - plain(IDS).logits
    assert difference.norm() < {4: 0.3, 8: 0.05}[bits] * plain(IDS).logits.norm()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("bits", BITS)
def test_qlora_learns_a_sentence(checkpoint, bits, tmp_path):
    from peft import prepare_model_for_kbit_training

    model = quantized(checkpoint, bits)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=8)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(12):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(checkpoint, bits), tmp_path).eval()
    assert (logits(again) - logits(model)).norm() <= 0.01 * logits(model).norm()


def test_float16_keeps_the_recurrence_in_float32():
    """bfloat16 keeps the dtype of the published files throughout."""
    model = RecurrentGemmaForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {n for n, _ in model.named_parameters() if "rg_lru" in n or "conv_1d" in n or "_norm." in n}
    exact = RecurrentGemmaForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits.float(), exact(IDS).logits, rtol=0.01, atol=0.05)
    model = RecurrentGemmaForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert Path(demo_checkpoint()).is_dir()


def test_repeated_layers_keep_their_kinds(tmp_path):
    """peft's layer_replication tells the config how many layers there are, but not of which kind. Text written with
    the cache equals a forward over everything."""
    torch.manual_seed(7)
    config = LoraConfig(r=4, init_lora_weights=False, layer_replication=[[0, 3], [1, 3]], task_type="CAUSAL_LM")
    model = get_peft_model(base(), config).eval()
    assert model.config.layers_block_type == ["recurrent", "recurrent", "attention", "recurrent", "attention"]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert_close(logits(again), logits(model))
    text = again.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(again(text).logits.argmax(-1)[:, -7:-1], text[:, -6:])


@pytest.mark.filterwarnings(
    "ignore:Position ids are not supported:UserWarning"
)  # generate() passes them, peft drops them
@pytest.mark.parametrize("blocks", [None, ["recurrent"]], ids=str)
def test_prompt_tuning_puts_its_virtual_tokens_in_once(blocks: list[str] | None):
    """Generating equals a forward over everything for each token."""
    model = build(tiny_config(logits_soft_cap=0.0, **({} if blocks is None else {"block_types": blocks})), seed=3)
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    ids = text = torch.randint(3, 101, (1, 9))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        for _ in range(6):
            text = torch.cat([text, model(input_ids=text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(input_ids=ids, **options), text)


def test_prefix_tuning_is_refused():
    model = build(tiny_config(), seed=3)
    model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with pytest.raises(ValueError, match=r"already holds keys or states .*prefix tuning.* LoRA and prompt tuning work"):
        model(input_ids=torch.randint(3, 101, (1, 9)))
    with pytest.raises(ValueError, match=r"already holds keys or states .*prefix tuning.* LoRA and prompt tuning work"):
        model.generate(input_ids=torch.randint(3, 101, (1, 9)), max_new_tokens=2)


def test_shadow_tuning_generates():
    """Its cache wraps ours and is unwrapped only in front of the model's forward pass."""
    if not hasattr(peft, "ShadowConfig"):
        pytest.skip("this PEFT has no ShadowPEFT")
    model = get_peft_model(build(tiny_config(), seed=3), peft.ShadowConfig(task_type="CAUSAL_LM")).eval()
    ids = text = torch.randint(3, 101, (1, 9))
    with torch.no_grad():
        for _ in range(6):
            text = torch.cat([text, model(input_ids=text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=ids, **options), text)
