"""Make questions from held-out text, for accuracies that need no download and that a small model can score on.

Four kinds, each a JSON lines file that a task of `evaluation/` reads with lm-eval:

- continuation: which of four sentences comes next; three come from elsewhere in the same text.
- word_order: which of two sentences is the real one; in the other, two neighbouring words have changed places.
- last_word: the last word of a passage, which has occurred in it before.
- text: short documents as they are; what is asked for is the likelihood of all of it.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from numprune.errors import NumpruneError
from numprune.files import replace_on_success

KINDS = ("continuation", "word_order", "last_word", "text")

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
# Prose: words, commas and a full stop; no code, markup or lists.
_PROSE = re.compile(r"^[A-Z][a-z]*(?:,? [A-Za-z][a-z'-]*)+\.$")
_WORDS = range(7, 31)
# Of a document whose likelihood is asked for.
_TEXT_WORDS = range(20, 301)


def write_questions(documents: Path, folder: Path, *, count: int, seed: int) -> None:
    """Writes up to `count` questions of each kind.

    Args:
        documents: JSON lines with a field `text`.
        folder: Where the files `<kind>.jsonl` go; it appears only when complete.
        count: Questions of each kind.
        seed: Of the choice of questions and wrong answers.

    Raises:
        NumpruneError: If the text has too little prose for a single question of some kind.
    """
    texts = [json.loads(line)["text"] for line in documents.read_text(encoding="utf-8").splitlines()]
    passages = list(dict.fromkeys(passage for text in texts for passage in _passages(text)))
    draw = random.Random(seed)
    questions = {
        "continuation": _continuations(passages, draw),
        "word_order": _word_orders(passages, draw),
        "last_word": _last_words(passages),
        "text": [{"text": text} for text in texts if len(text.split()) in _TEXT_WORDS],
    }
    with replace_on_success(folder) as temporary:
        temporary.mkdir()
        for kind, found in questions.items():
            if not found:
                raise NumpruneError(f"{documents} has no text to make a question of the kind {kind} from.")
            draw.shuffle(found)
            lines = (json.dumps(question, ensure_ascii=False) + "\n" for question in found[:count])
            (temporary / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")


def _passages(text: str) -> Iterator[tuple[str, ...]]:
    """Sentences of prose that follow each other within a paragraph."""
    for paragraph in re.split(r"\n\s*\n", text):
        run: list[str] = []
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            if _PROSE.match(sentence) and len(sentence.split()) in _WORDS:
                run.append(sentence)
                continue
            if run:
                yield tuple(run)
            run = []
        if run:
            yield tuple(run)


def _continuations(passages: Sequence[tuple[str, ...]], draw: random.Random) -> list[dict[str, Any]]:
    following = sorted({sentence for passage in passages for sentence in passage[1:]})
    questions = []
    for passage in passages:
        for place, sentence in enumerate(passage[1:], 1):
            others = [other for other in draw.sample(following, min(8, len(following))) if other not in passage]
            if len(others) < 3:
                continue
            choices = [sentence, *others[:3]]
            draw.shuffle(choices)
            context = " ".join(passage[:place])
            questions.append({"context": context, "choices": choices, "answer": choices.index(sentence)})
    return questions


def _word_orders(passages: Sequence[tuple[str, ...]], draw: random.Random) -> list[dict[str, Any]]:
    questions = []
    for sentence in sorted({sentence for passage in passages for sentence in passage}):
        words = sentence.removesuffix(".").split()
        # The first word would give itself away by its capital letter, and a comma by its place.
        places = [
            i for i in range(1, len(words) - 1) if words[i] != words[i + 1] and "," not in words[i] + words[i + 1]
        ]
        if not places:
            continue
        place = draw.choice(places)
        words[place], words[place + 1] = words[place + 1], words[place]
        choices = [sentence, " ".join(words) + "."]
        draw.shuffle(choices)
        questions.append({"choices": choices, "answer": choices.index(sentence)})
    return questions


def _last_words(passages: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    questions = []
    for passage in passages:
        context, _, last = " ".join(passage).removesuffix(".").rpartition(" ")
        if len(last) >= 4 and last in re.findall(r"[\w'-]+", context):
            questions.append({"context": context, "answer": last})
    return questions
