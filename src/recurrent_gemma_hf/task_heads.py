"""Heads for sequence classification, token classification and question answering.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from .configuration_recurrent_gemma import RecurrentGemmaConfig
from .cross_entropy import IGNORE_INDEX
from .inputs import last_true, select_columns
from .modeling_recurrent_gemma import RecurrentGemmaModel, RecurrentGemmaPreTrainedModel, new_linear
from .transformers_compat import (
    QuestionAnsweringModelOutput,
    RecurrentGemmaSequenceClassifierOutput,
    TokenClassifierOutput,
    can_return_tuple,
)


def _last_token(
    config: RecurrentGemmaConfig, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, B: int, T: int
) -> torch.Tensor | None:
    """Return the column of each row's last token, (B, 1); without a sign of padding, None for one row, else raise."""
    if attention_mask is not None and attention_mask.ndim == 2:
        tokens = attention_mask[:, -T:].bool()
    elif input_ids is not None and config.pad_token_id is not None:
        tokens = input_ids != config.pad_token_id
    elif B == 1:
        return None
    else:
        raise ValueError(
            "the last token of each row is unknown; give an attention_mask, or set config.pad_token_id for input_ids"
        )
    return last_true(tokens)


def _scale_to_batch(
    loss: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Scale the mean loss of a micro-batch to its share of the mean over all `num_items_in_batch` labels of the batch.

    Trainer counts these labels and sums the losses of the micro-batches.
    """
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss * (labels != IGNORE_INDEX).sum().to(loss.device) / num_items_in_batch


def _refuse_shard(kwargs: dict[str, Any]) -> None:
    if kwargs.get("sequence_shard") is not None:
        raise ValueError("only the language model works on a chunk of a sequence; give this one whole sequences")


class RecurrentGemmaForSequenceClassification(RecurrentGemmaPreTrainedModel):
    """RecurrentGemma with one label, or `num_labels` values, per sequence, computed from its last token."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RecurrentGemmaModel(config)
        self.score = new_linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> RecurrentGemmaSequenceClassifierOutput:
        """Return logits (B, num_labels) and, with labels (B,) int64 (float for regression and multi-label problems),
        the loss. The attention_mask, else config.pad_token_id, identifies padding. Other arguments as in
        `RecurrentGemmaModel`."""
        _refuse_shard(kwargs)
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            return_dict=True, **kwargs,
        )  # fmt: skip
        x = outputs.last_hidden_state
        last = _last_token(self.config, input_ids, attention_mask, *x.shape[:2])
        logits = self.score(select_columns(x, 1 if last is None else last))[:, 0]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
            loss = _scale_to_batch(loss, labels, num_items_in_batch)
        return RecurrentGemmaSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cache=outputs.cache,
        )


class RecurrentGemmaForTokenClassification(RecurrentGemmaPreTrainedModel):
    """RecurrentGemma with one label per token."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RecurrentGemmaModel(config)
        self.score = new_linear(config.hidden_size, config.num_labels, bias=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Return logits (B, T, num_labels) and, with labels (B, T) int64 (-100 ignored), the loss. Other arguments as
        in `RecurrentGemmaModel`."""
        _refuse_shard(kwargs)
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            return_dict=True, **kwargs,
        )  # fmt: skip
        logits, loss = self.score(outputs.last_hidden_state), None
        if labels is not None:
            loss = _scale_to_batch(self.loss_function(logits, labels, self.config), labels, num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class RecurrentGemmaForQuestionAnswering(RecurrentGemmaPreTrainedModel):
    """RecurrentGemma that finds the start and end of an answer in the text."""

    def __init__(self, config: RecurrentGemmaConfig) -> None:
        super().__init__(config)
        self.model = RecurrentGemmaModel(config)
        self.qa_outputs = new_linear(config.hidden_size, 2, bias=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Return start_logits and end_logits (B, T) and, with positions (B,) int64, the loss. Other arguments as in
        `RecurrentGemmaModel`."""
        _refuse_shard(kwargs)
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            return_dict=True, **kwargs,
        )  # fmt: skip
        start_logits, end_logits = (x.contiguous() for x in self.qa_outputs(outputs.last_hidden_state).unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
            loss = _scale_to_batch(loss, start_positions, num_items_in_batch)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "RecurrentGemmaForQuestionAnswering",
    "RecurrentGemmaForSequenceClassification",
    "RecurrentGemmaForTokenClassification",
]
