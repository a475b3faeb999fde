import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from numprune.checkpoint import load_model
from numprune.errors import NumpruneError
from numprune.generation_benchmark import generate
from tasks.accuracy import Answers, answer, expand, unknown_tasks
from tasks.corpus import write_corpus
from tasks.likelihood import Likelihood
from tasks.questions import write_questions

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models/reference-llama"
CHANCE = {"documentation_continuation": 0.25, "documentation_last_word": 0.0, "documentation_word_order": 0.5}
LIMIT = 60


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tasks find their data."""
    folder = tmp_path_factory.mktemp("questions")
    write_corpus(["networkx"], folder / "text.jsonl", seed=0)
    write_questions(folder / "text.jsonl", folder / "data/corpus/questions", count=LIMIT, seed=0)
    return folder


@pytest.fixture(scope="module")
def results(questions: Path) -> dict[str, Answers | Likelihood]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(questions)
        model = load_model(MODEL)
        tasks = [*CHANCE, "documentation_text"]
        return answer(model, MODEL, tasks, include=ROOT / "evaluation", limit=None, shots=None, batch_size=7)


@pytest.fixture(scope="module")
def answers(results: dict[str, Answers | Likelihood]) -> dict[str, Answers]:
    return {name: given for name, given in results.items() if isinstance(given, Answers)}


def test_reference_model_is_better_than_chance(answers: dict[str, Answers]) -> None:
    assert answers.keys() == CHANCE.keys()
    for name in ("documentation_last_word", "documentation_word_order"):
        assert answers[name].accuracy > CHANCE[name] + 3 * answers[name].stderr


def test_results_equal_those_of_lm_evals_own_command(
    results: dict[str, Answers | Likelihood], questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={MODEL}"]
    command += ["--tasks", ",".join(results), "--include_path", str(ROOT / "evaluation"), "--batch_size", "16"]
    monkeypatch.setattr(sys, "argv", [*command, "--device", "cpu", "--output_path", "out.json"])
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # The command sets it; this puts it back.
    monkeypatch.chdir(questions)
    # Thousands of tasks that come with it are not listed: that takes longer than these are answered in.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    cli_evaluate()
    (written,) = questions.glob("out*.json")
    theirs = json.loads(written.read_text(encoding="utf-8"))["results"]
    assert results.keys() == {*CHANCE, "documentation_text"}
    for name, mine in results.items():
        if isinstance(mine, Likelihood):
            # Of batches of another size, in float32.
            assert mine.bits_per_byte == pytest.approx(theirs[name]["bits_per_byte,none"], rel=1e-5)
            assert mine.word_perplexity == pytest.approx(theirs[name]["word_perplexity,none"], rel=1e-4)
        else:
            assert mine.accuracy == pytest.approx(theirs[name]["acc,none"], abs=1e-12)
            assert mine.stderr == pytest.approx(theirs[name]["acc_stderr,none"], abs=1e-12)


def write_task(folder: Path, name: str, **settings: Any) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def write_generation_task(folder: Path, name: str, rows: list[dict[str, str]], *, until: str) -> None:
    """A task whose answers are written, up to eight tokens or to a text, and must equal the data's."""
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_task(
        folder,
        name,
        task=name,
        dataset_path="json",
        dataset_kwargs={"data_files": {"test": "data.jsonl"}},
        test_split="test",
        fewshot_split="test",
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        target_delimiter="",
        generation_kwargs={"until": [until], "max_gen_toks": 8, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )


def test_a_group_is_one_entry_for_all_its_questions(
    answers: dict[str, Answers], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(questions)
    folder = tmp_path / "tasks"
    shutil.copytree(ROOT / "evaluation", folder)
    both = ["documentation_last_word", "documentation_word_order"]
    average = [{"metric": "acc", "weight_by_size": True}]
    write_task(folder, "documentation", group="documentation", task=both, aggregate_metric_list=average)
    assert unknown_tasks(["documentation", *both], folder) == []
    grouped = answer(load_model(MODEL), MODEL, ["documentation"], include=folder, limit=None, shots=None, batch_size=7)
    assert grouped.keys() == {"documentation"}
    assert isinstance(grouped["documentation"], Answers)
    assert grouped["documentation"].correct == answers[both[0]].correct + answers[both[1]].correct


def test_generated_answers_are_compared_with_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model(MODEL), AutoTokenizer.from_pretrained(MODEL)
    rows = []
    for number, question in enumerate(
        ("Returns the", "The number of nodes in", "Parameters of a", "If the graph is not")
    ):
        prompt = tokenizer(question, return_tensors="pt").input_ids
        written = tokenizer.decode(generate(model, prompt, 8)[0, prompt.shape[1] :])
        # What the model writes is the right answer to every other question.
        rows.append({"question": question, "answer": written if number % 2 else "another"})
    write_generation_task(tmp_path, "writing", rows, until="<no such text>")
    given = answer(model, MODEL, ["writing"], include=tmp_path, limit=None, shots=None, batch_size=3)
    assert isinstance(writing := given["writing"], Answers)
    assert (writing.metric, writing.correct) == ("exact_match", (0.0, 1.0, 0.0, 1.0))


def test_examples_stand_before_the_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"node {number} =", "answer": " 7"} for number in range(5)]
    write_generation_task(tmp_path, "repetition", rows, until="\n")
    model = load_model(MODEL)
    with_shots = {
        shots: answer(model, MODEL, ["repetition"], include=tmp_path, limit=None, shots=shots, batch_size=5)[
            "repetition"
        ]
        for shots in (None, 3)
    }
    assert all(isinstance(given, Answers) for given in with_shots.values())
    # It cannot know the number, but it repeats what stands there three times.
    assert [given.accuracy for given in with_shots.values()] == [0.0, 1.0]
    assert with_shots[None].task_sha256 != with_shots[3].task_sha256


def test_a_set_of_tasks_names_each_once() -> None:
    assert expand(["gsm8k", "paper"])[:2] == ["gsm8k", "boolq"]
    assert len(expand(["gsm8k", "paper"])) == 9


def test_paired_difference() -> None:
    dense = Answers("acc", (1.0, 1.0, 0.0, 1.0), "t")
    pruned = Answers("acc", (1.0, 0.0, 0.0, 0.0), "t")
    difference = pruned.difference(dense)
    assert difference["difference"] == -0.5
    # Of the differences 0, -1, 0, -1: variance 1/3 over 4 questions.
    assert difference["stderr"] == pytest.approx(math.sqrt(1 / 12))
    assert difference["low"] == pytest.approx(-0.5 - 1.96 * math.sqrt(1 / 12))
    assert dense.difference(dense) == {"difference": 0.0, "stderr": 0.0, "low": 0.0, "high": 0.0}


def test_other_questions_are_not_compared() -> None:
    with pytest.raises(ValueError, match="answered another task"):
        Answers("acc", (1.0,), "a").difference(Answers("acc", (1.0,), "b"))


def test_unknown_task(monkeypatch: pytest.MonkeyPatch, questions: Path) -> None:
    monkeypatch.chdir(questions)
    with pytest.raises(NumpruneError, match="has no task no_such_task"):
        answer(
            load_model(MODEL), MODEL, ["no_such_task"], include=ROOT / "evaluation", limit=1, shots=None, batch_size=1
        )
