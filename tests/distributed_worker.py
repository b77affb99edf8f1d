"""The checks of test_distributed.py: what several processes compute equals what one process computes.

Every check runs on every rank, in processes of its own, with a folder of its own. Tolerances: losses 1e-6, gradients
1e-5 of their norm, in float32.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from recurrent_gemma_hf import (
    RecurrentGemmaCache,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RecurrentGemmaForTokenClassification,
)
from recurrent_gemma_hf.context_parallel import shard_sequence
from tests import helpers

CHECKS: list[tuple[str, int]] = []  # name and number of processes
VOCABULARY = 96


def check(*world_sizes: int) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def register(function: Callable[[Path], None]) -> Callable[[Path], None]:
        CHECKS.extend((function.__name__, world_size) for world_size in world_sizes)
        return function

    return register


def run(name: str, rank: int, world_size: int, folder: Path, port: int) -> None:
    """Run a check as one of `world_size` processes; write what went wrong to folder/failed.RANK.

    A process that fails leaves: its sockets close, so that the others, which wait for its messages, fail as well.
    """
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=600))
        globals()[name](folder)
        dist.barrier()
    except BaseException:
        (folder / f"failed.{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None
    dist.destroy_process_group()


# --- Models and comparisons ---------------------------------------------------------------------------------------


def make_config(**changes: Any) -> RecurrentGemmaConfig:
    fields = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "lru_width": 64, "attention_window_size": 8,
    }  # fmt: skip
    return RecurrentGemmaConfig(**{**fields, **changes})


def make_model(config: RecurrentGemmaConfig) -> RecurrentGemmaForCausalLM:
    """The same on every rank; every parameter away from 0, so that an added bias counts, and states that last."""
    torch.manual_seed(0)
    model = RecurrentGemmaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
            if name.endswith("recurrent_param"):
                parameter.fill_(-7.0)
    return model.train()


def copy_of(model: RecurrentGemmaForCausalLM) -> RecurrentGemmaForCausalLM:
    copied = RecurrentGemmaForCausalLM(model.config)
    copied.load_state_dict(model.state_dict())
    return copied.train()


def saved(model: RecurrentGemmaForCausalLM, folder: Path) -> Path:
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return folder


def random_ids(B: int, T: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(1))


def documents(B: int, T: int) -> torch.Tensor:
    """Positions of packed documents; some begin inside a chunk, one at the border of two."""
    positions = torch.arange(T).repeat(B, 1)
    for row, start in ((0, 9), (0, T // 2), (B - 1, T // 2 + 3)):
        positions[row, start:] -= positions[row, start].clone()
    return positions


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same_gradients(model: nn.Module, reference: nn.Module, average: dist.ProcessGroup | None = None) -> None:
    got = {name.removeprefix("module."): whole(parameter.grad) for name, parameter in model.named_parameters()}
    if average is not None:
        for gradient in got.values():
            dist.all_reduce(gradient, group=average)
            gradient /= dist.get_world_size(average)
    helpers.assert_same_gradients(got, {name: parameter.grad for name, parameter in reference.named_parameters()})


def assert_same_loss(loss: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-6, atol=0)


def greedy(model: RecurrentGemmaForCausalLM, prompt: torch.Tensor) -> torch.Tensor:
    return model.eval().generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=15, min_new_tokens=15, do_sample=False
    )


def assert_same_weights(folder: Path, reference: nn.Module, rtol: float = 0.0, atol: float = 0.0) -> None:
    loaded = RecurrentGemmaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=rtol, atol=atol, msg=name)


# --- Tensor parallelism -------------------------------------------------------------------------------------------


def check_tensor_parallel(folder: Path, checkpointing: bool = False, **changes: Any) -> None:
    ranks = dist.get_world_size()
    reference = make_model(make_config(**changes))
    source = saved(reference, folder / "model")
    model = RecurrentGemmaForCausalLM.from_pretrained(
        source, distributed_config=DistributedConfig(tp_plan="auto"), dtype=torch.float32
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = random_ids(2, 21)
    batch = {"input_ids": ids, "labels": ids, "position_ids": documents(2, 21)}
    expected = reference(**batch).loss
    expected.backward()
    loss = model(**batch).loss
    loss.backward()
    assert_same_loss(loss, expected)
    assert_same_gradients(model, reference)
    assert torch.equal(greedy(model, ids), greedy(reference, ids))
    cache = RecurrentGemmaCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    D, H = reference.config.lru_width, reference.config.num_attention_heads
    assert cache.layers[0].recurrent_states[0].shape == (2, D // ranks)
    assert cache.layers[0].conv_states[0].shape[:2] == (2, D // ranks)
    assert model.model.layers[0].temporal_block.rg_lru.input_gate_weight.to_local().shape[0] == H // ranks
    if "attention" in reference.config.layers_block_type:
        assert cache.layers[2].keys.shape[1] == 1
    model.save_pretrained(folder / "saved")
    assert_same_weights(folder / "saved", reference)
    # What everyone does next: clipping and an optimizer, over all parameters at once.
    norms = [whole(torch.nn.utils.clip_grad_norm_(trained.parameters(), 0.1)) for trained in (model, reference)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=0)
    for trained in (model, reference):
        torch.optim.SGD(trained.parameters(), lr=1.0, foreach=True).step()
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter), expected, rtol=1e-5, atol=1e-6, msg=name)


@check(2, 4)
def tensor_parallel(folder: Path) -> None:
    check_tensor_parallel(folder, attention_bias=True)


@check(2)
def tensor_parallel_untied_head_and_checkpointing(folder: Path) -> None:
    check_tensor_parallel(folder, checkpointing=True, tie_word_embeddings=False)


@check(4)
def tensor_parallel_hawk(folder: Path) -> None:
    check_tensor_parallel(folder, block_types=["recurrent"], num_hidden_layers=2)


@check(2)
def tensor_parallel_refuses_what_does_not_divide(folder: Path) -> None:
    source = saved(make_model(make_config(hidden_size=24, num_attention_heads=3, lru_width=60)), folder / "model")
    with pytest.raises(ValueError, match="over 2 ranks needs num_attention_heads=3 to be a multiple of 2"):
        RecurrentGemmaForCausalLM.from_pretrained(source, distributed_config=DistributedConfig(tp_plan="auto"))


# --- FSDP2 --------------------------------------------------------------------------------------------------------


@check(2)
def fsdp_by_transformers(folder: Path) -> None:
    rank = dist.get_rank()
    for tied in (True, False):
        reference = make_model(make_config(tie_word_embeddings=tied))
        source = saved(reference, folder / f"model_{tied}")
        model = RecurrentGemmaForCausalLM.from_pretrained(
            source, distributed_config=DistributedConfig(fsdp_size=2), dtype=torch.float32
        ).train()
        ids = random_ids(2, 20)
        reference(ids, labels=ids).loss.backward()
        own = ids[rank : rank + 1]
        model(own, labels=own).loss.backward()
        assert_same_gradients(model, reference)
        assert torch.equal(greedy(model, own), greedy(reference, own))
        model.save_pretrained(folder / f"saved_{tied}")
        dist.barrier()
        assert_same_weights(folder / f"saved_{tied}", reference)


# --- Context parallelism ------------------------------------------------------------------------------------------


def check_context_parallel(
    batch: dict[str, torch.Tensor], checkpointing: dict[str, Any] | None = None, **changes: Any
) -> None:
    reference = make_model(make_config(**changes))
    model = copy_of(reference)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    expected = reference(**batch, output_hidden_states=True)
    expected.loss.backward()
    outputs = model(**shard_sequence(batch, dist.group.WORLD), output_hidden_states=True)
    outputs.loss.backward()
    assert_same_loss(outputs.loss, expected.loss)
    # Padding sees what it likes.
    tokens = batch.get("attention_mask", torch.ones_like(batch["labels"])).bool()
    ours, theirs, tokens = (
        outputs.hidden_states[-1],
        *(x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()] for x in (expected.hidden_states[-1], tokens)),
    )
    torch.testing.assert_close(ours[tokens], theirs[tokens], rtol=1e-4, atol=1e-5)
    assert_same_gradients(model, reference, average=dist.group.WORLD)


def language_batch(B: int, T: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = random_ids(B, T)
    return {"input_ids": ids, "labels": ids.clone(), **more}


@check(2, 4)
def context_parallel(folder: Path) -> None:
    check_context_parallel(language_batch(2, 64))


@check(2, 4)
def context_parallel_with_a_window_over_several_ranks(folder: Path) -> None:
    for window in (16, 40, 100):
        check_context_parallel(language_batch(1, 64), attention_window_size=window)


@check(2, 4)
def context_parallel_of_documents(folder: Path) -> None:
    check_context_parallel(language_batch(2, 64, position_ids=documents(2, 64)))
    check_context_parallel(language_batch(2, 64, position_ids=documents(1, 64)), attention_window_size=40)


@check(4)
def context_parallel_with_checkpointing(folder: Path) -> None:
    for reentrant in (False, True):
        check_context_parallel(language_batch(2, 64), {"use_reentrant": reentrant})


@check(4)
def context_parallel_of_hawk_and_other_shapes(folder: Path) -> None:
    check_context_parallel(language_batch(2, 12), block_types=["recurrent"], num_hidden_layers=2)
    check_context_parallel(language_batch(2, 16), conv1d_width=1)
    check_context_parallel(language_batch(2, 32), num_key_value_heads=2, block_types=["attention"])


@check(4)
def context_parallel_in_blocks_of_queries(folder: Path) -> None:
    """Chunks long enough for `attend_in_blocks`."""
    check_context_parallel(language_batch(1, 4 * 1200), num_hidden_layers=3, attention_window_size=100)


@check(4)
def context_parallel_with_padding_on_the_right(folder: Path) -> None:
    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[1, 37:] = 0
    batch = language_batch(2, 64, attention_mask=mask)
    batch["labels"][mask == 0] = -100
    check_context_parallel(batch)


@check(2)
def context_parallel_of_documents_by_their_lengths(folder: Path) -> None:
    """What DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=False) says."""
    lengths = torch.tensor([0, 9, 32, 50, 64], dtype=torch.int32)
    more = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 23, "max_length_k": 23}
    check_context_parallel(language_batch(1, 64, **more))
    check_context_parallel(language_batch(1, 64, seq_idx=(torch.arange(64) // 17)[None]))


@check(2, 4)
def context_parallel_with_a_document_that_is_not_finite(folder: Path) -> None:
    """Documents of 20 tokens: a NaN in the second, which ends within the third of four chunks, stays there."""
    model, ids = make_model(make_config()).eval(), random_ids(1, 64).clamp(min=1)
    batch = {"input_ids": ids, "position_ids": (torch.arange(64) % 20)[None]}
    with torch.no_grad():
        sound = model.model(**batch, use_cache=False).last_hidden_state
        model.model.embed_tokens.weight[0] = torch.nan
        ids[0, 30] = 0
        found = model(**shard_sequence(batch, dist.group.WORLD), output_hidden_states=True).hidden_states[-1]
    is_broken = (torch.arange(64) >= 30) & (torch.arange(64) < 40)
    sound, is_broken = (x.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()] for x in (sound.mT, is_broken))
    torch.testing.assert_close(found.mT[..., ~is_broken], sound[..., ~is_broken], rtol=1e-4, atol=1e-5)
    assert found[:, is_broken].isnan().all()


@check(2)
def context_parallel_under_a_given_number_of_targets(folder: Path) -> None:
    check_context_parallel(language_batch(2, 64, num_items_in_batch=torch.tensor(1000)))


@check(2)
def context_parallel_without_labels(folder: Path) -> None:
    reference, ids = make_model(make_config()).eval(), random_ids(2, 32)
    with torch.no_grad():
        expected = reference(ids).logits.chunk(2, dim=1)[dist.get_rank()]
        outputs = reference(**shard_sequence({"input_ids": ids}, dist.group.WORLD))
    assert outputs.loss is None
    assert outputs.past_key_values is None
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-5)


@check(2)
def context_parallel_messages_do_not_grow(folder: Path) -> None:
    """Whatever leaves a rank goes through these two functions; B (W G 2 h + ...) bytes, and nothing with T."""
    sent: list[int] = []
    first, gather, reduce = dist.batch_isend_irecv, dist.all_gather, dist.all_reduce

    def batch_isend_irecv(operations: list[Any]) -> Any:
        sent.extend(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return first(operations)

    def all_gather(tensors: Any, tensor: torch.Tensor, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return gather(tensors, tensor, **kwargs)

    def all_reduce(tensor: torch.Tensor, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return reduce(tensor, **kwargs)

    model, totals = make_model(make_config()), []
    dist.batch_isend_irecv, dist.all_gather, dist.all_reduce = batch_isend_irecv, all_gather, all_reduce
    for T in (64, 1024):
        sent.clear()
        model(**shard_sequence(language_batch(1, T), dist.group.WORLD)).loss.backward()
        totals.append(sum(sent))
    config = model.config
    recurrent = config.layers_block_type.count("recurrent")
    states = 2 * recurrent * 2 * config.lru_width  # forward and backward, decay and end
    context = recurrent * (config.conv1d_width - 1) * config.lru_width  # one way, rank 0 forward and rank 1 backward
    keys = config.attention_window_size * 2 * config.head_dim
    assert totals[0] == totals[1]
    assert totals[0] == 4 * (states + context + keys + 1) + 8  # float32, the loss, and the comparison of batches


@check(2)
def context_parallel_refuses_bad_input(folder: Path) -> None:
    group, model = dist.group.WORLD, make_model(make_config())
    ids = random_ids(2, 16)

    def refuses(match: str, batch: dict[str, Any], model: nn.Module = model, **arguments: Any) -> None:
        with pytest.raises(ValueError, match=match):
            model(**{**shard_sequence(batch, group), **arguments})

    refuses("15 tokens cannot be split evenly over 2 ranks; pad them on the right to 16", {"input_ids": ids[:, 1:]})
    custom = torch.ones(2, 1, 16, 16)
    refuses(r"attention_mask of shape \(2, 1, 16, 16\) must be", {"input_ids": ids, "attention_mask": custom})
    left = torch.ones_like(ids)
    left[0, :3] = 0
    refuses("padding before tokens", {"input_ids": ids, "attention_mask": left})
    refuses("cannot split token_type_ids", {"input_ids": ids, "token_type_ids": ids})
    refuses("needs input_ids", {"labels": ids})
    backwards = torch.arange(16)[None].repeat(2, 1)
    backwards[:, 8:] -= 3  # within the first chunk and within the second, nothing is wrong
    refuses("position_ids of row 0 from column 7 on", {"input_ids": ids, "position_ids": backwards})
    refuses(r"labels of shape \(2,\) must be one per token", {"input_ids": ids, "labels": ids[:, 0]})
    reverse = dist.get_rank() == 1
    positions = torch.tensor([[*range(8), *range(8)], [*range(6), *range(10)]])
    for other in (
        {"input_ids": ids + dist.get_rank()},
        {"input_ids": ids.flip(1) if reverse else ids},
        {"input_ids": ids[:, :12] if reverse else ids},
        {"input_ids": ids[:, :15] if reverse else ids},
        {"input_ids": ids, "position_ids": positions.flip(0) if reverse else positions},
        {"input_ids": ids, **({"labels": ids} if reverse else {})},
        {"inputs_embeds": torch.eye(16)[None].flip(1) if reverse else torch.eye(16)[None]},
    ):
        refuses(r"ranks \[1\] of the group were given another batch", other)
    refuses("a chunk of 2 tokens is shorter than the 3", {"input_ids": ids[:, :4]})
    refuses("goes without past_key_values", {"input_ids": ids}, use_cache=True)
    refuses("does not go with a chunk", {"input_ids": ids}, attention_mask=torch.ones(2, 8))
    refuses("has 4 tokens, this rank's chunk 8", {"input_ids": ids}, input_ids=ids[:, :4])
    model.set_attn_implementation("eager")
    refuses("output_attentions does not work", {"input_ids": ids}, output_attentions=True)
    refuses("only the language model", {"input_ids": ids}, RecurrentGemmaForTokenClassification(make_config()))


def check_with_data_parallel(wrap: Callable[[nn.Module, Any], nn.Module]) -> None:
    """A 2 x 2 mesh: two batches, each over two ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    ids = random_ids(2, 64)
    reference = make_model(make_config())
    expected = [reference(ids[i : i + 1], labels=ids[i : i + 1]).loss for i in range(2)]
    (sum(expected) / 2).backward()
    row = mesh["dp"].get_local_rank()
    own = ids[row : row + 1]
    model = wrap(copy_of(reference), mesh)
    loss = model(**shard_sequence({"input_ids": own, "labels": own}, mesh["cp"])).loss
    loss.backward()
    assert_same_loss(loss, expected[row])
    assert_same_gradients(model, reference)


@check(4)
def context_parallel_times_ddp(folder: Path) -> None:
    check_with_data_parallel(lambda model, mesh: DistributedDataParallel(model))


@check(4)
def context_parallel_times_fsdp(folder: Path) -> None:
    def wrap(model: RecurrentGemmaForCausalLM, mesh: Any) -> nn.Module:
        ranks = mesh["dp", "cp"]._flatten("dp_cp")
        for layer in model.model.layers:
            fully_shard(layer, mesh=ranks)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return fully_shard(model, mesh=ranks)

    check_with_data_parallel(wrap)


def all_three_at_once(folder: Path) -> None:
    """A 2 x 2 mesh: heads over one dimension; weights and sequence over the other."""
    reference = make_model(make_config())
    model = RecurrentGemmaForCausalLM.from_pretrained(
        saved(reference, folder / "model"),
        distributed_config=DistributedConfig(tp_size=2, fsdp_size=2),
        dtype=torch.float32,
    ).train()
    batch = language_batch(2, 64, position_ids=documents(2, 64))
    expected = reference(**batch).loss
    expected.backward()
    loss = model(**shard_sequence(batch, model._device_mesh["fsdp"])).loss
    loss.backward()
    assert_same_loss(loss, expected)
    assert_same_gradients(model, reference)


if Version(transformers.__version__) >= Version("5.23"):  # 5.17 divides a model by FSDP or by heads, not both
    check(4)(all_three_at_once)


# --- accelerate's FSDP2 -----------------------------------------------------------------------------------------------


def accelerate_fsdp() -> Any:
    """accelerate's FSDP2. It turns FSDP on for accelerators alone: here it is told that this CPU is one."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT"
    )
    return Accelerator(cpu=True, fsdp_plugin=plugin)


@check(2)
def fsdp_by_accelerate(folder: Path) -> None:
    """Three steps equal those of one process; the full state dict is saved and read back, and goes on training."""
    accelerator, rank = accelerate_fsdp(), dist.get_rank()
    reference = make_model(make_config())
    reference_optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    model = copy_of(reference)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert accelerator.is_fsdp2
    assert all(type(layer).__name__ == "FSDPRecurrentGemmaDecoderLayer" for layer in model.model.layers)
    for step in range(3):
        ids = random_ids(2, 20 + step)
        reference(ids, labels=ids).loss.backward()
        accelerator.backward(model(ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss)
        assert_same_gradients(model, reference)
        for trained in (optimizer, reference_optimizer):
            trained.step()
            trained.zero_grad()
    state = accelerator.get_state_dict(model)  # on rank 0
    if rank == 0:
        for name, tensor in reference.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    accelerator.unwrap_model(model).save_pretrained(
        folder / "saved", state_dict=state, is_main_process=accelerator.is_main_process
    )
    dist.barrier()
    if rank == 0:
        loaded = RecurrentGemmaForCausalLM.from_pretrained(folder / "saved", dtype=torch.float32).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@check(2)
def fsdp_by_trainer(folder: Path) -> None:
    """The Trainer's own losses under FSDP2, and what it saves, equal a loop of one process over the same data."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from transformers import Trainer, TrainingArguments

    AcceleratorState._reset_state(reset_partial_state=True)
    ids = random_ids(4, 20)
    rows = [{"input_ids": row, "labels": row} for row in ids]  # every step sees all of them, in whatever order
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=3, logging_steps=1,
        per_device_train_batch_size=2, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
        save_strategy="no", fsdp="full_shard auto_wrap", fsdp_config={"fsdp_version": 2},
    )  # fmt: skip
    _ = arguments.device  # sets torch.distributed up
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    reference = make_model(make_config())
    optimizer, losses = torch.optim.SGD(reference.parameters(), lr=0.1), []
    trainer = Trainer(model=copy_of(reference), args=arguments, train_dataset=rows)
    trainer.train()
    assert type(trainer.model).__name__ == "FSDPRecurrentGemmaForCausalLM"
    for _ in range(3):
        loss = reference(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-5)
    trainer.save_model(str(folder / "saved"))
    dist.barrier()
    assert_same_weights(folder / "saved", reference, rtol=1e-4, atol=1e-5)


# --- controls of the launch: not in CHECKS ----------------------------------------------------------------------------


def one_rank_fails(folder: Path) -> None:
    if dist.get_rank() == 1:
        raise ArithmeticError("this rank cannot add")
    dist.barrier()


def one_rank_hangs(folder: Path) -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.barrier()


# --- DeepSpeed ----------------------------------------------------------------------------------------------------


def deepspeed_zero(folder: Path) -> None:
    """Three steps of ZeRO 2 and 3 equal those of one process. Not in CHECKS: see test_distributed.py."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    rank, ids = dist.get_rank(), random_ids(2, 20)
    deepspeed.init_distributed("gloo")
    for stage in (2, 3):
        reference = make_model(make_config())
        optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
        model = copy_of(reference)
        settings = {
            "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }  # fmt: skip
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=settings
        )
        for _ in range(3):
            expected = reference(ids, labels=ids).loss
            expected.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss = engine(ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            assert_same_loss(mean / 2, expected)
        for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(safe_get_full_fp32_param(parameter), expected.detach(), rtol=1e-5, atol=1e-6)
