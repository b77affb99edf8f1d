"""RecurrentGemmaConfig: the published files, the presets, every field's effect, every bad value's error."""

import copy
import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.recurrent_gemma.configuration_recurrent_gemma import RecurrentGemmaConfig as InTreeConfig

from recurrent_gemma_hf import (
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RecurrentGemmaForSequenceClassification,
)
from tests.helpers import byte_config, in_pieces

FIXTURES = Path(__file__).parent / "fixtures"
INHERITED = {field.name for field in dataclasses.fields(PreTrainedConfig)}
OWN_FIELDS = [field.name for field in dataclasses.fields(RecurrentGemmaConfig) if field.name not in INHERITED]


def read_fixture(name: str, folder: Path) -> RecurrentGemmaConfig:
    """Through AutoConfig and a checkpoint folder, as users read it."""
    shutil.copy(FIXTURES / f"{name}.json", folder / "config.json")
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is RecurrentGemmaConfig
    return config


def own_values(config: RecurrentGemmaConfig) -> dict:
    return {name: getattr(config, name) for name in OWN_FIELDS}


# --- published files and presets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "preset", "eos_token_id"),
    [
        ("published_2b", "recurrentgemma-2b", 1),
        ("published_9b_it", "recurrentgemma-9b", [1, 107]),
        ("in_tree_2b", "recurrentgemma-2b", 1),
    ],
)
def test_published_files_are_the_presets(name, preset, eos_token_id, tmp_path):
    config = read_fixture(name, tmp_path)
    expected = RecurrentGemmaConfig.from_preset(preset, eos_token_id=eos_token_id)
    assert own_values(config) == own_values(expected)
    assert config.dtype == torch.bfloat16
    assert config.architectures == ["RecurrentGemmaForCausalLM"]


@pytest.mark.parametrize("name", ["published_2b", "published_9b_it", "in_tree_2b"])
def test_every_value_of_a_published_file_is_read(name, tmp_path):
    """Each field of the file, changed to another possible value, arrives in the config."""
    written = json.loads((FIXTURES / f"{name}.json").read_text())
    fields = {key: value for key, value in written.items() if key in OWN_FIELDS}
    other = {
        "attention_window_size": 16, "bos_token_id": 5, "conv1d_width": 5, "eos_token_id": 7, "head_dim": 128,
        "final_w_init_variance_scale": 0.5, "hidden_activation": "silu", "hidden_size": 640, "lru_width": 1280,
        "intermediate_size": 100, "logits_soft_cap": 0.0, "num_attention_heads": 5, "num_hidden_layers": 4,
        "num_key_value_heads": 5, "pad_token_id": 9, "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-5,
        "rope_theta": 500.0, "use_cache": False, "vocab_size": 300, "w_init_variance_scale": 0.1,
        "attention_bias": True, "attention_dropout": 0.25, "embeddings_scale_by_sqrt_dim": False,
        "block_types": ["attention", "recurrent"], "tie_word_embeddings": False, "fuse_linear_cross_entropy": False,
    }  # fmt: skip
    changed = {key: other[key] for key in fields}
    file = {**written, **changed}
    if "_block_types" in file:
        changed["block_types"] = file["_block_types"] = other["block_types"]
    if "rope_parameters" in file:
        file["rope_parameters"] = {"rope_theta": 500.0, "partial_rotary_factor": 0.25, "rope_type": "default"}
        changed |= {"rope_theta": 500.0, "partial_rotary_factor": 0.25}
    file.pop("layers_block_type", None)
    (tmp_path / "config.json").write_text(json.dumps(file))
    config = AutoConfig.from_pretrained(tmp_path)
    assert {key: getattr(config, key) for key in changed} == changed


def test_a_config_saved_by_the_in_tree_class(tmp_path):
    theirs = InTreeConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=5, num_key_value_heads=2,
                          rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
                          block_types=["attention", "recurrent"])  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = AutoConfig.from_pretrained(tmp_path)
    assert type(ours) is RecurrentGemmaConfig
    assert (ours.rope_theta, ours.partial_rotary_factor) == (500.0, 0.25)
    assert (ours.hidden_size, ours.head_dim, ours.num_key_value_heads) == (64, 16, 2)
    assert ours.layers_block_type == ["attention", "recurrent", "attention", "recurrent", "attention"]


@pytest.mark.parametrize(
    ("preset", "official"),
    [
        ("recurrentgemma-2b", "RECURRENT_GEMMA_2B_V1"),
        ("recurrentgemma-9b", "RECURRENT_GEMMA_9B_V1"),
        ("griffin-paper-7b", "GRIFFIN_PAPER_7B"),
        ("hawk-paper-7b", "HAWK_PAPER_7B"),
    ],
)
def test_presets_field_by_field(preset, official):
    common = pytest.importorskip("recurrentgemma.common", reason="the official presets: install the test extra")
    expected = common.GriffinConfig.from_preset(common.Preset[official])
    config = RecurrentGemmaConfig.from_preset(preset)
    assert config.vocab_size == expected.vocab_size
    assert config.hidden_size == expected.width
    assert config.intermediate_size == 2 * expected.mlp_expanded_width
    assert config.num_hidden_layers == len(expected.block_types)
    assert config.num_attention_heads == expected.num_heads
    assert config.num_key_value_heads == 1
    assert config.head_dim == expected.width // expected.num_heads
    assert config.lru_width == expected.lru_width
    assert config.layers_block_type == [kind.name.lower() for kind in expected.block_types]
    assert config.attention_window_size == expected.attention_window_size
    assert config.logits_soft_cap == expected.logits_soft_cap
    assert config.embeddings_scale_by_sqrt_dim == expected.embeddings_scale_by_sqrt_dim
    assert config.final_w_init_variance_scale == 2.0 / len(expected.block_types)


def test_the_default_is_the_2b_model():
    assert own_values(RecurrentGemmaConfig()) == own_values(RecurrentGemmaConfig.from_preset("recurrentgemma-2b"))


def test_presets_can_be_overridden_and_misspelled():
    config = RecurrentGemmaConfig.from_preset("hawk-paper-7b", num_hidden_layers=2, hidden_size=64, lru_width=96)
    assert config.layers_block_type == ["recurrent", "recurrent"]
    assert (config.head_dim, config.lru_width, config.final_w_init_variance_scale) == (2, 96, 1.0)
    assert RecurrentGemmaConfig.from_preset("hawk-paper-7b").num_hidden_layers == 32, "overriding changed the preset"
    with pytest.raises(ValueError, match="unknown preset 'recurrentgemma-3b'; there are recurrentgemma-2b, "):
        RecurrentGemmaConfig.from_preset("recurrentgemma-3b")


# --- derived values, copies, files ------------------------------------------------------------------------------------


def test_the_pattern_is_cycled_and_cut():
    config = byte_config(block_types=("attention", "recurrent", "recurrent"), num_hidden_layers=5)
    assert config.layers_block_type == ["attention", "recurrent", "recurrent", "attention", "recurrent"]
    assert config.layer_types == [
        {"attention": "sliding_attention", "recurrent": "linear_attention"}[kind] for kind in config.layers_block_type
    ]
    assert config.sliding_window == config.attention_window_size + 1
    assert byte_config(layers_block_type=["recurrent", "recurrent", "attention"]).num_hidden_layers == 3


def test_values_that_follow_from_others():
    config = byte_config(lru_width=None, num_hidden_layers=8)
    assert (config.head_dim, config.lru_width, config.final_w_init_variance_scale) == (8, 32, 0.25)


NON_DEFAULT = {
    "vocab_size": 50, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "lru_width": 60, "block_types": ["attention", "recurrent"],
    "attention_window_size": 7, "conv1d_width": 3, "logits_soft_cap": 5.5, "embeddings_scale_by_sqrt_dim": False,
    "rope_theta": 321.0, "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-4, "hidden_activation": "silu",
    "attention_dropout": 0.125, "attention_bias": True, "w_init_variance_scale": 0.02,
    "final_w_init_variance_scale": 0.75, "use_cache": False, "pad_token_id": 3, "eos_token_id": [4, 9],
    "bos_token_id": None, "tie_word_embeddings": False, "fuse_linear_cross_entropy": False,
}  # fmt: skip


def by_file(config, folder):
    config.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder)


WAYS = {
    "dict": lambda config, _: RecurrentGemmaConfig(**config.to_dict()),
    "diff": lambda config, _: RecurrentGemmaConfig(**config.to_diff_dict()),
    "file": by_file,
    "pickle": lambda config, _: pickle.loads(pickle.dumps(config)),
    "deepcopy": lambda config, _: copy.deepcopy(config),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("values", [NON_DEFAULT, {}], ids=["every_field_moved", "defaults"])
def test_round_trip(way: Callable, values, tmp_path):
    assert set(NON_DEFAULT) == set(OWN_FIELDS), "a new field needs a value here"
    assert all(getattr(RecurrentGemmaConfig(), name) != value for name, value in NON_DEFAULT.items())
    config = RecurrentGemmaConfig(**values)
    copied = way(config, tmp_path)
    assert type(copied) is RecurrentGemmaConfig
    assert own_values(copied) == own_values(config)
    assert {name: getattr(copied, name) for name in values} == values
    assert copied.fingerprint() == config.fingerprint()
    assert copied.to_dict() == {**config.to_dict(), "_name_or_path": copied.to_dict()["_name_or_path"]}


def test_overrides_while_reading_a_file(tmp_path):
    byte_config().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, attention_window_size=5, num_labels=7)
    assert (config.attention_window_size, config.num_labels) == (5, 7)


def test_configs_share_no_list():
    pattern = ["recurrent"]
    config = RecurrentGemmaConfig(block_types=pattern)
    copied = copy.deepcopy(config)
    pattern.append("attention")
    copied.block_types.append("attention")
    assert config.block_types == ["recurrent"]


# --- every field has an effect ----------------------------------------------------------------------------------------


def fresh(config: RecurrentGemmaConfig) -> RecurrentGemmaForCausalLM:
    """Same seed, same order of parameters: models that differ in no shape and no initial scale are equal."""
    torch.manual_seed(0)
    return RecurrentGemmaForCausalLM(config).eval()


def logits_of(config: RecurrentGemmaConfig, state: dict[str, Tensor]) -> Tensor:
    model = RecurrentGemmaForCausalLM(config).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.arange(2, 30)[None]).logits


def changes_shapes(config, changed) -> bool:
    first, second = (
        {name: p.shape for name, p in fresh(c).named_parameters()} for c in (config, changed)
    )  # fmt: skip
    return first != second


def changes_logits(config, changed) -> bool:
    state = fresh(config).state_dict()
    state = {name: value + 0.2 * torch.randn(value.shape) for name, value in state.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    first, second = logits_of(config, state), logits_of(changed, state)
    assert torch.equal(first, logits_of(config, state)), "the comparison has noise of its own"
    return (first - second).abs().max().item() > 1e-4


def changes_initial_values(config, changed) -> bool:
    first, second = (dict(fresh(c).named_parameters()) for c in (config, changed))
    return any(not torch.equal(first[name], second[name]) for name in first)


def changes_training(config, changed) -> bool:
    outputs = []
    for c in (config, changed):
        model = fresh(c).train()
        torch.manual_seed(1)
        outputs.append(model(torch.arange(2, 30)[None]).logits)
    return not torch.equal(*outputs)


def returns_no_cache(config, changed) -> bool:
    first, second = (fresh(c)(torch.tensor([[5]])).past_key_values for c in (config, changed))
    return first is not None and second is None


def changes_the_last_token(config, changed) -> bool:
    """Sequence classification without a mask tells padding by its id."""
    tokens = torch.tensor([[5, 6, config.pad_token_id, config.pad_token_id]])
    scores = []
    for c in (config, changed):
        torch.manual_seed(0)
        scores.append(RecurrentGemmaForSequenceClassification(c).eval()(tokens).logits)
    return not torch.equal(*scores)


def ends_generation(config, changed) -> bool:
    tokens = fresh(config).generate(torch.tensor([[5]]), max_new_tokens=4, do_sample=False)[0]
    assert config.eos_token_id not in tokens
    changed = copy.deepcopy(changed)
    changed.eos_token_id = tokens[1].item()
    return fresh(changed).generate(torch.tensor([[5]]), max_new_tokens=4, do_sample=False).shape[1] == 2


def begins_generation(config, changed) -> bool:
    first, second = (fresh(c).generate(max_new_tokens=1, do_sample=False)[0, 0].item() for c in (config, changed))
    return (first, second) == (config.bos_token_id, changed.bos_token_id)


def unties_the_head(config, changed) -> bool:
    first, second = (
        m.lm_head.weight.data_ptr() == m.model.embed_tokens.weight.data_ptr() for m in (fresh(config), fresh(changed))
    )
    return first and not second


def keeps_the_logits(config, changed) -> bool:
    tokens = torch.arange(2, 30)[None]
    first, second = (hasattr(fresh(c).train()(tokens, labels=tokens), "logits") for c in (config, changed))
    return second and not first


EFFECTS: dict[str, tuple[Callable, object]] = {
    "vocab_size": (changes_shapes, 300),
    "hidden_size": (changes_shapes, 64),
    "intermediate_size": (changes_shapes, 98),
    "num_hidden_layers": (changes_shapes, 4),
    "num_attention_heads": (changes_shapes, 2),
    "num_key_value_heads": (changes_shapes, 2),
    "lru_width": (changes_shapes, 44),
    "block_types": (changes_shapes, ["attention", "recurrent"]),
    "conv1d_width": (changes_shapes, 3),
    "attention_bias": (changes_shapes, True),
    "attention_window_size": (changes_logits, 9),
    "logits_soft_cap": (changes_logits, 5.0),
    "embeddings_scale_by_sqrt_dim": (changes_logits, False),
    "rope_theta": (changes_logits, 9_000.0),
    "partial_rotary_factor": (changes_logits, 0.25),
    "rms_norm_eps": (changes_logits, 1e-3),
    "hidden_activation": (changes_logits, "silu"),
    "attention_dropout": (changes_training, 0.25),
    "w_init_variance_scale": (changes_initial_values, 0.02),
    "final_w_init_variance_scale": (changes_initial_values, 0.5),
    "use_cache": (returns_no_cache, False),
    "pad_token_id": (changes_the_last_token, 7),
    "eos_token_id": (ends_generation, 7),
    "bos_token_id": (begins_generation, 7),
    "tie_word_embeddings": (unties_the_head, False),
    "fuse_linear_cross_entropy": (keeps_the_logits, False),
}


@pytest.mark.parametrize("field", OWN_FIELDS)
def test_every_field_changes_something(field):
    if field == "head_dim":  # has one possible value in a model with attention, and says so
        with pytest.raises(ValueError, match="head_dim=16 times num_attention_heads=4 must be hidden_size=32"):
            byte_config(head_dim=16)
        return
    assert field in EFFECTS, f"add an effect of the new field {field!r} to EFFECTS"
    has_effect, value = EFFECTS[field]
    config, changed = byte_config(), byte_config(**{field: value})
    assert getattr(config, field) != getattr(changed, field)
    assert has_effect(config, changed), f"{field} has no effect"


@pytest.mark.parametrize(
    "has_effect",
    [changes_shapes, changes_logits, changes_initial_values, changes_training, returns_no_cache,
     changes_the_last_token, unties_the_head],
)  # fmt: skip
def test_no_effect_is_seen_where_there_is_none(has_effect):
    """The control: a config against its copy."""
    assert not has_effect(byte_config(), byte_config())


def test_the_initialisation_scales_change_what_they_name():
    final, conv = ("linear_out.weight", "o_proj.weight", "down_proj.weight"), ("conv_1d.weight",)

    def stds(**fields):
        model = fresh(byte_config(lru_width=400, intermediate_size=2000, **fields))
        return {name: parameter.std().item() for name, parameter in model.named_parameters()}

    before = stds()
    for fields, named, factor in (
        ({"final_w_init_variance_scale": 2 / 3 * 4}, final, 2),
        ({"w_init_variance_scale": 0.04}, conv, 2),
        ({"final_w_init_variance_scale": 0.0, "w_init_variance_scale": 0.0}, final + conv, 0),
    ):
        for name, std in stds(**fields).items():
            assert std == pytest.approx((factor if name.endswith(named) else 1) * before[name], rel=1e-4), name


def test_inherited_fields():
    tokens = torch.tensor([[5, 6, 7]])
    assert len(fresh(byte_config(output_hidden_states=True))(tokens).hidden_states) == 4
    assert isinstance(fresh(byte_config(return_dict=False))(tokens), tuple)
    assert AutoModelForCausalLM.from_config(byte_config(dtype="bfloat16")).dtype == torch.bfloat16
    classifier = RecurrentGemmaForSequenceClassification(byte_config(id2label={0: "a", 1: "b", 2: "c"}))
    assert classifier(tokens).logits.shape == (1, 3)
    classifier = RecurrentGemmaForSequenceClassification(byte_config(num_labels=1, problem_type="regression"))
    assert classifier(tokens, labels=torch.tensor([0.5])).loss.ndim == 0


@pytest.mark.parametrize(
    "values",
    [
        {"conv1d_width": 1},
        {"attention_window_size": 1},
        {"partial_rotary_factor": 0.0},
        {"partial_rotary_factor": 1.0},
        {"num_key_value_heads": 4},
        {"num_attention_heads": 1},
        {"num_hidden_layers": 1},
        {"logits_soft_cap": 0.0},
        {"logits_soft_cap": 30},
        {"pad_token_id": None, "eos_token_id": None, "bos_token_id": None},
        {"vocab_size": 3},
    ],
    ids=str,
)
def test_extreme_values_work(values):
    """Training, and one forward = token by token, through the cache."""
    model = fresh(byte_config(**values))
    tokens = torch.randint(0, model.config.vocab_size, (2, 21))
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert loss.isfinite()
    with torch.no_grad():
        torch.testing.assert_close(in_pieces(model, tokens, 1), model(tokens).logits, atol=1e-5, rtol=1e-5)


# --- every bad value is refused by name -------------------------------------------------------------------------------

SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "lru_width", "attention_window_size", "conv1d_width"]  # fmt: skip
NUMBERS = ["logits_soft_cap", "rope_theta", "partial_rotary_factor", "rms_norm_eps", "attention_dropout",
           "w_init_variance_scale", "final_w_init_variance_scale"]  # fmt: skip
FLAGS = [
    "embeddings_scale_by_sqrt_dim", "attention_bias", "tie_word_embeddings", "use_cache", "fuse_linear_cross_entropy"
]  # fmt: skip
TOKENS = ["pad_token_id", "eos_token_id", "bos_token_id"]

BAD_VALUES = [
    *((name, value) for name in SIZES for value in (-1, 0, True, 8.0, "8", [8])),
    *((name, None) for name in SIZES if name not in ("head_dim", "lru_width")),
    *((name, value) for name in NUMBERS for value in (-0.5, float("nan"), float("inf"), "1", True, [1.0])),
    *((name, None) for name in NUMBERS if name != "final_w_init_variance_scale"),
    *((name, value) for name in FLAGS for value in (0, "true", None)),
    *((name, value) for name in TOKENS for value in (-1, 265, True, 1.0, "1")),
    ("pad_token_id", [0]),
    ("eos_token_id", [1, 265]),
    ("attention_dropout", 1.5),
    ("partial_rotary_factor", 1.5),
    ("rope_theta", 0),
    ("rms_norm_eps", 2.0),
    ("intermediate_size", 95),
    ("lru_width", 42),
    ("head_dim", 4),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", 8),
    ("partial_rotary_factor", 0.4),
    ("hidden_activation", "gelu_pytorch_tan"),
    ("hidden_activation", None),
    ("hidden_activation", ["silu"]),
    ("block_types", []),
    ("block_types", "recurrent"),
    ("block_types", None),
    ("block_types", 3),
    ("block_types", ["recurrent", "linear_attention"]),
    ("_block_types", ["recurent"]),
    ("_block_types", "recurrent"),
    ("_block_types", []),
    ("layer_types", ["recurrent"]),
    ("layers_block_type", ["recurrent", "attention", "recurrent"]),
    ("rope_parameters", "default"),
    ("rope_parameters", {"rope_type": "linear", "factor": 2.0}),
    ("rope_parameters", {"rope_theta": 10_000.0, "factor": 2.0}),
    ("dtype", "bfloat61"),
    ("model_type", "llama"),
    ("is_encoder_decoder", True),
    ("per_layer_config", {0: {"lru_width": 8}}),
    ("hiden_size", 32),
    ("window", 32),
    ("sliding_window", 9),
    ("max_position_embeddings", 8192),
]


# What may stand in a config.json by accident, and what only Python can put into a config.
ODD = [
    None, True, False, -1, 0, 1, 2, 1.5, float("nan"), float("inf"), -0.0, 2**31, 2**63, 10**30, -(10**30), 1e308, "",
    "abc", "4", "\ud800", "x" * 100_000, [], [1], [None], ["recurrent", 1], {}, {"a": 1}, {"rope_theta": "x"},
    {"rope_theta": float("nan")}, {"rope_type": [1]}, [[]], [["recurrent"]], {"0": [1]},
]  # fmt: skip
ODD_OBJECTS = [b"x", object(), np.int64(3), np.float32(2.0), torch.tensor(3), torch.int8, (1,), {1}, range(3), 1j]
EVERY_FIELD = sorted(
    {field.name for field in dataclasses.fields(RecurrentGemmaConfig)}
    | set("_block_types layer_types layers_block_type rope_parameters rope_scaling torch_dtype num_labels".split())
    | set("quantization_config auto_map attn_implementation problem_type model_type id2label label2id".split())
)
ALIASES = {"_block_types": "block_types", "torch_dtype": "dtype"} | dict.fromkeys(
    ("rope_parameters", "rope_scaling"), "rope"
)


def refusal(make: Callable[[dict], RecurrentGemmaConfig], given: dict) -> str | None:
    """The message of a refusal, ours or Transformers' check of its own fields' types; None for what works."""
    try:
        config = make(given)
        with torch.device("meta"):
            RecurrentGemmaForCausalLM(config)
        config.to_json_string()
    except (ValueError, StrictDataclassError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", EVERY_FIELD)
def test_any_value_of_any_field_is_taken_or_refused_in_one_sentence_that_names_it(name):
    """What is taken is a model that can be built, and a file that can be written."""
    for value in [*ODD, *ODD_OBJECTS]:
        for make in (lambda given: byte_config(**given), RecurrentGemmaConfig.from_dict):
            message = refusal(make, {name: value})
            assert message is None or ALIASES.get(name, name) in message
            assert message is None or len(message) < 1500 or name not in OWN_FIELDS  # Transformers shows all of a value


def test_sizes_end_before_machines_do():
    for name, value in (("num_hidden_layers", 2**31), ("attention_window_size", 10**30), ("num_labels", 2**31)):
        with pytest.raises(ValueError, match=rf"{name}={value} must be a whole number from [01] to"):
            byte_config(**{name: value})


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=lambda value: str(value).replace(" ", ""))
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"\b{name.removeprefix('_')}\b"):
        byte_config(**{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_block_types": ["recurrent"], "block_types": ["attention"]}, "_block_types=.* contradicts block_types="),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 9.0}}, r"rope_theta'\]=9.0 contradicts rope_theta=5.0"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "RecurrentGemma has only the default RoPE"),
        ({"rope_parameters": {"rope_theta": "10000"}}, "rope_theta='10000' must be a finite number from 1.0"),
        ({"hidden_size": 30, "head_dim": None}, "head_dim=7 times num_attention_heads=4 must be hidden_size=30"),
        (
            {"hidden_size": 36, "partial_rotary_factor": 0.35},
            "partial_rotary_factor=0.35 of head_dim=9 rotates 3 dimensions, which must be even",
        ),
        ({"hiden_size": 1, "windw": 2}, "has no field 'hiden_size', 'windw'; its fields are .*hidden_size"),
    ],
    ids=str,
)  # fmt: skip
def test_contradictions(fields, message):
    with pytest.raises(ValueError, match=message):
        byte_config(**fields)


def test_a_bad_file_is_refused_by_name(tmp_path):
    values = json.loads(byte_config().to_json_string()) | {"conv1d_width": 0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="conv1d_width=0"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 48),  # no longer head_dim x heads
        ("lru_width", 41),
        ("intermediate_size", 97),
        ("num_key_value_heads", 3),
        ("block_types", "attention"),
        ("block_types", ["mamba"]),
        ("hidden_activation", "glu"),
        ("conv1d_width", 0),
        ("attention_dropout", -1.0),
        ("eos_token_id", 9_999),
        ("vocab_size", 1),  # bos and eos do not fit
    ],
)
@pytest.mark.parametrize("build", [RecurrentGemmaForCausalLM, AutoModelForCausalLM.from_config], ids=["class", "auto"])
def test_later_changes_are_checked_when_a_model_is_built(name, value, build):
    config = byte_config()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=name):
        build(config)
