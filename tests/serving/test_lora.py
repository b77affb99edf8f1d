"""A LoRA adapter on vLLM gives PEFT's answers, and leaves the other requests of the batch alone."""

from pathlib import Path

import pytest
import torch
from conftest import Oracle, engine, greedy, prompts
from peft import LoraConfig, get_peft_model
from vllm.lora.request import LoRARequest

from recurrent_gemma_hf import RecurrentGemmaForCausalLM

TOKENS = 12
PROJECTIONS = "q_proj k_proj v_proj o_proj linear_x linear_y linear_out gate_proj up_proj down_proj".split()


@pytest.fixture(scope="module")
def adapter(demo: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    """An adapter of every projection, with random values, and PEFT's model."""
    torch.manual_seed(1)
    base = RecurrentGemmaForCausalLM.from_pretrained(demo, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, Oracle(model)


def test_adapter_and_base_share_a_batch(demo: str, demo_oracle: Oracle, adapter: tuple[Path, Oracle]):
    folder, adapted_oracle = adapter
    requests = prompts(6, (5, 200), vocab_size=1024)
    loras = [LoRARequest("adapter", 1, str(folder)) if i % 2 else None for i in range(len(requests))]
    # One slot more than adapters: on a CPU, vLLM 0.32 gives requests without an adapter what is in the last slot.
    with engine(demo, enable_lora=True, max_loras=2, max_lora_rank=8, max_num_batched_tokens=96) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in requests], greedy(TOKENS), lora_request=loras, use_tqdm=False
        )
    for output, lora in zip(outputs, loras, strict=True):
        (adapted_oracle if lora else demo_oracle).check(output, TOKENS)
    other = demo_oracle.logprobs(requests[1], list(outputs[1].outputs[0].token_ids))
    adapted = adapted_oracle.logprobs(requests[1], list(outputs[1].outputs[0].token_ids))
    assert (other - adapted).abs().max() > 0.1, "the adapter changes the answers"
