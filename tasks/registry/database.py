"""A new MLflow database on disk, whole or absent."""

import shutil
from pathlib import Path

_SQLITE = "sqlite:///"


def make_database(tracking_uri: str) -> None:
    """Makes the database of a `sqlite:///` address, unless it exists or the address is another.

    MLflow makes its tables in a hundred steps that take seconds, and cannot open a database in which some are missing.
    Made elsewhere and renamed, it survives a kill at any moment.
    """
    if not tracking_uri.startswith(_SQLITE):
        return
    path = Path(tracking_uri.removeprefix(_SQLITE))
    if path.exists():
        return
    from filelock import FileLock
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    # The lock ends with the process that holds it. A folder, because SQLite keeps a journal beside the file.
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        folder = path.with_name(f".{path.name}.partial")
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        temporary = folder / path.name
        store = SqlAlchemyStore(f"{_SQLITE}{temporary}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
        store.engine.dispose()
        temporary.rename(path)
        shutil.rmtree(folder)
