"""Measure the cost of context parallelism in a recurrent layer, compared with passing the state from rank to rank.

    OMP_NUM_THREADS=2 python benchmarks/context_parallel.py

Forward and backward of one chunk, in one process: the recurrence alone; the recurrence as
`SequenceShard.linear_recurrence` runs it (one extra pass per direction, so that no rank waits); and the whole residual
block with its recurrence, to relate the extra pass to. Passing the state from rank to rank needs no extra pass but
makes the last of N ranks wait for N - 1 recurrences, at each layer where a collective (FSDP) synchronises the ranks.
Messages are not timed: tests/distributed_worker.py checks their size.
"""

import torch
import torch.distributed as dist
from peers import our_config, recorded, seconds

from recurrent_gemma_hf import RecurrentGemmaForCausalLM, linear_recurrence
from recurrent_gemma_hf.context_parallel import SequenceShard


def main() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    columns = ["tokens", "width", "recurrence_ms", "sharded_ms", "block_ms", "extra_share", "waiting_share_of_8_ranks"]
    with recorded("cpu_context_parallel", columns) as add:
        for T, E in ((2048, 512), (1024, 2560)):
            shard = SequenceShard(dist.group.WORLD, 0, 1, 0, T)
            x, a = torch.randn(1, T, E, requires_grad=True), torch.rand(1, T, E).requires_grad_()
            torch.manual_seed(0)
            model = RecurrentGemmaForCausalLM(our_config(E, 1, E // 256, 1024, 16)).train()
            inputs = torch.randn(1, T, E)
            times = {
                "recurrence_ms": seconds(lambda x=x, a=a: linear_recurrence(x, a)[0].sum().backward(), repeats=7),
                "sharded_ms": seconds(
                    lambda x=x, a=a, shard=shard: shard.linear_recurrence(x, a)[0].sum().backward(), repeats=7
                ),
                "block_ms": seconds(
                    lambda model=model, inputs=inputs: (
                        model.model(inputs_embeds=inputs).last_hidden_state.sum().backward()
                    ),
                    repeats=3,
                ),
            }
            row = {name: 1e3 * value for name, value in times.items()}
            row["extra_share"] = (row["sharded_ms"] - row["recurrence_ms"]) / row["block_ms"]
            row["waiting_share_of_8_ranks"] = 7 * row["recurrence_ms"] / row["block_ms"]
            add({"tokens": T, "width": E, **row})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
