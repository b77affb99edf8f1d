"""Retrieval from long prompts of plain text, for any checkpoint with its tokenizer: passkeys and phonebooks.

Passkey: a number hidden at a given depth of filler text. Phonebook: the task of figure 6c of the Griffin paper (from
Jelassi et al., arXiv 2402.01032): a list of names and numbers, two look-ups as examples, a third name. The prompt is
read in chunks through the cache and answered greedily; an answer counts when it begins with the right number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

from .. import RecurrentGemmaCache, RecurrentGemmaForCausalLM
from .streaming import chunk_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILLER = "The road goes on over the hills. The river runs beside it. Birds cross from one bank to the other. "
SYLLABLES = (
    "an bel cor dan el far gor hal in jor kel lan mor nel or pan quin ros sel tor ul van wen xan yor zel".split()
)


class Prompt(NamedTuple):
    """A prompt, and the answer with which its continuation must begin."""

    text: str
    answer: str


def passkey_prompt(sentences: int, depth: float, rng: random.Random) -> Prompt:
    """Make a prompt of `sentences` blocks of filler, three short sentences each, with the key after a share `depth` of
    them; raise ValueError for sizes below 1 and other depths than 0 to 1."""
    if sentences < 1:
        raise ValueError(f"size {sentences} must be 1 or more")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth {depth} must be from 0 (the beginning) to 1 (just before the question)")
    key = str(rng.randrange(10_000, 100_000))
    before = round(depth * sentences)
    needle = f"The pass key is {key}. Remember it: {key} is the pass key. "
    text = FILLER * before + needle + FILLER * (sentences - before) + "What is the pass key? The pass key is"
    return Prompt(text, key)


def phonebook_prompt(entries: int, depth: float | None, rng: random.Random) -> Prompt:
    """Make a prompt of `entries` lines "name: number", two repeated as examples, then a name: that of the entry at
    `depth`, from 0 (the first) to 1 (the last), or of a random one for None."""
    if entries < 3:
        raise ValueError(f"size {entries} must be 3 or more: two entries are the examples")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth {depth} must be from 0 (the first entry) to 1 (the last)")
    names: dict[str, str] = {}
    while len(names) < entries:
        name = " ".join("".join(rng.choices(SYLLABLES, k=2)).capitalize() for _ in range(2))
        names.setdefault(name, f"{rng.randrange(200, 1000)}-{rng.randrange(0, 10_000):04d}")
    lines = [f"{name}: {number}" for name, number in names.items()]
    target = rng.randrange(entries) if depth is None else round(depth * (entries - 1))
    examples = rng.sample([line for place, line in enumerate(lines) if place != target], 2)
    name, number = lines[target].split(": ")
    return Prompt("\n".join([*lines, "", *examples, f"{name}:"]), number)


PROMPTS: dict[str, Callable[[int, float, random.Random], Prompt]] = {
    "passkey": passkey_prompt,
    "phonebook": phonebook_prompt,
}


@torch.no_grad()
def answer(model: RecurrentGemmaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[str, int]:
    """Return the greedy continuation, up to one token longer than the right answer, and the tokens of the prompt."""
    ids = tokenizer(prompt.text, return_tensors="pt").input_ids.to(model.device)
    # One more token than the answer has, because a leading space may be a separate token.
    new_tokens = len(tokenizer(" " + prompt.answer, add_special_tokens=False)["input_ids"]) + 1
    output = model.generate(
        ids,
        cache=RecurrentGemmaCache(model.config),
        prefill_chunk_size=chunk_length(model.config.vocab_size),
        max_new_tokens=new_tokens,
        do_sample=False,
        top_k=None,
        top_p=None,
        temperature=None,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True), ids.shape[1]


def measure(
    model: RecurrentGemmaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    sizes: tuple[int, ...],
    depths: tuple[float, ...],
    repeats: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Yield one record per size and depth, with the share of right answers among `repeats` prompts."""
    if task not in PROMPTS:
        raise ValueError(f"unknown task {task!r}; there are {', '.join(PROMPTS)}")
    if repeats < 1:
        raise ValueError(f"repeats {repeats} must be 1 or more")
    with tqdm(total=len(sizes) * len(depths) * repeats, unit="prompt") as progress:
        for size in sizes:
            for depth in depths:
                rng = random.Random(f"{seed} {task} {size} {depth}")
                right, tokens = 0, 0
                for _ in range(repeats):
                    prompt = PROMPTS[task](size, depth, rng)
                    text, length = answer(model, tokenizer, prompt)
                    right += text.strip().startswith(prompt.answer)
                    tokens += length
                    progress.update()
                yield {
                    "task": task,
                    "size": size,
                    "depth": depth,
                    "tokens": round(tokens / repeats),
                    "repeats": repeats,
                    "accuracy": right / repeats,
                }
