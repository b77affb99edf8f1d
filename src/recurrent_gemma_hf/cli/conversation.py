"""A conversation: a model, its tokenizer and one cache of constant size.

The commands import this file only when a conversation begins, because it imports torch and Transformers at its top.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, TextStreamer

from .. import RecurrentGemmaCache, RecurrentGemmaForCausalLM
from .shared import harmless

# Tokens of a prompt per forward, so that a book takes no more memory than a page.
PREFILL_CHUNK = 4096


class Conversation:
    """A model, its tokenizer and one cache: every turn runs the model over the new tokens only.

    The last token of an answer is sampled but not read by the model, so `pending` keeps it for the next turn. An
    end-of-sequence token is dropped: the chat template closes the turn, and plain text continues.
    """

    def __init__(
        self, model: RecurrentGemmaForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], raw: bool
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.has_template = bool(tokenizer.chat_template) and not raw
        self.reset()

    def reset(self) -> None:
        """Forget the conversation so far."""
        self.cache = RecurrentGemmaCache(self.model.config)
        self.pending: list[int] = []

    def ask(self, text: str, *, echo: bool = False) -> str:
        """Stream the answer to `text` to stdout, preceded by `text` if `echo`; return a line about the speed. After an
        error or a second Ctrl-C the conversation is as before."""
        past = self.cache.get_seq_length()
        new = self.pending + self._encode(text)
        meter = Meter(self.tokenizer, echo)
        with self._restored(), _interrupt_as_criterion() as interrupted:
            output = self.model.generate(
                torch.tensor([new], device=self.model.device),
                # A mask of the whole conversation tells generate() that these are only the new tokens.
                attention_mask=torch.ones(1, past + len(new), dtype=torch.long, device=self.model.device),
                cache=self.cache,
                streamer=meter,
                stopping_criteria=StoppingCriteriaList([interrupted]),
                prefill_chunk_size=PREFILL_CHUNK,
                **self.settings,
            )
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        unread = output[0, self.cache.get_seq_length() - past :].tolist()
        self.pending = [token for token in unread if token not in ends]
        return meter.report()

    def save(self, path: Path) -> None:
        """Run the model over the pending token and write the cache to `path`, in constant size."""
        if self.pending:
            with self._restored(), torch.no_grad():
                pending = torch.tensor([self.pending], device=self.model.device)
                self.model(pending, cache=self.cache, logits_to_keep=1)
            self.pending = []
        self.cache.save(path)

    def load(self, path: Path) -> int:
        """Continue from what `save` wrote; return the number of tokens in it. Raises OSError or ValueError."""
        cache = RecurrentGemmaCache.load(path, self.model.config, device=self.model.device)
        if cache.batch_size != 1:
            raise ValueError(f"{path} holds {cache.batch_size} conversations; a chat goes on from exactly one")
        cache.check(self.model, 1)
        self.cache, self.pending = cache, []
        return cache.get_seq_length()

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """After any error restore the cache, which a forward that breaks off leaves half written."""
        before = self.cache.fork()  # 17 MB for 2B
        try:
            yield
        except BaseException:
            self.cache = before
            raise

    def _encode(self, text: str) -> list[int]:
        """Return the tokens that `text` adds to the conversation."""
        begins = not self.pending and self.cache.get_seq_length() == 0
        if self.has_template:
            # A template writes its own beginning-of-sequence token.
            return self.tokenizer(self._turn(text, begins), add_special_tokens=False)["input_ids"]
        return self.tokenizer(text if begins else f"\n{text}", add_special_tokens=begins)["input_ids"]

    def _turn(self, text: str, begins: bool) -> str:
        """Return the chat template's text for `text`: at the beginning, or between an answer and the next one."""
        question = {"role": "user", "content": text}
        if begins:
            return self.tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        # The cache holds the earlier turns; an invented one shows what the template adds after an answer.
        answer = "an earlier answer"
        earlier = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        turns = self.tokenizer.apply_chat_template([*earlier, question], tokenize=False, add_generation_prompt=True)
        return turns.partition(answer)[2]


class Meter(TextStreamer):
    """Streamer that prints the text and times every token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, echo: bool) -> None:
        super().__init__(tokenizer, skip_prompt=not echo, skip_special_tokens=True)
        self.prompt_tokens = 0
        self.times = [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (1, T), then every new token (1,), as generate() passes them."""
        if self.prompt_tokens:
            self.times.append(time.perf_counter())
        else:
            self.prompt_tokens = value.numel()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of text, without what a terminal would obey."""
        super().on_finalized_text(harmless(text), stream_end)

    def report(self) -> str:
        """Return a line with the time of the prompt, in seconds, and the tokens per second after the first."""
        start, first, last = self.times[0], self.times[1], self.times[-1]
        prompt = f"{self.prompt_tokens} prompt tokens in {first - start:.2f} s"
        written = len(self.times) - 1
        if written == 1:
            return f"{prompt}, 1 token written"
        return f"{prompt}, {written} tokens written at {(written - 1) / (last - first):.1f} tokens/s"


@contextmanager
def _interrupt_as_criterion() -> Iterator[Callable[..., torch.Tensor]]:
    """Yield a stopping criterion for Ctrl-C. The first ends the answer between two tokens, where the cache is
    consistent; the second raises KeyboardInterrupt at once, in the middle of a long prompt for instance."""
    stopped = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    def is_stopped(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), stopped, device=input_ids.device)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield is_stopped
    finally:
        signal.signal(signal.SIGINT, previous)
