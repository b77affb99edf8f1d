"""The official RecurrentGemma code (PyPI `recurrentgemma`, PyTorch and JAX) as oracles for our model.

Every oracle is built from OUR config and OUR state dict (the parameter names of the published Hugging Face checkpoints)
through one table, `_entries`, which is read in both directions: our weights go into the official models, the official
gradients come back under our names. A test file that imports this module is skipped where the official code is not
installed.

Shape suffixes: B batch, T time, D lru_width, E hidden_size, F width of an MLP branch, H heads, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recurrent_gemma_hf import RecurrentGemmaConfig

_REASON = "the official code is the oracle: install this package with its `test` extra"
jax = pytest.importorskip("jax", reason=_REASON)
common = pytest.importorskip("recurrentgemma.common", reason=_REASON)
official_torch_code = pytest.importorskip("recurrentgemma.torch", reason=_REASON)
official_jax_code = pytest.importorskip("recurrentgemma.jax", reason=_REASON)

# --- the mapping ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One official parameter and the parameters of ours that it is made of."""

    official: str
    ours: tuple[str, ...]
    to_official: Callable[..., Tensor] = lambda tensor: tensor
    to_ours: Callable[[Tensor], tuple[Tensor, ...]] = lambda tensor: (tensor,)


def _linear(official: str, ours: str, bias: bool = True) -> Iterator[_Entry]:
    yield _Entry(f"{official}.weight", (f"{ours}.weight",))
    if bias:
        yield _Entry(f"{official}.bias", (f"{ours}.bias",))


def _recurrent_entries(official: str, ours: str) -> Iterator[_Entry]:
    for linear in ("linear_x", "linear_y", "linear_out"):
        yield from _linear(f"{official}.{linear}", f"{ours}.{linear}")
    # Both sides put the newest token last: official (4, D), ours torch's depthwise (D, 1, 4).
    yield _Entry(f"{official}.conv_1d.w", (f"{ours}.conv_1d.weight",), lambda w: w[:, 0].T, lambda w: (w.T[:, None],))
    yield _Entry(f"{official}.conv_1d.b", (f"{ours}.conv_1d.bias",))
    yield _Entry(f"{official}.rg_lru.a_param", (f"{ours}.rg_lru.recurrent_param",))
    for gate, our_gate in (("input_gate", "input_gate"), ("a_gate", "recurrent_gate")):
        yield _Entry(f"{official}.rg_lru.{gate}.w", (f"{ours}.rg_lru.{our_gate}_weight",))
        yield _Entry(f"{official}.rg_lru.{gate}.b", (f"{ours}.rg_lru.{our_gate}_bias",))


def _attention_entries(official: str, ours: str) -> Iterator[_Entry]:
    for projection in ("q", "k", "v"):
        yield from _linear(f"{official}.proj_{projection}", f"{ours}.{projection}_proj", bias=False)
    yield from _linear(f"{official}.proj_final", f"{ours}.o_proj")


def _mlp_entries(official: str, ours: str) -> Iterator[_Entry]:
    branches = (f"{ours}.gate_proj", f"{ours}.up_proj")
    # official (2, E, F) holds gate and up; ours are two torch linears (F, E)
    yield _Entry(
        f"{official}.ffw_up.w",
        tuple(f"{branch}.weight" for branch in branches),
        lambda gate, up: torch.stack([gate.T, up.T]),
        lambda w: (w[0].T, w[1].T),
    )
    yield _Entry(
        f"{official}.ffw_up.b",
        tuple(f"{branch}.bias" for branch in branches),
        lambda gate, up: torch.stack([gate, up])[:, None, None],
        lambda b: (b[0, 0, 0], b[1, 0, 0]),
    )
    yield from _linear(f"{official}.ffw_down", f"{ours}.down_proj")


def _layer_entries(index: int, kind: str) -> Iterator[_Entry]:
    official, ours = f"blocks.{index}", f"model.layers.{index}"
    for norm in ("temporal_pre_norm", "channel_pre_norm"):
        yield _Entry(f"{official}.{norm}.scale", (f"{ours}.{norm}.weight",))
    temporal = {"recurrent": _recurrent_entries, "attention": _attention_entries}[kind]
    yield from temporal(f"{official}.{kind}_block", f"{ours}.temporal_block")
    yield from _mlp_entries(f"{official}.mlp_block", f"{ours}.mlp_block")


def _entries(config: RecurrentGemmaConfig) -> list[_Entry]:
    """All official parameters of a model with our config `config`."""
    entries = [
        _Entry("embedder.input_embedding", ("model.embed_tokens.weight",)),
        _Entry("final_norm.scale", ("model.final_norm.weight",)),
    ]
    for index, kind in enumerate(_block_kinds(config)):
        entries.extend(_layer_entries(index, kind))
    return entries


def _block_kinds(config: RecurrentGemmaConfig) -> list[str]:
    """The pattern of the config, cycled: worked out here on purpose and not asked of the class under test."""
    return [config.block_types[index % len(config.block_types)] for index in range(config.num_hidden_layers)]


def to_official_state(config: RecurrentGemmaConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the official names and shapes. Raises if a parameter of ours is left over or missing."""
    left = dict(state_dict)
    head = left.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, state_dict["model.embed_tokens.weight"]):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight: the official model ties them")
    official = {}
    for entry in _entries(config):
        official[entry.official] = entry.to_official(*(left.pop(name) for name in entry.ours)).detach().clone()
    if left:
        raise ValueError(f"parameters without an official counterpart: {sorted(left)}")
    return official


def official_config(config: RecurrentGemmaConfig):
    """The official `GriffinConfig` of our config."""
    kinds = {"recurrent": common.TemporalBlockType.RECURRENT, "attention": common.TemporalBlockType.ATTENTION}
    return common.GriffinConfig(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        mlp_expanded_width=config.intermediate_size // 2,
        num_heads=config.num_attention_heads,
        block_types=tuple(kinds[kind] for kind in _block_kinds(config)),
        embeddings_scale_by_sqrt_dim=config.embeddings_scale_by_sqrt_dim,
        attention_window_size=config.attention_window_size,
        logits_soft_cap=config.logits_soft_cap,
        lru_width=config.lru_width,
        # Of the official scans this one is not the loop of the PyTorch oracle, and it compiles three times faster.
        scan_type=common.ScanType.ASSOCIATIVE_NATIVE,
    )


# --- the official PyTorch model ---------------------------------------------------------------------------------------


def official_torch(
    config: RecurrentGemmaConfig, state_dict: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The official PyTorch Griffin with our weights, all of them in `dtype`."""
    model = official_torch_code.Griffin(official_config(config), gradient_checkpointing=False, dtype=dtype)
    model.load_state_dict(to_official_state(config, state_dict), strict=True)
    return model.eval()


def positions_of(tokens_BT: Tensor) -> Tensor:
    """Positions 0..T-1 in every row, int32 (B, T)."""
    return torch.arange(tokens_BT.shape[1], dtype=torch.int32).expand(tokens_BT.shape)


@torch.no_grad()
def official_torch_logits(model: nn.Module, tokens_BT: Tensor, segment_pos_BT: Tensor | None = None) -> Tensor:
    """Logits (B, T, V) of the official PyTorch model, without a cache; a position 0 starts a document."""
    segment_pos_BT = positions_of(tokens_BT) if segment_pos_BT is None else segment_pos_BT.to(torch.int32)
    return model(tokens_BT, segment_pos_BT)[0]


@torch.no_grad()
def official_torch_decode(
    model: nn.Module, tokens_BT: Tensor, prompt: int, segment_pos_BT: Tensor | None = None
) -> Tensor:
    """Logits (B, T, V) with the official cache: `prompt` tokens at once, the rest one by one (all that the official
    cache supports).
    """
    segment_pos_BT = positions_of(tokens_BT) if segment_pos_BT is None else segment_pos_BT.to(torch.int32)
    logits, cache = model(tokens_BT[:, :prompt], segment_pos_BT[:, :prompt])
    steps = [logits]
    for t in range(prompt, tokens_BT.shape[1]):
        logits, cache = model(tokens_BT[:, t : t + 1], segment_pos_BT[:, t : t + 1], cache)
        steps.append(logits)
    return torch.cat(steps, dim=1)


def official_torch_gradients(
    config: RecurrentGemmaConfig,
    model: nn.Module,
    tokens_BT: Tensor,
    labels_BT: Tensor,
    segment_pos_BT: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean next-token cross entropy (labels of -100 do not count) and its gradient for every parameter, under OUR
    names.

    `labels_BT` are aligned with the tokens, as Transformers expects them: the logits of position t answer for the label
    of position t + 1.
    """
    segment_pos_BT = positions_of(tokens_BT) if segment_pos_BT is None else segment_pos_BT.to(torch.int32)
    model.zero_grad(set_to_none=True)
    logits_BTV = model(tokens_BT, segment_pos_BT)[0]
    loss = nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten(), ignore_index=-100
    )
    loss.backward()
    official = dict(model.named_parameters())
    gradients: dict[str, Tensor] = {}
    for entry in _entries(config):
        gradients.update(zip(entry.ours, entry.to_ours(official.pop(entry.official).grad), strict=True))
    assert not official, f"official parameters without a counterpart: {sorted(official)}"
    return loss.detach(), gradients


# --- the official JAX model -------------------------------------------------------------------------------------------


def _flax_parameters(official_state: Mapping[str, Tensor]) -> dict:
    """The official PyTorch names as a Flax tree: `blocks.N` is one key, and a linear's weight (out, in) is a kernel
    (in, out).
    """
    tree: dict = {}
    for name, tensor in official_state.items():
        *path, leaf = name.removeprefix("blocks.").split(".")
        if name.startswith("blocks."):
            path[0] = f"blocks.{path[0]}"
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        array = tensor.float().numpy()
        node["kernel" if leaf == "weight" else leaf] = jax.numpy.asarray(array.T if leaf == "weight" else array)
    return tree


@functools.cache
def _jax_forward(config) -> Callable:
    """The compiled official JAX forward pass of one official config: compiling takes seconds, so it is shared by all
    tests of a shape.
    """
    model = official_jax_code.Griffin(config, gradient_checkpointing=False)

    def logits(parameters: dict, tokens, positions):
        return model.apply(
            {"params": parameters}, tokens, positions, cache=None, return_logits=True, return_cache=False
        )[0]

    return jax.jit(logits)


def official_jax_logits(
    config: RecurrentGemmaConfig,
    state_dict: Mapping[str, Tensor],
    tokens_BT: Tensor,
    segment_pos_BT: Tensor | None = None,
) -> Tensor:
    """Logits (B, T, V) in float32 of the official JAX (Flax) model with our weights, on the CPU."""
    segment_pos_BT = positions_of(tokens_BT) if segment_pos_BT is None else segment_pos_BT
    parameters = _flax_parameters(to_official_state(config, state_dict))
    tokens, positions = (jax.numpy.asarray(ids.numpy().astype(np.int32)) for ids in (tokens_BT, segment_pos_BT))
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("float32"):
        logits = _jax_forward(official_config(config))(parameters, tokens, positions)
    return torch.from_numpy(np.array(logits))
