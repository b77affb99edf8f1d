"""Random programs of generate(): any mode, padding, cache and number of turns against each row alone, recomputed.

The models run in float64, so that the path through the cache cannot turn the choice between two tokens.
"""

import functools
import random

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from recurrent_gemma_hf import RecurrentGemmaCache, RecurrentGemmaForCausalLM
from tests.helpers import FUZZ_ROUNDS, build, tiny_config

VARIANTS = ["recurrentgemma", "wide_lru", "hawk", "attention_first", "attention_only"]
PAD = 0


@functools.cache
def model_of(variant: str, eos: int | None) -> RecurrentGemmaForCausalLM:
    config = tiny_config(variant, attention_window_size=8, eos_token_id=eos)
    return build(config, seed=7).double()


@torch.no_grad()
def alone(model: RecurrentGemmaForCausalLM, ids: list[int], new: int, eos: int | None) -> list[int]:
    """One row, greedily, without a cache, up to its end."""
    written: list[int] = []
    while len(written) < new and (eos is None or eos not in written):
        logits = model(torch.tensor([ids + written]), use_cache=False).logits[0, -1]
        written.append(int(logits.argmax()))
    return written


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, padding on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@pytest.mark.parametrize("seed", range(40 * FUZZ_ROUNDS))
def test_a_program(seed: int):
    draw = random.Random(seed)
    eos = draw.choice([None, 5, 17])
    model = model_of(draw.choice(VARIANTS), eos)
    rows = [[draw.randrange(1, 101) for _ in range(draw.randint(1, 20))] for _ in range(draw.choice([1, 1, 2, 3]))]
    options: dict = {"do_sample": False, "pad_token_id": PAD, "eos_token_id": eos}
    mode = draw.choice(["plain", "plain", "static", "lookup", "no cache"])
    if mode == "static":
        options["cache_implementation"] = "static"
        options["disable_compile"] = True
    if mode == "lookup" and len(rows) == 1:
        options["prompt_lookup_num_tokens"] = draw.randint(1, 12)
    if mode == "no cache":
        options["use_cache"] = False
    if draw.random() < 0.5 and mode != "no cache":
        options["prefill_chunk_size"] = draw.randint(1, 12)
    turns = draw.choice([1, 1, 2, 3]) if mode in ("plain", "lookup") else 1
    if turns > 1 or (mode == "plain" and draw.random() < 0.5):
        kinds = [lambda: RecurrentGemmaCache(model.config), DynamicCache]
        options[draw.choice(["cache", "past_key_values"])] = draw.choice(kinds)()
    ids, mask = padded(rows)
    for _ in range(turns):
        new = draw.randint(1, 12)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)
        found = output[:, ids.shape[1] :]
        for row, text in enumerate(rows):
            expected = alone(model, text, new, eos)
            assert found[row, : len(expected)].tolist() == expected, (seed, mode, options, row)
            assert (found[row, len(expected) :] == PAD).all()
        if turns == 1 or (eos is not None and (found == eos).any()):
            return  # rows that have ended differ in what they have read
        said = [[draw.randrange(1, 101) for _ in range(4)] for _ in rows]
        rows = [text + wrote.tolist() + more for text, wrote, more in zip(rows, found, said, strict=True)]
        ids = torch.cat([output, torch.tensor(said)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(rows), found.shape[1] + 4)], dim=1)
