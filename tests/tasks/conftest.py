"""What the stages leave for a tiny model, really pruned, and MLflow on SQLite to publish it in."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tasks.parameters import Registry, load_parameters
from tasks.registry.connection import connect
from tests.flows.conftest import ROOT, save_tiny_model
from tests.tasks.made_up_results import budgets, pages  # noqa: F401 - Fixtures.

MODEL = "small"
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model in `dense`, and a folder for each budget that it was really pruned to."""
    from numprune.cli import app

    folder = tmp_path_factory.mktemp("pruned")
    save_tiny_model(folder / "dense")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    for budget in ("0.2", "0.5"):
        options = {"--ratio": budget, "--calibration": folder / "text.txt", "--output": folder / budget}
        options |= {"--samples": 8, "--length": 32, "--recipe": "paper", "--seed": 1}
        arguments = ["prune", folder / "dense", *(part for pair in options.items() for part in pair)]
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        assert (folder / budget / "ragged.py").exists()  # Another seed may happen to keep equal widths.
        # The stages write none: a version gets a card that knows its figures.
        (folder / budget / "README.md").unlink()
    return folder


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Making the tables takes seconds; each test starts from a copy."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    connect(Registry(tracking_uri=f"sqlite:///{path}")).search_experiments()
    return path


class Workspace:
    """A folder with the results of the stages for the model `small`; the working directory of a test.

    Attributes:
        pruned: The checkpoints to take results from.
        client: Of its registry.
    """

    def __init__(self, pruned: Path) -> None:
        self.pruned = pruned
        shutil.copytree(pruned / "dense", Path("models") / MODEL)
        self.client: MlflowClient = connect(load_parameters().registry)

    def make_results(
        self,
        budget: str = "0.2",
        *,
        perplexity: float = 21.0,
        speed: float = 11.0,
        memory: int = 180,
        seed: int = 0,
        tasks: dict[str, Any] | None = None,
    ) -> None:
        """What the stages leave for one budget; another seed gives other weights."""
        base = Path("artifacts") / MODEL
        folder = base / budget
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.pruned / budget, folder / "checkpoint")
        if seed:
            weights = load_file(folder / "checkpoint/model.safetensors")
            name = min(weights)
            weights[name] = weights[name] + seed * 1e-3
            save_file(weights, folder / "checkpoint/model.safetensors", metadata={"format": "pt"})
        protect(folder / "checkpoint")
        shutil.copyfile(folder / "checkpoint/pruning_plan.json", folder / "plan.json")
        shutil.copyfile(folder / "checkpoint/calibration/input_ids.safetensors", base / "calibration.safetensors")
        protocol = {"tokens_sha256": "0" * 64, "windows": 4, "length": 64, "stride": 64, "bos_token": "none added"}
        protocol |= {"data": "data/corpus/evaluation.jsonl", "dtype": "float32", "device": "cpu", "torch": "2"}
        quality: dict[str, Any] = {"bits_per_byte": 1.2, "protocol": protocol}
        dense_size, size = weights_size(Path("models") / MODEL), weights_size(folder / "checkpoint")
        dense_tasks = {task: {"accuracy": 0.8, "stderr": 0.01} for task in tasks or {}}
        extra = {"perplexity_without_compensation": 30.0}
        write(folder / "evaluation.json", {"perplexity": perplexity, **extra, **quality, **size, "tasks": tasks or {}})
        write(base / "dense/evaluation.json", {"perplexity": 20.0, **quality, **dense_size, "tasks": dense_tasks})
        dense = {**dense_size, "peak_memory_bytes": 250, "tokens_per_second": 10.0}
        cost = {**size, "peak_memory_bytes": memory, "tokens_per_second": speed}
        benchmark = {"prompt_length": 8, "new_tokens": 8, "repeats": 1, "batch": 1, "dtype": "float32"}
        benchmark |= {"device": "cpu", "threads": 1, "torch": "2"}
        write(folder / "benchmark.json", {"dense": dense, "pruned": cost, "protocol": benchmark})
        lock()

    def edit_parameters(self, section: str, **values: Any) -> None:
        content = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
        content[section] |= values
        write(Path("params.yaml"), yaml.safe_dump(content))


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path, pruned: Path) -> Workspace:
    """An empty registry, and results at the budget 0.2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("mlflow").mkdir()
    shutil.copy(empty_database, "mlflow/mlflow.db")
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content["models"] = [MODEL]
    # Absolute, because MLflow keeps connections by their address.
    content["registry"]["tracking_uri"] = f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    write(Path("params.yaml"), yaml.safe_dump(content))
    made = Workspace(pruned)
    made.make_results()
    return made


@pytest.fixture
def client(workspace: Workspace) -> MlflowClient:
    return workspace.client


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def protect(folder: Path) -> None:
    """As DVC leaves files that it shares with its cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o444)


def weights_size(folder: Path) -> dict[str, int]:
    """Parameters and bytes of a checkpoint in one file."""
    file = folder / "model.safetensors"
    parameters = sum(tensor.numel() for tensor in load_file(file).values())
    return {"parameters": parameters, "checkpoint_bytes": file.stat().st_size}


def lock() -> None:
    """Writes dvc.lock as DVC would."""

    def md5(path: Path) -> str:
        return hashlib.md5(path.read_bytes()).hexdigest()

    def entry(path: Path) -> dict[str, Any]:
        if path.is_file():
            return {"path": path.as_posix(), "hash": "md5", "md5": md5(path), "size": path.stat().st_size}
        files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
        listing = [{"md5": md5(file), "relpath": name} for name, file in sorted(files.items())]
        digest = hashlib.md5(json.dumps(listing).encode()).hexdigest() + ".dir"
        size = sum(file.stat().st_size for file in files.values())
        return {"path": path.as_posix(), "hash": "md5", "md5": digest, "size": size, "nfiles": len(files)}

    dense, base = Path("models") / MODEL, Path("artifacts") / MODEL
    calibration = base / "calibration.safetensors"
    stages = {
        f"calibrate@{MODEL}": {"deps": [dense], "outs": [calibration]},
        f"evaluate_dense@{MODEL}": {"deps": [dense], "outs": [base / "dense/evaluation.json"]},
    }
    for folder in sorted(path for path in base.iterdir() if (path / "plan.json").exists()):
        name = f"{MODEL}-{folder.name}"
        checkpoint = folder / "checkpoint"
        stages |= {
            f"prune@{name}": {"deps": [calibration, dense], "outs": [folder / "plan.json"]},
            f"compensate@{name}": {"deps": [folder / "plan.json", calibration, dense], "outs": [checkpoint]},
            f"evaluate@{name}": {"deps": [checkpoint, dense], "outs": [folder / "evaluation.json"]},
            f"benchmark@{name}": {"deps": [checkpoint, dense], "outs": [folder / "benchmark.json"]},
        }
    locked = {
        name: {
            "cmd": f"python -m tasks {name}",
            **{kind: [entry(path) for path in paths] for kind, paths in io.items()},
        }
        for name, io in stages.items()
    }
    write(Path("dvc.lock"), yaml.safe_dump({"schema": "2.0", "stages": locked}, sort_keys=False))
