"""Fine-tune all weights of a checkpoint on a text file, with Trainer.

    python examples/finetune.py --text my.txt --output griffin-mine

Runs as written on the demo checkpoint (about a minute on a laptop for 200 kB). Paragraphs (blocks between empty lines)
are documents, packed into rows without padding; no document sees another. Weight decay excludes the RG-LRU, the
embedding, norms and biases, as in Google's fine-tuning, whose AdamW settings (1e-4, 0.96, decay 0.1) are the defaults.
Changes for the published models (`recurrent-gemma memory` computes the memory of each):

- 2B (--model google/recurrentgemma-2b): one GPU with 80 GB takes rows of 8192 tokens: --row 8192 --checkpointing.
- 9B: several such GPUs with FSDP; see docs/training.md. Or LoRA: examples/lora_chat.py.
- Both: --learning-rate 1e-5 to 5e-5, --epochs 1 to 3, --accumulate so that a step sees some 100,000 tokens.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

import recurrent_gemma_hf

VALIDATION_SHARE = 0.1


class GriffinTrainer(recurrent_gemma_hf.GriffinTrainerMixin, Trainer):
    """Excludes the RG-LRU, embedding, norms and biases from weight decay."""


def read_documents(path: Path, tokenizer, longest: int) -> list[dict[str, list[int]]]:
    """Return one document per paragraph, from <bos> to <eos>; split those over `longest` tokens into several."""
    if not path.is_file():
        raise SystemExit(f"finetune: --text {path}: no such file; give a plain text file")
    paragraphs = [text.strip() for text in path.read_text(encoding="utf-8").split("\n\n") if text.strip()]
    if len(paragraphs) < 20:
        raise SystemExit(f"finetune: --text {path}: {len(paragraphs)} paragraphs are too few; at least 20 are needed")
    documents = []
    for ids in tokenizer(paragraphs)["input_ids"]:
        ids = [*ids, tokenizer.eos_token_id]
        documents += [{"input_ids": ids[i : i + longest]} for i in range(0, len(ids), longest)]
    return [document for document in documents if len(document["input_ids"]) > 1]


def into_rows(documents: list[dict[str, list[int]]], size: int) -> list[list[dict[str, list[int]]]]:
    """Pack documents in order, as many per row of `size` tokens as fit, so that all rows cost about the same."""
    rows, room = [[]], size
    for document in documents:
        length = len(document["input_ids"])
        if length > room and rows[-1]:
            rows.append([])
            room = size
        rows[-1].append(document)
        room -= length
    return rows


class Flatten(DataCollatorWithFlattening):
    """Flattens rows of documents to one row whose position_ids restart at 0 per document."""

    def __call__(self, features, *args, **kwargs):
        """Flatten `features`, which are rows: lists of documents."""
        return super().__call__([document for row in features for document in row], *args, **kwargs)


def last_complete(folder: Path) -> str:
    """Return the newest checkpoint that was written to its end, where Trainer writes trainer_state.json: a run that was
    killed may leave a part of one, from which Trainer would resume without the optimizer, or not at all."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            print(f"finetune: {checkpoint} is incomplete; it is left out")
        else:
            return str(checkpoint)
    raise SystemExit(f"finetune: --resume: there is no complete checkpoint in {folder}; leave --resume out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=recurrent_gemma_hf.demo_checkpoint(), help="folder or Hub id")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--steps", type=int, default=-1, help="stop after this many updates")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--row", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument("--accumulate", type=int, default=1, help="rows per update and device")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in the output folder")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # Always float32 weights: bfloat16 would round updates of 1e-4 away.
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    documents = read_documents(options.text, tokenizer, options.row)
    split = int(len(documents) * (1 - VALIDATION_SHARE))
    settings = TrainingArguments(
        str(options.output), num_train_epochs=options.epochs, max_steps=options.steps,
        learning_rate=options.learning_rate, lr_scheduler_type="cosine", warmup_steps=10, weight_decay=0.1,
        adam_beta2=0.96, per_device_train_batch_size=1, per_device_eval_batch_size=1,
        gradient_accumulation_steps=options.accumulate, gradient_checkpointing=options.checkpointing,
        bf16=torch.cuda.is_available(), prediction_loss_only=True, logging_steps=20, save_strategy="steps",
        save_steps=200, save_total_limit=1, report_to="none", seed=0,
    )  # fmt: skip
    trainer = GriffinTrainer(
        model,
        settings,
        train_dataset=into_rows(documents[:split], options.row),
        eval_dataset=into_rows(documents[split:], options.row),
        data_collator=Flatten(),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=last_complete(options.output) if options.resume else None)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    tokenizer.save_pretrained(options.output)
    print(f"validation loss {before:.3f} -> {after:.3f} nats per token (perplexity {math.exp(after):.1f})")


if __name__ == "__main__":
    sys.exit(main())
