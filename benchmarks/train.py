"""Training and prefill of one sequence: ours beside Transformers' own RecurrentGemma and a Gemma of equal size.

python benchmarks/train.py [--lengths 1024 4096 16384]
"""

from __future__ import annotations

import argparse

import torch
from peers import gemma, in_tree_recurrent_gemma, our_config, ours, parameters, recorded, seconds


def training_step(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model.train()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def prefill(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model.eval()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--slow-peer-up-to", type=int, default=4096, help="longest T for the in-tree model")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    config = our_config(hidden_size=512, layers=6, heads=8, window=1024, vocab_size=1024)
    models = {"ours": ours(config), "gemma": gemma(config), "in-tree": in_tree_recurrent_gemma(config)}
    columns = ["what", "T", "model", "parameters", "seconds", "tokens/s", "times ours"]
    with recorded("cpu_train_prefill", columns) as add:
        for what, run in (("train", training_step), ("prefill", prefill)):
            for T in args.lengths:
                ids, reference = torch.randint(2, 1024, (1, T)), 0.0
                for name, model in models.items():
                    if name == "in-tree" and args.slow_peer_up_to < T:
                        continue
                    repeats = args.repeats if T < 16384 else 1
                    took = seconds(lambda m=model, i=ids, r=run: r(m, i), repeats, warmup=1 if T < 16384 else 0)
                    reference = took if name == "ours" else reference
                    add({
                        "what": what, "T": T, "model": name, "parameters": parameters(model), "seconds": took,
                        "tokens/s": T / took, "times ours": took / reference,
                    })  # fmt: skip


if __name__ == "__main__":
    main()
