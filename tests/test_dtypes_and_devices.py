"""The same numbers in other dtypes, on other devices, offloaded, checkpointed, compiled, exported, from two threads."""

from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from recurrent_gemma_hf import (
    RecurrentGemmaCache,
)
from tests.helpers import (
    CLOSE,
    assert_same_gradients,
    build,
    gradients,
    in_pieces,
    model_of,
    padded,
    tiny_config,
    tokens_of,
)

# Beyond two blocks of queries: attention goes in bands.
LONG = tiny_config().attention_window_size + 2 * 512 + 77


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    model, ids = build(tiny_config()).train(), tokens_of(2, 40)
    expected = gradients(model, model(ids, labels=ids).loss)
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
    got = gradients(model, outputs.loss)
    handle.remove()
    assert len(calls) == 2, "nothing was recomputed"
    assert_same_gradients(got, expected, 1e-6)
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


@pytest.mark.parametrize("variant", ["recurrentgemma", "hawk"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float64, 1e-5)], ids=str
)  # fmt: skip
@torch.no_grad()
def test_dtypes(variant, dtype, tolerance):
    """Mean error against float32, relative to the standard deviation of the logits; over a cache as well."""
    model, ids = build(tiny_config(variant), seed=3).to(dtype), tokens_of(2, 40)
    expected = model_of(variant)(ids).logits
    for logits in (model(ids, use_cache=False).logits, in_pieces(model, ids, [20, 18, 1, 1])):
        assert logits.dtype == dtype
        assert (logits.float() - expected).abs().mean() <= tolerance * expected.std()


@torch.no_grad()
def test_float64_is_float64_throughout():
    """One float32 in between would show: pieces and whole agree to 1e-12."""
    model, ids = build(tiny_config()).double(), tokens_of(2, 40)
    pieces = in_pieces(model, ids, [20, 18, 1, 1])
    torch.testing.assert_close(pieces, model(ids, use_cache=False).logits, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("length", [40, LONG], ids=["short", "banded"])
def test_autocast(attention, length):
    """As Trainer(bf16=True) trains: float32 parameters and residual stream, bfloat16 products."""
    model, ids = build(tiny_config(), seed=3, attention=attention), tokens_of(2, length)
    expected = model(ids).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(ids, labels=ids, use_cache=False)
        with torch.no_grad():
            pieces = in_pieces(model, ids, [length - 3, 1, 1, 1])
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


def test_compiled_without_a_graph_break():
    model, ids = build(tiny_config()), tokens_of(2, 40)
    mask = padded([25, 40], "left")[1]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for inputs in ({}, {"attention_mask": mask}):
            got, expected = (m(ids, use_cache=False, **inputs).logits for m in (compiled, model))
            torch.testing.assert_close(got, expected, **CLOSE)
    model.train()
    losses = [m(ids, labels=ids).loss for m in (compiled, model)]
    torch.testing.assert_close(*losses)
    assert_same_gradients(*(gradients(model, loss) for loss in losses))


def test_compiled_training_with_any_length():
    """Two recurrent layers and sizes that change: a float that belongs to no module fails there."""
    model = build(tiny_config(num_hidden_layers=3)).train()
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    for ids in (tokens_of(2, 12), tokens_of(3, 20)):
        losses = [m(ids, labels=ids).loss for m in (compiled, model)]
        torch.testing.assert_close(*losses)
        assert_same_gradients(*(gradients(model, loss) for loss in losses))


def test_exported():
    model, ids = model_of(), tokens_of(2, 40)
    program = torch.export.export(model, (ids,), {"use_cache": False})
    torch.testing.assert_close(program.module()(ids, use_cache=False).logits, model(ids).logits, **CLOSE)


@torch.no_grad()
def test_two_threads_on_one_model():
    model, texts = model_of(), [tokens_of(1, 60, seed) for seed in (1, 2)]
    expected = [model(text).logits for text in texts]
    with ThreadPoolExecutor(2) as threads:
        got = threads.map(torch.no_grad()(lambda text: [in_pieces(model, text, 7) for _ in range(3)]), texts)
    for text, logits in zip(got, expected, strict=True):
        for again in text:
            torch.testing.assert_close(again, logits, **CLOSE)
