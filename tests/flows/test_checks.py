import shutil
from pathlib import Path

import pytest

from flows.checks import check_inputs
from numprune.errors import NumpruneError
from tasks.parameters import Download, Parameters, load_parameters
from tests.flows.conftest import ROOT


@pytest.fixture
def parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parameters:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "evaluation", tmp_path / "evaluation")
    folder = tmp_path / "models/reference-llama"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    (folder / "model.safetensors").touch()
    return load_parameters()


def test_what_is_there_passes(parameters: Parameters) -> None:
    check_inputs(parameters)


def test_all_that_is_missing_is_named(parameters: Parameters, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = Path("models/pickled")
    pickled.mkdir()
    (pickled / "config.json").touch()
    (pickled / "pytorch_model.bin").touch()
    several = Path("models/several")
    several.mkdir()
    (several / "config.json").write_text('{"model_type": "janus"}', encoding="utf-8")
    (several / "model.safetensors").touch()
    wrong = parameters.model_copy(
        update={
            "models": ["absent", "pickled", "several", "fetched"],
            "downloads": {"fetched": Download(repository="owner/name", revision="0" * 40)},
            "calibration": parameters.calibration.model_copy(update={"data": "owner/data:train"}),
            "evaluation": parameters.evaluation.model_copy(
                update={"tasks": ["documentation_word_order", "paper", "boolk"]}
            ),
            "benchmark": parameters.benchmark.model_copy(update={"compile": True}),
            "corpus": parameters.corpus.model_copy(update={"calibration": ["no_such_package"]}),
            "orchestration": parameters.orchestration.model_copy(update={"runner": "dask"}),
        }
    )
    monkeypatch.setattr("shutil.which", lambda _name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NumpruneError, match=r"8 mistake\(s\)") as caught:
        check_inputs(wrong)
    message = str(caught.value)
    assert "models/absent holds no model" in message
    assert "pytorch_model.bin" in message
    assert "models/several holds a language model among other parts" in message
    assert "owner/data:train is no file" in message
    assert "neither lm-eval nor evaluation has boolk;" in message
    assert "benchmark.compile: needs a C++ compiler" in message
    assert "no_such_package" in message
    assert "set PREFECT_API_URL" in message
