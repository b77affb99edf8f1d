"""Teach a checkpoint to answer: LoRA (or QLoRA) on a file of conversations, with TRL.

    python examples/lora_chat.py --data examples/chat.jsonl --output griffin-chat

Runs as written on the demo checkpoint (a minute on a laptop). The data are JSON lines in TRL's format, with a `prompt`
and a `completion`, each a list of messages; the loss covers only the completions. Changes for the published models
(--model google/recurrentgemma-2b-it or 9b-it; `recurrent-gemma memory` computes the memory of each):

- 2B: --learning-rate 2e-4 --epochs 3 on one GPU with 12 GB. Its tokenizer has a chat template.
- 9B: the same and --four-bit, on one GPU with 16 GB.
- Both: --device-batch 1 --accumulate 8 if rows are long; packing already fills them.
"""

import argparse
import sys
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import recurrent_gemma_hf

# Gemma's turns, for checkpoints without a template. The demo has no tokens for them and encodes them as text, so its
# answers end with <eos>.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '<end_of_turn>' }}\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def read_conversations(path: Path) -> Dataset:
    if not path.is_file():
        raise SystemExit(f"lora_chat: --data {path}: no such file; give JSON lines such as examples/chat.jsonl")
    data = load_dataset("json", data_files=str(path), split="train")
    missing = {"prompt", "completion"} - set(data.column_names)
    if missing:
        raise SystemExit(f"lora_chat: --data {path}: lines have no {' and no '.join(sorted(missing))}; see --help")
    return data


def load(name: str, four_bit: bool) -> tuple:
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = GEMMA_TEMPLATE
    how = None
    if four_bit:  # norms, convolution, gates, Lambda, embedding and head keep their dtype
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    # Small models train best in float32 on a CPU; a GPU uses the published bfloat16.
    dtype = torch.bfloat16 if torch.cuda.is_available() or four_bit else torch.float32
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, quantization_config=how), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=recurrent_gemma_hf.demo_checkpoint(), help="folder or Hub id")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for the adapter and the tokenizer")
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device-batch", type=int, default=2, help="packed rows per step and device")
    parser.add_argument("--accumulate", type=int, default=1, help="steps per update")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--four-bit", action="store_true", help="QLoRA")
    parser.add_argument("--merge", action="store_true", help="also write the merged model, to OUTPUT-merged")
    options = parser.parse_args()
    data = read_conversations(options.data)
    model, tokenizer = load(options.model, options.four_bit)
    settings = SFTConfig(
        str(options.output), num_train_epochs=options.epochs, learning_rate=options.learning_rate,
        per_device_train_batch_size=options.device_batch, gradient_accumulation_steps=options.accumulate,
        max_length=options.max_length, packing=True, bf16=torch.cuda.is_available(), gradient_checkpointing=True,
        lr_scheduler_type="cosine", warmup_steps=3, logging_steps=10, save_strategy="no", report_to="none",
    )  # fmt: skip
    # No target_modules: all linear layers. The gates too: target_parameters=["rg_lru.input_gate_weight",
    # "rg_lru.recurrent_gate_weight"].
    adapter = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(options.output)
    answer(trainer.model, tokenizer, data[0]["prompt"])
    if options.merge:
        merged = options.output.with_name(options.output.name + "-merged")
        trainer.model.merge_and_unload().save_pretrained(merged)
        tokenizer.save_pretrained(merged)


def answer(model, tokenizer, messages: list[dict[str, str]]) -> None:
    model.eval()
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = model.generate(**inputs.to(model.device), max_new_tokens=40, do_sample=False)
    print(
        messages[-1]["content"],
        "->",
        tokenizer.decode(text[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True),
    )


if __name__ == "__main__":
    sys.exit(main())
