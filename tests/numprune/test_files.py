import pytest

from numprune.files import replace_on_success


def test_a_file_takes_its_place_when_complete(tmp_path):
    path = tmp_path / "folder" / "file"
    with replace_on_success(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interruption_leaves_what_was_there(tmp_path, error):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()

    def interrupted():
        with replace_on_success(folder) as temporary:
            temporary.mkdir()
            (temporary / "half").touch()
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == [folder]
    assert [file.name for file in folder.iterdir()] == ["old"]


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "folder"
    for name in ("old", "new"):
        with replace_on_success(folder) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [file.name for file in folder.iterdir()] == ["new"]


def test_what_a_crash_left_is_cleared(tmp_path):
    (tmp_path / ".file.partial").mkdir()
    with replace_on_success(tmp_path / "file") as temporary:
        temporary.touch()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "within").mkdir(parents=True)

    def write():
        with replace_on_success(folder) as temporary:
            temporary.touch()

    with pytest.raises(OSError, match="folder"):
        write()
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "within").is_dir()
