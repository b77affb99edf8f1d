"""Check before writing: infer the config from the arrays, and require that the mapping is a bijection."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from .. import RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from .mapping import Dialect, Row

Shapes = Mapping[str, tuple[int, ...]]


class ConversionError(ValueError):
    """Reports input, output or options that prevent the conversion, with the remedy."""


@dataclass(frozen=True)
class Claims:
    """Holds the caller's claims about the model (None: no claim). The arrays do not contain the last three."""

    preset: str | None = None
    attention_window_size: int | None = None
    logits_soft_cap: float | None = None
    embeddings_scale_by_sqrt_dim: bool | None = None

    def stated(self) -> dict[str, int | float | bool]:
        """Return the fields set by an option or else by the preset."""
        preset = {} if self.preset is None else _preset(self.preset)
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "preset"}
        return {
            name: preset[name] if value is None else value
            for name, value in values.items()
            if value is not None or preset
        }


OPTION_OF_FIELD = {
    "attention_window_size": "--attention-window-size N",
    "logits_soft_cap": "--logits-soft-cap C (0: none)",
    "embeddings_scale_by_sqrt_dim": "--scale-embeddings or --no-scale-embeddings",
}
# Fields that both a preset and the arrays define. As in the official code, a preset does not define the vocabulary.
_SHAPE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "lru_width",
    "conv1d_width",
    "layers_block_type",
)
# The official code has these values built in.
_OFFICIAL_CONSTANTS = {
    "num_key_value_heads": 1,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "conv1d_width": 4,
}


def _preset(name: str) -> dict:
    config = RecurrentGemmaConfig.from_preset(name)
    fields_of_preset = {field: getattr(config, field) for field in (*_SHAPE_FIELDS, *OPTION_OF_FIELD)}
    if "recurrent" not in config.layers_block_type:
        del fields_of_preset["lru_width"]
    return fields_of_preset


# --- the config -------------------------------------------------------------------------------------------------------


def infer_config(shapes: Shapes, dialect: Dialect, claims: Claims) -> RecurrentGemmaConfig:
    """Infer the config of an official checkpoint: sizes from the arrays' shapes, the rest from `claims`."""
    sizes = _infer_sizes(shapes, dialect)
    unsaid = [option for field, option in OPTION_OF_FIELD.items() if field not in claims.stated()]
    if unsaid:
        raise ConversionError(
            "the arrays of a checkpoint do not say everything about the model: give --preset NAME, or "
            + " and ".join(unsaid)
        )
    try:
        config = RecurrentGemmaConfig(**sizes, **claims.stated())
    except ValueError as error:
        raise ConversionError(f"the arrays describe no possible model: {error}") from error
    _refuse_contradictions(config, claims, "the arrays say")
    return config


def _infer_sizes(shapes: Shapes, dialect: Dialect) -> dict:
    kinds = _block_kinds(shapes)
    embedding = shapes.get("embedder.input_embedding", ())
    branch = _first(shapes, r"mlp_block\.ffw_up\.w")
    gate = _first(shapes, r"recurrent_block\.rg_lru\.a_gate\.b")
    taps = _first(shapes, r"recurrent_block\.conv_1d\.w")
    key = _first(shapes, r"attention_block\.proj_k\.(kernel|weight)")
    head_dim = 0 if len(key) != 2 else key[1] if dialect == "jax" else key[0]
    lacking = [
        name
        for name, found in (
            ("embedder.input_embedding (V, E)", len(embedding) == 2),
            ("blocks.N.mlp_block.ffw_up.w (2, E, F)", len(branch) == 3),
            ("blocks.N.recurrent_block.rg_lru.a_gate.b (H, D / H) or blocks.N.attention_block.proj_k",
             len(gate) == 2 or head_dim),
        )
        if not found
    ]  # fmt: skip
    if lacking or not kinds:
        raise ConversionError(
            f"this is not a Griffin, Hawk or RecurrentGemma checkpoint of the official code: it has no "
            f"{', no '.join(lacking or ['blocks.0'])}. It holds {_some(sorted(shapes))}"
        )
    sizes = {
        "vocab_size": embedding[0],
        "hidden_size": embedding[1],
        "intermediate_size": 2 * branch[2],
        "num_hidden_layers": len(kinds),
        "num_attention_heads": gate[0] if len(gate) == 2 else embedding[1] // head_dim,
        "block_types": _pattern(kinds),
    }
    if len(gate) == 2:
        sizes["lru_width"] = gate[0] * gate[1]
    if len(taps) == 2:
        sizes["conv1d_width"] = taps[0]
    return sizes


def _block_kinds(shapes: Shapes) -> list[str]:
    kinds: dict[int, set[str]] = {}
    for name in shapes:
        if match := re.match(r"blocks\.(\d+)\.(?:(recurrent|attention)_block)?", name):
            kinds.setdefault(int(match[1]), set()).add(match[2] or "")
    # As many layers as there are numbers: a name such as blocks.999999999 is one layer too many, not a billion.
    unclear = [i for i in range(len(kinds)) if len(kinds.get(i, set()) - {""}) != 1]
    if unclear:
        raise ConversionError(
            "each layer needs either a recurrent_block or an attention_block: the checkpoint has none, or both, in "
            + ", ".join(f"blocks.{i}" for i in unclear)
        )
    return [(kinds[i] - {""}).pop() for i in range(len(kinds))]


def _first(shapes: Shapes, pattern: str) -> tuple[int, ...]:
    """Return the shape of the first matching array of any layer, or ()."""
    return next((shape for name, shape in shapes.items() if re.fullmatch(rf"blocks\.\d+\.{pattern}", name)), ())


def _pattern(kinds: list[str]) -> list[str]:
    """Return the shortest pattern whose repetition, cut to length, gives these layers, as in the published configs."""
    lengths = range(1, len(kinds) + 1)
    period = next(n for n in lengths if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return kinds[:period]


def _refuse_contradictions(config: RecurrentGemmaConfig, claims: Claims, who: str) -> None:
    preset = {} if claims.preset is None else _preset(claims.preset)
    claimed = {**{field: value for field, value in preset.items() if field in _SHAPE_FIELDS}, **claims.stated()}
    wrong = [
        f"{place}: {who} {ours!r}, {f'preset {claims.preset}' if field in preset else 'the option'} says {value!r}"
        for field, claim in claimed.items()
        for place, ours, value in _difference(field, getattr(config, field), claim)
    ]
    if wrong:
        raise ConversionError("the checkpoint contradicts the options:\n  " + "\n  ".join(wrong))


def _difference(field: str, ours: object, claim: object) -> list[tuple[str, object, object]]:
    """Return [(place, ours, claim)] if a field differs, otherwise []. Of two lists, their first elements that differ.

    That one list goes on after the end of the other is no difference: num_hidden_layers says it.
    """
    if not isinstance(ours, list) or not isinstance(claim, list):
        return [] if ours == claim else [(field, ours, claim)]
    differing = [i for i, (one, other) in enumerate(zip(ours, claim, strict=False)) if one != other]
    return [(f"{field}[{i}], the first of {len(differing)}", ours[i], claim[i]) for i in differing[:1]]


def check_official_can_express(config: RecurrentGemmaConfig, claims: Claims) -> None:
    """Raise ConversionError unless the official code can run this config and the caller's claims agree with it."""
    _refuse_contradictions(config, claims, "config.json says")
    wrong = [
        f"{field}={getattr(config, field)!r} (official: {value!r})"
        for field, value in _OFFICIAL_CONSTANTS.items()
        if getattr(config, field) != value
    ]
    if wrong:
        raise ConversionError(f"the official code has no model with {', '.join(wrong)}")


# --- the bijection ----------------------------------------------------------------------------------------------------


def our_shapes(config: RecurrentGemmaConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of our parameters, read from a model on the meta device; a tied head counts once."""
    with torch.device("meta"):
        model = RecurrentGemmaForCausalLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def official_shapes(rows: list[Row], ours: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the official arrays that correspond to our parameters."""
    return {
        row.official: tuple(
            row.layout.to_official(*(torch.empty(ours[name], device="meta") for name in row.ours)).shape
        )
        for row in rows
    }


def check_bijection(rows: list[Row], ours: Shapes, expected: Shapes, found: Shapes) -> None:
    """Raise one ConversionError that names everything that violates the bijection.

    Every parameter of our model (`ours`) must come from one row, no array may have two rows, and the arrays `found`
    must equal those `expected` in name and shape.
    """
    used = Counter(name for row in rows for name in row.ours) + Counter(row.official for row in rows)
    problems = [f"used {count} times by the mapping: {name}" for name, count in used.items() if count > 1]
    problems += [f"without a row in the mapping: {name}" for name in ours if name not in used]
    problems += [f"missing: {name} {expected[name]}" for name in expected if name not in found]
    problems += [f"unexpected: {name} {found[name]}" for name in found if name not in expected]
    problems += [
        f"wrong shape: {name} is {found[name]}, expected {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if problems:
        raise ConversionError("the arrays are not those of the model:\n  " + "\n  ".join(problems))


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more arrays" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more
