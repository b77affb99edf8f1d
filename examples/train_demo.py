"""Train the demo checkpoint, a small Griffin, or a Hawk or transformer of equal size for comparison, on Shakespeare.

    python examples/train_demo.py --text tinyshakespeare.txt --architecture griffin --output griffin --log griffin.jsonl
    python examples/train_demo.py --text tinyshakespeare.txt --architecture hawk --output hawk --log hawk.jsonl
    python examples/train_demo.py --text tinyshakespeare.txt --architecture transformer --output peer --log peer.jsonl

The runs share the tokenizer (trained on the training split alone), the windows and their order, the number of steps,
the optimizer and its schedule; only the architecture differs. The first 90% of the characters are the training text,
the rest is the validation text. Training is in float32; the weights with the lowest validation loss are saved as
bfloat16, reloaded from the finished folder and evaluated again: the reported losses are those of the saved files.

Shape suffixes: B batch, T time (tokens of one window), V vocabulary.
"""

import argparse
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GemmaForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from recurrent_gemma_hf import RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from recurrent_gemma_hf.transformers_compat import CACHE_NAME

PAD, EOS, BOS, UNK = 0, 1, 2, 3  # Gemma's ids of the special tokens
SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]
TRAINING_SHARE = 0.9


@dataclass(frozen=True)
class Settings:
    """Holds the settings shared by all architectures; one step sees batch_size * window tokens."""

    steps: int
    vocab_size: int = 1024
    batch_size: int = 4
    window: int = 256
    learning_rate: float = 3e-3
    final_learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.2
    adam_betas: tuple[float, float] = (0.9, 0.98)
    gradient_clip: float = 1.0
    evaluate_every: int = 100
    seed: int = 0


class DemoError(Exception):
    """Reports a problem that the caller can solve; the message names the value and the remedy."""


def read_text(path: Path, window: int) -> tuple[str, str]:
    """Return the training and the validation text: the first 90% of the characters and the rest."""
    if not path.is_file():
        raise DemoError(f"--text {path}: no such file; give a plain text file, for example tinyshakespeare.txt")
    text = path.read_text(encoding="utf-8")
    # A token has at most a few characters, so this leaves several windows of validation text.
    needed = 200 * window
    if len(text) < needed:
        raise DemoError(f"--text {path}: {len(text)} characters are too few to train on; at least {needed} are needed")
    split = int(TRAINING_SHARE * len(text))
    return text[:split], text[split:]


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: every string round-trips, none has unknown tokens; <bos> is prepended."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Return the token ids (long, one dimension) of a text without <bos>."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def build_model(architecture: str, vocab_size: int) -> PreTrainedModel:
    """Return an untrained float32 model; the architectures differ by less than 1% in parameters."""
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": 160,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
    }
    if architecture == "transformer":
        # The Griffin paper's baseline: multi-query attention in every layer, gated GELU. The MLP receives the
        # parameters that the narrower attention block saves.
        config = GemmaConfig(**shared, head_dim=40, intermediate_size=516, max_position_embeddings=256)
        return GemmaForCausalLM(config)
    # A recurrent block has more parameters than an attention block, so Hawk's MLPs are narrower. intermediate_size is
    # twice the width of each branch.
    hawk = {"block_types": ["recurrent"], "intermediate_size": 924}
    griffin = {"block_types": ["recurrent", "recurrent", "attention"], "intermediate_size": 960}
    config = RecurrentGemmaConfig(
        **shared,
        head_dim=40,
        lru_width=160,
        attention_window_size=128,
        **(hawk if architecture == "hawk" else griffin),
    )
    return RecurrentGemmaForCausalLM(config)


def training_windows(tokens: torch.Tensor, settings: Settings) -> Iterator[torch.Tensor]:
    """Yield batches [B, T + 1] without end: windows after a <bos>, at positions that depend only on the seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    offsets = torch.arange(settings.window)
    bos = torch.full((settings.batch_size, 1), BOS)
    while True:
        starts = torch.randint(len(tokens) - settings.window + 1, (settings.batch_size, 1), generator=generator)
        yield torch.cat([bos, tokens[starts + offsets]], dim=1)


def window_loss(model: PreTrainedModel, window_BT: torch.Tensor, reduction: str) -> torch.Tensor:
    """Return the cross entropy (nats, float32) of all tokens but the first; each window [B, T + 1] is a document."""
    inputs_BT, targets_BT = window_BT[:, :-1], window_BT[:, 1:]
    positions_BT = torch.arange(inputs_BT.shape[1]).expand_as(inputs_BT)
    logits_BTV = model(input_ids=inputs_BT, position_ids=positions_BT, use_cache=False).logits
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction=reduction)


@torch.no_grad()
def windowed_loss(model: PreTrainedModel, tokens: torch.Tensor, window: int) -> float:
    """Return the mean loss per token over consecutive windows, each starting from its own <bos>."""
    model.eval()
    whole = len(tokens) // window * window
    bos = torch.full((whole // window, 1), BOS)
    batches = list(torch.cat([bos, tokens[:whole].view(-1, window)], dim=1).split(32))
    if whole < len(tokens):
        batches.append(torch.cat([bos[:1, 0], tokens[whole:]])[None])
    return sum(window_loss(model, batch_BT, "sum").item() for batch_BT in batches) / len(tokens)


@torch.no_grad()
def streamed_loss(model: PreTrainedModel, tokens: torch.Tensor, window: int) -> float:
    """Return the mean loss per token of one document, processed piece by piece with the cache carried along."""
    model.eval()
    stream = torch.cat([torch.tensor([BOS]), tokens])
    cache, total = None, 0.0
    for start in range(0, len(tokens), window):
        inputs_BT = stream[None, start : min(start + window, len(tokens))]
        output = model(input_ids=inputs_BT, **{CACHE_NAME: cache}, use_cache=True)
        cache = output[CACHE_NAME]
        targets = stream[start + 1 : start + 1 + inputs_BT.shape[1]]
        total += F.cross_entropy(output.logits[0].float(), targets, reduction="sum").item()
    return total / len(tokens)


def make_optimizer(model: PreTrainedModel, settings: Settings) -> torch.optim.AdamW:
    """Return AdamW with weight decay on every matrix, the embedding and the gates included, and on nothing else.

    The demo checkpoint and its README's peers were trained this way; pretrain.py uses `parameter_groups` instead.
    """
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (decayed if name.endswith("weight") and parameter.ndim >= 2 else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.adam_betas)


def learning_rate(step: int, settings: Settings) -> float:
    """Return the learning rate: linear warmup, then a cosine down to the final value."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.final_learning_rate + (settings.learning_rate - settings.final_learning_rate) * cosine


def train(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    training: torch.Tensor,
    validation: torch.Tensor,
    settings: Settings,
) -> Iterator[dict[str, float]]:
    """Train in place and yield a row per evaluation; at the end load the weights with the lowest validation loss."""
    windows = training_windows(training, settings)
    best, best_weights, losses, start = math.inf, {}, [], time.perf_counter()
    progress = tqdm(range(settings.steps), unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        model.train()
        loss = window_loss(model, next(windows), "mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise DemoError(f"the loss became {losses[-1]} at step {step + 1}; lower the learning rate")
        if (step + 1) % settings.evaluate_every and step + 1 != settings.steps:
            continue
        validation_loss = windowed_loss(model, validation, settings.window)
        if validation_loss < best:
            best = validation_loss
            best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        row = {"step": step + 1, "training_loss": sum(losses) / len(losses), "validation_loss": validation_loss}
        progress.set_postfix(training=f"{row['training_loss']:.3f}", validation=f"{validation_loss:.3f}")
        yield row | {"seconds": round(time.perf_counter() - start, 1)}
        losses = []
    model.load_state_dict(best_weights)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint in bfloat16, the tokenizer and the generation settings to `folder`."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=40,
        top_p=0.9,
        max_new_tokens=256,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    # Without it, a copy of the folder that lost tokenizer_config.json would get a GemmaTokenizer and other tokens.
    model.config.tokenizer_class = "PreTrainedTokenizerFast"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(folder: Path, validation: str, architecture: str, window: int) -> dict[str, float]:
    """Reload a finished folder and evaluate it on the validation text in its stored bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokens = encode(AutoTokenizer.from_pretrained(folder), validation)
    bits_per_character = len(tokens) / len(validation) / math.log(2)  # for a loss of one nat per token
    loss = windowed_loss(model, tokens, window)
    result = {"validation_loss": loss, "bits_per_character": loss * bits_per_character}
    if architecture != "transformer":
        # The transformer was not trained on positions beyond the window; the others carry their constant-size state.
        loss = streamed_loss(model, tokens, window)
        result |= {"streamed_validation_loss": loss, "streamed_bits_per_character": loss * bits_per_character}
    return result


def sample(folder: Path, prompt: str) -> str:
    """Return the text that the checkpoint generates after the prompt with its own generation settings."""
    torch.manual_seed(0)
    generate = transformers.pipeline("text-generation", model=str(folder))
    return generate(prompt)[0]["generated_text"]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="plain text file to learn from")
    parser.add_argument("--architecture", choices=["griffin", "hawk", "transformer"], required=True)
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to create (absent or empty)")
    parser.add_argument("--log", type=Path, required=True, help="JSON lines: settings, one line per evaluation, result")
    parser.add_argument("--steps", type=int, default=1400)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Train, save and evaluate. The folder and the log appear under their names only when complete."""
    settings = Settings(steps=options.steps)
    if settings.steps < 1:
        raise DemoError(f"--steps {settings.steps}: at least one step is needed")
    if options.output.exists() and not (options.output.is_dir() and not any(options.output.iterdir())):
        raise DemoError(f"--output {options.output} exists and is not an empty folder; remove it or name another")
    training_text, validation_text = read_text(options.text, settings.window)
    tokenizer = train_tokenizer(training_text, settings.vocab_size)
    training, validation = encode(tokenizer, training_text), encode(tokenizer, validation_text)

    torch.manual_seed(settings.seed)
    model = build_model(options.architecture, len(tokenizer))
    header = {
        "architecture": options.architecture,
        "parameters": model.num_parameters(),
        "training_tokens": len(training),
        "validation_tokens": len(validation),
        "validation_characters": len(validation_text),
        "settings": asdict(settings),
        "config": model.config.to_diff_dict(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__},
        "threads": torch.get_num_threads(),
    }
    rows = list(train(model, make_optimizer(model, settings), training, validation, settings))

    partial = options.output.with_name(options.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(model, tokenizer, partial)
    result = measure(partial, validation_text, options.architecture, settings.window)
    options.log.parent.mkdir(parents=True, exist_ok=True)
    partial_log = options.log.with_name(options.log.name + ".partial")
    partial_log.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows, result]), encoding="utf-8")
    os.replace(partial, options.output)
    os.replace(partial_log, options.log)
    print(json.dumps(result, indent=2))
    print(sample(options.output, "ROMEO:\n"))


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0, or 1 after printing a DemoError."""
    try:
        run(parse_arguments(arguments))
    except DemoError as error:
        print(f"train_demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
