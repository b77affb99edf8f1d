"""Map the official code's parameters to ours: one table, used in both directions.

The official code has two dialects with the same modules: "jax" (Flax trees, as Orbax stores them) and "torch" (state
dicts, as in Kaggle's .pt files). Names are paths joined by dots; both call a layer `blocks.N`. Each row of the table
maps one official array to one or two of our parameters with the same values.

Shape suffixes: D lru_width, E hidden_size, F width of an MLP branch, K taps of the convolution.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from torch import Tensor, stack

from .. import RecurrentGemmaConfig

Dialect = Literal["jax", "torch"]


class Layout(NamedTuple):
    """Converts the layout of one official array to ours and back. Both functions only permute: no bit changes."""

    to_ours: Callable[[Tensor], tuple[Tensor, ...]]
    to_official: Callable[..., Tensor]


SAME = Layout(lambda array: (array,), lambda ours: ours)
# A Flax kernel is (in, out), a torch weight (out, in).
TRANSPOSED = Layout(lambda kernel: (kernel.T,), lambda weight: weight.T)
# (K, D) against torch's depthwise (D, 1, K); the newest token comes last on both sides.
TAPS = Layout(lambda w_KD: (w_KD.T[:, None],), lambda weight: weight[:, 0].T)
# (2, E, F) against two torch weights (F, E).
PAIR_OF_MATRICES = Layout(lambda w: (w[0].T, w[1].T), lambda gate, up: stack([gate.T, up.T]))
# (2, 1, 1, F) against two biases (F,).
PAIR_OF_BIASES = Layout(lambda b: (b[0, 0, 0], b[1, 0, 0]), lambda gate, up: stack([gate, up])[:, None, None])


class Row(NamedTuple):
    """Maps one official array to our parameters with the same values, and gives their layout."""

    official: str
    ours: tuple[str, ...]
    layout: Layout


def table(config: RecurrentGemmaConfig, dialect: Dialect) -> list[Row]:
    """Return all rows for a model of this config, in the order in which the model applies them."""
    rows = [Row("embedder.input_embedding", ("model.embed_tokens.weight",), SAME)]
    for index, kind in enumerate(config.layers_block_type):
        rows += _layer(f"blocks.{index}", f"model.layers.{index}", kind, dialect)
    rows.append(Row("final_norm.scale", ("model.final_norm.weight",), SAME))
    return rows


def _layer(official: str, ours: str, kind: str, dialect: Dialect) -> Iterator[Row]:
    temporal = {"recurrent": _recurrent_block, "attention": _attention_block}[kind]
    yield Row(f"{official}.temporal_pre_norm.scale", (f"{ours}.temporal_pre_norm.weight",), SAME)
    yield from temporal(f"{official}.{kind}_block", f"{ours}.temporal_block", dialect)
    yield Row(f"{official}.channel_pre_norm.scale", (f"{ours}.channel_pre_norm.weight",), SAME)
    yield from _mlp_block(f"{official}.mlp_block", f"{ours}.mlp_block", dialect)


def _recurrent_block(official: str, ours: str, dialect: Dialect) -> Iterator[Row]:
    for name in ("linear_x", "linear_y", "linear_out"):
        yield from _linear(f"{official}.{name}", f"{ours}.{name}", dialect)
    yield Row(f"{official}.conv_1d.w", (f"{ours}.conv_1d.weight",), TAPS)
    yield Row(f"{official}.conv_1d.b", (f"{ours}.conv_1d.bias",), SAME)
    yield Row(f"{official}.rg_lru.a_param", (f"{ours}.rg_lru.recurrent_param",), SAME)
    for official_gate, our_gate in (("a_gate", "recurrent_gate"), ("input_gate", "input_gate")):
        for official_leaf, our_leaf in (("w", "weight"), ("b", "bias")):
            yield Row(
                f"{official}.rg_lru.{official_gate}.{official_leaf}", (f"{ours}.rg_lru.{our_gate}_{our_leaf}",), SAME
            )


def _attention_block(official: str, ours: str, dialect: Dialect) -> Iterator[Row]:
    for name in ("q", "k", "v"):
        yield _matrix(f"{official}.proj_{name}", f"{ours}.{name}_proj", dialect)
    yield from _linear(f"{official}.proj_final", f"{ours}.o_proj", dialect)


def _mlp_block(official: str, ours: str, dialect: Dialect) -> Iterator[Row]:
    gate, up = f"{ours}.gate_proj", f"{ours}.up_proj"
    yield Row(f"{official}.ffw_up.w", (f"{gate}.weight", f"{up}.weight"), PAIR_OF_MATRICES)
    yield Row(f"{official}.ffw_up.b", (f"{gate}.bias", f"{up}.bias"), PAIR_OF_BIASES)
    yield from _linear(f"{official}.ffw_down", f"{ours}.down_proj", dialect)


def _linear(official: str, ours: str, dialect: Dialect) -> Iterator[Row]:
    yield _matrix(official, ours, dialect)
    yield Row(f"{official}.bias", (f"{ours}.bias",), SAME)


def _matrix(official: str, ours: str, dialect: Dialect) -> Row:
    leaf, layout = ("kernel", TRANSPOSED) if dialect == "jax" else ("weight", SAME)
    return Row(f"{official}.{leaf}", (f"{ours}.weight",), layout)
