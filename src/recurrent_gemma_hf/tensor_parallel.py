"""Tensor parallelism: the sharding styles of `config.base_model_tp_plan` that Transformers lacks, registered on import.

Each rank computes some of the heads. A head of a recurrent layer is a slice of channels: the gates are block-diagonal
with one block per head, and convolution and recurrence are per channel, so ranks do not communicate between `linear_x`
and `linear_out`. Caches hold the rank's own channels and the one key/value head.

Shapes: B batch, T tokens, D lru_width, H heads, d = D / H, K conv1d_width, G key/value heads, h head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import is_available as is_distributed_available

from .configuration_recurrent_gemma import RecurrentGemmaConfig
from .transformers_compat import ALL_PARALLEL_STYLES, TensorParallelLayer


def check_tensor_parallel(config: RecurrentGemmaConfig, ranks: int) -> None:
    """Raise ValueError, with the values, if this model cannot be split evenly over `ranks` processes."""
    what = f"tensor parallelism over {ranks} ranks"
    for name, size in (
        ("num_attention_heads", config.num_attention_heads),
        ("intermediate_size // 2", config.intermediate_size // 2),
        ("vocab_size", config.vocab_size),
    ):
        if size % ranks:
            raise ValueError(f"{what} needs {name}={size} to be a multiple of {ranks}; use a number of ranks that fits")
    if config.num_key_value_heads != 1 and "attention" in config.layers_block_type:
        raise ValueError(
            f"{what} keeps the one key/value head on every rank, this model has "
            f"num_key_value_heads={config.num_key_value_heads}; use FSDP (docs/distributed.md)"
        )


def _register_styles() -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    class LocalParallel(TensorParallelLayer):
        """Style of a module that computes on local tensors, its parameters sharded along their first dimension (D or H)
        or replicated. Replicated ones are DTensors too, because clipping and optimizers reject a mixture."""

        def __init__(self, placement: Any) -> None:
            self.placement = placement

        def should_use_local_tensors(self, module: torch.nn.Module) -> bool:
            return True

        def shard_param(self, module: torch.nn.Module, param: str, mesh: Any) -> None:
            whole = module._parameters[param]
            if whole is not None:
                placed = distribute_tensor(whole, mesh, [self.placement], src_data_rank=None)
                module._parameters[param] = torch.nn.Parameter(placed, requires_grad=whole.requires_grad)

    class SharedHeadParallel(LocalParallel):
        """Style of a replicated projection, (B, T, G h), whose output each rank uses for its own queries. The output's
        gradients are summed over the ranks, so every rank has the full gradients of input and parameters."""

        def transform_output_post_forward(self, module: torch.nn.Module, output: torch.Tensor, mesh: Any) -> Any:
            if not output.requires_grad:
                return output
            whole = DTensor.from_local(output, mesh, [Replicate()], run_check=False)
            return whole.to_local(grad_placements=[Partial()])

    ALL_PARALLEL_STYLES.register("recurrent_gemma_channels", LocalParallel(Shard(0)))
    ALL_PARALLEL_STYLES.register("recurrent_gemma_whole", LocalParallel(Replicate()))
    ALL_PARALLEL_STYLES.register("recurrent_gemma_shared_head", SharedHeadParallel(Replicate()))


if is_distributed_available():
    _register_styles()
