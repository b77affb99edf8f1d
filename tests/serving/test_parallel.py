"""Two processes give the answers of one: tensor parallel ranks, pipeline stages."""

import os

import pytest
from conftest import Oracle, engine, greedy, metric, prompts

TOKENS = 12
CORES = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="vLLM wants a core for each of two processes")


@pytest.fixture(autouse=True)
def _one_core_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{CORES[0]}|{CORES[1]}")


PARALLEL = {
    "tensor": {"tensor_parallel_size": 2},
    # vLLM's pipeline on a CPU does not run eagerly.
    "pipeline": {"pipeline_parallel_size": 2, "enforce_eager": False},
}


@pytest.mark.parametrize("options", PARALLEL.values(), ids=list(PARALLEL))
def test_demo_in_two_processes(demo: str, demo_oracle: Oracle, options: dict):
    """With chunked prompts, and hits in the prefix cache the second time."""
    requests = prompts(8, (1, 300), vocab_size=1024)
    with engine(demo, enable_prefix_caching=True, block_size=32, max_num_batched_tokens=96, **options) as llm:
        for _ in range(2):
            for output in llm.generate([{"prompt_token_ids": ids} for ids in requests], greedy(TOKENS), use_tqdm=False):
                demo_oracle.check(output, TOKENS)
        assert metric(llm, "prefix_cache_hits") > 0


def test_key_heads_are_split_where_there_are_enough(tiny):
    folder = tiny(num_attention_heads=4, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False)
    with engine(folder, max_model_len=128, tensor_parallel_size=2) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts(4, (1, 60), vocab_size=160)], greedy(TOKENS), use_tqdm=False
        )
    for output in outputs:
        Oracle(folder).check(output, TOKENS)
