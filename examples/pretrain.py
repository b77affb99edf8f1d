"""Pretrain your own Griffin on any text file.

    python examples/pretrain.py --config examples/griffin.json --text my.txt --output my-griffin --steps 150

The script also trains the tokenizer on the text. It uses the code of train_demo.py, which trained the package's demo
checkpoint: it trains on the first 90% of the text, selects the weights by the loss on the rest, and creates the folder
only when it is complete. The config may contain any field of RecurrentGemmaConfig except the vocabulary's; for the
papers' sizes start from RecurrentGemmaConfig.from_preset("griffin-paper-7b"). Runs as written in about two minutes.

For 2B and 9B, change the data and the loop: this script keeps the text in memory and trains on one device in float32.
At those sizes use Trainer with a streamed data set, bf16=True and FSDP (docs/training.md), starting from
RecurrentGemmaForCausalLM(RecurrentGemmaConfig.from_preset("recurrentgemma-2b")), and GriffinTrainerMixin.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import train_demo

from recurrent_gemma_hf import RecurrentGemmaConfig, RecurrentGemmaForCausalLM, parameter_groups


def read_config(path: Path) -> RecurrentGemmaConfig:
    """Read a config file and set the special-token ids of the tokenizer to be trained."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return RecurrentGemmaConfig(
            **fields, pad_token_id=train_demo.PAD, eos_token_id=train_demo.EOS, bos_token_id=train_demo.BOS
        )
    except (OSError, ValueError, TypeError) as error:
        raise train_demo.DemoError(f"--config {path}: {error}") from error


def run(options: argparse.Namespace) -> None:
    settings = train_demo.Settings(
        steps=options.steps, vocab_size=options.vocab_size, batch_size=options.batch_size, window=options.window,
        learning_rate=options.learning_rate, warmup_steps=min(100, options.steps // 5), evaluate_every=50,
    )  # fmt: skip
    if settings.steps < 1:
        raise train_demo.DemoError(f"--steps {settings.steps}: at least one step is needed")
    config = read_config(options.config)
    if options.output.exists():
        raise train_demo.DemoError(f"--output {options.output} exists; remove it or name another")
    training_text, validation_text = train_demo.read_text(options.text, settings.window)
    tokenizer = train_demo.train_tokenizer(training_text, settings.vocab_size)
    config.vocab_size = len(tokenizer)
    training, validation = (train_demo.encode(tokenizer, text) for text in (training_text, validation_text))
    torch.manual_seed(settings.seed)
    model = RecurrentGemmaForCausalLM(config)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(training):,} tokens of training text")
    groups = parameter_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.adam_betas)
    for row in train_demo.train(model, optimizer, training, validation, settings):
        print(json.dumps(row))
    partial = options.output.with_name(options.output.name + ".partial")
    train_demo.save(model, tokenizer, partial)
    print(json.dumps(train_demo.measure(partial, validation_text, "griffin", settings.window)))
    partial.rename(options.output)
    print(train_demo.sample(options.output, validation_text[:20]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="JSON file with fields of RecurrentGemmaConfig")
    parser.add_argument("--text", type=Path, required=True, help="plain text file to learn from")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to create")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    try:
        run(parser.parse_args())
    except train_demo.DemoError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
