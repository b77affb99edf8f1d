"""Quantized weights through vLLM's own loaders."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Oracle, engine, greedy, prompts
from safetensors.torch import load_file, save_file

from recurrent_gemma_hf import RecurrentGemmaForCausalLM

TOKENS = 12
PROJECTIONS = "q_proj k_proj v_proj o_proj linear_x linear_y linear_out gate_proj up_proj down_proj".split()
# What llm-compressor writes for 8-bit weights (per output channel) and activations (per token, when they come).
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
        }
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def quantized(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    """A model with its projections in 8 bits, and ours with the same rounded weights.

    All of them, also q, k and v as vLLM merges them, have a multiple of 32 outputs: on processors with AMX, vLLM 0.32
    chooses a kernel for multiples of 16 that then refuses those that are not multiples of 32, as the demo's 240.
    """
    source = tiny(num_attention_heads=4)
    weights = load_file(source / "model.safetensors")
    stored, rounded = {}, {}
    for name, weight in weights.items():
        if name.split(".")[-2] in PROJECTIONS and name.endswith("weight"):
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            stored[name] = (weight.float() / scale).round().to(torch.int8)
            stored[f"{name}_scale"] = scale
            rounded[name] = stored[name].float() * scale
        else:
            stored[name] = rounded[name] = weight
    folder = tmp_path_factory.mktemp("int8")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": INT8}))
    model = RecurrentGemmaForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in rounded.items()}, strict=False)
    return folder, Oracle(model)


def test_int8_weights_and_activations(quantized: tuple[Path, Oracle]):
    """The distribution of the next token stays that of the rounded weights (Kullback-Leibler, in nats)."""
    folder, oracle = quantized
    with engine(folder, dtype="bfloat16") as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts(4, (20, 200), vocab_size=160)],
            greedy(TOKENS),
            use_tqdm=False,
        )
    for output in outputs:
        answer = list(output.outputs[0].token_ids)
        found = torch.tensor([[step[t].logprob for t in range(160)] for step in output.outputs[0].logprobs])
        expected = oracle.logprobs(list(output.prompt_token_ids), answer)
        divergence = (expected.exp() * (expected - found)).sum(-1)
        assert divergence.max() < 0.005, divergence
