"""The loss without logits against the loss of all logits: values, gradients, precision, memory, every way to call it.

Shape suffixes: B batch, T tokens, N tokens, E hidden_size, V vocabulary.
"""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GemmaConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother

from recurrent_gemma_hf import RecurrentGemmaForCausalLM, cross_entropy, linear_cross_entropy
from recurrent_gemma_hf.transformers_compat import CACHE_NAME
from tests.helpers import VARIANTS, assert_same_gradients, build, gradients, tiny_config

IGNORED = -100
V = tiny_config().vocab_size


@pytest.fixture(params=[2**27, 1000, 7], ids=["one block", "blocks", "rows and columns one by one"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", request.param)


def problem(N: int = 63, E: int = 24, V: int = 131, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, weight, labels of which a third is ignored, and a weight for each token's loss."""
    labels = torch.randint(V, (N,))
    labels[::3] = IGNORED
    x, weight = torch.randn(N, E, dtype=torch.float64), torch.randn(V, E, dtype=torch.float64)
    share = torch.rand(N, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, share


def plain(x: Tensor, weight: Tensor, labels: Tensor, soft_cap: float, label_smoothing: float) -> Tensor:
    """All logits, as the model computes them outside of training and ForCausalLMLoss goes on."""
    logits = F.linear(x, weight)
    if soft_cap:
        logits = torch.tanh(logits / soft_cap) * soft_cap
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def gradients_of(losses: Tensor, share: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((losses * share.to(losses.dtype)).sum(), inputs)


# ---------------------------------------------------------------- the operation


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str)
def test_losses_and_gradients_equal_the_plain_ones(blocks, dtype, tolerance, soft_cap, label_smoothing):
    x, weight, labels, share = problem(dtype=dtype)
    expected = plain(x, weight, labels, soft_cap, label_smoothing)
    got = linear_cross_entropy(x, weight, labels, soft_cap=soft_cap, label_smoothing=label_smoothing)
    assert got.dtype == dtype
    assert (got[labels == IGNORED] == 0).all()
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=5 * tolerance)
    for ours, theirs in zip(gradients_of(got, share, x, weight), gradients_of(expected, share, x, weight), strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_each_input_may_be_frozen(blocks):
    x, weight, labels, share = problem()
    both = gradients_of(linear_cross_entropy(x, weight, labels, soft_cap=3.0), share, x, weight)
    only_x = gradients_of(linear_cross_entropy(x, weight.detach(), labels, soft_cap=3.0), share, x)
    only_weight = gradients_of(linear_cross_entropy(x.detach(), weight, labels, soft_cap=3.0), share, weight)
    torch.testing.assert_close(both, (*only_x, *only_weight), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(x, weight, labels), plain(x, weight, labels, 0.0, 0.0), rtol=2e-6, atol=1e-5
        )


def test_backward_may_run_twice():
    x, weight, labels, share = problem()
    losses = linear_cross_entropy(x, weight, labels)
    first, second = (
        torch.autograd.grad((losses * share.float()).sum(), (x, weight), retain_graph=True) for _ in range(2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("soft_cap", [0.0, 30.0])
def test_bfloat16_is_no_worse_than_the_plain_way(soft_cap):
    """Both against float64, from the same bfloat16 inputs; logits have a standard deviation of 8."""
    x, weight, labels, share = problem(N=500, E=64, V=1000, dtype=torch.bfloat16)
    exact_inputs = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact_losses = plain(*exact_inputs, labels, soft_cap, 0.0)
    exact = (exact_losses.detach(), *gradients_of(exact_losses, share, *exact_inputs))
    errors = {}
    for name, function in (("ours", linear_cross_entropy), ("plain", plain)):
        losses = function(x, weight, labels, soft_cap=soft_cap, label_smoothing=0.0)
        values = (losses.detach(), *gradients_of(losses, share, x, weight))
        errors[name] = [((v.double() - e).norm() / e.norm()).item() for v, e in zip(values, exact, strict=True)]
    for ours, theirs in zip(errors["ours"], errors["plain"], strict=True):
        assert ours <= 1.05 * theirs, errors


def test_autocast_computes_in_its_dtype():
    x, weight, labels, share = problem(N=500, E=64, V=1000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = linear_cross_entropy(x, weight, labels, soft_cap=3.0)
    rounded = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), labels, soft_cap=3.0)
    torch.testing.assert_close(losses, rounded, rtol=0, atol=0)
    got, expected = (gradients_of(each, share, x, weight) for each in (losses, rounded))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert got[1].dtype == torch.float32


def test_never_holds_the_logits(monkeypatch):
    """Peak of all allocations of a forward and backward: less than half of the logits (42 MB), most of it gradients."""
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", 2**18)
    N, E, V = 512, 32, 20_480
    x, weight = torch.randn(N, E, requires_grad=True), torch.randn(V, E, requires_grad=True)
    peaks = {}
    for name, function in (("ours", linear_cross_entropy), ("plain", plain)):
        with torch.profiler.profile(profile_memory=True) as profile:
            function(x, weight, torch.randint(V, (N,)), soft_cap=3.0, label_smoothing=0.0).mean().backward()
        x.grad = weight.grad = None
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        peaks[name] = peak / (4 * N * V)
    assert peaks["ours"] < 0.5, peaks
    assert peaks["plain"] > 3, peaks  # else this measures nothing


def test_compiles_into_one_graph():
    x, weight, labels, share = problem()
    torch._dynamo.reset()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return (linear_cross_entropy(x, weight, labels, soft_cap=3.0) * share.float()).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(x, weight), (x, weight))
    torch.testing.assert_close(got, torch.autograd.grad(loss(x, weight), (x, weight)), rtol=0, atol=0)


def test_operators_keep_their_contract():
    x, weight, labels, _ = problem(N=5, E=3, V=4, dtype=torch.float64)
    arguments = (x, weight, labels.remainder(4), 3.0, 0.1, IGNORED, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(cross_entropy._token_losses, arguments, test_utils=checks)
    assert torch.autograd.gradcheck(lambda x, w: cross_entropy._token_losses(x, w, *arguments[2:])[0], (x, weight))


@pytest.mark.parametrize("bad", [-1, 131, -101])
def test_labels_that_are_no_words_are_refused(bad):
    x, weight, labels, _ = problem()
    labels[5] = bad
    with pytest.raises(ValueError, match=rf"labels from -?\d+ to \d+ do not fit vocab_size=131.*{IGNORED}"):
        linear_cross_entropy(x, weight, labels)


def test_bad_arguments_are_refused():
    x, weight, labels, _ = problem()
    with pytest.raises(ValueError, match=r"\(63, 24\), weight \(131, 24\) and labels \(62,\) must be"):
        linear_cross_entropy(x, weight, labels[1:])
    with pytest.raises(ValueError, match=r"label_smoothing=1\.5 must be from 0 to 1"):
        linear_cross_entropy(x, weight, labels, label_smoothing=1.5)


# ---------------------------------------------------------------- the model


def plain_loss(logits: Tensor, labels: Tensor, **kwargs) -> Tensor:
    """A loss function of the user's, which the model must hand all logits."""
    assert logits.shape[-1] == V
    return ForCausalLMLoss(logits, labels, **kwargs)


def loss_and_gradients(model: nn.Module, *args, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(*args, **kwargs).loss
    return loss.detach(), gradients(model, loss)


def assert_same(got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], limit: float = 1e-5):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    assert_same_gradients(got[1], expected[1], limit)


def pair(variant: str = "recurrentgemma", **config) -> tuple[RecurrentGemmaForCausalLM, RecurrentGemmaForCausalLM]:
    """The model as it is, and one that computes all logits; both in training."""
    ours = build(tiny_config(variant, **config), seed=3).train()
    theirs = copy.deepcopy(ours)
    theirs.loss_function = plain_loss
    return ours, theirs


def batch() -> dict[str, Tensor]:
    """Two rows of 40: a packed one and one padded on the left, prompts ignored."""
    ids = torch.randint(3, V, (2, 40))
    positions = torch.stack([torch.arange(40) % 17, (torch.arange(40) - 6).clamp(min=0)])
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :6] = 0
    labels = ids.clone()
    labels[:, 10:14] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_loss_and_gradients_equal_those_of_all_logits(variant, tied):
    ours, theirs = pair(variant, tie_word_embeddings=tied)
    inputs = batch()
    assert not hasattr(ours(**inputs), "logits")
    assert theirs(**inputs).logits.shape == (2, 40, V)
    assert_same(loss_and_gradients(ours, **inputs), loss_and_gradients(theirs, **inputs))
    torch.testing.assert_close(ours(**inputs).loss, ours.eval()(**inputs).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", ["num_items", "num_items tensor", "shift_labels", "ignore_index"])
def test_every_argument_of_the_loss(how):
    ours, theirs = pair()
    inputs = batch()
    labels, ids = inputs["labels"], inputs["input_ids"]
    inputs |= {
        "num_items": {"num_items_in_batch": 1000},
        "num_items tensor": {"num_items_in_batch": torch.tensor(77)},
        "shift_labels": {"labels": ids, "shift_labels": F.pad(labels[:, 1:], (0, 1), value=IGNORED)},
        "ignore_index": {"labels": labels.masked_fill(labels == IGNORED, 7), "ignore_index": 7},
    }[how]
    assert_same(loss_and_gradients(ours, **inputs), loss_and_gradients(theirs, **inputs))
    if how == "shift_labels":
        alike = batch() | {"input_ids": ids, "labels": labels}
        torch.testing.assert_close(ours(**inputs).loss, ours(**alike).loss, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_label_smoothing_is_that_of_trainer(training):
    model, _ = pair()
    ids = torch.randint(3, V, (2, 40))
    labels = ids.clone()
    labels[:, :9] = IGNORED
    expected = LabelSmoother(0.1)({"logits": model.eval()(ids).logits}, labels, shift_labels=True)
    got = model.train(training)(ids, labels=labels, label_smoothing=0.1).loss
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_logits_are_there_when_asked_for():
    model, _ = pair()
    inputs = batch()
    loss = model(**inputs).loss
    for training in (True, False):
        outputs = model.train(training)(**inputs, logits_to_keep=3)
        assert outputs.logits.shape == (2, 3, V)
        torch.testing.assert_close(outputs.loss, loss, rtol=1e-6, atol=0)
    assert model.train()(inputs["input_ids"]).logits.shape == (2, 40, V)  # no labels, no loss


def test_nothing_to_predict():
    """As in Transformers: no mean of nothing, but a sum."""
    model, _ = pair()
    ids = torch.randint(3, V, (1, 9))
    nothing = torch.full_like(ids, IGNORED)
    assert model(ids, labels=nothing).loss.isnan()
    loss, found = loss_and_gradients(model, ids, labels=nothing, num_items_in_batch=5)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in found.values())


# Transformers 5.23 has a new name for it, which 5.17 does not know.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant):
    model, _ = pair()
    inputs = batch()
    expected = loss_and_gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(loss_and_gradients(model, **inputs), expected, limit=1e-6)


def test_compiled_model():
    model, _ = pair()
    ids = torch.randint(3, V, (2, 40))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(ids, labels=ids).loss
    assert_same((loss.detach(), gradients(model, loss)), loss_and_gradients(model, ids, labels=ids))


# peft asks for it under the old name, which Transformers is about to retire.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("what", ["adapter on the head", "resized", "resized and tied", "bias"])
def test_heads_of_other_kinds(what, monkeypatch):
    """Where the head is more than its weight, blocks of tokens go through it: the same again."""
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", 10 * V)
    model = build(tiny_config(tie_word_embeddings=what == "resized and tied"), seed=3).train()
    inputs = batch()
    if what == "adapter on the head":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    elif what == "bias":
        model.lm_head.bias = nn.Parameter(torch.randn(V))
    else:
        model.resize_token_embeddings(V + 20, mean_resizing=False)
    theirs = copy.deepcopy(model)
    inner = theirs.get_base_model() if what == "adapter on the head" else theirs
    inner.loss_function = lambda logits, labels, **kwargs: ForCausalLMLoss(logits, labels, **kwargs)
    assert not hasattr(model(**inputs), "logits")
    assert_same(loss_and_gradients(model, **inputs), loss_and_gradients(theirs, **inputs))


def test_missing_logits_name_the_switch_that_brings_them():
    model, inputs = pair()[0], batch()
    outputs = model(**inputs, output_hidden_states=True, use_cache=True)
    for read, error in ((lambda: outputs.logits, AttributeError), (lambda: outputs["logits"], KeyError)):
        with pytest.raises(error, match="fuse_linear_cross_entropy"):
            read()
    assert list(outputs) == ["loss", CACHE_NAME, "hidden_states"]
    assert outputs.past_key_values is outputs.cache is not None
    copied = pickle.loads(pickle.dumps(model(**inputs)))
    assert type(copied) is type(outputs)
    assert "loss=" in repr(copied)
    fused = loss_and_gradients(model, **inputs)
    model.config.fuse_linear_cross_entropy = False
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits.shape))
    loss, logits = model(**inputs, return_dict=False)
    handle.remove()
    assert logits.shape == (2, 40, V)
    assert seen == [logits.shape]
    assert_same(fused, loss_and_gradients(model, **inputs))
    torch.testing.assert_close(loss, fused[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [-1, V, IGNORED - 1])
@pytest.mark.parametrize("training", [True, False])
def test_labels_out_of_range_are_refused_before_the_step(training, bad):
    model, _ = pair()
    ids = torch.randint(3, V, (1, 9))
    labels = ids.clone()
    labels[0, 4] = bad
    with pytest.raises(ValueError, match=f"do not fit vocab_size={V}"):
        model.train(training)(ids, labels=labels)


def test_the_soft_cap_is_found_by_those_who_compute_the_loss_themselves():
    """TRL reads the attribute of Gemma 2's config."""
    assert not hasattr(GemmaConfig(), "final_logit_softcapping")  # a cap is what having the attribute means
    assert tiny_config().final_logit_softcapping == 3.0
    assert tiny_config("hawk").final_logit_softcapping is None
    assert "final_logit_softcapping" not in tiny_config().to_dict()
