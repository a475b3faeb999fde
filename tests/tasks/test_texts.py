"""From the texts' folders on the Hub, here local ones of the same names, to figures of a model."""

import json
from pathlib import Path

import pytest
import yaml

from numprune.calibration import evaluation_windows
from numprune.samples import fingerprint
from tasks.evaluate import evaluate
from tasks.layout import TEXTS_FOLDER, evaluation_file, model_folder, timing_file
from tasks.texts import fetch_texts
from tests.flows.conftest import ROOT, save_tiny_model
from tests.numprune.test_texts import hub  # noqa: F401 - A fixture.

LENGTH = 16


@pytest.mark.usefixtures("hub")
def test_texts_are_fetched_and_evaluated_on_with_their_protocol() -> None:
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    Path("own.txt").write_text("Some text of one's own. " * 20, encoding="utf-8")
    content["evaluation"] |= {"data": "own.txt", "length": LENGTH, "texts": ["wikitext2", "ptb"], "tasks": []}
    Path("params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    save_tiny_model(model_folder("tiny"))
    fetch_texts()
    assert sorted(path.name for path in TEXTS_FOLDER.iterdir()) == ["origin.json", "ptb.jsonl", "wikitext2.jsonl"]

    evaluate("tiny")
    measured = json.loads(evaluation_file("tiny", None).read_text(encoding="utf-8"))
    assert measured["texts"].keys() == {"wikitext2", "ptb"}
    for name, found in measured["texts"].items():
        windows, _ = evaluation_windows(name, "models/tiny", length=LENGTH)
        assert found["tokens_sha256"] == fingerprint(windows)
        assert (found["windows"], found["length"]) == tuple(windows.input_ids.shape)
        # A random model of 257 tokens knows nothing.
        assert 200 < found["perplexity"] < 320
        assert "split " + {"wikitext2": "test", "ptb": "validation"}[name] in found["data"]
    assert measured["protocol"]["versions"].keys() >= {"torch", "transformers", "lm_eval", "datasets"}
    assert json.loads(timing_file("tiny", None).read_text(encoding="utf-8"))["seconds"] > 0
