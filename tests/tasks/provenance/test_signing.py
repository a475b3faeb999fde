import subprocess
from pathlib import Path

import pytest

from numprune.errors import NumpruneError
from tasks.parameters import Signing
from tasks.provenance.signing import (
    PASSWORD_VARIABLE,
    check_folder_signature,
    check_record_signature,
    sign_folder,
    sign_record,
)
from tests.tasks.provenance.conftest import make_keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    (folder / "a").write_text("a", encoding="utf-8")
    (folder / "inside/b").write_text("b", encoding="utf-8")
    return folder


def test_signature_holds_until_something_changes(folder: Path, tmp_path: Path) -> None:
    signing = make_keys(tmp_path, "key")
    assert check_folder_signature(folder, signing) == "is missing"
    sign_folder(folder, signing)
    assert check_folder_signature(folder, signing) is None
    assert sorted(path.name for path in folder.iterdir()) == ["a", "inside", "model.sig"]
    (folder / "inside/c").write_text("c", encoding="utf-8")
    assert "inside/c" in (check_folder_signature(folder, signing) or "")


def test_verifier_of_openssf_accepts_the_signature_as_it_is(folder: Path, tmp_path: Path) -> None:
    from model_signing import verifying

    signing = make_keys(tmp_path, "key")
    sign_folder(folder, signing)
    verifying.Config().use_elliptic_key_verifier(public_key=signing.public_key).verify(folder, folder / "model.sig")


def test_signed_once(folder: Path, tmp_path: Path) -> None:
    signing = make_keys(tmp_path, "key")
    sign_folder(folder, signing)
    with pytest.raises(NumpruneError, match="signed once"):
        sign_folder(folder, signing)


def test_links_cannot_be_signed(folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to(folder / "a")
    with pytest.raises(NumpruneError, match="cannot be signed"):
        sign_folder(folder, make_keys(tmp_path, "key"))
    assert not (folder / "model.sig").exists()


def test_record(tmp_path: Path) -> None:
    signing, stranger = make_keys(tmp_path, "key"), make_keys(tmp_path, "stranger")
    signature = sign_record(b'{"version": 1}', signing)
    assert check_record_signature(b'{"version": 1}', signature, signing)
    assert not check_record_signature(b'{"version": 2}', signature, signing)
    assert not check_record_signature(b'{"version": 1}', signature, stranger)
    assert not check_record_signature(b'{"version": 1}', "", signing)


def test_encrypted_key_takes_its_password_from_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signing = make_keys(tmp_path, "key", password=b"secret")
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    with pytest.raises(NumpruneError, match=PASSWORD_VARIABLE):
        sign_folder(folder, signing)
    monkeypatch.setenv(PASSWORD_VARIABLE, "wrong")
    with pytest.raises(NumpruneError, match=PASSWORD_VARIABLE):
        sign_folder(folder, signing)
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    sign_folder(folder, signing)
    assert check_folder_signature(folder, signing) is None


def test_keys_that_are_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pem").write_text("text", encoding="utf-8")
    text = str(tmp_path / "text.pem")
    with pytest.raises(NumpruneError, match="no usable private key"):
        sign_folder(folder, Signing(key=text))
    with pytest.raises(NumpruneError, match="cannot be read"):
        sign_folder(folder, Signing(key=str(tmp_path / "absent.pem")))
    with pytest.raises(NumpruneError, match=r"signing\.key is not set"):
        sign_folder(folder, Signing())
    (folder / "model.sig").write_text("{}", encoding="utf-8")
    with pytest.raises(NumpruneError, match="elliptic public key"):
        check_folder_signature(folder, Signing(public_key=text))
    with pytest.raises(NumpruneError, match=r"signing\.public_key is not set"):
        check_folder_signature(folder, Signing())


def test_pkcs11_without_its_library_says_what_to_install(folder: Path) -> None:
    pytest.importorskip("model_signing")
    try:
        import PyKCS11  # noqa: F401
    except ImportError:
        with pytest.raises(NumpruneError, match=r"pip install 'model-signing\[pkcs11\]'"):
            sign_folder(folder, Signing(key="pkcs11:token=t;object=o"))
    else:
        pytest.skip("PyKCS11 is installed")


def test_key_that_git_tracks_is_warned_of(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    signing = make_keys(tmp_path, "key")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    sign_folder(folder, signing)
    assert capfd.readouterr().err == ""
    subprocess.run(["git", "add", "key.pem"], cwd=tmp_path, check=True)
    (folder / "model.sig").unlink()
    sign_folder(folder, signing)
    assert "warning: git tracks the private key" in capfd.readouterr().err
