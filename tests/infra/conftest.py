"""A folder that PostgreSQL can reach even when the tests run as root, whose temporary folders nobody else may enter."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def reachable_folder() -> Iterator[Path]:
    # The socket's path must be short, too.
    folder = Path(tempfile.mkdtemp(prefix="numprune-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
