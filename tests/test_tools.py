"""Tools that pick a class by the name in a checkpoint, and programs that do not know of this package, get our model."""

import json
import os
import subprocess
import sys

import pytest
import torch

from recurrent_gemma_hf import RecurrentGemmaConfig, RecurrentGemmaForCausalLM, RecurrentGemmaModel, demo_checkpoint

COMMAND = [sys.executable, "-m", "recurrent_gemma_hf.cli"]


@pytest.fixture(scope="module")
def trl():
    trl = pytest.importorskip("trl", reason="fine-tuning with TRL needs the train extra")
    pytest.importorskip("datasets", reason="TRL needs datasets: install the train extra").disable_progress_bars()
    return trl


def in_turn(completions: list[str], **_) -> list[float]:
    """Rewards that always differ, so that there is something to learn."""
    return [float(i) for i in range(len(completions))]


PAIRS = [{"prompt": f"ROMEO:\nline {i}\n", "chosen": "But soft!", "rejected": "zzz qqq"} for i in range(4)]
TRAINERS = {
    "SFT": ([{"text": f"ROMEO: line {i}"} for i in range(4)], {}, {}),
    "DPO": (PAIRS, {}, {}),
    "KTO": ([{"prompt": "ROMEO:", "completion": "soft", "label": i % 2 == 0} for i in range(4)], {}, {}),
    "GRPO": ([{"prompt": "ROMEO:"}] * 4, {"num_generations": 2, "max_completion_length": 4},
             {"reward_funcs": in_turn}),
    "RLOO": ([{"prompt": "ROMEO:"}] * 4, {"num_generations": 2, "max_completion_length": 4},
             {"reward_funcs": in_turn}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")  # TRL's
@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_given_a_path_train_our_model(trl, tmp_path, name):
    """TRL takes the class that the checkpoint names from the module `transformers`."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    if not hasattr(trl, f"{name}Trainer"):
        pytest.skip(f"this TRL has no {name}Trainer")
    rows, options, arguments = TRAINERS[name]
    options = getattr(trl, f"{name}Config")(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, bf16=False,
        gradient_checkpointing=False, max_steps=1, per_device_train_batch_size=2, logging_steps=1,
        learning_rate=1e-3, **options,
    )  # fmt: skip
    trainer = getattr(trl, f"{name}Trainer")(
        model=demo_checkpoint(), args=options, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(demo_checkpoint()), **arguments,
    )  # fmt: skip
    assert type(trainer.model) is RecurrentGemmaForCausalLM
    before = trainer.model.model.embed_tokens.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.model.embed_tokens.weight, before)


ORDERS = {
    "ours first": "import recurrent_gemma_hf, {tool}",
    "the tool first": "import {tool}, recurrent_gemma_hf",
    "Transformers' own class first": (
        "import transformers; transformers.RecurrentGemmaForCausalLM; import {tool}, recurrent_gemma_hf"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tool", ["transformers", "transformers.processing_utils", "trl.trainer.utils"])
def test_the_names_in_transformers_are_ours_in_any_order(order, tool):
    pytest.importorskip(tool.split(".")[0])
    code = [
        ORDERS[order].format(tool=tool), f"import {tool} as tool, transformers",
        "modules = [transformers, getattr(tool, 'transformers', transformers)]",
        "print([getattr(m, 'RecurrentGemma' + n).__module__ for m in modules for n in ('Config', 'Model',"
        "'ForCausalLM', 'PreTrainedModel', 'ForSequenceClassification')])",
        "from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaForCausalLM as Theirs",
        "assert Theirs.__module__.startswith('transformers.'), Theirs",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    modules = done.stdout.split("[")[-1].split(", ")
    assert len(modules) == 10
    assert all("'recurrent_gemma_hf." in module for module in modules), modules


# --- A config of Transformers' own ------------------------------------------------------------------------------------


@pytest.fixture
def theirs():
    from transformers.models.recurrent_gemma.configuration_recurrent_gemma import RecurrentGemmaConfig as InTree

    return InTree.from_pretrained(demo_checkpoint())


def test_a_config_read_before_the_import_of_this_package(theirs):
    from transformers import AutoModelForCausalLM

    ids = torch.arange(1, 20)[None]
    expected = RecurrentGemmaForCausalLM.from_pretrained(demo_checkpoint())(ids).logits
    for cls in (AutoModelForCausalLM, RecurrentGemmaForCausalLM):
        model = cls.from_pretrained(demo_checkpoint(), config=theirs)
        assert type(model.config) is RecurrentGemmaConfig
        assert torch.equal(model(ids).logits, expected)
    model = AutoModelForCausalLM.from_config(theirs, attn_implementation="eager")
    assert type(model) is RecurrentGemmaForCausalLM
    assert model.config._attn_implementation == "eager"
    own = RecurrentGemmaConfig.from_pretrained(demo_checkpoint())
    assert model.config.layers_block_type == own.layers_block_type
    assert RecurrentGemmaConfig.adopt(own) is own


@pytest.mark.parametrize("cls", [RecurrentGemmaModel, RecurrentGemmaForCausalLM])
def test_the_constructor_takes_our_config_alone(theirs, cls):
    with pytest.raises(ValueError, match=r"not a transformers\..*: convert it with RecurrentGemmaConfig.adopt"):
        cls(theirs)


# --- recurrent-gemma run ----------------------------------------------------------------------------------------------


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, "run", *arguments], capture_output=True, text=True, timeout=250, env=os.environ | environment
    )


def test_run_brings_the_package_into_a_program_and_what_it_starts(tmp_path):
    child = "import sys; print('recurrent_gemma_hf' in sys.modules, 'torch' in sys.modules)"
    code = f"import subprocess, sys; {child}; sys.stdout.flush(); subprocess.run([sys.executable, '-c', {child!r}])"
    assert run("python", "-c", code).stdout.split() == ["True", "False"] * 2
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:], 'recurrent_gemma_hf' in sys.modules); sys.exit(3)")
    done = run(str(script), "--help", "-x")
    assert (done.stdout.strip(), done.returncode) == ("['--help', '-x'] True", 3)


def test_run_leaves_a_sitecustomize_its_place(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.customized = 1")
    code = "import sys; print(customized, 'recurrent_gemma_hf' in sys.modules)"
    assert run("python", "-c", code, PYTHONPATH=str(tmp_path)).stdout.split() == ["1", "True"]


@pytest.mark.parametrize("command", ["no-such-program", "no_such_script.py"])
def test_run_of_nothing(command):
    done = run(command)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"recurrent-gemma: there is no program '{command}' here; give one that is installed, or a script by its path"
    )


def test_run_says_what_it_does():
    for arguments in ((), ("--help",)):
        assert run(*arguments).stdout.startswith("Usage: recurrent-gemma run COMMAND [ARGS]...")


def test_run_trl(trl, tmp_path):
    """Two documents of different length in one batch, padded: the loss that our model gives."""
    rows = [{"text": "ROMEO: But soft, what light through yonder window breaks?"}, {"text": "JULIET: O Romeo!"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run(
        "trl", "sft", "--model_name_or_path", demo_checkpoint(), "--dataset_name", str(tmp_path), "--max_steps", "1",
        "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "out"), "--report_to", "none",
        "--use_cpu", "--bf16", "False", "--logging_steps", "1", "--save_strategy", "no",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    saved = RecurrentGemmaForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.config.block_types == RecurrentGemmaConfig.from_pretrained(demo_checkpoint()).block_types
    # Transformers' own class would have written its spelling of the pattern.
    assert "_block_types" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_run_lm_eval(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval comes with the eval extra")
    (tmp_path / "docs.jsonl").write_text(json.dumps({"text": "ROMEO: But soft, what light through yonder window?"}))
    (tmp_path / "task.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs:\n  data_files: {test: " + str(tmp_path / "docs.jsonl") + "}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: word_perplexity\n"
    )
    checker = tmp_path / "sitecustomize.py"  # says at the end which model ran
    checker.write_text(
        "import atexit, sys\n"
        "atexit.register(lambda: print('RAN', sorted(n for n in sys.modules if 'modeling_recurrent' in n)))\n"
    )
    done = run(
        "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={demo_checkpoint()}", "--tasks", "own",
        "--include_path", str(tmp_path), "--device", "cpu", PYTHONPATH=str(tmp_path), HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "word_perplexity" in done.stdout
    assert "RAN ['recurrent_gemma_hf.modeling_recurrent_gemma']" in done.stdout
