"""What the model inside Transformers (`transformers.models.recurrent_gemma`) gets wrong, and ours gets right.

Each row of the table runs both models on the same weights and compares them with the official code. The tests assert
only that OURS is right: what the in-tree model does is recorded beside it, so a Transformers release that mends a
defect changes the table and breaks nothing.

`python -m tests.test_in_tree_defects` writes the table in Markdown, for the README.
"""

import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, logging
from transformers.models.recurrent_gemma import configuration_recurrent_gemma as in_tree_configuration
from transformers.models.recurrent_gemma import modeling_recurrent_gemma as in_tree_modeling

from recurrent_gemma_hf import RecurrentGemmaCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from tests import oracles
from tests.helpers import build, packed_positions, tiny_config, tokens_of
from tests.oracles import official_torch, official_torch_logits

SEED = 3
LOGITS_TOLERANCE = 1e-4  # for logits of order 1, as in test_against_official.py


def in_tree_config(config: RecurrentGemmaConfig) -> in_tree_configuration.RecurrentGemmaConfig:
    """The in-tree config of our config. It has no field for the embedding scale: the in-tree model always scales."""
    fields = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads lru_width "
        "attention_window_size conv1d_width logits_soft_cap block_types rms_norm_eps pad_token_id eos_token_id"
    )
    return in_tree_configuration.RecurrentGemmaConfig(**{field: getattr(config, field) for field in fields.split()})


def in_tree_model(config: RecurrentGemmaConfig, state_dict: dict[str, Tensor]) -> GenerationMixin:
    """The in-tree model with our config and weights."""
    model = in_tree_modeling.RecurrentGemmaForCausalLM(in_tree_config(config))
    model.load_state_dict({"lm_head.weight": state_dict["model.embed_tokens.weight"], **state_dict}, strict=True)
    return model.eval()


@dataclass(frozen=True)
class Trio:
    """The same weights three times."""

    ours: RecurrentGemmaForCausalLM
    in_tree: GenerationMixin
    official: nn.Module

    @classmethod
    def of(cls, variant: str = "recurrentgemma", **overrides) -> "Trio":
        config = tiny_config(variant, eos_token_id=None, **overrides)
        ours = build(config, SEED)
        return cls(ours, in_tree_model(config, ours.state_dict()), official_torch(config, ours.state_dict()))


@dataclass(frozen=True)
class Row:
    """One line of the table: our deviation from the official code, and what the in-tree model does."""

    claim: str
    ours: float
    tolerance: float
    in_tree: str

    def markdown(self) -> str:
        ours = f"{self.ours:.0e}" if self.ours else "0"
        return f"| {self.claim} | {ours} | {self.in_tree} |"


def error(logits: Tensor, official: Tensor) -> float:
    """The largest absolute difference; infinite where the logits are not numbers."""
    return (logits.float() - official).abs().nan_to_num(nan=float("inf")).max().item()


def outcome(measure: Callable[[], str]) -> str:
    """What the in-tree model does in words, or the exception it ends with."""
    try:
        return measure()
    except Exception as exception:  # whatever the in-tree model raises is the finding
        message = str(exception).strip().splitlines()[0].replace("`", "'")
        return f"`{type(exception).__name__}: {textwrap.shorten(message, 80, placeholder=' ...')}`"


def compare(claim: str, trio: Trio, logits_of: Callable[[nn.Module], Tensor], official: Tensor) -> Row:
    """Return a row from logits that both models compute the same way."""

    def in_tree() -> str:
        logits = logits_of(trio.in_tree)
        wrong = error(logits, official)
        if wrong <= LOGITS_TOLERANCE:
            return f"right ({wrong:.0e})"
        zero = ", all of them 0" if not logits.any() else ""
        return f"logits off by {wrong:.1f}{zero} (their standard deviation is {official.std().item():.1f})"

    with torch.no_grad():
        return Row(claim, error(logits_of(trio.ours), official), LOGITS_TOLERANCE, outcome(in_tree))


def compare_forward(claim: str, tokens_BT: Tensor, position_ids: Tensor | None = None, **config) -> Row:
    """Return a row from one forward without a cache."""
    trio = Trio.of(**config)
    inputs = {} if position_ids is None else {"position_ids": position_ids}
    official = official_torch_logits(trio.official, tokens_BT, position_ids)
    return compare(claim, trio, lambda m: m(input_ids=tokens_BT, use_cache=False, **inputs).logits, official)


def greedy(official: nn.Module, prompt_BT: Tensor, count: int) -> Tensor:
    """Return the official model's greedy continuation (B, T + count), everything recomputed for every token."""
    tokens_BT = prompt_BT
    for _ in range(count):
        tokens_BT = torch.cat([tokens_BT, official_torch_logits(official, tokens_BT)[:, -1:].argmax(-1)], dim=1)
    return tokens_BT


def compare_generate(claim: str, prompt_BT: Tensor, options: dict | None = None, draft=None, **config) -> Row:
    """Return a row from greedy `generate`: how many of 30 new tokens per row differ from the official ones.

    `draft` is the config of a draft model, of the kind of the model that it drafts for.
    """
    trio, count = Trio.of(**config), 30
    official = greedy(trio.official, prompt_BT, count)
    drafts = Trio.of(**draft) if draft else None

    def wrong(model: GenerationMixin, draft: GenerationMixin | None) -> int:
        chosen = {**(options or {}), **({"assistant_model": draft} if draft else {})}
        mask_BT = torch.ones_like(prompt_BT)
        written = model.generate(prompt_BT, attention_mask=mask_BT, max_new_tokens=count, do_sample=False, **chosen)
        return int((written != official).sum())

    def in_tree() -> str:
        number, new = wrong(trio.in_tree, drafts and drafts.in_tree), official[:, -count:].numel()
        return f"{number} of {new} tokens wrong" if number else "right"

    return Row(claim, wrong(trio.ours, drafts and drafts.ours), 0, outcome(in_tree))


# --- the rows that take more than one call ----------------------------------------------------------------------------


def left_padding(claim: str) -> Row:
    trio, row_BT = Trio.of(), tokens_of(1, 7, SEED)
    padded_BT = nn.functional.pad(row_BT, (4, 0), value=5)
    mask_BT = nn.functional.pad(torch.ones_like(row_BT), (4, 0))
    inputs = {"attention_mask": mask_BT, "position_ids": (mask_BT.cumsum(-1) - 1).clamp(min=0), "use_cache": False}
    official = official_torch_logits(trio.official, row_BT)
    return compare(claim, trio, lambda m: m(input_ids=padded_BT, **inputs).logits[:, 4:], official)


def returned_cache(claim: str) -> Row:
    """Two chunks, the second with the cache that the first returned."""
    trio, tokens_BT = Trio.of(), tokens_of(2, 11, SEED)

    def second_chunk(model: nn.Module) -> Tensor:
        cache = model(input_ids=tokens_BT[:, :6], use_cache=True).past_key_values
        return model(input_ids=tokens_BT[:, 6:], past_key_values=cache, use_cache=True).logits

    official = official_torch_logits(trio.official, tokens_BT)[:, 6:]
    return compare(claim, trio, second_chunk, official)


def own_cache(model: nn.Module) -> RecurrentGemmaCache | DynamicCache:
    """An empty cache of the kind the model uses."""
    return (
        RecurrentGemmaCache(model.config)
        if isinstance(model, RecurrentGemmaForCausalLM)
        else DynamicCache(config=model.config)
    )


def two_conversations(claim: str) -> Row:
    """Two sequences of different content, each with its own cache, advance in turns."""
    trio, talks = Trio.of(), [tokens_of(1, 11, seed) for seed in (1, 2)]

    def logits(model: nn.Module) -> Tensor:
        caches = [own_cache(model) for _ in talks]
        steps = []
        for start, end in [(0, 5), *((t, t + 1) for t in range(5, 11))]:
            outputs = [
                model(
                    input_ids=talk[:, start:end],
                    position_ids=torch.arange(start, end)[None],
                    past_key_values=cache,
                    use_cache=True,
                )
                for talk, cache in zip(talks, caches, strict=True)
            ]
            steps.append(torch.cat([output.logits for output in outputs]))
        return torch.cat(steps, dim=1)

    official = official_torch_logits(trio.official, torch.cat(talks))
    return compare(claim, trio, logits, official)


def gradient_of_token_zero(claim: str) -> Row:
    """Token 0 as an ordinary token: `pad_token_id` is 0, and an embedding with a `padding_idx` learns nothing from
    it.
    """
    trio, tokens_BT = Trio.of(), tokens_of(1, 11, SEED)
    tokens_BT[:, 2::3] = 0
    name = "model.embed_tokens.weight"
    _, gradients = oracles.official_torch_gradients(trio.ours.config, trio.official, tokens_BT, tokens_BT)

    def relative_error(model: nn.Module) -> float:
        model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
        gradient = model.get_parameter(name).grad
        return ((gradient - gradients[name]).norm() / gradients[name].norm()).item()

    in_tree = outcome(lambda: f"relative error {relative_error(trio.in_tree):.2f}")
    return Row(claim, relative_error(trio.ours), LOGITS_TOLERANCE, in_tree)


def initial_values(claim: str) -> Row:
    """The ratios of standard deviations, parameter by parameter, of models that nobody has trained yet."""
    config = tiny_config(hidden_size=256, head_dim=64, lru_width=256, intermediate_size=1024)
    torch.manual_seed(SEED)
    official = oracles.official_torch_code.Griffin(oracles.official_config(config)).state_dict()

    def largest_factor(model: nn.Module) -> float:
        state = oracles.to_official_state(config, model.state_dict())
        ratios = [state[name].std() / expected.std() for name, expected in official.items() if expected.any()]
        return max(max(ratio, 1 / ratio) for ratio in ratios).item()

    ours = largest_factor(RecurrentGemmaForCausalLM(config)) - 1
    in_tree = largest_factor(in_tree_modeling.RecurrentGemmaForCausalLM(in_tree_config(config)))
    # The samples are finite: 256 values of Lambda leave the ratio of two standard deviations uncertain by 6 %.
    return Row(claim, ours, 0.2, f"off by a factor of up to {in_tree:.0f}")


WIDE = {"attention_window_size": 64}
ROWS: dict[str, Callable[[str], Row]] = {
    "text longer than the attention window": lambda claim: compare_forward(claim, tokens_of(2, 61, SEED)),
    "left padding (a batch of prompts)": left_padding,
    "packed documents (`position_ids` that restart)": lambda claim: compare_forward(
        claim, tokens_of(1, 11, SEED), packed_positions(5, 6)[None]
    ),
    "two conversations on one model, in turns": two_conversations,
    "continuing from the `past_key_values` of an output": returned_cache,
    "`generate(prefill_chunk_size=4)`": lambda claim: compare_generate(
        claim, tokens_of(2, 11, SEED), {"prefill_chunk_size": 4}, **WIDE
    ),
    '`generate(cache_implementation="static")`': lambda claim: compare_generate(
        claim, tokens_of(2, 9, SEED), {"cache_implementation": "static", "disable_compile": True}, **WIDE
    ),
    "prompt-lookup decoding": lambda claim: compare_generate(
        claim, tokens_of(1, 6, SEED).repeat(1, 3), {"prompt_lookup_num_tokens": 4}, **WIDE
    ),
    # A draft that often guesses wrong, so that guesses have to be taken back.
    "assisted decoding (a draft model)": lambda claim: compare_generate(
        claim, tokens_of(1, 9, SEED), draft={"num_hidden_layers": 1, **WIDE}, **WIDE
    ),
    "`generate` from one token where `lru_width` is not `hidden_size`": lambda claim: compare_generate(
        claim, tokens_of(2, 1, SEED), variant="wide_lru", **WIDE
    ),
    # The in-tree model cannot leave the embedding unscaled: a Hawk that scales shows Hawk alone.
    "Hawk (no attention layers): `generate`": lambda claim: compare_generate(
        claim, tokens_of(2, 9, SEED), variant="hawk", embeddings_scale_by_sqrt_dim=True, logits_soft_cap=30.0
    ),
    "models of the Griffin paper (embedding not scaled)": lambda claim: compare_forward(
        claim, tokens_of(2, 11, SEED), variant="griffin_paper", logits_soft_cap=30.0
    ),
    "`logits_soft_cap` 0 (none)": lambda claim: compare_forward(claim, tokens_of(2, 11, SEED), logits_soft_cap=0.0),
    "gradient of the embedding where `pad_token_id` occurs as a token": gradient_of_token_zero,
    "initial values (spread of each parameter)": initial_values,
}


@pytest.mark.filterwarnings("ignore")  # the in-tree model may warn as it likes; ours is held to no warnings elsewhere
@pytest.mark.parametrize("claim", ROWS)
def test_ours_is_right_where_the_in_tree_model_is_not(claim: str, record_testsuite_property):
    row = ROWS[claim](claim)
    record_testsuite_property(row.claim, row.in_tree)
    assert row.ours <= row.tolerance, f"{row.claim}: ours is off by {row.ours:.2e}; the in-tree model: {row.in_tree}"


if __name__ == "__main__":
    logging.set_verbosity_error()
    sys.stdout.write("| | ours: deviation from the official code | in-tree |\n|---|---|---|\n")
    for claim, measure in ROWS.items():
        sys.stdout.write(measure(claim).markdown() + "\n")
