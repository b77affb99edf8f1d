"""What people do on the day that they install the package, in one process, with its declared dependencies alone.

`make test-unpinned` runs this with the releases that pip resolves today.
"""

import json
import subprocess
import sys

import pytest

FIRST_DAY = """
import json
import recurrent_gemma_hf, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

checkpoint = recurrent_gemma_hf.demo_checkpoint()
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
before = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

ids = tokenizer("ROMEO:\\nGood morrow, cousin. Is the day so young?")["input_ids"]
dataset = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}] * 4
arguments = TrainingArguments(
    "out", max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, report_to="none", use_cpu=True,
    save_strategy="no", disable_tqdm=True,
)
trainer = Trainer(model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset)
first = trainer.evaluate()["eval_loss"]
trainer.train()
last = trainer.evaluate()["eval_loss"]
moved = sum(not torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters()))
trainer.save_model("trained")
tokenizer.save_pretrained("trained")

loaded, info = AutoModelForCausalLM.from_pretrained("trained", output_loading_info=True)
prompt = torch.tensor([ids])
write = dict(max_new_tokens=8, do_sample=False)
texts = {
    "trained": model.eval().generate(prompt, **write),
    "loaded": loaded.generate(prompt, **write),
    "static": loaded.generate(prompt, cache_implementation="static", **write),
    "no cache": loaded.generate(prompt, use_cache=False, **write),
    "chunks": loaded.generate(prompt, prefill_chunk_size=5, **write),
    "lookup": loaded.generate(prompt, prompt_lookup_num_tokens=2, **write),
}
answers = pipeline("text-generation", model="trained")(["ROMEO:", "Good morrow"], batch_size=2, **write)
print(json.dumps({
    "class": type(loaded).__module__, "losses": [first, last], "moved": moved,
    "of": len(list(model.parameters())), "texts": {name: ids.tolist() for name, ids in texts.items()},
    "pipeline": [answer[0]["generated_text"] for answer in answers],
}))
"""


@pytest.fixture(scope="module")
def first_day(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """What the script found, and all that was said on stderr meanwhile."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_DAY],
        cwd=tmp_path_factory.mktemp("day"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_training_moves_every_parameter_and_learns(first_day):
    found, _ = first_day
    assert found["moved"] == found["of"] > 50
    assert found["losses"][1] < found["losses"][0] - 0.1


def test_the_saved_model_is_ours_and_writes_the_same_in_every_mode(first_day):
    found, _ = first_day
    assert found["class"] == "recurrent_gemma_hf.modeling_recurrent_gemma"
    for name, text in found["texts"].items():
        assert text == found["texts"]["trained"], name
    for text, prompt in zip(found["pipeline"], ("ROMEO:", "Good morrow"), strict=True):
        assert text.startswith(prompt)


def test_nobody_is_warned_of_names_that_only_we_use(first_day):
    _, said = first_day
    for word in ("past_key_values", "cache_params", "FutureWarning", "transformers 5"):
        assert word not in said
