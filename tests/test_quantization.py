"""Weight-only quantization by torchao: what is converted, that it generates, survives the disk and stays accurate."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig

from recurrent_gemma_hf import RecurrentGemmaForCausalLM, demo_checkpoint
from recurrent_gemma_hf.cpu_linear import FEW_INT8_ROWS, linear
from tests.helpers import assert_is_linear, byte_config

TEXT = "ROMEO: But soft, what light through yonder window breaks?"
PROJECTIONS = {"linear_x", "linear_y", "linear_out", "q_proj", "k_proj", "v_proj", "o_proj"}
PROJECTIONS |= {"gate_proj", "up_proj", "down_proj"}


def load(path: str, **kwargs) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **kwargs)


@pytest.fixture(scope="module")
def int8() -> nn.Module:
    return load(demo_checkpoint(), quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))


@pytest.fixture(scope="module")
def ids(demo_tokenizer) -> torch.Tensor:
    return demo_tokenizer(TEXT, return_tensors="pt").input_ids


def test_projections_are_quantized_and_nothing_else(int8: nn.Module):
    """Gates, Lambda, convolution, norms, biases, embedding and head keep their precision, whatever quantizer it is:
    quantizers of Linear layers find the projections alone, because the gates are parameters of their own."""
    quantized = {name for name, parameter in int8.named_parameters() if type(parameter).__name__ == "Int8Tensor"}
    assert {name.split(".")[-2] for name in quantized} == PROJECTIONS
    linear = {f"{name}.weight" for name, module in int8.named_modules() if isinstance(module, nn.Linear)}
    assert linear == quantized | {"lm_head.weight"}
    rest = {name: p.dtype for name, p in int8.named_parameters() if name not in quantized}
    assert set(rest.values()) == {torch.bfloat16}


def test_the_state_is_float32(int8: nn.Module, ids: torch.Tensor):
    with torch.no_grad():
        cache = int8(ids).past_key_values
    assert {layer.tensors()["recurrent"].dtype for layer in cache.layers if "recurrent" in layer.tensors()} == {
        torch.float32
    }


def test_it_stays_near_the_model(int8: nn.Module, ids: torch.Tensor):
    reference = load(demo_checkpoint())
    with torch.no_grad():
        ours, exact = (F.log_softmax(model(ids).logits.float(), -1) for model in (int8, reference))
    divergence = (exact.exp() * (exact - ours)).sum(-1).mean()
    assert divergence < 1e-3  # nats; measured 3e-4


def test_generates_and_comes_back_from_the_disk(int8: nn.Module, ids: torch.Tensor, tmp_path):
    options = {"max_new_tokens": 12, "do_sample": False}
    text = int8.generate(ids, **options)
    assert text.shape[1] == ids.shape[1] + 12
    int8.save_pretrained(tmp_path)
    again = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, int8(ids).logits)
    assert torch.equal(again.generate(ids, **options), text)


def test_the_head_is_quantized_by_itself(ids: torch.Tensor):
    """As docs/quantization.md shows it: the embedding keeps its own table."""
    model = load(demo_checkpoint(), quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    table = model.model.embed_tokens.weight.clone()
    quantize_(model.lm_head, Int8WeightOnlyConfig())
    assert type(model.lm_head.weight).__name__ == "Int8Tensor"
    assert torch.equal(model.model.embed_tokens.weight, table)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, FEW_INT8_ROWS, FEW_INT8_ROWS + 1])
def test_int8_product(rows: int, bias: bool):
    layer = nn.Linear(80, 136, bias=bias).bfloat16()
    quantize_(layer, Int8WeightOnlyConfig())
    x = torch.randn(1, rows, 80).bfloat16()
    with torch.no_grad():
        assert_is_linear(layer, x, linear(layer, x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("inputs", [80, 82])
def test_int8_product_compiled(fresh_compiler, inputs: int, dtype: torch.dtype):
    """A loop of Inductor's own, which reads four values as one word where their number allows it."""
    layer = nn.Linear(inputs, 136).to(dtype)
    quantize_(layer, Int8WeightOnlyConfig())
    x = torch.randn(1, 1, inputs).to(dtype)
    with torch.no_grad():
        assert_is_linear(layer, x, torch.compile(linear, fullgraph=True)(layer, x))


def test_int4_at_widths_its_kernel_takes(tmp_path):
    config = byte_config(hidden_size=128, intermediate_size=256, lru_width=128)
    RecurrentGemmaForCausalLM(config).save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=32)))
    quantized = [name for name, p in model.named_parameters() if type(p).__name__ == "Int4OpaqueTensor"]
    assert {name.split(".")[-2] for name in quantized} == PROJECTIONS
    exact, ids = load(tmp_path), torch.randint(2, 265, (1, 9))
    with torch.no_grad():
        ours, expected = model(ids).logits.float(), exact(ids).logits.float()
    assert (ours - expected).norm() < 0.2 * expected.norm()
    assert not torch.equal(ours, expected)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 12)


def test_the_page_runs_as_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "quantization.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(block, "quantization.md", "exec"), names := {})
    assert type(names["model"].lm_head.weight).__name__ == "Int8Tensor"
    assert (tmp_path / "griffin-int8" / "model.safetensors").is_file()
