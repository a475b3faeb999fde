import sqlite3
import time
from pathlib import Path

from mlflow import MlflowClient

from tasks.registry.database import make_database
from tests.processes import FORKED


def test_killed_while_it_is_made(tmp_path: Path) -> None:
    path = tmp_path / "mlflow/mlflow.db"
    maker = FORKED.Process(target=make_database, args=[f"sqlite:///{path}"])
    maker.start()
    half = path.with_name(".mlflow.db.partial") / path.name
    try:
        deadline = time.monotonic() + 120
        while not half.exists() or half.stat().st_size < 20_000:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        maker.kill()
        maker.join()
    assert not path.exists()

    make_database(f"sqlite:///{path}")
    client = MlflowClient(tracking_uri=f"sqlite:///{path}", registry_uri=f"sqlite:///{path}")
    client.create_registered_model("model")
    assert [model.name for model in client.search_registered_models()] == ["model"]
    assert list(path.parent.glob(".*.partial")) == []


def test_existing_databases_and_servers_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    sqlite3.connect(path).close()
    path.write_bytes(b"")
    make_database(f"sqlite:///{path}")
    make_database("http://127.0.0.1:1")
    assert path.read_bytes() == b""
    assert [entry.name for entry in tmp_path.iterdir()] == ["mlflow.db"]
