"""The model and its heads as users of Transformers meet them: initial values, outputs, masks, dtypes, offloading,
compilation and bad input. That the numbers are those of the official code is test_against_official.py's business.

Shape suffixes: B batch, T time, E hidden_size, H heads, K keys, V vocabulary.
"""

import functools
import math
import threading

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
)

from recurrent_gemma_hf import (
    RecurrentGemmaCache,
    RecurrentGemmaForCausalLM,
    RecurrentGemmaForQuestionAnswering,
    RecurrentGemmaForSequenceClassification,
    RecurrentGemmaForTokenClassification,
    RecurrentGemmaModel,
)
from tests.helpers import build, perturb, tiny_config

HEADS = [
    RecurrentGemmaForCausalLM,
    RecurrentGemmaForSequenceClassification,
    RecurrentGemmaForTokenClassification,
    RecurrentGemmaForQuestionAnswering,
]
WINDOW = tiny_config().attention_window_size
# What torch warns of in its own compiler; said at the first compilation of a process, whichever test that is.
COMPILER_WARNINGS = [
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning",
]
# float32 by two orders of summation; logits here are of order 1
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


@functools.cache
def model_of(variant: str = "recurrentgemma", attention: str = "sdpa") -> RecurrentGemmaForCausalLM:
    """Shared by the tests that do not change it."""
    return build(tiny_config(variant), seed=3, attention=attention)


def head_of(head: type, **config) -> nn.Module:
    """A perturbed model with the head, so that no two outputs are equal by accident."""
    torch.manual_seed(0)
    return perturb(head(tiny_config(**config)), seed=4).eval()


def tokens_of(rows: int, length: int, seed: int = 0) -> Tensor:
    """(rows, length) ids; none is the padding id 0, so that padding can be told by it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, tiny_config().vocab_size, (rows, length), generator=generator)


def padded(lengths: list[int], side: str, seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """ids (B, T), mask (B, T) and the rows alone, each (1, its length)."""
    rows = [tokens_of(1, length, seed + i) for i, length in enumerate(lengths)]
    ids, mask = torch.zeros(len(rows), max(lengths), dtype=torch.long), torch.zeros(len(rows), max(lengths)).long()
    for i, row in enumerate(rows):
        columns = slice(0, row.shape[1]) if side == "right" else slice(max(lengths) - row.shape[1], None)
        ids[i, columns], mask[i, columns] = row[0], 1
    return ids, mask, rows


def gradients(model: nn.Module) -> dict[str, Tensor]:
    result = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return result


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        error = (got[name] - expected[name]).norm() / expected[name].norm()
        assert error <= tolerance, f"{name}: gradient off by {error:.1e} of its norm"


# --- initial values ---------------------------------------------------------------------------------------------------

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


def test_a_mask_of_init_weights_leaves_loaded_weights_alone(tmp_path):
    """Transformers runs the initialisation after loading as well; nothing that was loaded may move."""
    model = build(tiny_config())
    model.save_pretrained(tmp_path)
    loaded = RecurrentGemmaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in model.named_parameters())


# --- heads ------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("told_by", ["mask", "pad_token_id"])
def test_sequence_classification_reads_the_last_token(side, told_by):
    model = head_of(RecurrentGemmaForSequenceClassification, num_labels=3)
    ids, mask, rows = padded([5, 30, 17], side)
    if told_by == "pad_token_id" and side == "left":
        mask = (
            None  # padding on the left without a mask is text that comes before: it counts, but not as the last token
        )
        rows = list(ids.split(1))
    elif told_by == "pad_token_id":
        mask = None
    got = model(ids, attention_mask=mask).logits
    expected = torch.cat([model(row).logits for row in rows])
    torch.testing.assert_close(got, expected, **CLOSE)
    assert got.std() > 0.1


def test_sequence_classification_by_hand():
    model, ids = head_of(RecurrentGemmaForSequenceClassification, num_labels=3), tokens_of(2, 20)
    hidden = model.model(ids).last_hidden_state
    torch.testing.assert_close(model(ids).logits, hidden[:, -1] @ model.score.weight.T, **CLOSE)
    embeds = model.model.embed_tokens(ids)
    mask = torch.ones_like(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, model(ids).logits, **CLOSE)
    with pytest.raises(ValueError, match="which token is the last of each row"):
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


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_hidden_states():
    model, ids = model_of(), tokens_of(2, 30)
    outputs = model(ids, output_hidden_states=True)
    states = outputs.hidden_states
    assert [tuple(state.shape) for state in states] == [(2, 30, model.config.hidden_size)] * 4
    scale = torch.tensor(model.config.hidden_size**0.5).bfloat16().float()
    torch.testing.assert_close(states[0], model.model.embed_tokens(ids) * scale)
    assert torch.equal(states[-1], model.model(ids).last_hidden_state)
    seen = []
    handles = [layer.register_forward_hook(lambda *a: seen.append(a[2][0])) for layer in model.model.layers]
    model(ids)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(state, output) for state, output in zip(states[1:-1], seen[:-1], strict=True))
    torch.testing.assert_close(states[-1], model.model.final_norm(seen[-1]))
    assert model(ids).hidden_states is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_and_attentions_stand_in_the_columns_of_the_caller(side):
    model = model_of("attention_first", "eager")
    ids, mask, rows = padded([7, 30, 18], side)
    outputs = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    for i, row in enumerate(rows):
        alone = model(row, output_hidden_states=True, output_attentions=True)
        own = mask[i].bool()
        for got, expected in zip(outputs.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(got[i, own], expected[0], **CLOSE)
        for got, expected in zip(outputs.attentions, alone.attentions, strict=True):
            assert got.shape == (3, 4, 30, 30)
            torch.testing.assert_close(got[i][:, own][:, :, own], expected[0], **CLOSE)
            assert not got[i][:, own][:, :, ~own].any(), "a token attends to padding"


def attention_by_hand(block: nn.Module, x_TE: Tensor, window: int, theta: float, share: float) -> Tensor:
    """Probabilities (H, T, T): rotation as multiplication of complex numbers, the window as a loop."""
    T, h = x_TE.shape[0], block.head_dim
    r = int(h * share) // 2
    angle = torch.arange(T, dtype=torch.float64)[:, None] * theta ** (-torch.arange(r, dtype=torch.float64) / r)

    def project(layer: nn.Linear) -> Tensor:
        x = layer(x_TE).double().view(T, -1, h)
        turned = torch.complex(x[..., :r], x[..., r : 2 * r]) * torch.polar(
            torch.ones(T, 1, r).double(), angle[:, None]
        )
        return torch.cat([turned.real, turned.imag, x[..., 2 * r :]], dim=-1)

    q, k = project(block.q_proj), project(block.k_proj)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    probabilities = torch.zeros(q.shape[1], T, T, dtype=torch.float64)
    for t in range(T):
        keys = slice(max(0, t - window), t + 1)
        scores = torch.einsum("Hh,KHh->HK", q[t], k[keys]) / math.sqrt(h)
        probabilities[:, t, keys] = scores.softmax(-1)
    return probabilities


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_probabilities_by_hand(groups):
    model = build(tiny_config(num_key_value_heads=groups, rope_theta=100.0), seed=5, attention="eager")
    ids, block, inputs = tokens_of(2, 40), model.model.layers[2].temporal_block, []
    handle = block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
        handle.remove()
        assert len(attentions) == 1, "one attention layer"
        for row in range(2):
            expected = attention_by_hand(block, inputs[0][row], WINDOW, 100.0, 0.5)
            torch.testing.assert_close(attentions[0][row].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 4, 40))


@pytest.mark.parametrize("chunks", [[20, 1, 1, 1], [5, 9, 20], [1] * 30], ids=str)
def test_attention_probabilities_while_decoding(chunks):
    model, ids = model_of("attention_first", "eager"), tokens_of(2, sum(chunks))
    window = model.config.attention_window_size
    whole = model(ids, output_attentions=True).attentions
    cache, start = RecurrentGemmaCache(model.config), 0
    for size in chunks:
        new = ids[:, start : start + size]
        attentions = model(new, past_key_values=cache, output_attentions=True).attentions
        end, keys = start + size, min(start, window) + size
        for got, expected in zip(attentions, whole, strict=True):
            assert got.shape == (2, 4, size, keys)
            torch.testing.assert_close(got, expected[:, :, start:end, end - keys : end], **CLOSE)
        start = end


def test_attention_probabilities_while_decoding_padded_rows():
    model = model_of("attention_first", "eager")
    ids, mask, rows = padded([7, 30, 18], "left")
    cache = RecurrentGemmaCache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    new, mask = tokens_of(3, 1, seed=9), torch.cat([mask, torch.ones(3, 1).long()], dim=1)
    attentions = model(new, attention_mask=mask, past_key_values=cache, output_attentions=True).attentions
    for i, row in enumerate(rows):
        alone = model(torch.cat([row, new[i : i + 1]], 1), output_attentions=True).attentions
        for got, expected in zip(attentions, alone, strict=True):
            seen = min(row.shape[1], model.config.attention_window_size) + 1
            torch.testing.assert_close(got[i, :, 0, -seen:], expected[0, :, -1, -seen:], **CLOSE)
            torch.testing.assert_close(got[i].sum(-1), torch.ones(4, 1))


def test_use_cache_by_default_and_while_training():
    model, ids = build(tiny_config()), tokens_of(1, 5)
    assert isinstance(model(ids).past_key_values, RecurrentGemmaCache)
    assert model(ids, use_cache=False).past_key_values is None
    model.train()
    assert model(ids).past_key_values is None
    assert isinstance(model(ids, use_cache=True).past_key_values, RecurrentGemmaCache)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_to_keep(side):
    model = model_of()
    ids, mask, _ = padded([9, 20], side)
    whole = model(ids, attention_mask=mask).logits
    for keep, expected in (
        (0, whole),
        (1, whole[:, -1:]),
        (5, whole[:, -5:]),
        (torch.tensor([3, 0, 19]), whole[:, [3, 0, 19]]),
        (torch.tensor([[8, 2], [19, 0]]), torch.stack([whole[0, [8, 2]], whole[1, [19, 0]]])),
    ):
        got = model(ids, attention_mask=mask, logits_to_keep=keep).logits
        torch.testing.assert_close(got, expected, **CLOSE)


def test_inputs_embeds_are_rows_of_the_embedding():
    model, ids = model_of(), tokens_of(2, 30)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits, rtol=0, atol=0)


# --- attention implementations and masks ------------------------------------------------------------------------------


@pytest.fixture
def eager_flex():
    """Compiling flex attention takes a minute on a CPU; uncompiled it computes the same and says that it is slow."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@pytest.mark.usefixtures("eager_flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning", *COMPILER_WARNINGS)
@torch.no_grad()
def test_implementations_agree(implementation):
    """Plain, packed, padded, and in chunks and token by token over a cache."""
    model, reference = model_of("attention_first", implementation), model_of("attention_first")
    assert (model.config._attn_implementation, reference.config._attn_implementation) == (implementation, "sdpa")
    ids, mask, _ = padded([7, 30, 18], "left")
    positions = torch.cat([torch.arange(n) for n in (11, 1, 18)])[None]
    for inputs in (
        {"input_ids": ids},
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "position_ids": positions},
    ):
        own = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        torch.testing.assert_close(model(**inputs).logits[own], reference(**inputs).logits[own], **CLOSE)
    caches = [RecurrentGemmaCache(m.config) for m in (model, reference)]
    for new in tokens_of(3, 22).split([10, 9, 1, 1, 1], dim=1):
        got, expected = (
            m(new, past_key_values=c).logits for m, c in zip((model, reference), caches, strict=True)
        )  # fmt: skip
        torch.testing.assert_close(got, expected, **CLOSE)


def window_mask(T: int, window: int, lengths: list[int] | None = None) -> Tensor:
    """(1, 1, T, T) bool: what the model sees without being told; `lengths` are those of packed documents."""
    document = torch.repeat_interleave(torch.arange(len(lengths or [T])), torch.tensor(lengths or [T]))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return ((distance >= 0) & (distance <= window) & (document[:, None] == document))[None, None]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bool", "additive", "per_head"])
def test_a_4d_mask_replaces_the_window(attention, kind):
    model, ids = model_of("attention_only", attention), tokens_of(2, 60)
    wide = build(tiny_config("attention_only", attention_window_size=100), seed=3, attention=attention)
    for reference, window in ((model, 16), (wide, 100)):
        mask = window_mask(60, window)
        if kind == "additive":
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        elif kind == "per_head":
            mask = mask.expand(2, 4, -1, -1)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, reference(ids).logits, **CLOSE)
    assert (model(ids).logits - wide(ids).logits).abs().max() > 0.01, "the window makes no difference here"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_4d_mask_with_a_cache(attention):
    """Token 3 is hidden from all others, in one forward and in pieces."""
    model, ids = model_of("attention_only", attention), tokens_of(2, 14)
    mask = window_mask(14, 16)
    mask[..., 4:, 3] = False
    whole = model(ids, attention_mask=mask).logits
    assert (whole - model(ids).logits)[:, 4:].abs().max() > 0.01
    cache, steps = RecurrentGemmaCache(model.config), []
    for start, end in ((0, 9), (9, 12), (12, 13), (13, 14)):
        piece = mask[:, :, start:end, :end]
        steps.append(model(ids[:, start:end], attention_mask=piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)


@pytest.mark.parametrize("shape", [(2, 1, 19, 20), (2, 1, 20, 19), (2, 1, 20, 21), (2, 1, 1, 20)], ids=str)
def test_a_4d_mask_of_the_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"a 4D attention_mask of shape .* must be \(batch or 1, heads or 1, 20, 20\)"):
        model_of()(tokens_of(2, 20), attention_mask=torch.ones(shape, dtype=torch.bool))


def test_a_4d_mask_with_the_wrong_implementation():
    with pytest.raises(ValueError, match="needs attn_implementation 'eager' or 'sdpa', not 'flex_attention'"):
        model_of("attention_first", "flex_attention")(tokens_of(2, 20), attention_mask=window_mask(20, 8))


@pytest.fixture
def registered_attention():
    """A function of the user's, registered with Transformers, and what it was called with."""
    calls = []

    def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **kwargs):
        calls.append((attention_mask.shape, sliding_window))
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~attention_mask, -math.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("mine", attend)
    yield calls
    del AttentionInterface._global_mapping["mine"]


def test_a_registered_attention_function(registered_attention):
    model, reference = build(tiny_config("attention_first"), seed=3, attention="mine"), model_of("attention_first")
    ids, mask, _ = padded([7, 30, 18], "left")
    got = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(got, reference(ids, attention_mask=mask).logits[mask.bool()], **CLOSE)
    assert len(registered_attention) == 2
    assert registered_attention[0][1] == model.config.attention_window_size + 1
    assert torch.equal(model.generate(ids[1:2], max_new_tokens=5), reference.generate(ids[1:2], max_new_tokens=5))


def test_the_implementation_can_be_changed_and_is_checked():
    model = build(tiny_config())
    for implementation in ("eager", "sdpa", "flex_attention", "eager"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == model.model.config._attn_implementation == implementation
    with pytest.raises(ValueError, match="falsh_attention"):
        model.set_attn_implementation("falsh_attention")


# --- long texts: attention in bands -----------------------------------------------------------------------------------

LONG = WINDOW + 2 * 512 + 77


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", [None, [5, 600, 1, LONG - 606]], ids=["one_text", "packed"])
def test_banded_attention_equals_the_full_mask(attention, lengths):
    model, ids = build(tiny_config(), seed=3, attention=attention), tokens_of(1, LONG)
    positions = None if lengths is None else torch.cat([torch.arange(n) for n in lengths])[None]
    results = []
    for mask in (None, window_mask(LONG, WINDOW, lengths)):
        outputs = model(ids, attention_mask=mask, position_ids=positions, labels=ids, use_cache=False)
        outputs.loss.backward()
        results.append((outputs.logits, gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0], **CLOSE)
    assert_same_gradients(results[0][1], results[1][1])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_banded_attention_in_chunks_and_padded(attention):
    model, ids = model_of("recurrentgemma", attention), tokens_of(2, 2 * LONG)
    whole = model(ids, attention_mask=window_mask(2 * LONG, WINDOW), use_cache=False).logits
    cache, chunks = RecurrentGemmaCache(model.config), ids.split([LONG, 3, LONG - 3], dim=1)
    got = torch.cat([model(chunk, past_key_values=cache).logits for chunk in chunks], dim=1)
    torch.testing.assert_close(got, whole, **CLOSE)
    mask = torch.ones_like(ids)
    mask[1, :100] = 0
    row = model(ids[1:, 100:], use_cache=False).logits
    torch.testing.assert_close(model(ids, attention_mask=mask, use_cache=False).logits[1:, 100:], row, **CLOSE)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    model, ids = build(tiny_config()).train(), tokens_of(2, 40)
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    # Transformers is renaming the method; its argument in front stays what it was.
    enable, disable = (
        getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}")
        for what in ("enable", "disable")
    )
    enable({"use_reentrant": use_reentrant})
    assert model.model.gradient_checkpointing
    calls = []
    handle = model.model.layers[0].mlp_block.register_forward_pre_hook(lambda *args: calls.append(1))
    outputs = model(ids, labels=ids, use_cache=True)
    assert outputs.past_key_values is None
    outputs.loss.backward()
    handle.remove()
    assert len(calls) == 2, "nothing was recomputed"
    assert_same_gradients(gradients(model), expected, 1e-6)
    with pytest.raises(ValueError, match="train without past_key_values"):
        model(ids, past_key_values=RecurrentGemmaCache(model.config))
    disable()
    assert not model.model.gradient_checkpointing


def test_attention_dropout_while_training_only():
    for attention in ("eager", "sdpa"):
        model, ids = build(tiny_config("attention_only", attention_dropout=0.5), attention=attention), tokens_of(1, 30)
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


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


# --- dtypes, devices, compilers, threads ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float64, 1e-5)], ids=str
)  # fmt: skip
@torch.no_grad()
def test_dtypes(variant, dtype, tolerance):
    """Mean error against float32, relative to the standard deviation of the logits; over a cache as well."""
    config = tiny_config(variant)
    model, ids = build(config, seed=3).to(dtype), tokens_of(2, 40)
    expected = model_of(variant)(ids).logits
    cache = RecurrentGemmaCache(config)
    got = model(ids, use_cache=False).logits
    pieces = torch.cat(
        [model(piece, past_key_values=cache).logits for piece in ids.split([20, 18, 1, 1], dim=1)], dim=1
    )
    for logits in (got, pieces):
        assert logits.dtype == dtype
        assert (logits.float() - expected).abs().mean() <= tolerance * expected.std()


@torch.no_grad()
def test_float64_is_float64_throughout():
    """One float32 in between would show: pieces and whole agree to 1e-12."""
    model, ids = build(tiny_config()).double(), tokens_of(2, 40)
    cache = RecurrentGemmaCache(model.config)
    pieces = torch.cat(
        [model(piece, past_key_values=cache).logits for piece in ids.split([20, 18, 1, 1], dim=1)], dim=1
    )
    torch.testing.assert_close(pieces, model(ids, use_cache=False).logits, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("length", [40, LONG], ids=["short", "banded"])
def test_autocast(attention, length):
    """As Trainer(bf16=True) trains: float32 parameters and residual stream, bfloat16 products."""
    model, ids = build(tiny_config(), seed=3, attention=attention), tokens_of(2, length)
    expected = model(ids).logits.detach()
    cache = RecurrentGemmaCache(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(ids, labels=ids, use_cache=False)
        with torch.no_grad():
            chunks = ids.split([length - 3, 1, 1, 1], dim=1)
            pieces = torch.cat([model(chunk, past_key_values=cache).logits for chunk in chunks], dim=1)
    outputs.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    for logits in (outputs.logits, pieces):
        assert (logits.float() - expected).abs().mean() <= 0.02 * expected.std()


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_map(device_map, tmp_path):
    model, ids = model_of(), tokens_of(1, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, dtype=torch.float32)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
          "model.final_norm": "cpu", "lm_head": "cpu"}  # fmt: skip


def offload_from_pretrained(model, folder):
    model.save_pretrained(folder / "checkpoint")
    return AutoModelForCausalLM.from_pretrained(
        folder / "checkpoint", device_map=PLACES, offload_folder=folder / "offload", dtype=torch.float32
    )


def offload_dispatched(model, folder):
    return accelerate.dispatch_model(model, PLACES, main_device="cpu", offload_dir=folder, force_hooks=True)


def offload_layers(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


@pytest.mark.parametrize("offload", [offload_from_pretrained, offload_dispatched, offload_layers])
@pytest.mark.filterwarnings(
    "ignore:You are calling .generate.* with the `input_ids` being on a device type:UserWarning"
)
@torch.no_grad()
def test_offloaded_layers(offload, tmp_path):
    """A module that reads the parameters of another one without calling it would find them on the meta device."""
    model, ids = build(tiny_config(), seed=3), tokens_of(1, 9)
    expected, text = model(ids).logits, model.generate(ids, max_new_tokens=5)
    offloaded = offload(model, tmp_path)
    assert any(parameter.device.type == "meta" for parameter in offloaded.parameters()), "nothing was offloaded"
    torch.testing.assert_close(offloaded(ids).logits, expected, rtol=0, atol=0)
    assert torch.equal(offloaded.generate(ids, max_new_tokens=5), text)


@pytest.mark.filterwarnings(*COMPILER_WARNINGS)
def test_compiled_without_a_graph_break():
    model, ids = build(tiny_config()), tokens_of(2, 40)
    mask = padded([25, 40], "left")[1]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for inputs in ({}, {"attention_mask": mask}):
            got, expected = (m(ids, use_cache=False, **inputs).logits for m in (compiled, model))
            torch.testing.assert_close(got, expected, **CLOSE)
    model.train()
    results = []
    for m in (compiled, model):
        loss = m(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_same_gradients(results[0][1], results[1][1])


@pytest.mark.filterwarnings(*COMPILER_WARNINGS)
def test_exported():
    model, ids = model_of(), tokens_of(2, 40)
    program = torch.export.export(model, (ids,), {"use_cache": False})
    torch.testing.assert_close(program.module()(ids, use_cache=False).logits, model(ids).logits, **CLOSE)


@torch.no_grad()
def test_two_threads_on_one_model():
    model, texts = model_of(), [tokens_of(1, 60, seed) for seed in (1, 2)]
    expected = [model(text).logits for text in texts]
    got: list[list[Tensor]] = [[], []]

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                cache, pieces = RecurrentGemmaCache(model.config), texts[i].split(7, dim=1)
                got[i].append(torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(got[i]) == 3
        for logits in got[i]:
            torch.testing.assert_close(logits, expected[i], **CLOSE)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": None}, "give exactly one of input_ids and inputs_embeds"),
        ({"inputs_embeds": torch.zeros(2, 5, 48)}, "give exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.ones(2, 0).long()}, r"shape \(2, 0\).*an empty prompt needs at least its BOS token"),
        ({"input_ids": torch.ones(0, 5).long()}, r"shape \(0, 5\)"),
        ({"input_ids": torch.ones(5).long()}, r"shape \(5,\); it must be \(batch, tokens\) ids"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(5, 48)}, r"shape \(5, 48\).*\(batch, tokens, width\)"),
        ({"input_ids": torch.tensor([[3, 101]])}, "token ids from 3 to 101 do not fit vocab_size=101"),
        ({"input_ids": torch.tensor([[-1, 5]])}, "token ids from -1 to 5 do not fit vocab_size=101"),
        ({"position_ids": torch.arange(4)[None]}, r"position_ids of shape \(1, 4\) must be \(2 or 1, 5\)"),
        ({"position_ids": torch.arange(5)}, r"position_ids of shape \(5,\) must be \(2 or 1, 5\)"),
        ({"attention_mask": torch.ones(2, 6)}, r"attention_mask of shape \(2, 6\) must be .*\(2, 0 \+ 5\), or 4D"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask of shape \(1, 5\)"),
        ({"attention_mask": torch.ones(2, 5, 5)}, r"attention_mask of shape \(2, 5, 5\)"),
        ({"past_key_values": ()}, "past_key_values is a tuple; it must be a Cache, best a RecurrentGemmaCache"),
        ({"past_key_values": {}}, "past_key_values is a dict"),
        ({"output_attentions": True}, "output_attentions needs attn_implementation='eager', this model has 'sdpa'"),
    ],
)
def test_bad_input(inputs, message):
    with pytest.raises(ValueError, match=message):
        model_of()(**{"input_ids": torch.ones(2, 5).long(), **inputs})


def test_a_mask_that_forgets_the_past():
    model, cache = model_of(), RecurrentGemmaCache(tiny_config())
    model(tokens_of(2, 7), past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 1\) must be .*\(2, 7 \+ 1\)"):
        model(tokens_of(2, 1), attention_mask=torch.ones(2, 1), past_key_values=cache)


@pytest.mark.parametrize("kind", ["DynamicCache()", "DynamicCache(config)", "StaticCache", "StaticCache, allocated"])
def test_an_empty_cache_of_transformers_becomes_ours(kind: str):
    model = model_of()
    cache = DynamicCache() if kind == "DynamicCache()" else DynamicCache(config=model.config)
    if "Static" in kind:
        cache = StaticCache(config=model.config, max_cache_len=20)
    if "allocated" in kind:
        heads = model.config.num_key_value_heads, model.config.head_dim
        cache.early_initialization(2, *heads, torch.float32, torch.device("cpu"))
    ids, mask, _ = padded([5, 9], "right")
    output = model(ids, attention_mask=mask, past_key_values=cache)
    assert output.cache is cache
    assert type(cache) is RecurrentGemmaCache
    assert cache.is_compileable == ("Static" in kind)
    reference = RecurrentGemmaCache(model.config)
    assert torch.equal(output.logits, model(ids, attention_mask=mask, cache=reference).logits)
    new, mask = tokens_of(2, 3), F.pad(mask, (0, 3), value=1)
    logits = [model(new, attention_mask=mask, cache=c).logits for c in (cache, reference)]
    assert torch.equal(*logits)
    assert cache.fork().get_seq_length() == 12


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_of_transformers_that_holds_something_is_refused(kind: type):
    model = model_of()
    options = {"max_cache_len": 20} if kind is StaticCache else {}
    cache = kind(config=model.config, **options)
    attention = model.config.layers_block_type.index("attention")
    keys = torch.zeros(1, model.config.num_key_value_heads, 3, model.config.head_dim)
    cache.update(keys, keys, attention)
    with pytest.raises(ValueError, match=rf"this {kind.__name__} already holds keys or states .* give an empty one"):
        model(tokens_of(1, 4), past_key_values=cache)
    assert type(cache) is kind, "refused, and left as it was"
    cache = kind(config=model.config, **options)
    cache.update_conv_state(torch.zeros(1, model.config.lru_width, 3), 0, conv_kernel_size=3)
    with pytest.raises(ValueError, match="already holds keys or states"):
        model(tokens_of(1, 4), past_key_values=cache)


def test_a_cache_for_an_encoder_and_a_decoder_is_refused():
    model = model_of()
    with pytest.raises(ValueError, match="a EncoderDecoderCache is for an encoder and a decoder"):
        model(tokens_of(1, 4), past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))


def test_the_auto_class_of_a_head():
    model = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=4))
    assert type(model) is RecurrentGemmaForSequenceClassification
    assert model.score.out_features == 4


def test_a_custom_mask_cannot_show_keys_that_the_cache_has_dropped():
    model = build(tiny_config("attention_only"))
    tokens = torch.randint(0, 101, (1, 40), generator=torch.Generator().manual_seed(0))
    cache = RecurrentGemmaCache(model.config)
    with torch.no_grad():
        model(tokens[:, :30], past_key_values=cache)
        causal = torch.ones(40, 40, dtype=torch.bool).tril()[None, None, 30:]
        for mask in (causal, torch.zeros(1, 1, 10, 40).masked_fill(~causal, torch.finfo(torch.float32).min)):
            with pytest.raises(ValueError, match="no longer holds"):
                model(tokens[:, 30:], attention_mask=mask, past_key_values=cache)
        assert cache.get_seq_length() == 30, "a refused forward leaves the cache as it was"


def test_the_loss_of_packed_and_padded_texts_is_that_of_each_alone():
    model = build(tiny_config())
    texts = [torch.randint(3, 101, (1, n), generator=torch.Generator().manual_seed(n)) for n in (7, 12, 9)]
    with torch.no_grad():
        alone = sum(model(text, labels=text).loss * (text.shape[1] - 1) for text in texts)
        alone = alone / sum(text.shape[1] - 1 for text in texts)
        packed = torch.cat(texts, dim=1)
        positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
        torch.testing.assert_close(model(packed, position_ids=positions, labels=packed).loss, alone)
        for side in ("left", "right"):
            ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
            for row, text in enumerate(texts):
                n = text.shape[1]
                columns = slice(12 - n, None) if side == "left" else slice(0, n)
                ids[row, columns], mask[row, columns] = text[0], 1
            labels = ids.masked_fill(mask == 0, -100)
            torch.testing.assert_close(model(ids, attention_mask=mask, labels=labels).loss, alone)
