"""The training of the reference model, on a text of a few kilobytes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from numprune.errors import NumpruneError
from tasks import reference, training
from tasks.parameters import ReferenceShape, ReferenceTraining

SHAPE = ReferenceShape(
    vocabulary=300, hidden=16, intermediate=24, layers=2, heads=4, key_value_heads=2, head_dim=4, length=32
)
TRAINING = ReferenceTraining(packages=["none"], steps=6, batch=4, warmup_steps=2, checkpoint_steps=2, compile=False)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    text = Path(__file__).read_text(encoding="utf-8")
    path.write_text("\n".join(json.dumps({"text": text}) for _ in range(3)), encoding="utf-8")
    return path


def test_the_model_learns_and_loads(corpus: Path, tmp_path: Path) -> None:
    longer = TRAINING.model_copy(update={"steps": 60})
    result = reference.train_reference(corpus, tmp_path / "model", SHAPE, longer)
    assert result["tokens"] == 60 * 4 * 32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    rows = AutoTokenizer.from_pretrained(tmp_path / "model")(Path(__file__).read_text(encoding="utf-8"))["input_ids"]
    ids = torch.tensor([rows[:32]])
    untrained = AutoModelForCausalLM.from_config(model.config)
    with torch.no_grad():
        assert model(ids, labels=ids).loss < untrained(ids, labels=ids).loss - 1


def test_an_interrupted_training_goes_on_to_the_same_weights(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference.train_reference(corpus, tmp_path / "whole", SHAPE, TRAINING)
    step, calls = training._step, iter(range(100))

    def interrupted_at_the_fourth(*arguments):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(training, "_step", interrupted_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            reference.train_reference(corpus, tmp_path / "model", SHAPE, TRAINING)
    assert not (tmp_path / "model").exists()
    with pytest.raises(NumpruneError, match="training with other parameters"):
        reference.train_reference(corpus, tmp_path / "model", SHAPE, TRAINING.model_copy(update={"seed": 1}))
    reference.train_reference(corpus, tmp_path / "model", SHAPE, TRAINING)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "model"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert not list(tmp_path.glob("*.checkpoint.pt"))
