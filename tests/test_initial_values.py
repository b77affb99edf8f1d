"""Initial values: the official distributions, for every parameter and every head, and only where nothing is loaded."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
)

from recurrent_gemma_hf import (
    RecurrentGemmaForCausalLM,
    RecurrentGemmaModel,
)
from tests.helpers import (
    HEADS,
    build,
    tiny_config,
)

MEDIUM = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1536, "lru_width": 384, "vocab_size": 500}


def expected_std(name: str, parameter: Tensor, config) -> float:
    """The official standard deviations, by parameter name."""
    E, D, F_ = config.hidden_size, config.lru_width, config.intermediate_size // 2
    final = config.final_w_init_variance_scale
    if name.endswith(("norm.weight", ".bias", "_gate_bias")):
        return 0.0
    stds = {
        "linear_out.weight": math.sqrt(final / D),
        "o_proj.weight": math.sqrt(final / E),
        "down_proj.weight": math.sqrt(final / F_),
        "conv_1d.weight": math.sqrt(config.w_init_variance_scale / config.conv1d_width),
        "_gate_weight": 1 / math.sqrt(D // config.num_attention_heads),
    }
    for ending, std in stds.items():
        if name.endswith(ending):
            return std
    inputs_of_width = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "linear_x")
    assert name.split(".")[-2] in (*inputs_of_width, "linear_y", "score", "qa_outputs"), f"no rule for {name}"
    return 1 / math.sqrt(E)


def assert_initial(model: nn.Module, names: set[str] | None = None) -> None:
    for name, parameter in model.named_parameters():
        if (names is not None and name not in names) or name.endswith("recurrent_param"):
            continue
        std, n = expected_std(name, parameter, model.config), parameter.numel()
        assert abs(parameter.mean().item()) <= 6 * std / math.sqrt(n), f"{name}: mean {parameter.mean()}"
        if std == 0:
            assert not parameter.any(), name
        else:
            deviation = abs(parameter.std().item() / std - 1)
            assert deviation <= 6 / math.sqrt(2 * (n - 1)), f"{name}: std {parameter.std()} instead of {std}"


def assert_ring(recurrent_param: Tensor) -> None:
    """a = exp(-softplus(Lambda)) lies in the ring 0.9 to 0.999, uniformly by area (Kolmogorov-Smirnov, p < 1e-6)."""
    square = torch.exp(-2 * F.softplus(recurrent_param.double())).sort().values
    low, high = 0.9**2, 0.999**2
    assert low - 1e-6 <= square.min()
    assert square.max() <= high + 1e-6
    n = square.numel()
    distance = ((square - low) / (high - low) - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 2.7 / math.sqrt(n) + 0.5 / n


@pytest.mark.parametrize("head", [RecurrentGemmaModel, *HEADS])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_initial_values_of_every_parameter(head, tie):
    model = head(tiny_config(**MEDIUM, tie_word_embeddings=tie, num_labels=5))
    assert_initial(model)
    for name, parameter in model.named_parameters():
        if name.endswith("recurrent_param"):
            assert_ring(parameter)


def test_initial_values_through_from_config():
    model = AutoModelForCausalLM.from_config(tiny_config(**MEDIUM), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_initial(model.float())


def test_lambda_of_a_wide_model():
    config = tiny_config(lru_width=8192, num_hidden_layers=1)
    assert_ring(RecurrentGemmaModel(config).layers[0].temporal_block.rg_lru.recurrent_param)


@pytest.mark.parametrize("variant", ["recurrentgemma", "wide_lru", "hawk"])
def test_initial_statistics_equal_those_of_the_official_model(variant):
    config = tiny_config(variant, **{**MEDIUM, "lru_width": 256 if variant == "recurrentgemma" else 384})
    oracles = pytest.importorskip("tests.oracles")
    ours = oracles.to_official_state(config, RecurrentGemmaForCausalLM(config).state_dict())
    official = oracles.official_torch_code.Griffin(oracles.official_config(config)).state_dict()
    assert ours.keys() == official.keys()
    for name, expected in official.items():
        got = ours[name]
        assert got.shape == expected.shape, name
        error = expected.std().item() * math.sqrt(2 / expected.numel())
        assert abs(got.mean() - expected.mean()).item() <= 6 * error, name
        assert abs(got.std() - expected.std()).item() <= 6 * error, name


@pytest.mark.parametrize("head", HEADS[1:])
def test_a_head_that_the_checkpoint_lacks_is_initialised(head, tmp_path):
    base = build(tiny_config(**MEDIUM))
    base.save_pretrained(tmp_path)
    model, info = head.from_pretrained(tmp_path, dtype=torch.float32, num_labels=64, output_loading_info=True)
    new = {name for name in info["missing_keys"] if not name.startswith("model.")}
    assert new == {name for name, _ in model.named_parameters() if not name.startswith("model.")}
    assert_initial(model, new)
    for name, parameter in base.model.named_parameters():
        assert torch.equal(model.model.get_parameter(name), parameter), name
