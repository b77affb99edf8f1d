"""Checkpoints on their way to and from the Hub: folders that carry their code, shards, the published names, broken
files, Auto classes, pipelines, PEFT, and the dtype that a CPU gets.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.utils.logging import warning_once

from recurrent_gemma_hf import (
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RecurrentGemmaForQuestionAnswering,
    RecurrentGemmaForSequenceClassification,
    RecurrentGemmaForTokenClassification,
    RecurrentGemmaModel,
    modeling_recurrent_gemma,
)
from tests.helpers import build, tiny_config

AUTO_CLASSES = {
    AutoModel: RecurrentGemmaModel,
    AutoModelForCausalLM: RecurrentGemmaForCausalLM,
    AutoModelForSequenceClassification: RecurrentGemmaForSequenceClassification,
    AutoModelForTokenClassification: RecurrentGemmaForTokenClassification,
    AutoModelForQuestionAnswering: RecurrentGemmaForQuestionAnswering,
}
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def model() -> RecurrentGemmaForCausalLM:
    return build(tiny_config(eos_token_id=None), seed=6)


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def load(folder: Path, **options) -> RecurrentGemmaForCausalLM:
    return RecurrentGemmaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def assert_same_logits(got, expected) -> None:
    with torch.no_grad():
        torch.testing.assert_close(got(IDS).logits, expected(IDS).logits, rtol=0, atol=0)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- a folder that carries its code -----------------------------------------------------------------------------------

ELSEWHERE = """
import importlib.util, json, sys
sys.modules["recurrent_gemma_hf"] = None  # importing it raises, whether or not this interpreter has it installed
try:
    import recurrent_gemma_hf
except ImportError:
    pass
else:
    raise SystemExit("recurrent_gemma_hf can be imported")
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

folder, ids = sys.argv[1], torch.arange(3, 40)[None]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
base = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
with torch.no_grad():
    print(json.dumps({
        "modules": [type(x).__module__ for x in (config, model, base, classifier)],
        "classes": [type(x).__name__ for x in (config, model, base, classifier)],
        "sliding_window": config.sliding_window,
        "logits": model(ids).logits[0, -1].tolist(),
        "cache": type(model(ids).past_key_values).__name__,
        "text": model.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist(),
        "hidden": list(base(ids).last_hidden_state.shape),
        "labels": classifier.num_labels,
    }))
"""


@pytest.fixture
def registered(monkeypatch):
    """register_for_auto_class marks the classes for the rest of the process; this takes the marks away again."""
    for cls in (RecurrentGemmaConfig, *AUTO_CLASSES.values()):
        monkeypatch.setattr(cls, "_auto_class", None)
    RecurrentGemmaConfig.register_for_auto_class()
    for auto_class, cls in AUTO_CLASSES.items():
        cls.register_for_auto_class(auto_class.__name__)


@pytest.mark.usefixtures("registered")
def test_a_saved_folder_runs_where_the_package_is_not_installed(model, tmp_path):
    folder, elsewhere = tmp_path / "checkpoint", tmp_path / "elsewhere"
    AUTO_CLASSES[AutoModelForSequenceClassification](model.config).save_pretrained(folder)  # brings its own file
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "modeling_recurrent_gemma.RecurrentGemmaModel"
    model.save_pretrained(folder)
    config["auto_map"] |= json.loads((folder / "config.json").read_text())["auto_map"]
    assert config["auto_map"]["AutoModelForSequenceClassification"].startswith("task_heads.")
    (folder / "config.json").write_text(json.dumps(config))
    elsewhere.mkdir()
    kept = ("PATH", "HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(elsewhere)}
    # Not -W error: what other packages warn of while they are imported is not this test's business.
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder)], env=environment, cwd=elsewhere, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    got = json.loads(run.stdout.splitlines()[-1])
    assert all(module.startswith("transformers_modules.checkpoint.") for module in got["modules"]), got["modules"]
    assert got["classes"] == [
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaModel",
        "RecurrentGemmaForSequenceClassification",
    ]
    assert got["sliding_window"] == model.config.attention_window_size + 1
    assert got["cache"] == "RecurrentGemmaCache"
    assert got["hidden"] == [1, 37, model.config.hidden_size]
    assert got["labels"] == 3
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(got["logits"]), model(IDS).logits[0, -1], atol=1e-5, rtol=1e-5)
        assert got["text"] == model.generate(IDS, max_new_tokens=20, do_sample=False)[0].tolist()


@pytest.mark.usefixtures("registered")
def test_the_folder_carries_what_it_needs_and_no_more(model, tmp_path):
    model.save_pretrained(tmp_path)
    source = Path(modeling_recurrent_gemma.__file__).parent
    carried = sorted(path.name for path in tmp_path.glob("*.py"))
    assert {"configuration_recurrent_gemma.py", "modeling_recurrent_gemma.py"} <= set(carried)
    assert not {"training.py", "__init__.py"} & set(carried)
    for name in carried:
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_recurrent_gemma.RecurrentGemmaConfig",
        "AutoModelForCausalLM": "modeling_recurrent_gemma.RecurrentGemmaForCausalLM",
    }


@pytest.mark.usefixtures("registered")
def test_where_the_package_is_installed_it_is_what_runs(model, tmp_path):
    """No question is asked, and no code of the folder is run."""
    model.save_pretrained(tmp_path)
    (tmp_path / "modeling_recurrent_gemma.py").write_text("raise SystemExit('the code of the folder ran')")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is RecurrentGemmaForCausalLM


def test_without_registration_no_code_is_saved(checkpoint):
    assert not list(checkpoint.glob("*.py"))
    assert "auto_map" not in json.loads((checkpoint / "config.json").read_text())


# --- shards, names, broken files --------------------------------------------------------------------------------------


def test_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) >= 3
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_logits(load(tmp_path), model)
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name):
        load(tmp_path)


MLP_NAMES = " ".join(f"mlp_block.{name}_proj.{kind}" for name in ("down", "gate", "up") for kind in ("bias", "weight"))
NORM_NAMES = "channel_pre_norm.weight temporal_pre_norm.weight"
TEMPORAL_NAMES = [
    "conv_1d.bias conv_1d.weight linear_out.bias linear_out.weight linear_x.bias linear_x.weight linear_y.bias "
    "linear_y.weight rg_lru.input_gate_bias rg_lru.input_gate_weight rg_lru.recurrent_gate_bias "
    "rg_lru.recurrent_gate_weight rg_lru.recurrent_param",
    "k_proj.weight o_proj.bias o_proj.weight q_proj.weight v_proj.weight",
]
PUBLISHED_NAMES = ["model.embed_tokens.weight", "model.final_norm.weight"] + [
    f"model.layers.{i}.{name}"
    for i, names in enumerate(TEMPORAL_NAMES)
    for name in [*f"{MLP_NAMES} {NORM_NAMES}".split(), *(f"temporal_block.{name}" for name in names.split())]
]

# Instead of E 2560, D 2560, 10 heads, MLP 7680, V 256000: E 8, D 12, 2 heads, MLP 6, V 20
PUBLISHED_SHAPES = {
    "embed_tokens.weight": (20, 8), "norm.weight": (8,), "down_proj.weight": (8, 6), "down_proj.bias": (8,),
    "gate_proj.weight": (6, 8), "gate_proj.bias": (6,), "up_proj.weight": (6, 8), "up_proj.bias": (6,),
    "conv_1d.weight": (12, 1, 4), "conv_1d.bias": (12,), "linear_out.weight": (8, 12), "linear_out.bias": (8,),
    "linear_x.weight": (12, 8), "linear_x.bias": (12,), "linear_y.weight": (12, 8), "linear_y.bias": (12,),
    "_gate_weight": (2, 6, 6), "_gate_bias": (2, 6), "recurrent_param": (12,), "k_proj.weight": (4, 8),
    "v_proj.weight": (4, 8), "q_proj.weight": (8, 8), "o_proj.weight": (8, 8), "o_proj.bias": (8,),
}  # fmt: skip


def test_the_published_names_load(tmp_path):
    assert len(PUBLISHED_NAMES) == 36
    config = tiny_config(vocab_size=20, hidden_size=8, head_dim=4, lru_width=12, num_attention_heads=2,
                         intermediate_size=12, num_hidden_layers=2, block_types=["recurrent", "attention"])  # fmt: skip
    weights = {
        name: torch.randn(next(shape for ending, shape in PUBLISHED_SHAPES.items() if name.endswith(ending)))
        for name in PUBLISHED_NAMES
    }
    config.save_pretrained(tmp_path)
    write_weights(tmp_path, weights)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    state = loaded.state_dict()
    assert torch.equal(state.pop("lm_head.weight"), weights["model.embed_tokens.weight"])
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], value) for name, value in weights.items())


@pytest.mark.parametrize("head", [RecurrentGemmaForCausalLM, RecurrentGemmaModel, AutoModelForSequenceClassification])
def test_missing_weights_are_named(head, checkpoint):
    weights = weights_of(checkpoint)
    del weights["model.layers.1.temporal_block.rg_lru.recurrent_param"], weights["model.final_norm.weight"]
    write_weights(checkpoint, weights)
    names = r"final_norm\.weight, .*layers\.1\.temporal_block\.rg_lru\.recurrent_param\. Is this"
    with pytest.raises(ValueError, match=rf"2 weights of .* are missing: .*{names}"):
        head.from_pretrained(checkpoint)


def test_unexpected_weights_are_named(checkpoint):
    weights = weights_of(checkpoint)
    weights |= {f"model.layers.{i}.temporal_pre_norm.wieght": torch.zeros(3) for i in range(10)}
    write_weights(checkpoint, weights)
    with pytest.raises(ValueError, match=r"10 weights .* are unexpected: model\.layers\.0\..*wieght.* and 2 more"):
        load(checkpoint)


def test_a_deeper_checkpoint_is_not_cut(checkpoint):
    with pytest.raises(ValueError, match=r"are unexpected: model\.layers\.2\.channel_pre_norm\.weight"):
        load(checkpoint, num_hidden_layers=2)


def test_weights_of_another_shape(checkpoint):
    with pytest.raises(RuntimeError, match="mismatch"):
        load(checkpoint, lru_width=60)


@pytest.mark.parametrize("keep", [4, 100, 0.5, -1], ids=["header_length", "header", "half", "last_byte"])
def test_truncated_weights(checkpoint, keep):
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(SafetensorError):
        load(checkpoint)


def test_no_weights_at_all(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(checkpoint)


# --- Auto classes, pipelines, adapters --------------------------------------------------------------------------------


@pytest.mark.parametrize(("auto_class", "expected"), AUTO_CLASSES.items(), ids=lambda cls: cls.__name__)
def test_the_auto_classes_give_ours(auto_class, expected, checkpoint):
    assert type(auto_class.from_pretrained(checkpoint)) is expected
    assert type(auto_class.from_config(AutoConfig.from_pretrained(checkpoint))) is expected


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Characters from 'a' on, after padding, end and beginning."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>"])}
    vocabulary |= {chr(ord("a") + i): 4 + i for i in range(26)}
    vocabulary |= {f"<{i}>": i for i in range(30, 101)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def test_text_generation_pipeline(model, checkpoint, tokenizer):
    """One prompt, and prompts of different lengths in one batch, which the tokenizer pads on the left."""
    tokenizer.save_pretrained(checkpoint)
    generate = pipeline("text-generation", model=str(checkpoint), dtype=torch.float32, device="cpu")
    assert type(generate.model) is RecurrentGemmaForCausalLM
    prompts = ["hello", "griffin", "ab"]
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    texts = [generate(prompt, **options)[0]["generated_text"] for prompt in prompts]
    batched = [texts_of_one[0]["generated_text"] for texts_of_one in generate(prompts, batch_size=3, **options)]
    assert batched == texts
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert text == tokenizer.decode(expected, skip_special_tokens=True)


# --- the dtype that a CPU gets ----------------------------------------------------------------------------------------


@pytest.fixture
def bfloat16_checkpoint(tmp_path) -> Path:
    build(tiny_config(eos_token_id=None)).bfloat16().save_pretrained(tmp_path / "bfloat16")
    return tmp_path / "bfloat16"


@pytest.fixture
def cpu_without_bfloat16(monkeypatch, caplog):
    """Whether this machine's CPU has it or not; and the warnings said so far."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    warning_once.cache_clear()
    caplog.set_level(logging.WARNING)
    yield lambda: [r.getMessage() for r in caplog.records if "bfloat16 instructions" in r.getMessage()]
    warning_once.cache_clear()


def test_a_cpu_without_bfloat16_gets_float32_and_is_told_once(bfloat16_checkpoint, cpu_without_bfloat16):
    kept = RecurrentGemmaForCausalLM.from_pretrained(bfloat16_checkpoint, dtype=torch.bfloat16)
    assert (kept.dtype, cpu_without_bfloat16()) == (torch.bfloat16, [])
    for cls in (AutoModelForCausalLM, RecurrentGemmaForCausalLM, RecurrentGemmaModel):
        model = cls.from_pretrained(bfloat16_checkpoint)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.config.dtype == torch.float32
    said = cpu_without_bfloat16()
    assert len(said) == 1
    assert "Pass dtype=torch.bfloat16 to keep bfloat16" in said[0]
    model = AutoModelForCausalLM.from_pretrained(bfloat16_checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_logits(model, kept.float())


def test_the_default_dtype_of_a_pipeline(bfloat16_checkpoint, cpu_without_bfloat16, tokenizer):
    tokenizer.save_pretrained(bfloat16_checkpoint)
    assert pipeline("text-generation", model=str(bfloat16_checkpoint)).model.dtype == torch.float32
    assert len(cpu_without_bfloat16()) == 1


@pytest.mark.parametrize(
    "options", [{"device_map": "auto"}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}], ids=str
)
@pytest.mark.usefixtures("cpu_without_bfloat16")
def test_the_default_dtype_with_a_device_map(bfloat16_checkpoint, options):
    assert AutoModelForCausalLM.from_pretrained(bfloat16_checkpoint, **options).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_only_bfloat16_is_converted(dtype, tmp_path, cpu_without_bfloat16):
    build(tiny_config()).to(dtype).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype
    assert cpu_without_bfloat16() == []


def test_a_cpu_with_bfloat16_keeps_it(bfloat16_checkpoint, cpu_without_bfloat16, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert AutoModelForCausalLM.from_pretrained(bfloat16_checkpoint).dtype == torch.bfloat16
    assert cpu_without_bfloat16() == []


def test_float32_is_what_a_bfloat16_model_saves_after_conversion(bfloat16_checkpoint, tmp_path, cpu_without_bfloat16):
    AutoModelForCausalLM.from_pretrained(bfloat16_checkpoint).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "float32"
    assert len(cpu_without_bfloat16()) == 1
    shutil.rmtree(bfloat16_checkpoint)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").dtype == torch.float32
