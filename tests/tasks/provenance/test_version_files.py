import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks.provenance.version_files import dvc_folder_hash, read_digests


def test_folder_hash_is_that_of_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["b", "a/c", "a.txt", "a/b/d", "ä", "A", "a-b"]
    for name in names:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    for command in (["init", "--no-scm", "--quiet"], ["add", "--quiet", "folder"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], check=True)
    tracked = yaml.safe_load(Path("folder.dvc").read_text(encoding="utf-8"))["outs"][0]["md5"]
    digests, irregular = read_digests(tmp_path / "folder")
    assert dvc_folder_hash({name: digest.md5 for name, digest in digests.items()}) == tracked
    assert set(digests) == set(names)
    assert irregular == []


def test_links_are_named_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret", encoding="utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to(folder)
    digests, irregular = read_digests(folder)
    assert digests == {}
    assert [entry.name for entry in irregular] == ["link", "loop"]
