"""Fine-tune on a text file over several devices with sharded weights, gradients and optimizer (FSDP2).

    torchrun --nproc-per-node 2 examples/train_sharded.py --text TEXT                  # each rank has its own sequences
    torchrun --nproc-per-node 4 examples/train_sharded.py --text TEXT --ranks-per-sequence 4 --length 131072 --steps 1

The second line uses context parallelism: each of four ranks has a quarter of the sequence. With `--ranks-per-sequence
2`, eight ranks train on four sequences at a time. A text that is too short is repeated.

For RecurrentGemma: `--model google/recurrentgemma-2b --bf16 --length 8192`. Weights, gradients and AdamW take 16 bytes
per parameter, 43 GB for 2B and 137 GB for 9B, divided by the number of ranks: 2 and 4 GPUs of 80 GB leave room for the
activations. Long sequences need a larger `--ranks-per-sequence`: a rank holds the activations of length / ranks tokens.

Shape suffixes: B batch (1), T tokens of a sequence.
"""

import argparse
import os
import resource
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.distributed import DistributedConfig

import recurrent_gemma_hf
from recurrent_gemma_hf.context_parallel import shard_sequence


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, concatenated in this order")
    parser.add_argument("--model", default=recurrent_gemma_hf.demo_checkpoint(), help="folder or Hub id")
    parser.add_argument("--ranks-per-sequence", type=int, default=1, help="more than 1: context parallelism")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; weights stay in float32")
    parser.add_argument("--output", type=Path, help="folder for the trained model")
    return parser.parse_args()


def load_sharded(name: str, bf16: bool) -> PreTrainedModel:
    """Load the model in float32, each rank with its shard of every weight; torch.distributed must be initialized."""
    config = DistributedConfig(fsdp_size=dist.get_world_size(), fsdp_mixed_precision=bf16)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, distributed_config=config)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its new name is not in Transformers 5.17
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def read_tokens(paths: list[Path], name: str, at_least: int) -> torch.Tensor:
    """Return the token ids (n,) of the texts, repeated if there are fewer than `at_least`."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokens = torch.tensor(tokenizer("\n\n".join(path.read_text() for path in paths), verbose=False).input_ids)
    return tokens.repeat(-(-at_least // len(tokens)))


def peak_memory_gb(device: torch.device) -> float:
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return torch.accelerator.max_memory_allocated() / 1e9


def main() -> None:
    args = parse_arguments()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if ranks % args.ranks_per_sequence:
        raise SystemExit(f"--ranks-per-sequence {args.ranks_per_sequence} does not divide the {ranks} ranks")
    rows = ranks // args.ranks_per_sequence
    mesh = init_device_mesh(device.type, (rows, args.ranks_per_sequence), mesh_dim_names=("dp", "cp"))
    model = load_sharded(args.model, args.bf16)
    optimizer = torch.optim.AdamW(recurrent_gemma_hf.parameter_groups(model), lr=args.learning_rate)
    tokens = read_tokens(args.text, args.model, at_least=rows * args.length)
    progress = tqdm(range(args.steps), disable=rank > 0)
    for step in progress:
        began = time.perf_counter()
        # Each row of the mesh trains on a different sequence; the ranks of a row share it.
        start = (step * rows + mesh["dp"].get_local_rank()) * args.length % (len(tokens) - args.length + 1)
        ids_BT = tokens[None, start : start + args.length].to(device)
        batch = {"input_ids": ids_BT, "labels": ids_BT}
        if args.ranks_per_sequence > 1:
            batch = shard_sequence(batch, mesh["cp"])
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        rate = rows * args.length / (time.perf_counter() - began)
        memory = peak_memory_gb(device)
        if rank == 0:
            progress.write(f"step {step}: loss {mean.item() / ranks:.4f}, {rate:.0f} tokens/s, {memory:.2f} GB a rank")
    if args.output is not None:
        model.save_pretrained(args.output)
        if rank == 0:
            AutoTokenizer.from_pretrained(args.model).save_pretrained(args.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
