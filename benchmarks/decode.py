"""Decoding on a CPU, batch 1: milliseconds per token, ours beside its peers, and the 2B shape beside its floor.

    python benchmarks/decode.py                 # small models: ours, Transformers' own RecurrentGemma, Gemma
    python benchmarks/decode.py --shape 2b      # RecurrentGemma-2B with random weights (11 GB in float32)

The floor of a token is the time to read every weight once, at the bandwidth that a matrix-vector product reaches in
the same run.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from peers import gemma, in_tree_recurrent_gemma, our_config, ours, parameters, read_bandwidth, recorded
from transformers import DynamicCache

from recurrent_gemma_hf import RecurrentGemmaCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

COLUMNS = [
    "model",
    "context",
    "dtype",
    "parameters",
    "ms/token",
    "tokens/s",
    "floor ms",
    "share of floor",
    "times ours",
]


@torch.inference_mode()
def decoder(model: torch.nn.Module, context: int) -> Callable[[int], float]:
    """Reads a prompt of `context` tokens; returns what decodes n more and tells the mean milliseconds of one."""
    model.eval()
    vocab = model.config.vocab_size
    # The in-tree model returns no cache, and forgets its keys and values unless it gets one, as generate() does it.
    is_ours = isinstance(model, RecurrentGemmaForCausalLM)
    cache = RecurrentGemmaCache(model.config) if is_ours else DynamicCache(config=model.config)
    model(input_ids=torch.randint(2, vocab, (1, context)), past_key_values=cache, use_cache=True, logits_to_keep=1)
    positions = itertools.count(context)

    @torch.inference_mode()
    def decode(tokens: int) -> float:
        start = time.perf_counter()
        for position in itertools.islice(positions, tokens):
            ids = torch.randint(2, vocab, (1, 1))
            model(input_ids=ids, position_ids=torch.tensor([[position]]), past_key_values=cache, logits_to_keep=1)
        return (time.perf_counter() - start) / tokens * 1e3

    return decode


def random_2b(dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The 2B shape, ours and the in-tree model on the same memory, without the minutes that initialisation takes."""
    with torch.device("meta"):
        model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig.from_preset("recurrentgemma-2b")).to(dtype)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.01, 0.01)
    with torch.device("meta"):
        theirs = in_tree_recurrent_gemma(model.config).to(dtype)
    theirs.load_state_dict(model.state_dict(), assign=True)
    for module in theirs.modules():  # buffers that are not part of a checkpoint
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.ones_like(buffer, device="cpu")
    return {"ours, 2B shape": model, "in-tree, 2B shape": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["small", "2b"], default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    bandwidth = read_bandwidth()
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s")
    if args.shape == "2b":
        models, contexts, tokens = random_2b(dtype), [8], args.tokens or 8
    else:
        config = our_config(hidden_size=512, layers=6, heads=8, window=1024, vocab_size=1024)
        models = {"ours": ours(config), "in-tree": in_tree_recurrent_gemma(config), "gemma": gemma(config)}
        models = {name: model.to(dtype) for name, model in models.items()}
        contexts, tokens = [128, 1024, 8192], args.tokens or 64
    with recorded(f"cpu_decode_{args.shape}_{args.dtype}", COLUMNS) as add:
        for context in contexts:
            decoders = {name: decoder(model, context) for name, model in models.items()}
            # In turns, so that a disturbance of the machine meets all of them; the fastest of five rounds counts.
            rounds = [{name: decode(tokens) for name, decode in decoders.items()} for _ in range(5)]
            reference = min(row[next(iter(models))] for row in rounds)
            for name, model in models.items():
                took = min(row[name] for row in rounds)
                size = sum(p.numel() * p.element_size() for p in model.parameters())
                floor = size / bandwidth * 1e3
                add({
                    "model": name, "context": context, "dtype": args.dtype, "parameters": parameters(model),
                    "ms/token": took, "tokens/s": 1e3 / took, "floor ms": floor, "share of floor": floor / took,
                    "times ours": took / reference, "read GB/s": bandwidth / 1e9,
                })  # fmt: skip


if __name__ == "__main__":
    main()
