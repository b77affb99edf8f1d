"""`transformers_compat.py`: both names of the cache on every release, and lists that are true of the code."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

import recurrent_gemma_hf
from recurrent_gemma_hf import (
    RecurrentGemmaCache,
    RecurrentGemmaForCausalLM,
    RecurrentGemmaForSequenceClassification,
    RecurrentGemmaModel,
    transformers_compat,
)
from recurrent_gemma_hf.transformers_compat import CACHE_NAME, OVERRIDDEN, READ, SUPPORTED_RELEASES, release_problem
from tests.helpers import byte_config, load_file

ROOT = Path(__file__).parents[1]
PACKAGE = Path(recurrent_gemma_hf.__file__).parent
NAMES = ["cache", "past_key_values"]
MODELS = [RecurrentGemmaModel, RecurrentGemmaForCausalLM, RecurrentGemmaForSequenceClassification]

# --- Both names of the cache ----------------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that Transformers' loggers say, what they say once included, and every FutureWarning as an error."""
    messages: list[str] = []

    def record(self, message: str, *args: object, **kwargs: object) -> None:
        messages.append(str(message))

    for kind in ("warning", "warning_once"):
        monkeypatch.setattr("logging.Logger." + kind, record)
    return messages


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model_class", MODELS)
def test_forward_takes_both_names_and_its_output_answers_to_both(said, model_class, name: str):
    model = model_class(byte_config(num_labels=2)).eval()
    ids = torch.randint(3, 265, (1, 12))
    cache = RecurrentGemmaCache(model.config)
    with torch.no_grad():
        first = model(ids[:, :7], use_cache=True, **{name: cache})
        second = model(ids[:, 7:], **{name: first[name]})
        whole = model(ids)
    for output in (first, second):
        for answer in NAMES:
            assert getattr(output, answer) is output[answer] is output.get(answer) is cache
            assert answer in output
    assert list(second.keys())[1:] == [CACHE_NAME], "as this release has it: Trainer and pipelines drop it by name"
    torch.testing.assert_close(second[0][:, -1:], whole[0][:, -1:], rtol=1e-4, atol=1e-5)
    without = model(ids, use_cache=False)
    for answer in NAMES:
        assert getattr(without, answer) is None
        assert answer not in without
        assert without.get(answer, "none") == "none"
        with pytest.raises(KeyError):
            without[answer]
    assert said == []


def test_the_cache_is_the_fourth_argument():
    model = RecurrentGemmaForCausalLM(byte_config()).eval()
    cache, ids = RecurrentGemmaCache(model.config), torch.randint(3, 265, (1, 5))
    assert model(ids, None, None, cache).cache is cache
    assert list(inspect.signature(model.forward).parameters)[3] == "cache"
    assert "past_key_values" in inspect.signature(model.forward).parameters


@pytest.mark.parametrize(
    ("model_class", "method"), [*((kind, "forward") for kind in MODELS), (RecurrentGemmaForCausalLM, "generate")]
)
def test_two_caches_are_an_error_and_one_twice_is_not(model_class, method: str):
    model = model_class(byte_config()).eval()
    call = model.generate if method == "generate" else model
    ids, cache = torch.randint(3, 265, (1, 5)), RecurrentGemmaCache(model.config)
    options = {"max_new_tokens": 2} if method == "generate" else {}
    call(ids, cache=cache, past_key_values=cache, **options)
    assert cache.get_seq_length() >= 5
    with pytest.raises(ValueError, match=r"cache and past_key_values are two names .* give one"):
        call(ids, cache=cache, past_key_values=RecurrentGemmaCache(model.config), **options)
    for name in NAMES:
        with pytest.raises(ValueError, match=rf"{name} is a tuple; it must be a Cache"):
            call(ids, **{name: ((torch.zeros(1),),)}, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("blocks", [None, ["recurrent"], ["attention"]], ids=str)
def test_generate_takes_both_names_and_returns_both(said, blocks, options: dict, name: str):
    model = RecurrentGemmaForCausalLM(byte_config(**({} if blocks is None else {"block_types": blocks}))).eval()
    ids = torch.randint(3, 265, (1, 9))
    common = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "return_dict_in_generate": True, **options}
    torch.manual_seed(0)
    expected = model.generate(ids, **common)
    cache = RecurrentGemmaCache(model.config)
    torch.manual_seed(0)
    first = model.generate(ids, **{name: cache}, **common)
    assert torch.equal(first.sequences, expected.sequences)
    for output in (expected, first):
        assert output.cache is output.past_key_values is output["cache"] is output["past_key_values"]
        assert isinstance(output.cache, RecurrentGemmaCache)
    assert first.cache is cache
    assert isinstance(first, type(expected)), "and so the isinstance checks of others go on as they were"
    if options.get("num_beams"):
        return  # one cache, two beams: there is no one text to go on from
    # Going on from it equals reading everything anew.
    text = torch.cat([first.sequences, ids], dim=1)
    torch.manual_seed(1)
    again = model.generate(text, **{name: cache}, **common)
    torch.manual_seed(1)
    assert torch.equal(again.sequences, model.generate(text, **common).sequences)
    chunked = [m for m in said if "this Transformers prefills in chunks only without a cache" in m]
    assert said == chunked
    assert bool(chunked) == ("prefill_chunk_size" in options and not transformers_compat.CONTINUES_IN_CHUNKS)


def test_tools_see_the_arguments_of_generate():
    theirs = inspect.signature(transformers.GenerationMixin.generate)
    assert inspect.signature(RecurrentGemmaForCausalLM.generate) == theirs
    assert "streamer" in theirs.parameters


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_made_changed_and_copied_under_both_names(said, name: str):
    model = RecurrentGemmaForCausalLM(byte_config()).eval()
    output = model(torch.randint(3, 265, (1, 5)))
    one, two = RecurrentGemmaCache(model.config), RecurrentGemmaCache(model.config)
    made = type(output)(logits=output.logits, **{name: one})
    assert made.cache is made.past_key_values is made[name] is one
    made[name] = two
    assert made.cache is made.past_key_values is two
    setattr(made, name, one)
    assert list(made.keys()) == ["logits", CACHE_NAME]
    leaves, spec = torch.utils._pytree.tree_flatten(made)
    rebuilt, replaced = torch.utils._pytree.tree_unflatten(leaves, spec), dataclasses.replace(made, logits=made.logits)
    for each in (made, rebuilt, replaced):
        assert type(each) is type(output)
        assert each["cache"] is each["past_key_values"] is each.cache is each.past_key_values is one
    assert said == []


@pytest.mark.parametrize("name", NAMES)
def test_the_hooks_of_generate_take_both_names(said, name: str):
    model = RecurrentGemmaForCausalLM(byte_config()).eval()
    ids, cache = torch.randint(3, 265, (1, 9)), RecurrentGemmaCache(model.config)
    model(ids[:, :6], cache=cache)
    mask = torch.ones_like(ids)
    inputs = model.prepare_inputs_for_generation(ids, attention_mask=mask, **{name: cache})
    assert torch.equal(inputs["input_ids"], ids[:, 6:]), "what the cache has read is not read again"
    assert [inputs.get(each) for each in ("past_key_values", "cache")] == [cache, None], "PEFT reads the old name"
    masks = model.create_masks_for_generate(
        config=model.config, inputs_embeds=torch.empty(1, 3, 0), attention_mask=mask, **{name: cache}
    )
    assert masks["is_token"].shape == (1, 3)
    positional = model.prepare_inputs_for_generation(ids, 3, cache, mask)
    assert torch.equal(positional["input_ids"], ids[:, 6:])
    assert set(NAMES) <= set(model._skip_keys_device_placement), "accelerate moves no cache from layer to layer"
    assert said == []


def test_a_cache_of_another_copy_of_the_code_is_refused_once_it_holds_something():
    """A package and a checkpoint's remote code have one each."""
    copy = load_file(PACKAGE / "cache_recurrent_gemma.py", "recurrent_gemma_hf.another_copy")
    model = RecurrentGemmaForCausalLM(byte_config()).eval()
    ids, cache = torch.randint(3, 265, (1, 5)), copy.RecurrentGemmaCache(model.config)
    assert model(ids, cache=cache).cache is cache, "an empty one becomes the model's"
    assert type(cache) is RecurrentGemmaCache
    cache.__class__ = copy.RecurrentGemmaCache
    with pytest.raises(ValueError, match=r"filled by another copy of the code .*another_copy.* save\(\) it and load"):
        model(ids, cache=cache)


# --- Releases -------------------------------------------------------------------------------------------------------


def test_the_declared_range_is_the_tested_one():
    low, high = SUPPORTED_RELEASES
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"transformers>={low},<{high}" in project["dependencies"]
    tested = {
        name: re.search(r"^transformers==(\d+\.\d+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE).group(1)
        for name in ("constraints-oldest.txt", "constraints.txt")
    }
    major, minor = tested["constraints.txt"].split(".")
    assert (tested["constraints-oldest.txt"], f"{major}.{int(minor) + 1}") == (low, high)
    assert release_problem(transformers.__version__) is None


@pytest.mark.parametrize(
    ("version", "is_tested"),
    [
        ("4.57.1", False), ("5.16.1", False), ("5.17.0", True), ("5.17.0.dev0", True), ("5.24.3", True),
        ("5.24rc1", True), ("5.25rc1", False),
        ("5.25.0", False), ("5.25.0.dev0", False), ("6.0.0rc1", False), ("6", False),
    ],
)  # fmt: skip
def test_the_message_about_a_release(version: str, is_tested: bool):
    problem = release_problem(version)
    assert (problem is None) == is_tested
    if problem is not None:
        assert problem.startswith(f"transformers {version} is installed; ")
        assert ">=5.17,<5.25" in problem


def test_an_untested_release_is_announced_once():
    script = """if True:
        import transformers
        transformers.__version__ = "5.99.0"
        import importlib
        from recurrent_gemma_hf import RecurrentGemmaConfig, transformers_compat
        importlib.reload(transformers_compat)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("transformers 5.99.0 is installed; ") == 1


# --- Names ----------------------------------------------------------------------------------------------------------


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_only_one_file_imports_from_below_the_top_level_of_transformers():
    below = {
        name
        for name, tree in sources()
        for node in ast.walk(tree)
        for module in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""] * (not node.level)
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if module.startswith("transformers.")
    }
    assert below == {"transformers_compat.py"}


def owner_of(name: str) -> type:
    return getattr(transformers, name, None) or getattr(transformers_compat, name)


def our_classes() -> Iterator[type]:
    for module in pkgutil.iter_modules([str(PACKAGE)]):
        if "triton" in module.name or module.name.startswith("peft") or module.ispkg:
            continue
        for found in vars(importlib.import_module(f"recurrent_gemma_hf.{module.name}")).values():
            if inspect.isclass(found) and found.__module__ == f"recurrent_gemma_hf.{module.name}":
                yield found
    waiting = [transformers_compat.TensorParallelLayer]  # tensor_parallel.py makes its classes in a function
    while waiting:
        yield from (subclasses := waiting.pop().__subclasses__())
        waiting += subclasses


def overridden() -> dict[str, set[str]]:
    """What our classes override, by the listed class of Transformers that has it, itself or by inheritance."""
    found: dict[str, set[str]] = {owner: set() for owner in OVERRIDDEN}
    for ours in our_classes():
        if not ours.__module__.startswith("recurrent_gemma_hf"):
            continue
        for name in vars(ours):
            theirs = [
                base for base in ours.__mro__[1:] if base.__module__.startswith("transformers.") and name in vars(base)
            ]
            if theirs and not name.startswith("__") and name != "_abc_impl" and "Output" not in theirs[0].__name__:
                owner = next(
                    owner
                    for owner in OVERRIDDEN
                    if issubclass(owner_of(owner), theirs[0]) and issubclass(ours, owner_of(owner))
                )
                found[owner].add(name)
    return found


def test_the_list_of_overridden_names_is_true():
    assert overridden() == {owner: set(names.split()) for owner, names in OVERRIDDEN.items()}


def test_the_private_names_in_use_are_listed():
    used = {
        node.attr
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr) and not name.startswith("vllm")
    }
    listed = {name for table in (OVERRIDDEN, READ) for names in table.values() for name in names.split()}
    owners = [owner_of(owner) for owner in OVERRIDDEN] + [transformers.GenerationConfig]
    theirs = {
        name
        for owner in owners
        for base in owner.__mro__
        if base.__module__.startswith("transformers.")
        for name in vars(base)
    }
    assert used & theirs <= listed
    assert {name for names in READ.values() for name in names.split() if name.startswith("_")} <= used


def test_the_names_exist_in_this_release():
    instances = {
        "PreTrainedModel": transformers.GemmaForCausalLM(
            transformers.GemmaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=4)
        ),
        "PreTrainedConfig": PreTrainedConfig(),
        "CacheLayerMixin": DynamicLayer(),
        "LinearAttentionCacheLayerMixin": LinearAttentionLayer(),
    }
    instances["CacheLayerMixin"].update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    for owner, names in OVERRIDDEN.items():
        missing = [name for name in names.split() if not hasattr(owner_of(owner), name)]
        assert not missing, f"{owner} of transformers {transformers.__version__} has no {missing}"
    for owner, names in READ.items():
        optional = {"hf_quantizer", "dtype"}  # only on quantized models; 5.24's own layers have no dtype any more
        missing = [name for name in names.split() if not hasattr(instances[owner], name) and name not in optional]
        assert not missing, f"{owner} of transformers {transformers.__version__} has no {missing}"
