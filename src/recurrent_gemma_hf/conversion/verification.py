"""Implement --verify: reread the result, compare every bit, and compare its logits with the official code's."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from .checks import ConversionError
from .mapping import Dialect, Row
from .sources import HfSource, OfficialSource, Source
from .targets import Plan, pieces

TOKENS_BT = (2, 24)
# Relative to the largest logit. Correctly converted small models differ by at most 2e-5 (tests/test_conversion.py), and
# rounding grows with depth; exchanging any two arrays changes logits by the order of their size.
TOLERANCE = 1e-3
# Peak memory. The whole JAX model is in float32, and XLA copies nearly half of it: measured 5.8 (benchmarks/LOG.md). In
# PyTorch only one block at a time is in float32, beside the model in its stored dtype: 4 at most.
BYTES_PER_PARAMETER: dict[Dialect, float] = {"jax": 6.0, "torch": 4.0}


def verify_bits(official: OfficialSource, ours: Source, rows: list[Row], plan: Plan, dtype: torch.dtype | None) -> None:
    """Raise ConversionError unless both checkpoints have the same bits, after a cast to `dtype` if one is given."""
    wrong: dict[str, None] = {}
    for row, part in pieces(rows, plan):
        expected = official.read(row.official, part)
        found = row.layout.to_official(*(ours.read(name, part) for name in row.ours))
        if dtype is not None:
            expected, found = expected.to(dtype), found.to(dtype)
        if expected.dtype != found.dtype or not torch.equal(_bits(expected), _bits(found)):
            wrong[row.official] = None  # a name once, for any number of differing parts
    if wrong:
        raise ConversionError(f"the result differs from its source in {', '.join(wrong)}: please report this")


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits as integers, so that a NaN equals itself and -0 differs from 0."""
    return tensor.contiguous().view(torch.int32 if tensor.itemsize == 4 else torch.int16)


def check_can_verify(dialect: Dialect, parameters: int) -> None:
    """Raise, before the conversion starts, if `verify_logits` could not import the official code or lacks memory."""
    try:
        import_module(f"recurrentgemma.{dialect}")
    except ImportError as error:
        raise ConversionError(
            f"--verify compares logits with the official code, which cannot be imported ({error}): "
            "pip install 'recurrentgemma[full]', or leave --verify out"
        ) from error
    import psutil

    needed, free = BYTES_PER_PARAMETER[dialect] * parameters, psutil.virtual_memory().available
    if free < needed:
        raise ConversionError(
            f"--verify runs the official model of {parameters / 1e9:.2f} billion parameters in float32, which takes up "
            f"to {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free: close other programs, run it on a "
            "larger machine, or leave --verify out"
        )


def verify_logits(
    official: OfficialSource, folder: Path, config: RecurrentGemmaConfig, dtype: torch.dtype | None
) -> None:
    """Raise unless our model in `folder` gives the official code's logits for random tokens, in float32.

    If the conversion rounded to `dtype`, the unrounded side is rounded here too. The official code of the same dialect
    loads the official arrays under their own names, independently of our mapping.
    """
    tokens_BT = torch.randint(config.vocab_size, TOKENS_BT, generator=torch.Generator().manual_seed(0))
    ours_BTV = _our_logits(folder, tokens_BT, dtype)
    official_logits = {"jax": _jax_logits, "torch": _torch_logits}[official.dialect]
    official_BTV = official_logits(official, config, tokens_BT, dtype)
    error, size = (ours_BTV - official_BTV).abs().max().item(), official_BTV.abs().max().item()
    if not error <= TOLERANCE * size:
        raise ConversionError(
            f"the logits differ from the official code's by {error:.2g}, where the largest is {size:.2g}: the weights "
            "were not converted correctly; please report this"
        )


@torch.no_grad()
def _our_logits(folder: Path, tokens_BT: Tensor, dtype: torch.dtype | None) -> Tensor:
    stored = max(HfSource(folder).dtypes.values(), key=lambda dtype: dtype.itemsize)
    model = RecurrentGemmaForCausalLM.from_pretrained(folder, dtype=stored).eval()
    for parameter in model.parameters():
        parameter.data = _rounded(parameter.data, dtype)
    _compute_in_float32(model, model.model.layers)
    return model(tokens_BT, use_cache=False).logits


def _rounded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _compute_in_float32(model: nn.Module, blocks: nn.ModuleList) -> None:
    """Cast parameters to float32, those of a block only while it runs, so that the whole model is never in float32."""

    def cast(block: nn.Module, inputs: object) -> None:
        for parameter in block.parameters():
            stored[parameter], parameter.data = parameter.data, parameter.data.float()

    def restore(block: nn.Module, inputs: object, outputs: object) -> None:
        for parameter in block.parameters():
            parameter.data = stored.pop(parameter)

    stored: dict[nn.Parameter, Tensor] = {}
    for block in blocks:
        block.register_forward_pre_hook(cast)
        block.register_forward_hook(restore)
    in_blocks = set(blocks.parameters())
    for parameter in model.parameters():
        if parameter not in in_blocks:
            parameter.data = parameter.data.float()


def _official_config(config: RecurrentGemmaConfig) -> Any:
    from recurrentgemma import common

    kinds = {"recurrent": common.TemporalBlockType.RECURRENT, "attention": common.TemporalBlockType.ATTENTION}
    return common.GriffinConfig(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        mlp_expanded_width=config.intermediate_size // 2,
        num_heads=config.num_attention_heads,
        block_types=tuple(kinds[kind] for kind in config.layers_block_type),
        embeddings_scale_by_sqrt_dim=config.embeddings_scale_by_sqrt_dim,
        attention_window_size=config.attention_window_size,
        logits_soft_cap=config.logits_soft_cap,
        lru_width=config.lru_width,
        scan_type=common.ScanType.ASSOCIATIVE_NATIVE,  # compiles on a CPU
    )


def _positions(tokens_BT: Tensor) -> Tensor:
    return torch.arange(tokens_BT.shape[1], dtype=torch.int32).expand(tokens_BT.shape)


@torch.no_grad()
def _torch_logits(
    official: OfficialSource, config: RecurrentGemmaConfig, tokens_BT: Tensor, dtype: torch.dtype | None
) -> Tensor:
    from recurrentgemma import torch as official_code

    with torch.device("meta"):
        model = official_code.Griffin(_official_config(config), gradient_checkpointing=False, dtype=torch.float32)
    weights = {name: _rounded(official.read(name), dtype) for name in official.shapes}
    model.load_state_dict(weights, strict=True, assign=True)
    _compute_in_float32(model, model.blocks)
    return model.eval()(tokens_BT, _positions(tokens_BT))[0]


def _jax_logits(
    official: OfficialSource, config: RecurrentGemmaConfig, tokens_BT: Tensor, dtype: torch.dtype | None
) -> Tensor:
    import jax
    from recurrentgemma import jax as official_code

    tree: dict = {}
    for name in official.shapes:
        # a name is a path of keys, except that `blocks.N` is one
        *keys, leaf = name.replace("blocks.", "blocks/", 1).split(".")
        node = tree
        for key in keys:
            node = node.setdefault(key.replace("/", "."), {})
        node[leaf] = jax.numpy.asarray(_rounded(official.read(name), dtype).float().numpy())
    model = official_code.Griffin(_official_config(config), gradient_checkpointing=False)
    tokens, positions = (jax.numpy.asarray(ids.numpy().astype(np.int32)) for ids in (tokens_BT, _positions(tokens_BT)))
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("float32"):
        forward = jax.jit(
            lambda parameters: model.apply(
                {"params": parameters}, tokens, positions, return_logits=True, return_cache=False
            )
        )
        return torch.from_numpy(np.array(forward(tree)[0]))
