"""Texts that pruned and quantised models are compared on: where they lie, and how the published code cuts them.

The figures of LLaMA-7B at 2048 tokens that papers agree on, WikiText2 5.68, PTB 27.34 and C4 7.08, come from the data
loaders of GPTQ (Frantar et al., 2023). Three of their habits decide the last digits: what joins the documents, that the
tokenizer puts in front of a text what it always puts there (for LLaMA a BOS token, once), and that C4 is 256 pieces of
long documents. Others are about, such as PTB's test split joined by blanks or the first 1100 documents of C4; they give
other figures.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from numprune.errors import NumpruneError

_PIECES = 256


@dataclass(frozen=True)
class Text:
    """One of the texts.

    Attributes:
        repository: On the Hugging Face Hub.
        revision: Commit or branch of it.
        options: Of `datasets.load_dataset`: configuration or files.
        split: Of the data set.
        column: That holds the documents.
        pieces: Whether windows are pieces of long documents, rather than all of the text in a row.
    """

    repository: str
    revision: str
    options: Mapping[str, Any]
    split: str
    column: str
    pieces: bool = False


TEXTS: Mapping[str, Text] = {
    "wikitext2": Text(
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        {"name": "wikitext-2-raw-v1"},
        "test",
        "text",
    ),
    # The repository itself holds a loading script, which `datasets` no longer runs; the Hub keeps its output here.
    "ptb": Text(
        "ptb-text-only/ptb_text_only",
        "refs/convert/parquet",
        {"data_files": {"validation": "penn_treebank/validation/0000.parquet"}},
        "validation",
        "sentence",
    ),
    "c4": Text(
        "allenai/c4",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
        "validation",
        "text",
        pieces=True,
    ),
}


def read_text(name: str) -> list[str]:
    """The documents of a text, from the Hub or from where `datasets` keeps what it fetched.

    Raises:
        NumpruneError: If it cannot be had.
    """
    text = TEXTS[name]
    try:
        from datasets import load_dataset
    except ImportError:
        raise NumpruneError(f"{name} is a data set of the Hub, which needs `pip install datasets`.") from None
    try:
        rows = load_dataset(text.repository, split=text.split, revision=text.revision, **text.options)
    except Exception as error:  # Whatever the Hub, the network or the data set's own files come up with.
        raise NumpruneError(f"{name}: {describe(name)} cannot be loaded: {error}") from error
    return list(rows[text.column])


def cut_text(name: str, documents: Sequence[str], tokenizer: Any, length: int) -> Tensor:
    """Windows of a text as the published figures have them.

    Args:
        name: A key of `TEXTS`.
        documents: As `read_text` gives them.
        tokenizer: The model's.
        length: Tokens a window.

    Returns:
        (windows, length) int64 token ids.

    Raises:
        NumpruneError: If there is no window of this length.
    """

    def tokens(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)

    if TEXTS[name].pieces:
        return _pieces(name, documents, tokens, length)
    stream = tokens("\n\n".join(documents))
    if len(stream) < length:
        raise NumpruneError(f"{name}: no window of {length} tokens; lower the length.")
    return stream[: len(stream) // length * length].view(-1, length)


def _pieces(name: str, documents: Sequence[str], tokens: Any, length: int) -> Tensor:
    """A random piece of each of 256 random documents that are long enough; GPTQ's draw, number by number."""
    draw = random.Random(0)
    pieces: list[Tensor] = []
    misses = 0
    while len(pieces) < _PIECES:
        document = tokens(documents[draw.randint(0, len(documents) - 1)])
        if len(document) < length:
            misses += 1
            if misses > 10 * len(documents):
                raise NumpruneError(f"{name}: no document of {length} tokens; lower the length.")
            continue
        misses = 0
        # Where only one piece fits, GPTQ's own bounds are empty.
        start = draw.randint(0, len(document) - length - 1) if len(document) > length else 0
        pieces.append(document[start : start + length])
    return torch.stack(pieces)


def bos_token(data: str) -> str:
    """What a protocol says of the token that begins a text; `data` as `numprune.calibration.evaluation_windows` has it.

    Those of `TEXTS` are tokenized as their published figures were.
    """
    return "once before a text, where the tokenizer adds one" if data in TEXTS else "none added"


def describe(name: str) -> str:
    """Where a text lies: repository, configuration or file, split, revision."""
    text = TEXTS[name]
    (where,) = text.options.values()
    place = where if isinstance(where, str) else where[text.split]
    return f"{text.repository} {place}, split {text.split}, revision {text.revision}"
