import json
from pathlib import Path
from typing import Any

import pytest

from numprune.errors import NumpruneError
from tasks.questions import KINDS, write_questions

ANIMALS = ["cat", "dog", "horse", "cow", "sheep", "goat", "duck", "hen", "goose", "pig"]


def tale(animal: str) -> str:
    return (
        f"The {animal} of the farmer sleeps in a very old house. Every morning the farmer looks for the {animal}.\n\n"
        f">>> {animal}.sleep()\n\n- one, two: `{animal}`"
    )


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": tale(animal)}) + "\n" for animal in ANIMALS), encoding="utf-8")
    return path


def read(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_answers_are_right_and_wrong_ones_are_not(documents: Path, tmp_path: Path) -> None:
    folder = tmp_path / "questions"
    write_questions(documents, folder, count=100, seed=0)
    continuations, orders, words, texts = (read(folder, kind) for kind in KINDS)
    assert len(continuations) == 10
    for question in continuations:
        (animal,) = (word for word in question["context"].split() if word in ANIMALS)
        assert [animal in choice for choice in question["choices"]].index(True) == question["answer"]
        assert len(set(question["choices"])) == 4
    assert len(orders) == 20
    for question in orders:
        right, wrong = question["choices"][question["answer"]], question["choices"][1 - question["answer"]]
        assert any(right in tale(animal) for animal in ANIMALS)
        assert not any(wrong in tale(animal) for animal in ANIMALS)
        assert sorted(right[:-1].split()) == sorted(wrong[:-1].split())
    assert {question["answer"] for question in words} == {"horse", "sheep", "duck", "goat", "goose"}
    for question in words:
        assert question["context"].endswith("looks for the")
    assert sorted(text["text"] for text in texts) == sorted(map(tale, ANIMALS))


def test_same_seed_same_questions(documents: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_questions(documents, tmp_path / name, count=5, seed=seed)
    first, again, other = ([read(tmp_path / name, kind) for kind in KINDS] for name in "abc")
    assert first == again != other
    assert all(len(questions) == 5 for questions in first)


def test_text_without_prose(tmp_path: Path) -> None:
    documents = tmp_path / "text.jsonl"
    documents.write_text(json.dumps({"text": ">>> 1 + 1\n2"}) + "\n", encoding="utf-8")
    with pytest.raises(NumpruneError, match="no text to make a question of the kind continuation"):
        write_questions(documents, tmp_path / "questions", count=5, seed=0)
    assert not (tmp_path / "questions").exists()
