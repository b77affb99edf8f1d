"""What the tests of serving share: checkpoints, vLLM engines in this process, our Transformers model as the oracle."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# The engine in this process: on a CPU two fresh interpreters per engine cost more than all that is tested.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# Kernels run on a CPU where a test asks for them by name.
os.environ.setdefault("TRITON_INTERPRET", "1")

import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.outputs import RequestOutput

from recurrent_gemma_hf import RecurrentGemmaConfig, RecurrentGemmaForCausalLM, demo_checkpoint

# Sums of the same float32 products in another order, and logits of up to 30.
TOLERANCE = 5e-5
# 64 MiB is more than these tests need; vLLM's default is most of the memory.
CACHE_BYTES = 1 << 26


@contextmanager
def engine(model: str | Path, **options) -> Iterator[LLM]:
    """A vLLM engine that is gone afterwards."""
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": CACHE_BYTES,
        "max_logprobs": -1,
        "disable_log_stats": False,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    llm = LLM(str(model), **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def greedy(tokens: int) -> SamplingParams:
    """The likeliest token each time, with the log-probabilities of the whole vocabulary."""
    return SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=-1, ignore_eos=True, detokenize=False)


def prompts(count: int, lengths: tuple[int, int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random texts, their lengths spread over the range."""
    generator = torch.Generator().manual_seed(seed)
    low, high = lengths
    sizes = [low + (high - low) * i // max(count - 1, 1) for i in range(count)]
    sizes = [sizes[i] for i in torch.randperm(count, generator=generator)]
    return [[2, *torch.randint(3, vocab_size, (size - 1,), generator=generator).tolist()] for size in sizes]


def metric(llm: LLM, name: str) -> int:
    """A counter of vLLM."""
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


@contextmanager
def http_server(command: list[object], log: Path, port: int, **environment: str) -> Iterator[str]:
    """The address of a server while it runs; asserts that it is still there at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("the server did not come up:\n" + log.read_text()[-3000:])
        yield address
        assert process.poll() is None, "the server died:\n" + log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Oracle:
    """Our Transformers model, whose answers vLLM's must equal."""

    def __init__(self, model: str | Path | torch.nn.Module) -> None:
        if not isinstance(model, torch.nn.Module):
            model = RecurrentGemmaForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model = model.eval()

    @torch.no_grad()
    def logprobs(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """(answer, V): log-probabilities of each of the answer's tokens, given everything before it."""
        logits = self.model(torch.tensor([prompt + answer])).logits[0]
        return logits[len(prompt) - 1 : -1].float().log_softmax(-1)

    @torch.no_grad()
    def continuation(self, prompt: list[int], tokens: int) -> list[int]:
        """The greedy answer."""
        ids = self.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=None
        )
        return ids[0, len(prompt) :].tolist()

    def check(self, output: RequestOutput, tokens: int, tolerance: float = TOLERANCE) -> None:
        """The answer is the greedy one, and all log-probabilities are right."""
        answer = list(output.outputs[0].token_ids)
        assert len(answer) == tokens
        expected = self.logprobs(list(output.prompt_token_ids), answer)
        V = expected.shape[1]
        found = torch.tensor([[step[token].logprob for token in range(V)] for step in output.outputs[0].logprobs])
        worst = (found - expected).abs().max().item()
        assert worst < tolerance, f"log-probabilities of a prompt of {len(output.prompt_token_ids)} off by {worst}"
        assert answer == expected.argmax(-1).tolist()


@pytest.fixture(scope="session")
def demo() -> str:
    return demo_checkpoint()


# That of the instruction-tuned Gemma models.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "Who goes there?"},
    {"role": "assistant", "content": "A friend."},
    {"role": "user", "content": "Stand, and unfold yourself."},
]


@pytest.fixture(scope="session")
def chat_demo(demo: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "demo"
    shutil.copytree(demo, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def check_text(demo: str, demo_oracle: Oracle):
    """Asserts that a text is the greedy continuation of a prompt (ids)."""
    tokenizer = AutoTokenizer.from_pretrained(demo)

    def check(prompt: list[int], text: str, tokens: int = 12) -> None:
        ids = demo_oracle.continuation(prompt, tokens)
        assert text == tokenizer.decode(ids, skip_special_tokens=True)

    return check


@pytest.fixture(scope="session")
def demo_oracle(demo: str) -> Oracle:
    return Oracle(demo)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """A factory of random checkpoints (folder): the window shorter than the texts, lru_width unlike the width."""

    def make(**overrides) -> Path:
        fields = {
            "vocab_size": 160,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "lru_width": 96,
            "attention_window_size": 8,
            "eos_token_id": None,
        }
        torch.manual_seed(0)
        model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**{**fields, **overrides}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # biases begin as zeros, which would hide a lost one
                parameter.add_(torch.randn_like(parameter) * (0.3 if name.endswith("bias") else 0.05))
        folder = tmp_path_factory.mktemp("tiny")
        model.save_pretrained(folder)
        return folder

    return make
