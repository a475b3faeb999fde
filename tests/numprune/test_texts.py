"""The texts of the Hub, read by `datasets` itself from folders of the same names, as it also does offline."""

import gzip
import json
import random

import pandas
import pytest
import torch

from numprune.calibration import evaluation_windows
from numprune.errors import NumpruneError
from numprune.texts import TEXTS, cut_text, describe, read_text

DOCUMENTS = ["", " = A title = \n", "A first <unk> sentence, and more. \n" * 5, "The second document. \n" * 9]


class Words:
    """A tokenizer that numbers words and puts a token in front, as LLaMA's does."""

    def __call__(self, text, **_options):
        return {"input_ids": [0, *(len(word) for word in text.split(" "))]}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Repositories of the same names and files below the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    wikitext = tmp_path / "Salesforce/wikitext"
    for split in ("train", "test"):
        folder = wikitext / "wikitext-2-raw-v1"
        folder.mkdir(parents=True, exist_ok=True)
        rows = DOCUMENTS if split == "test" else ["Trained on."]
        pandas.DataFrame({"text": rows}).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"wikitext-2-raw-v1/{split}-*"} for split in ("train", "test")]
    card = json.dumps({"configs": [{"config_name": "wikitext-2-raw-v1", "data_files": files}]})
    (wikitext / "README.md").write_text(f"---\n{card}\n---\n", encoding="utf-8")
    ptb = tmp_path / "ptb-text-only/ptb_text_only/penn_treebank"
    for split, rows in (("validation", DOCUMENTS[2:]), ("test", ["Another split."])):
        (ptb / split).mkdir(parents=True)
        pandas.DataFrame({"sentence": rows}).to_parquet(ptb / split / "0000.parquet")
    c4 = tmp_path / "allenai/c4/en"
    c4.mkdir(parents=True)
    for shard in range(2):
        with gzip.open(c4 / f"c4-validation.0000{shard}-of-00008.json.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": f"{shard} {text}", "url": "u"}) + "\n" for text in DOCUMENTS)


@pytest.mark.usefixtures("hub")
def test_split_files_and_columns_are_those_of_the_published_code():
    assert read_text("wikitext2") == DOCUMENTS
    assert read_text("ptb") == DOCUMENTS[2:]
    assert read_text("c4") == [f"0 {text}" for text in DOCUMENTS]
    assert describe("wikitext2").startswith("Salesforce/wikitext wikitext-2-raw-v1, split test, revision b08601e")
    assert "penn_treebank/validation/0000.parquet, split validation" in describe("ptb")
    assert "en/c4-validation.00000-of-00008.json.gz, split validation" in describe("c4")


@pytest.mark.usefixtures("hub")
def test_windows_of_a_model(make_checkpoint):
    folder = make_checkpoint()
    windows, size = evaluation_windows("wikitext2", str(folder), length=8)
    again, _ = evaluation_windows("wikitext2", str(folder), length=8, documents=DOCUMENTS)
    assert torch.equal(windows.input_ids, again.input_ids)
    assert windows.length == 8
    assert 0 < size <= len("\n\n".join(DOCUMENTS).encode())


@pytest.mark.parametrize("name", ["wikitext2", "ptb"])
def test_a_stream_begins_with_the_tokenizers_own_token(name):
    windows = cut_text(name, ["a bb", "ccc dddd e"], Words(), 2)
    # "a bb\n\nccc dddd e"
    assert windows.tolist() == [[0, 1], [7, 4]]


def test_pieces_are_those_of_the_published_draw():
    documents = [" ".join("w" * (1 + index % 7) for index in range(size)) for size in (3, 40, 5, 25)]
    length = 10
    # The loop as GPTQ has it, with the state of the module `random`.
    random.seed(0)
    expected = []
    for _ in range(256):
        while True:
            ids = Words()(documents[random.randint(0, len(documents) - 1)])["input_ids"]
            if len(ids) >= length:
                break
        start = random.randint(0, len(ids) - length - 1)
        expected.append(ids[start : start + length])
    assert cut_text("c4", documents, Words(), length).tolist() == expected
    # Where only one piece fits, that loop would fail.
    (only,) = {tuple(row) for row in cut_text("c4", ["a " * 8 + "b"], Words(), length).tolist()}
    assert only == (0, *[1] * 9)


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_is_too_short(name):
    with pytest.raises(NumpruneError, match=f"{name}: no (window|document) of 50 tokens"):
        cut_text(name, ["too short"], Words(), 50)


def test_text_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(NumpruneError, match=r"wikitext2: Salesforce/wikitext wikitext-2-raw-v1, split test"):
        read_text("wikitext2")
