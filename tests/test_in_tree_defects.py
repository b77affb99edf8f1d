"""What the model inside Transformers (`transformers.models.recurrent_gemma`) gets wrong, and ours gets right.

Each row of the table runs both models on the same weights and compares them with the official code. The tests assert
only that OURS is right: what the in-tree model does is recorded beside it, so a Transformers release that mends a
defect changes the table and breaks nothing.

`python tests/test_in_tree_defects.py` writes the table in Markdown, for the README.
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
from tests.helpers import build, tiny_config
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


def tokens(rows: int, length: int, seed: int = SEED) -> Tensor:
    """Token ids (rows, length); not 0, the padding token."""
    return torch.randint(1, 101, (rows, length), generator=torch.Generator().manual_seed(seed))


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


def compare_logits(claim: str, trio: Trio, logits_of: Callable[[nn.Module], Tensor], official: Tensor) -> Row:
    """A row from logits that both models compute the same way."""

    def in_tree() -> str:
        logits = logits_of(trio.in_tree)
        wrong = error(logits, official)
        if wrong <= LOGITS_TOLERANCE:
            return f"right ({wrong:.0e})"
        zero = ", all of them 0" if not logits.any() else ""
        return f"logits off by {wrong:.1f}{zero} (their standard deviation is {official.std().item():.1f})"

    with torch.no_grad():
        return Row(claim, error(logits_of(trio.ours), official), LOGITS_TOLERANCE, outcome(in_tree))


def tokens_wrong(count: int, of: int) -> str:
    return f"{count} of {of} tokens wrong" if count else "right"


def greedy(official: nn.Module, prompt_BT: Tensor, count: int) -> Tensor:
    """The official model's greedy continuation (B, T + count), everything recomputed for every token."""
    tokens_BT = prompt_BT
    for _ in range(count):
        tokens_BT = torch.cat([tokens_BT, official_torch_logits(official, tokens_BT)[:, -1:].argmax(-1)], dim=1)
    return tokens_BT


def compare_generation(claim: str, trio: Trio, prompt_BT: Tensor, count: int = 30, **options) -> Row:
    """A row from greedy `generate`: how many of the new tokens differ from the official ones."""
    official = greedy(trio.official, prompt_BT, count)

    def wrong(model: GenerationMixin) -> float:
        generated = model.generate(
            prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=count, do_sample=False, **options
        )
        return (generated != official).sum().item()

    new = official[:, -count:].numel()
    return Row(claim, wrong(trio.ours), 0, outcome(lambda: tokens_wrong(wrong(trio.in_tree), new)))


# --- the rows ---------------------------------------------------------------------------------------------------------


def beyond_the_window() -> Row:
    trio, tokens_BT = Trio.of(), tokens(2, 61)
    official = official_torch_logits(trio.official, tokens_BT)
    return compare_logits(
        "text longer than the attention window",
        trio,
        lambda m: m(input_ids=tokens_BT, use_cache=False).logits,
        official,
    )


def lru_width() -> Row:
    trio, prompt_BT = Trio.of("wide_lru", attention_window_size=64), tokens(2, 1)
    return compare_generation("`generate` from one token where `lru_width` is not `hidden_size`", trio, prompt_BT)


def hawk() -> Row:
    # The in-tree model cannot leave the embedding unscaled: give it a Hawk that scales, so that this row shows Hawk
    # alone.
    trio = Trio.of("hawk", embeddings_scale_by_sqrt_dim=True, logits_soft_cap=30.0)
    return compare_generation("Hawk (no attention layers): `generate`", trio, tokens(2, 9))


def unscaled_embedding() -> Row:
    trio, tokens_BT = Trio.of("griffin_paper", logits_soft_cap=30.0), tokens(2, 11)
    official = official_torch_logits(trio.official, tokens_BT)
    claim = "models of the Griffin paper (embedding not scaled)"
    return compare_logits(claim, trio, lambda m: m(input_ids=tokens_BT, use_cache=False).logits, official)


def no_soft_cap() -> Row:
    trio, tokens_BT = Trio.of(logits_soft_cap=0.0), tokens(2, 11)
    official = official_torch_logits(trio.official, tokens_BT)
    return compare_logits(
        "`logits_soft_cap` 0 (none)", trio, lambda m: m(input_ids=tokens_BT, use_cache=False).logits, official
    )


def left_padding() -> Row:
    trio, row_BT = Trio.of(), tokens(1, 7)
    padded_BT = nn.functional.pad(row_BT, (4, 0), value=5)
    mask_BT = nn.functional.pad(torch.ones_like(row_BT), (4, 0))
    positions_BT = (mask_BT.cumsum(-1) - 1).masked_fill(mask_BT == 0, 0)

    def logits(model: nn.Module) -> Tensor:
        return model(input_ids=padded_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=False).logits[
            :, 4:
        ]

    return compare_logits(
        "left padding (a batch of prompts)", trio, logits, official_torch_logits(trio.official, row_BT)
    )


def packed_documents() -> Row:
    trio, tokens_BT = Trio.of(), tokens(1, 11)
    positions_BT = torch.cat([torch.arange(5), torch.arange(6)])[None]
    official = official_torch_logits(trio.official, tokens_BT, positions_BT)
    claim = "packed documents (`position_ids` that restart)"
    return compare_logits(
        claim, trio, lambda m: m(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False).logits, official
    )


def returned_cache() -> Row:
    """Two chunks, the second with the cache that the first returned."""
    trio, tokens_BT = Trio.of(), tokens(2, 11)

    def second_chunk(model: nn.Module) -> Tensor:
        cache = model(input_ids=tokens_BT[:, :6], use_cache=True).past_key_values
        return model(input_ids=tokens_BT[:, 6:], past_key_values=cache, use_cache=True).logits

    official = official_torch_logits(trio.official, tokens_BT)[:, 6:]
    return compare_logits("continuing from the `past_key_values` of an output", trio, second_chunk, official)


def own_cache(model: nn.Module) -> RecurrentGemmaCache | DynamicCache:
    """An empty cache of the kind the model uses."""
    return (
        RecurrentGemmaCache(model.config)
        if isinstance(model, RecurrentGemmaForCausalLM)
        else DynamicCache(config=model.config)
    )


def two_conversations() -> Row:
    """Two sequences of different content, each with its own cache, advance in turns."""
    trio, talks = Trio.of(), [tokens(1, 11, seed) for seed in (1, 2)]

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
    return compare_logits("two conversations on one model, in turns", trio, logits, official)


def chunked_prefill() -> Row:
    trio = Trio.of(attention_window_size=64)
    return compare_generation("`generate(prefill_chunk_size=4)`", trio, tokens(2, 11), prefill_chunk_size=4)


def static_cache() -> Row:
    trio = Trio.of(attention_window_size=64)
    claim = '`generate(cache_implementation="static")`'
    return compare_generation(claim, trio, tokens(2, 9), cache_implementation="static", disable_compile=True)


def prompt_lookup() -> Row:
    trio = Trio.of(attention_window_size=64)
    return compare_generation("prompt-lookup decoding", trio, tokens(1, 6).repeat(1, 3), prompt_lookup_num_tokens=4)


def assisted() -> Row:
    trio = Trio.of(attention_window_size=64)
    prompt_BT, count = tokens(1, 9), 30
    official = greedy(trio.official, prompt_BT, count)

    def wrong(model: GenerationMixin, draft: GenerationMixin) -> float:
        mask_BT = torch.ones_like(prompt_BT)
        generated = model.generate(
            prompt_BT, attention_mask=mask_BT, max_new_tokens=count, do_sample=False, assistant_model=draft
        )
        return (generated != official).sum().item()

    # A draft that often guesses wrong, so that guesses have to be taken back.
    config = tiny_config(eos_token_id=None, num_hidden_layers=1, attention_window_size=64)
    draft = build(config, SEED)
    in_tree_draft = in_tree_model(config, draft.state_dict())
    in_tree = outcome(lambda: tokens_wrong(wrong(trio.in_tree, in_tree_draft), count))
    return Row("assisted decoding (a draft model)", wrong(trio.ours, draft), 0, in_tree)


def gradient_of_token_zero() -> Row:
    """Token 0 as an ordinary token: `pad_token_id` is 0, and an embedding with a `padding_idx` learns nothing from
    it.
    """
    trio, tokens_BT = Trio.of(), tokens(1, 11)
    tokens_BT[:, 2::3] = 0
    name = "model.embed_tokens.weight"
    _, gradients = oracles.official_torch_gradients(trio.ours.config, trio.official, tokens_BT, tokens_BT)

    def relative_error(model: nn.Module) -> float:
        model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
        gradient = model.get_parameter(name).grad
        return ((gradient - gradients[name]).norm() / gradients[name].norm()).item()

    in_tree = outcome(lambda: f"relative error {relative_error(trio.in_tree):.2f}")
    claim = "gradient of the embedding where `pad_token_id` occurs as a token"
    return Row(claim, relative_error(trio.ours), LOGITS_TOLERANCE, in_tree)


def initial_values() -> Row:
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
    return Row("initial values (spread of each parameter)", ours, 0.2, f"off by a factor of up to {in_tree:.0f}")


ROWS = [
    beyond_the_window,
    left_padding,
    packed_documents,
    two_conversations,
    returned_cache,
    chunked_prefill,
    static_cache,
    prompt_lookup,
    assisted,
    lru_width,
    hawk,
    unscaled_embedding,
    no_soft_cap,
    gradient_of_token_zero,
    initial_values,
]


@pytest.mark.filterwarnings("ignore")  # the in-tree model may warn as it likes; ours is held to no warnings elsewhere
@pytest.mark.parametrize("measure", ROWS, ids=lambda measure: measure.__name__)
def test_ours_is_right_where_the_in_tree_model_is_not(measure, record_testsuite_property):
    row = measure()
    record_testsuite_property(row.claim, row.in_tree)
    assert row.ours <= row.tolerance, f"{row.claim}: ours is off by {row.ours:.2e}; the in-tree model: {row.in_tree}"


if __name__ == "__main__":
    logging.set_verbosity_error()
    sys.stdout.write("| | ours: deviation from the official code | in-tree |\n|---|---|---|\n")
    for measure_row in ROWS:
        sys.stdout.write(measure_row().markdown() + "\n")
