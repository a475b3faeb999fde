"""OpenSSF model signatures over version folders, and with the same key over the records of the promotion log."""

import base64
import binascii
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numprune.errors import NumpruneError
from numprune.files import replace_on_success
from tasks.parameters import Signing
from tasks.provenance.version_files import DOWNLOAD_MARK, SIGNATURE

if TYPE_CHECKING:
    from model_signing import hashing
    from model_signing import signing as model_signing_api

PASSWORD_VARIABLE = "NUMPRUNE_SIGNING_PASSWORD"  # noqa: S105  # The name of the variable, not what it holds.
_RECORD = "record"


def sign_folder(folder: Path, signing: Signing) -> None:
    """Writes `model.sig`, a signature over all other files of a folder.

    Raises:
        NumpruneError: If the key cannot be used, or the folder holds links.
    """
    if (folder / SIGNATURE).exists():
        raise NumpruneError(f"{folder / SIGNATURE} is there already: a version is signed once.")
    signer = _signer(signing)
    try:
        with replace_on_success(folder / SIGNATURE) as temporary:
            signer.set_hashing_config(_all_listed_files()).sign(folder, temporary)
    except ValueError as error:
        raise NumpruneError(f"{folder} cannot be signed: {error}") from None


def check_folder_signature(folder: Path, signing: Signing) -> str | None:
    """Checks `model.sig` with `signing.public_key`; what is wrong with it, or None if it holds.

    Raises:
        NumpruneError: If the public key cannot be read.
    """
    public_key = _public_key(signing)
    path = folder / SIGNATURE
    if not path.is_file() or path.is_symlink():
        return "is missing"
    from model_signing import verifying

    try:
        _check_encoding(path.read_text(encoding="utf-8"))
        verifier = verifying.Config().set_hashing_config(_all_listed_files())
        verifier.use_elliptic_key_verifier(public_key=public_key).verify(folder, path)
    except Exception as error:  # noqa: BLE001, RUF100  # Damaged signatures raise whatever the parsers they meet raise.
        return f"does not hold: {_reason(error)}"
    return None


def sign_record(data: bytes, signing: Signing) -> str:
    """Signs a record with `signing.key`; the signature is text in the same form as `model.sig`.

    Raises:
        NumpruneError: If the key cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="numprune-") as temporary:
        folder = Path(temporary) / _RECORD
        _write_record(folder, data)
        sign_folder(folder, signing)
        return (folder / SIGNATURE).read_text(encoding="utf-8")


def check_record_signature(data: bytes, signature: str, signing: Signing) -> bool:
    """Whether a signature of `sign_record` is one over this record by `signing.public_key`.

    Raises:
        NumpruneError: If the public key cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="numprune-") as temporary:
        folder = Path(temporary) / _RECORD
        _write_record(folder, data)
        (folder / SIGNATURE).write_text(signature, encoding="utf-8")
        return check_folder_signature(folder, signing) is None


def _write_record(folder: Path, data: bytes) -> None:
    # A folder with one file of this name is no version folder: neither signature can pass for the other.
    folder.mkdir()
    (folder / _RECORD).write_bytes(data)


def _all_listed_files() -> "hashing.Config":
    from model_signing import hashing

    # Files of git would be left out otherwise, and could then be added unseen.
    return hashing.Config().set_ignored_paths(paths=[SIGNATURE, DOWNLOAD_MARK], ignore_git_paths=False)


def _signer(signing: Signing) -> "model_signing_api.Config":
    if signing.key is None:
        raise NumpruneError("signing.key is not set in params.yaml: there is no key to sign with.")
    from model_signing.signing import Config

    if signing.key.startswith("pkcs11:"):
        try:
            return Config().use_pkcs11_signer(pkcs11_uri=signing.key)
        except RuntimeError as error:
            if isinstance(error.__cause__, ImportError):
                raise NumpruneError(
                    "signing.key is a PKCS#11 URI: run `pip install 'model-signing[pkcs11]'`."
                ) from None
            raise NumpruneError(f"signing.key: the PKCS#11 module refuses: {error}") from None
    path = Path(signing.key).expanduser()
    _warn_if_tracked(path)
    password = os.environ.get(PASSWORD_VARIABLE)
    try:
        # The library hands the password to cryptography as it is, which takes bytes.
        secret: Any = password.encode() if password else None
        return Config().use_elliptic_key_signer(private_key=path, password=secret)
    except OSError as error:
        raise NumpruneError(f"signing.key: {path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise NumpruneError(
            f"signing.key: {path} is no usable private key ({error}). It must be a PEM file with an elliptic key, as "
            f"from `openssl ecparam -name prime256v1 -genkey -noout`; the password of an encrypted one is read from "
            f"{PASSWORD_VARIABLE}."
        ) from None


def _public_key(signing: Signing) -> Path:
    if signing.public_key is None:
        raise NumpruneError("signing.public_key is not set in params.yaml: signatures cannot be checked.")
    path = Path(signing.public_key).expanduser()
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        usable = isinstance(load_pem_public_key(path.read_bytes()), EllipticCurvePublicKey)
    except OSError as error:
        raise NumpruneError(f"signing.public_key: {path} cannot be read: {error.strerror}.") from None
    except ValueError:
        usable = False
    if not usable:
        raise NumpruneError(f"signing.public_key: {path} is no PEM file with an elliptic public key.")
    return path


def _warn_if_tracked(path: Path) -> None:
    command = ["git", "ls-files", "--error-unmatch", path.name]
    try:
        tracked = subprocess.run(command, cwd=path.parent, capture_output=True, check=False).returncode == 0
    except OSError:
        return
    if tracked:
        print(f"warning: git tracks the private key {path}: everybody with the repository has it.", file=sys.stderr)


def _check_encoding(signature: str) -> None:
    """Refuses base64 with other last bits than an encoder writes, which would let two texts be the same signature."""
    envelope = json.loads(signature)["dsseEnvelope"]
    for text in (envelope["payload"], *(entry["sig"] for entry in envelope["signatures"])):
        if base64.b64encode(base64.b64decode(text, validate=True)).decode() != text:
            raise binascii.Error("its base64 is not canonical")


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0].removeprefix("Signature mismatch: ") if text else type(error).__name__
