from pathlib import Path

from tasks.parameters import Signing
from tasks.provenance.verify import verify_folder, verify_version
from tests.tasks.provenance.conftest import Version


def test_untouched_version_verifies(version: Version) -> None:
    found = verify_version(version.client, version.registered, version.folder, version.signing, signature_required=True)
    assert list(map(str, found)) == []


def test_unsigned_folder_verifies(unsigned: Path) -> None:
    assert list(map(str, verify_folder(unsigned, Signing()))) == []
