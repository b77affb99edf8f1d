"""lm-evaluation-harness (EleutherAI, `lm-eval`) with models of this package.

`--model hf` works as for any other model once this package is imported, as `recurrent-gemma eval harness` does before
it runs lm-eval's own command line. Plain `lm_eval` would find Transformers' own RecurrentGemma.

`--model recurrent_gemma` differs from `hf` in two ways, which a constant-size state makes cheap: it does not truncate
contexts to 2048 tokens, and its `loglikelihood_rolling` carries the state through a whole document, while `hf` starts
anew in every window.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from .streaming import streamed_logits

# In tokens; lm-eval truncates longer contexts on the left.
UNLIMITED = 1 << 24


@register_model("recurrent_gemma")
class RecurrentGemmaLM(HFLM):
    """HFLM with unlimited context; documents of any length are scored in one pass of linear cost.

    Takes the arguments of `hf`. Raises ValueError for a batch size of "auto" without `max_length`, since lm-eval finds
    it by trying the longest context.
    """

    def __init__(self, pretrained: Any, batch_size: int | str | None = 1, **kwargs: Any) -> None:
        automatic = isinstance(batch_size, str) and batch_size.startswith("auto")
        if automatic and not kwargs.get("max_length"):
            raise ValueError(
                f"batch_size {batch_size!r} is found by trying the longest context, and this model has none; give a "
                "number, or max_length among the model arguments"
            )
        super().__init__(pretrained, batch_size=batch_size, **kwargs)
        # lm-eval limits generation by max_length, which max_new_tokens of a checkpoint's config would override.
        self.model.generation_config = copy.deepcopy(self.model.generation_config)
        self.model.generation_config.max_new_tokens = None

    @property
    def max_length(self) -> int:
        """Return the longest context in tokens: `UNLIMITED` unless a model argument sets it."""
        return self._max_length or UNLIMITED

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Compute the log-likelihood, in nats, of each whole document after <bos>, in one pass."""
        results = []
        for request in tqdm(requests, disable=disable_tqdm or self.rank != 0, desc="Reading documents"):
            (text,) = request.args
            # hf adds the prefix in front of a text that already begins with one, and scores it.
            tokens = [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
            results.append(self._log_likelihood(torch.tensor([tokens])) if len(tokens) > 1 else 0.0)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def _log_likelihood(self, tokens_BT: torch.Tensor) -> float:
        total = 0.0
        for logits_BCV, targets_BC in streamed_logits(self.model, tokens_BT):
            log_probabilities_BCV = logits_BCV.log_softmax(-1, dtype=self.softmax_dtype or torch.float32)
            total += log_probabilities_BCV.gather(2, targets_BC[..., None]).double().sum().item()
        return total


def run_command_line(arguments: list[str]) -> None:
    """Run lm-eval's own command line (`run`, `ls`, `validate`), with this package's models registered."""
    previous, sys.argv = sys.argv, ["recurrent-gemma eval harness", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = previous
