"""Token-level tasks that need copying or retrieval, after section 6.2 and appendix H of the Griffin paper.

A task makes batches of any length from a generator. A sequence is the context, a question, and the answer, which is
labelled, so that `RecurrentGemmaForCausalLM` can train on the batch directly. A row is solved if every answer token is
the most likely one, given the tokens before it: exactly then greedy decoding produces the whole answer.

Shapes: B batch, T tokens, N items (data tokens, entries), L tokens of one item.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

IGNORED = -100  # ignore_index of PyTorch's cross entropy


class Batch(NamedTuple):
    """Rows of tokens (int64). The last `answer` tokens of each row are the answer; the answers to earlier questions, as
    long, begin `examples` tokens before its end."""

    tokens_BT: torch.Tensor
    answer: int
    examples: tuple[int, ...] = ()

    @property
    def labels_BT(self) -> torch.Tensor:
        """Return the labels to train with, not shifted: `IGNORED` except at the answers, the examples' included."""
        labels_BT = torch.full_like(self.tokens_BT, IGNORED)
        for distance in (*self.examples, self.answer):
            span = slice(labels_BT.shape[1] - distance, labels_BT.shape[1] - distance + self.answer)
            labels_BT[:, span] = self.tokens_BT[:, span]
        return labels_BT


@dataclass(frozen=True)
class Task:
    """A family of sequences.

    Args:
        vocab_size: number of token ids.
        shortest: the smallest `length` that `make` accepts.
        make: (length, batch_size, generator, depth) -> Batch. `length` counts every token of a row. `depth` is the
            needle's position, from 0 (the beginning) to 1 (just before the question); None draws it at random.
        has_depth: whether `make` accepts a depth.
        training_length: tokens of a training sequence, as in the paper for its tasks.
    """

    vocab_size: int
    shortest: int
    make: Callable[[int, int, torch.Generator, float | None], Batch]
    has_depth: bool
    training_length: int

    def batch(self, length: int, batch_size: int, generator: torch.Generator, depth: float | None = None) -> Batch:
        """Make `batch_size` rows of exactly `length` tokens; raise ValueError for unsupported sizes or depths."""
        if length < self.shortest:
            raise ValueError(f"length {length} is too short for this task; give {self.shortest} or more")
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size} must be 1 or more")
        if depth is not None and not self.has_depth:
            raise ValueError(f"depth {depth}: this task has no single needle; leave the depth out")
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth {depth} must be from 0 (the beginning) to 1 (just before the question)")
        return self.make(length, batch_size, generator, depth)


def _distinct(limit: int, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Draw N different integers below `limit` per row, in random order, (B, N) int64."""
    rows, count = shape
    return torch.rand(rows, limit, generator=generator).topk(count, dim=1).indices


def _uniform(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator)


# --- selective copying: a vocabulary of one noise token, COPY and 14 data tokens ---

COPIED = 16
NOISE, COPY, FIRST_DATA = 0, 1, 2


def _selective_copying(
    length: int, batch_size: int, generator: torch.Generator, depth: float | None, *, copied: int
) -> Batch:
    """Make noise with `copied` data tokens at random positions, COPY, and as the answer the data tokens in order."""
    context = length - copied - 1
    data_BN = _uniform(FIRST_DATA, 16, (batch_size, copied), generator)
    places_BN = _distinct(context, (batch_size, copied), generator).sort(dim=1).values
    tokens_BT = torch.full((batch_size, length), NOISE)
    tokens_BT.scatter_(1, places_BN, data_BN)
    tokens_BT[:, context] = COPY
    tokens_BT[:, context + 1 :] = data_BN
    return Batch(tokens_BT, answer=copied)


# --- induction heads: what followed the special token? ---

SPECIAL = 15


def _induction_heads(length: int, batch_size: int, generator: torch.Generator, depth: float | None) -> Batch:
    """Make random tokens with SPECIAL among them and at the end; the answer is the token after the first SPECIAL."""
    last_place = length - 4  # leaves room for SPECIAL, its successor, SPECIAL and the answer
    tokens_BT = _uniform(0, SPECIAL, (batch_size, length), generator)
    if depth is None:
        place_B = _uniform(0, last_place + 1, (batch_size,), generator)
    else:
        place_B = torch.full((batch_size,), round(depth * last_place))
    tokens_BT.scatter_(1, place_B[:, None], SPECIAL)
    tokens_BT[:, -2] = SPECIAL
    tokens_BT[:, -1] = tokens_BT.gather(1, place_B[:, None] + 1)[:, 0]
    return Batch(tokens_BT, answer=1)


# --- passkey: as induction heads, with an answer of several digits among noise without digits ---

KEY_DIGITS = 5
KEY, FIRST_NOISE, NOISE_TOKENS = 10, 11, 20


def _passkey(length: int, batch_size: int, generator: torch.Generator, depth: float | None) -> Batch:
    """Make random noise with KEY and five digits in it, and KEY again at the end; the answer is the five digits."""
    last_place = length - 2 * (KEY_DIGITS + 1)
    tokens_BT = _uniform(FIRST_NOISE, FIRST_NOISE + NOISE_TOKENS, (batch_size, length), generator)
    digits_BL = _uniform(0, 10, (batch_size, KEY_DIGITS), generator)
    if depth is None:
        place_B = _uniform(0, last_place + 1, (batch_size,), generator)
    else:
        place_B = torch.full((batch_size,), round(depth * last_place))
    needle_BL = torch.cat([torch.full((batch_size, 1), KEY), digits_BL], dim=1)
    tokens_BT.scatter_(1, place_B[:, None] + torch.arange(KEY_DIGITS + 1), needle_BL)
    tokens_BT[:, -(KEY_DIGITS + 1) :] = needle_BL
    return Batch(tokens_BT, answer=KEY_DIGITS)


# --- phonebook: names of two letters, numbers of three digits, and a name to look up ---

LETTERS, NAME, NUMBER = 26, 2, 3
FIRST_LETTER = 10  # ids 0 to 9 are the digits
COLON, NEWLINE, PAD = 36, 37, 38
ENTRY = NAME + 1 + NUMBER + 1


def _phonebook(length: int, batch_size: int, generator: torch.Generator, depth: float | None) -> Batch:
    """Make entries "ab:123\\n", two of them repeated as examples, and the name of a third; the answer is its number.

    Tokens that whole entries leave over are PAD, at the beginning.
    """
    names = LETTERS**NAME
    entries = (length + 1) // ENTRY - 3
    if entries > names:
        raise ValueError(
            f"length {length} needs {entries} names, there are {names}; give at most {(names + 4) * ENTRY - 2}"
        )
    codes_BN = _distinct(names, (batch_size, entries), generator)
    letters_BNL = torch.stack([codes_BN // LETTERS, codes_BN % LETTERS], dim=2) + FIRST_LETTER
    digits_BNL = _uniform(0, 10, (batch_size, entries, NUMBER), generator)
    colon_BN1 = torch.full((batch_size, entries, 1), COLON)
    lines_BNL = torch.cat([letters_BNL, colon_BN1, digits_BNL, torch.full_like(colon_BN1, NEWLINE)], dim=2)
    queried_BN = _distinct(entries, (batch_size, 3), generator)
    if depth is not None:
        target = round(depth * (entries - 1))
        # The examples are any other two entries.
        examples_BN = (target + 1 + _distinct(entries - 1, (batch_size, 2), generator)) % entries
        queried_BN = torch.cat([examples_BN, torch.full((batch_size, 1), target)], dim=1)
    questions_BNL = lines_BNL.gather(1, queried_BN[:, :, None].expand(-1, -1, ENTRY))
    book_BT = torch.cat([lines_BNL, questions_BNL], dim=1).flatten(1)[:, :-1]
    padding = torch.full((batch_size, length - book_BT.shape[1]), PAD)
    tokens_BT = torch.cat([padding, book_BT], dim=1)
    return Batch(tokens_BT, answer=NUMBER, examples=(NUMBER + ENTRY, NUMBER + 2 * ENTRY))


def _copying_task(copied: int, training_length: int) -> Task:
    def make(length: int, batch_size: int, generator: torch.Generator, depth: float | None) -> Batch:
        return _selective_copying(length, batch_size, generator, depth, copied=copied)

    return Task(
        vocab_size=16,
        shortest=2 * copied + 1,
        make=make,
        has_depth=False,
        training_length=training_length,
    )


TASKS: dict[str, Task] = {
    "selective-copying": _copying_task(copied=COPIED, training_length=1024),
    "induction-heads": Task(
        vocab_size=16,
        shortest=4,
        make=_induction_heads,
        has_depth=True,
        training_length=256,
    ),
    "phonebook": Task(
        vocab_size=39,
        shortest=6 * ENTRY - 1,
        make=_phonebook,
        has_depth=True,
        training_length=128,
    ),
    "passkey": Task(
        vocab_size=31,
        shortest=2 * (KEY_DIGITS + 1),
        make=_passkey,
        has_depth=True,
        training_length=128,
    ),
}


def find_task(name: str) -> Task:
    """Return the task called `name`; raise ValueError, with a list of all tasks, if there is none."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]
