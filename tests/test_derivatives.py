"""Derivatives beyond the first backward pass, and torch's transforms: right, or an error that names the remedy."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from recurrent_gemma_hf import RecurrentGemmaForCausalLM, linear_cross_entropy, linear_recurrence, set_backend
from recurrent_gemma_hf.scan import linear_recurrence_reference
from tests.helpers import build, tiny_config
from tests.kernels import needs_triton

# Torch imports its own decompositions for forward mode, and scripts them.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
VARIANTS = ["recurrentgemma", "wide_lru", "hawk"]
INPUTS = {
    "plain": {},
    "packed": {"position_ids": torch.cat([torch.arange(9), torch.arange(8)])[None].expand(2, -1)},
    "left padding": {"attention_mask": torch.tensor([[0] * 5 + [1] * 12, [1] * 17])},
}


def model_of(variant: str) -> RecurrentGemmaForCausalLM:
    return build(tiny_config(variant), attention="eager").double()


def ids_of(model: RecurrentGemmaForCausalLM) -> Tensor:
    return torch.randint(model.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))


def direction_of(model: RecurrentGemmaForCausalLM) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in model.named_parameters()}


def loss_of(model: RecurrentGemmaForCausalLM, parameters: dict[str, Tensor], inputs: dict) -> Tensor:
    """From the logits, in float64: Transformers' own loss is computed in float32."""
    ids = ids_of(model)
    logits = functional_call(model, parameters, (ids,), {"use_cache": False, **inputs}).logits
    return torch.nn.functional.cross_entropy(logits[:, 5:-1].flatten(0, 1), ids[:, 6:].flatten())


def moved(model: RecurrentGemmaForCausalLM, by: float) -> dict[str, Tensor]:
    return {n: (p + by * direction_of(model)[n]).detach().requires_grad_() for n, p in model.named_parameters()}


def gradients_at(model: RecurrentGemmaForCausalLM, by: float, inputs: dict) -> dict[str, Tensor]:
    parameters = moved(model, by)
    return dict(
        zip(parameters, torch.autograd.grad(loss_of(model, parameters, inputs), parameters.values()), strict=True)
    )


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hessian_times_a_vector_equals_finite_differences(variant: str, inputs: dict):
    model, step = model_of(variant), 1e-6
    parameters, direction = moved(model, 0.0), direction_of(model)
    first = torch.autograd.grad(loss_of(model, parameters, inputs), parameters.values(), create_graph=True)
    slope = sum((g * v).sum() for g, v in zip(first, direction.values(), strict=True))
    actual = torch.autograd.grad(slope, parameters.values())
    above, below = (gradients_at(model, by, inputs) for by in (step, -step))
    for name, got in zip(parameters, actual, strict=True):
        expected = (above[name] - below[name]) / (2 * step)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item(), msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_that_can_be_differentiated_again_are_the_same_gradients(variant: str):
    model = model_of(variant)
    plain = gradients_at(model, 0.0, {})
    parameters = moved(model, 0.0)
    again = torch.autograd.grad(loss_of(model, parameters, {}), parameters.values(), create_graph=True)
    for (name, expected), got in zip(plain.items(), again, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=name)


def test_the_slope_of_the_root_is_bounded_in_every_derivative():
    """At a = 1, where Lambda is far below 0, the derivative of sqrt(1 - a^2) would be infinite."""
    model = model_of("hawk")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.temporal_block.rg_lru.recurrent_param.fill_(-40.0)
    parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    first = torch.autograd.grad(loss_of(model, parameters, {}), parameters.values(), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters.values())
    assert all(x.isfinite().all() for x in (*first, *second))


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("how", ["torch.func.jvp", "dual numbers", "dual numbers under no_grad"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_mode_equals_the_gradient(variant: str, how: str, inputs: dict):
    model = model_of(variant)
    parameters, direction = {n: p.detach() for n, p in model.named_parameters()}, direction_of(model)
    expected = sum((g * direction[name]).sum() for name, g in gradients_at(model, 0.0, inputs).items())
    if how == "torch.func.jvp":
        _, got = torch.func.jvp(lambda p: loss_of(model, p, inputs), (parameters,), (direction,))
    else:
        with torch.set_grad_enabled("no_grad" not in how), forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(p, direction[name]) for name, p in parameters.items()}
            got = forward_ad.unpack_dual(loss_of(model, duals, inputs)).tangent
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_single_rows_by_vmap(variant: str):
    model, ids = model_of(variant), ids_of(model_of(variant))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], row: Tensor) -> Tensor:
        logits = functional_call(model, p, (row[None],), {"use_cache": False}).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1], row[1:])

    actual = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    for row in range(len(ids)):
        alone = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        expected = torch.autograd.grad(loss(alone, ids[row]), alone.values())
        for name, want in zip(alone, expected, strict=True):
            torch.testing.assert_close(actual[name][row], want, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_the_scan_has_tangents(grad: bool):
    x, a, h0 = torch.randn(2, 9, 3), torch.rand(2, 9, 3), torch.randn(2, 3)
    tangents = tuple(torch.randn_like(t) for t in (x, a, h0))
    with torch.set_grad_enabled(grad):
        got = torch.func.jvp(linear_recurrence, (x, a, h0), tangents)
        expected = torch.func.jvp(linear_recurrence_reference, (x, a, h0), tangents)
    torch.testing.assert_close(got, expected)
    assert got[1][0].abs().max() > 0.1


TRANSFORMS = {
    "grad": lambda loss, p, v: torch.func.grad(loss)(p),
    "vjp": lambda loss, p, v: torch.func.vjp(loss, p)[1](torch.ones((), dtype=torch.float64))[0],
    "jvp": lambda loss, p, v: torch.func.jvp(loss, (p,), (v,)),
    "jvp of grad": lambda loss, p, v: torch.func.jvp(torch.func.grad(loss), (p,), (v,)),
    "vmap of grad": lambda loss, p, v: torch.func.vmap(torch.func.grad(loss))(
        {name: torch.stack([x, x + v[name]]) for name, x in p.items()}
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("is_adapted", [False, True], ids=["one weight", "adapted head"])
def test_the_loss_of_training_under_transforms(transform: Callable, is_adapted: bool):
    """It has operators and checkpoints of its own, which transforms do not know: there it is the loss of the logits."""
    model = model_of("recurrentgemma").train()
    if is_adapted:
        model.lm_head = torch.nn.Sequential(model.lm_head)
    model.config.logits_soft_cap = 0.5
    ids = ids_of(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def of_training(p: dict[str, Tensor]) -> Tensor:
        return functional_call(model, p, (ids,), {"labels": ids}).loss

    def of_logits(p: dict[str, Tensor]) -> Tensor:
        logits = functional_call(model, p, (ids,), {"use_cache": False}).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    direction = {name: direction_of(model)[name] for name in parameters}
    got, expected = (transform(loss, parameters, direction) for loss in (of_training, of_logits))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert all(x.abs().max() > 1e-9 for x in tree_leaves(got))


def test_dual_numbers_reach_the_loss_of_training():
    x, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    labels, direction = torch.tensor([3, 10, -100, 0, 7]), torch.randn(5, 8, dtype=torch.float64)
    with forward_ad.dual_level():
        losses = linear_cross_entropy(forward_ad.make_dual(x, direction), weight, labels, soft_cap=2.0)
        got = forward_ad.unpack_dual(losses).tangent
    step = 1e-6
    above, below = (linear_cross_entropy(x + s * direction, weight, labels, soft_cap=2.0) for s in (step, -step))
    torch.testing.assert_close(got, (above - below) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["grad", "jvp", "jvp of grad", "vmap of grad"])  # torch cannot compile a call of vjp
def test_transforms_inside_a_compiled_function(name: str):
    model = model_of("hawk").train()
    model.config.num_hidden_layers = 1
    ids, direction = ids_of(model), direction_of(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def derivative(p: dict[str, Tensor], v: dict[str, Tensor]):
        return TRANSFORMS[name](lambda p: functional_call(model, p, (ids,), {"labels": ids}).loss, p, v)

    expected = derivative(parameters, direction)
    got = torch.compile(derivative, backend="aot_eager")(parameters, direction)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_a_mask_per_sample_by_vmap():
    """The cache that is on by default would be written to by all samples at once."""
    model, ids = model_of("recurrentgemma"), ids_of(model_of("recurrentgemma"))
    masks = torch.tensor([[0] * 5 + [1] * 12, [1] * 17])
    got = torch.func.vmap(lambda row, mask: model(row[None], attention_mask=mask[None]).logits[0])(ids, masks)
    torch.testing.assert_close(got[:, 5:], model(ids, attention_mask=masks).logits[:, 5:])


def test_the_loss_without_logits_says_that_it_is_differentiated_once():
    model = model_of("recurrentgemma").train()
    ids = ids_of(model)
    loss = model(ids, labels=ids).loss
    with pytest.raises(RuntimeError, match=r"can be differentiated once.*model\.eval\(\)"):
        torch.autograd.grad(loss, tuple(model.parameters()), create_graph=True)


@needs_triton
def test_kernels_have_the_second_derivatives_of_plain_torch():
    model = build(tiny_config("hawk", num_hidden_layers=1))
    ids, parameters = ids_of(model)[:, :5], tuple(model.parameters())

    def second(backend: str) -> tuple[Tensor, ...]:
        set_backend(backend)
        loss = model(ids, labels=ids, use_cache=False).loss
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)

    try:
        for got, expected in zip(second("triton"), second("portable"), strict=True):
            assert (got - expected).norm() <= 1e-4 * expected.norm()
    finally:
        set_backend("auto")
