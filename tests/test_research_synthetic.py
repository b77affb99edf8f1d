"""The synthetic tasks mean what they say, and training on them resumes, repeats and refuses as promised.

Shape suffixes: B batch, T time.
"""

import pytest
import synthetic  # of research/
import synthetic_tasks as tasks
import torch

from recurrent_gemma_hf.evaluation.records import read_records
from tests.helpers import run_command

SMALL = synthetic.Settings(
    length=24, shortest=8, window=12, width=16, batch_size=4, max_steps=3, evaluate_every=2, validation_rows=8
)


def batch(name, length=64, rows=8, seed=0, depth=None):
    return tasks.find_task(name).batch(length, rows, torch.Generator().manual_seed(seed), depth)


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.parametrize("extra", [0, 1, 5, 100])
def test_batches_have_the_asked_shape_and_known_tokens(name, extra):
    task = tasks.TASKS[name]
    made = batch(name, task.shortest + extra, rows=5)
    assert made.tokens_BT.shape == (5, task.shortest + extra)
    assert made.tokens_BT.dtype == torch.int64
    assert made.tokens_BT.min() >= 0
    assert made.tokens_BT.max() < task.vocab_size
    assert (made.labels_BT[:, -made.answer :] == made.tokens_BT[:, -made.answer :]).all()


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_seed_repeats_its_batch_and_another_does_not(name):
    assert (batch(name, seed=3).tokens_BT == batch(name, seed=3).tokens_BT).all()
    assert (batch(name, seed=3).tokens_BT != batch(name, seed=4).tokens_BT).any()


def test_selective_copying_asks_for_the_data_in_its_order():
    for row in batch("selective-copying").tokens_BT.tolist():
        context, answer = row[: row.index(tasks.COPY)], row[row.index(tasks.COPY) + 1 :]
        assert [token for token in context if token != tasks.NOISE] == answer
        assert len(answer) == tasks.COPIED


@pytest.mark.parametrize("depth", [None, 0.0, 0.3, 1.0])
def test_induction_heads_answer_is_what_followed_the_special_token(depth):
    for row in batch("induction-heads", depth=depth).tokens_BT.tolist():
        place = row.index(tasks.SPECIAL)
        assert row.count(tasks.SPECIAL) == 2
        assert row[-2] == tasks.SPECIAL
        assert row[-1] == row[place + 1]
        assert place + 1 < len(row) - 2
        if depth is not None:
            assert place == round(depth * 60)


@pytest.mark.parametrize("depth", [None, 0.0, 0.5, 1.0])
def test_passkey_lies_at_its_depth(depth):
    for row in batch("passkey", depth=depth).tokens_BT.tolist():
        place = row.index(tasks.KEY)
        assert row[-6:] == row[place : place + 6]
        assert all(token >= tasks.FIRST_NOISE for token in row[:place] + row[place + 6 : -6])
        if depth is not None:
            assert place == round(depth * (64 - 12))


@pytest.mark.parametrize("length", [41, 64, 300, 4758])
@pytest.mark.parametrize("depth", [None, 0.0, 1.0])
def test_phonebook_looks_up_what_is_written_in_it(length, depth):
    made = batch("phonebook", length, depth=depth)
    for row, labels in zip(made.tokens_BT.tolist(), made.labels_BT.tolist(), strict=True):
        start = next(place for place, token in enumerate(row) if token != tasks.PAD)
        assert start < tasks.ENTRY
        lines = [row[i : i + tasks.ENTRY] for i in range(start, len(row), tasks.ENTRY)]
        book, questions = [line[:6] for line in lines[:-3]], [line[:6] for line in lines[-3:]]
        assert len({tuple(line[:2]) for line in book}) == len(book)
        assert all(question in book for question in questions)
        assert len({tuple(question) for question in questions}) == 3
        if depth is not None:
            assert questions[2] == book[round(depth * (len(book) - 1))]
        assert [label for label in labels if label != tasks.IGNORED] == [d for q in questions for d in q[3:]]


def test_random_depths_reach_both_ends():
    places = {row.index(tasks.SPECIAL) for row in batch("induction-heads", 6, rows=200).tokens_BT.tolist()}
    assert places == {0, 1, 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("copying",), "unknown task 'copying'; there are selective-copying"),
        (("passkey", 11), "length 11 is too short for this task; give 12 or more"),
        (("passkey", 64, 0), "batch size 0 must be 1 or more"),
        (("passkey", 64, 1, 0, 1.5), "depth 1.5 must be from 0"),
        (("selective-copying", 64, 1, 0, 0.5), "depth 0.5: this task has no single needle"),
        (("phonebook", 7 * 676 + 28, 1), "needs 677 names, there are 676; give at most 4758"),
    ],
)
def test_a_task_refuses_what_it_has_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch(*arguments)


# --- models, training, measuring ---


@pytest.mark.parametrize("width", [32, 64, 128])
def test_the_architectures_are_of_equal_size(width):
    settings = synthetic.Settings(length=64, shortest=64, window=32, width=width)
    sizes = [
        synthetic.build_model(name, tasks.TASKS["phonebook"], settings, 0).num_parameters()
        for name in synthetic.ARCHITECTURES
    ]
    assert max(sizes) < 1.01 * min(sizes)


def test_only_the_sliding_window_transformer_forgets():
    made = batch("induction-heads", 64, depth=0.0)
    changed_BT = made.tokens_BT.clone()
    changed_BT[:, 0] = (changed_BT[:, 0] + 1) % 15
    settings = synthetic.Settings(length=64, shortest=64, window=4, width=16)
    reached = {}
    for name in synthetic.ARCHITECTURES:
        model = synthetic.build_model(name, tasks.TASKS["induction-heads"], settings, 0).eval()
        with torch.no_grad():
            logits = [model(tokens, use_cache=False).logits[:, -1] for tokens in (made.tokens_BT, changed_BT)]
        reached[name] = not torch.equal(*logits)
    assert reached == {"griffin": True, "hawk": True, "sliding-window transformer": False, "transformer": True}


@pytest.mark.parametrize("architecture", synthetic.ARCHITECTURES)
def test_training_learns(architecture):
    """Enough steps for the loss to fall below chance on a task whose answer stands two tokens before."""
    settings = synthetic.Settings(
        length=6, shortest=6, window=8, width=16, batch_size=32, max_steps=250, evaluate_every=250, learning_rate=1e-2
    )
    task = tasks.TASKS["induction-heads"]
    model = synthetic.build_model(architecture, task, settings, 0)
    before = synthetic.accuracies(model, task.batch(6, 256, torch.Generator().manual_seed(9)))
    curve = synthetic.train(model, task, settings, seed=0)
    assert before["rows"] < 0.2
    assert curve[-1]["rows"] > 0.5


def test_training_ends_when_the_task_is_solved():
    settings = synthetic.Settings(**{**SMALL.__dict__, "solved": 0.0, "max_steps": 1000, "decay_steps": 5})
    task = tasks.TASKS["induction-heads"]
    curve = synthetic.train(synthetic.build_model("hawk", task, settings, 0), task, settings, seed=0)
    assert [row["step"] for row in curve] == [2, 4, 6, 7]


def test_accuracy_counts_tokens_and_whole_answers(monkeypatch):
    task = tasks.TASKS["passkey"]
    made = batch("passkey", 40, rows=2)
    model = synthetic.build_model("griffin", task, SMALL, 0)
    logits_BTV = torch.nn.functional.one_hot(made.tokens_BT[:, -5:], task.vocab_size).float()
    logits_BTV[0, 2] = 0.0
    logits_BTV[0, 2, tasks.KEY] = 1.0  # one wrong token in one of two rows
    monkeypatch.setattr(
        model, "forward", lambda *_, **__: type("Output", (), {"logits": logits_BTV, "past_key_values": None})
    )
    assert synthetic.accuracies(model, made) == {"tokens": pytest.approx(0.9), "rows": 0.5}


@pytest.mark.parametrize("architecture", ["griffin", "hawk", "sliding-window transformer"])
def test_long_sequences_are_measured_in_chunks_with_the_same_result(architecture, monkeypatch):
    task = tasks.TASKS["passkey"]
    made = batch("passkey", 100, rows=4)
    model = synthetic.build_model(architecture, task, SMALL, 0).eval()
    seen = []
    forward = model.forward

    def watch(*arguments, **settings):
        output = forward(*arguments, **settings)
        seen.append(output.logits[:, -5:])
        return output

    monkeypatch.setattr(model, "forward", watch)
    synthetic.accuracies(model, made)
    monkeypatch.setattr(synthetic, "CHUNK", 30)
    synthetic.accuracies(model, made)
    assert len(seen) == 1 + 4 + 1
    torch.testing.assert_close(seen[0], seen[-1], atol=1e-5, rtol=1e-5)


def test_runs_are_resumed_and_repeat_exactly(tmp_path):
    plan = [
        ("induction-heads", SMALL, synthetic.Measurement(lengths=(24,), depth_lengths=(24,), depths=(0.5,), rows=5))
    ]

    def run(seeds, output):
        return list(synthetic.run(plan, ["hawk", "griffin"], seeds, output))

    first = run([0], tmp_path / "a.jsonl")
    assert [(r["architecture"], r["seed"]) for r in first] == [("hawk", 0), ("griffin", 0)]
    assert [(cell["length"], cell["depth"]) for cell in first[0]["accuracy"]] == [(24, None), (24, 0.5)]
    more = run([0, 1], tmp_path / "a.jsonl")
    assert [(r["architecture"], r["seed"]) for r in more] == [("hawk", 1), ("griffin", 1)]
    assert len(read_records(tmp_path / "a.jsonl")) == 4
    again = run([1], tmp_path / "b.jsonl")
    assert [r["curve"] for r in again] == [r["curve"] for r in more]
    assert [r["accuracy"] for r in again] == [r["accuracy"] for r in more]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "length 0 must be 1 or more"),
        ({"shortest": 25}, "shortest 25 must be from 1 to length 24"),
        ({"width": 30}, "width 30 must be a multiple of the 4 heads"),
        ({"learning_rate": 0.0}, "learning_rate 0.0 must be above 0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        synthetic.Settings(**{**SMALL.__dict__, **changes})


def test_the_synthetic_command_trains_measures_and_draws(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra eval is not installed")
    arguments = "--task passkey --architecture hawk --seeds 1 --length 24 --width 16 --batch-size 2".split()
    arguments += ["--max-steps", "2", "--rows", "3", "--lengths", "24,48", "--output", tmp_path / "runs.jsonl"]
    result = run_command(*arguments, "--figure", tmp_path / "figure.png", app=synthetic.app)
    assert result.exit_code == 0, result.output
    (record,) = read_records(tmp_path / "runs.jsonl")
    assert record["settings"]["length"] == record["settings"]["shortest"] == 24
    assert record["settings"]["window"] == 12
    assert "passkey, hawk, seed 0: 2 steps" in result.output
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task sorting", "unknown task 'sorting'; there are selective-copying"),
        ("--architecture mamba --length 64", "unknown architecture 'mamba'"),
        ("--lengths 1,x", "--lengths '1,x' is not a list of numbers"),
    ],
)
def test_the_synthetic_command_names_mistakes(arguments, message, tmp_path):
    result = run_command(*arguments.split(), "--output", tmp_path / "runs.jsonl", app=synthetic.app)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
