"""lm-evaluation-harness with models of this package, offline, on tasks of our own."""

import json
import math
import re

import pytest
import torch
import yaml

from recurrent_gemma_hf import RecurrentGemmaForCausalLM, demo_checkpoint
from recurrent_gemma_hf.cli import evaluate
from tests.helpers import run_command

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

import papers  # of research/
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from recurrent_gemma_hf.evaluation.harness import RecurrentGemmaLM

QUESTIONS = [
    ("Who is the king?", ["Richard is.", "I do not know, my lord.", "He"]),
    ("What light through yonder window breaks?", ["It is the east.", "No"]),
    ("Now is the winter of our discontent made glorious summer by this sun of", ["York", "the house of Lancaster"]),
    ("Speak,", ["I say.", "speak.", "and"]),
]
DOCUMENTS = [
    "ROMEO:\nWhat, shall this speech be spoke for our excuse?\n" * 40,  # longer than the window of the demo
    "First Citizen:\nYou are all resolved rather to die than to famish?\n",
]


@pytest.fixture(scope="module")
def demo(demo_tokenizer):
    return RecurrentGemmaForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32).eval(), demo_tokenizer


def language_model(demo, kind=RecurrentGemmaLM, **settings):
    model, tokenizer = demo
    return kind(model, tokenizer=tokenizer, device="cpu", **settings)


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=i, metadata=("test", i, 1))
        for i, each in enumerate(arguments)
    ]


def multiple_choice():
    return requests("loglikelihood", [(q, " " + choice) for q, choices in QUESTIONS for choice in choices])


@torch.no_grad()
def log_likelihood(demo, context, continuation):
    """Straight from the logits of one forward."""
    model, tokenizer = demo
    ids = tokenizer(context + continuation, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    start = len(tokenizer(context).input_ids)
    log_probabilities = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return log_probabilities.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()


@pytest.mark.parametrize("kind", [HFLM, RecurrentGemmaLM])
@pytest.mark.parametrize("logits_cache", [False, True])
def test_log_likelihoods_do_not_depend_on_the_batch(demo, kind, logits_cache):
    """With batches of 1 and of 8, with and without logits_cache: what one forward over the text alone gives."""
    expected = [log_likelihood(demo, *request.args) for request in multiple_choice()]
    for batch_size in (1, 8):
        lm = language_model(demo, kind, batch_size=batch_size, logits_cache=logits_cache)
        found = [value for value, _ in lm.loglikelihood(multiple_choice(), disable_tqdm=True)]
        assert found == pytest.approx(expected, abs=1e-4)


def test_a_context_longer_than_2048_tokens_is_not_cut(demo, monkeypatch):
    """The model reads every token of a long context: with a state there is no longest one."""
    context, continuation = (DOCUMENTS[0] * 3).strip(), " Romeo"
    lm = language_model(demo)
    call, lengths = lm._model_call, []
    monkeypatch.setattr(lm, "_model_call", lambda ids: lengths.append(ids.shape[1]) or call(ids))
    ((found, _),) = lm.loglikelihood(requests("loglikelihood", [(context, continuation)]), disable_tqdm=True)
    assert found == pytest.approx(log_likelihood(demo, context, continuation), abs=1e-4)
    assert lengths == [len(lm.tok_encode(context + continuation)) - 1]
    assert lengths[0] > 2048


def test_a_document_is_scored_as_in_one_long_forward(demo, monkeypatch):
    """The state is carried from chunk to chunk; nothing is forgotten, nothing counted twice."""
    monkeypatch.setattr("recurrent_gemma_hf.evaluation.streaming.LONGEST_CHUNK", 100)
    lm = language_model(demo)
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in DOCUMENTS]))
    expected = [log_likelihood(demo, "", text) for text in DOCUMENTS]
    assert found == pytest.approx(expected, rel=1e-5)
    # hf with windows of 100 tokens forgets what came before each of them.
    windows = language_model(demo, HFLM, max_length=100)
    forgetful = windows.loglikelihood_rolling(requests("loglikelihood_rolling", [(DOCUMENTS[0],)]), disable_tqdm=True)
    assert forgetful[0] < expected[0] - 10


def test_an_empty_document_has_likelihood_one(demo):
    assert language_model(demo).loglikelihood_rolling(requests("loglikelihood_rolling", [("",)])) == [0.0]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_generation_in_padded_batches_equals_each_prompt_alone(demo, batch_size):
    model, tokenizer = demo
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = [question for question, _ in QUESTIONS]
    lm = language_model(demo, batch_size=batch_size, max_length=4096)
    found = lm.generate_until(requests("generate_until", [(prompt, dict(settings)) for prompt in prompts]))
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(
            ids, max_new_tokens=12, do_sample=False, temperature=None, top_k=None, top_p=None, stop_strings=["\n\n"],
            tokenizer=tokenizer,
        )  # fmt: skip
        alone = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == alone.split("\n\n")[0]


def test_an_automatic_batch_size_needs_a_longest_context(demo):
    with pytest.raises(ValueError, match="batch_size 'auto' is found by trying the longest context"):
        language_model(demo, batch_size="auto")
    assert language_model(demo, batch_size="auto", max_length=64).max_length == 64


# --- whole runs, on local tasks ---


@pytest.fixture
def local_tasks(tmp_path):
    """A folder with a multiple-choice, a generating and a rolling task, and their data."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": question, "choices": choices, "answer": 0} for question, choices in QUESTIONS]
    documents = [{"text": text} for text in DOCUMENTS]
    for name, data in (("questions", rows), ("documents", documents)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))

    def task(name, data, **settings):
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / data)}, "cache_dir": str(tmp_path / "cache")},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **settings}))

    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    task("verse_choice", "questions.jsonl", output_type="multiple_choice", doc_to_text="{{question}}",
         doc_to_choice="choices", doc_to_target="answer", metric_list=[accuracy])  # fmt: skip
    task("verse_rolling", "documents.jsonl", output_type="loglikelihood_rolling", doc_to_text="",
         doc_to_target="{{text}}", metric_list=[{"metric": "word_perplexity"}])  # fmt: skip
    task("verse_missing", "nowhere.jsonl", output_type="loglikelihood_rolling", doc_to_text="",
         doc_to_target="{{text}}", metric_list=[{"metric": "word_perplexity"}])  # fmt: skip
    return folder


@pytest.mark.parametrize("model", ["hf", "recurrent_gemma"])
def test_the_harness_command_runs_local_tasks(model, local_tasks, tmp_path, demo):
    result = run_command(
        "eval", "harness", "run", "--model", model, "--model_args", f"pretrained={demo_checkpoint()},dtype=float32",
        "--tasks", "verse_choice,verse_rolling", "--include_path", local_tasks, "--device", "cpu",
        "--batch_size", "4", "--output_path", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    (path,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(path.read_text())["results"]
    best = [
        max(range(len(choices)), key=lambda i: log_likelihood(demo, question, " " + choices[i]))
        for question, choices in QUESTIONS
    ]
    assert results["verse_choice"]["acc,none"] == pytest.approx(sum(i == 0 for i in best) / len(best))
    nats = -sum(log_likelihood(demo, "", text) for text in DOCUMENTS)
    if model == "recurrent_gemma":
        # lm-eval counts the words of a text by splitting at every single blank.
        words = sum(len(re.split(r"\s+", text)) for text in DOCUMENTS)
        assert results["verse_rolling"]["word_perplexity,none"] == pytest.approx(math.exp(nats / words), rel=1e-4)


def local_paper_task(monkeypatch, local_tasks, *names):
    """The paper's list, replaced by local tasks."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(local_tasks), include_defaults=False)
    monkeypatch.setattr("lm_eval.evaluator.TaskManager", lambda *_, **__: manager)
    lines = {
        "verse_choice": papers.PaperTask("Verse", "verse_choice", "hellaswag", "acc,none", 0, "0-shot"),
        "verse_missing": papers.PaperTask("Missing", "verse_missing", "piqa", "word_perplexity,none", 0, "0-shot"),
    }
    monkeypatch.setattr(papers, "PAPER_TASKS", tuple(lines[name] for name in names))


def test_the_papers_command_prints_the_published_figure_and_resumes(monkeypatch, local_tasks, tmp_path):
    local_paper_task(monkeypatch, local_tasks, "verse_choice")
    arguments = ["--published", "recurrentgemma-2b", "--output", tmp_path / "out.jsonl", "--device", "cpu"]
    result = run_command(*arguments, app=papers.app)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "71.0" in result.output  # HellaSwag of the card
    (record,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert record["task"] == "verse_choice"
    monkeypatch.setattr(papers, "evaluate", lambda *_: pytest.fail("measured again"))
    assert run_command(*arguments, app=papers.app).exit_code == 0


def test_a_task_without_data_is_named(monkeypatch, local_tasks, tmp_path):
    local_paper_task(monkeypatch, local_tasks, "verse_missing")
    result = run_command("--output", tmp_path / "out.jsonl", "--device", "cpu", app=papers.app)
    assert result.exit_code == 2, (result.output, result.exception)
    message = " ".join(result.output.split())
    assert "the data of verse_missing cannot be read" in message
    assert "leave the task out with --task" in message
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task imagenet", "'imagenet' is not on the paper's list, which is mmlu, hellaswag"),
        ("--task piqa --published gemma-7b", "there is no card 'gemma-7b'; there are recurrentgemma-2b,"),
        ("--task humaneval --task piqa", "humaneval run the code that the model writes; allow it with"),
    ],
)
def test_the_papers_command_names_mistakes(arguments, message, tmp_path):
    result = run_command(*arguments.split(), "--output", tmp_path / "out.jsonl", "--device", "cpu", app=papers.app)
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in " ".join(result.output.split())


def test_every_line_of_the_paper_is_a_task_of_lm_eval():
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    assert len(papers.PAPER_TASKS) == 18
    assert {task.task for task in papers.PAPER_TASKS} <= known


@pytest.mark.parametrize("name", papers.PUBLISHED)
def test_every_published_figure_belongs_to_a_line_of_the_paper(name):
    figures = papers.published_figures(papers.card_path(name))
    assert set(figures) <= {task.dataset for task in papers.PAPER_TASKS}


def test_published_figures_are_those_of_the_card():
    assert papers.published_figures(papers.card_path("recurrentgemma-2b"))["mmlu"] == 38.4


def test_a_missing_extra_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")

    # Not importlib's own: what other libraries import for the first time meanwhile would keep it.
    monkeypatch.setattr(evaluate, "import_module", missing)
    result = run_command("eval", "harness", "run")
    assert result.exit_code == 2
    assert "this needs lm_eval, which is not installed: pip install 'recurrent-gemma-hf[eval]'" in result.output


def test_an_error_of_our_own_is_not_taken_for_a_missing_extra():
    with pytest.raises(ModuleNotFoundError, match=r"evaluation\.harnes'"):
        evaluate.import_extra("harnes")
