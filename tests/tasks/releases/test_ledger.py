import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from numprune.errors import NumpruneError
from tasks.download import folder_revision
from tasks.parameters import Download, Watch, load_parameters
from tasks.releases import ledger as module
from tasks.releases.ledger import DONE, FAILED, FOUND, PATIENCE, RUNNING, Key, Ledger, shaping_hash
from tasks.releases.sources import Release
from tests.processes import FORKED

ROOT = Path(__file__).parents[3]
REVISION = "a" * 64
RELEASE = Release("model", Download(folder="/models/model", revision=REVISION))
PARAMETERS = "1" * 64
KEY = Key("model", REVISION, PARAMETERS)
LEASE = 0.2


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/folder/ledger.db"


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds pass on the ledger's clock, which otherwise stands still: the machine may be slow."""
    clock = SimpleNamespace(time=lambda: clock.now, now=1e9)
    monkeypatch.setattr(module, "time", clock)

    def pass_by(seconds: float) -> None:
        clock.now += seconds

    return pass_by


@pytest.fixture
def ledger(url: str) -> Ledger:
    return Ledger(url, lease_seconds=LEASE)


def state(ledger: Ledger) -> str:
    entry = ledger.read(KEY)
    assert entry is not None
    return entry.state


def test_only_the_first_announces(ledger: Ledger, url: str) -> None:
    assert ledger.announce(RELEASE, PARAMETERS)
    assert not ledger.announce(RELEASE, PARAMETERS)
    # Nor after a restart.
    assert not Ledger(url, lease_seconds=LEASE).announce(RELEASE, PARAMETERS)
    entry = ledger.read(KEY)
    assert entry is not None
    assert (entry.release, entry.branch, entry.state) == (RELEASE, f"release/model/{REVISION[:12]}", FOUND)


def test_other_parameters_are_other_work_on_another_branch(ledger: Ledger) -> None:
    assert ledger.announce(RELEASE, PARAMETERS)
    assert ledger.announce(RELEASE, "2" * 64)
    entry = ledger.read(Key("model", REVISION, "2" * 64))
    assert entry is not None
    assert entry.branch == f"release/model/{REVISION[:12]}-22222222"


@pytest.mark.usefixtures("wait")
def test_one_claims_until_it_is_done(ledger: Ledger) -> None:
    assert not ledger.claim(KEY, "first")
    ledger.announce(RELEASE, PARAMETERS)
    assert ledger.claim(KEY, "first")
    assert not ledger.claim(KEY, "second")
    assert not ledger.finish(KEY, "second")
    assert ledger.finish(KEY, "first")
    assert state(ledger) == DONE
    assert not ledger.claim(KEY, "second")
    assert ledger.unfinished(PARAMETERS) == []


def test_signs_of_life_keep_a_claim_and_a_stale_one_is_taken_over(
    ledger: Ledger, wait: Callable[[float], None]
) -> None:
    ledger.announce(RELEASE, PARAMETERS)
    ledger.claim(KEY, "first")
    for _ in range(4):
        wait(LEASE / 2)
        assert ledger.beat(KEY, "first")
        assert not ledger.claim(KEY, "second")
    wait(1.5 * LEASE)
    assert ledger.claim(KEY, "second")
    # The first was not dead after all: it learns that it lost the release, and can change nothing.
    assert not ledger.beat(KEY, "first")
    assert not ledger.finish(KEY, "first")
    assert not ledger.fail(KEY, "first", "late", retryable=True)
    assert not ledger.give_back(KEY, "first")
    assert state(ledger) == RUNNING


def test_what_was_never_claimed_is_announced_again(ledger: Ledger, wait: Callable[[float], None]) -> None:
    ledger.announce(RELEASE, PARAMETERS)
    wait(1.1 * PATIENCE * LEASE)
    assert ledger.announce(RELEASE, PARAMETERS)
    assert not ledger.announce(RELEASE, PARAMETERS)


def test_a_dead_run_is_announced_again_and_a_living_one_is_not(ledger: Ledger, wait: Callable[[float], None]) -> None:
    ledger.announce(RELEASE, PARAMETERS)
    ledger.claim(KEY, "first")
    wait(1.1 * PATIENCE * LEASE)
    ledger.beat(KEY, "first")
    assert not ledger.announce(RELEASE, PARAMETERS)
    wait(1.5 * LEASE)
    assert ledger.announce(RELEASE, PARAMETERS)


@pytest.mark.parametrize("retryable", [True, False])
def test_failures(ledger: Ledger, retryable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0)
    ledger.announce(RELEASE, PARAMETERS)
    announced = 0
    for attempt in range(1, 6):
        assert ledger.claim(KEY, f"run {attempt}")  # By hand it can always be tried again.
        assert ledger.fail(KEY, f"run {attempt}", "no disk", retryable=retryable)
        entry = ledger.read(KEY)
        assert entry is not None
        assert (entry.state, entry.attempts, entry.error) == (FAILED, attempt, "no disk")
        announced += ledger.announce(RELEASE, PARAMETERS)
        assert len(ledger.unfinished(PARAMETERS)) == (1 if retryable and attempt < 3 else 0)
    assert announced == (2 if retryable else 0)


def test_what_is_given_back_counts_as_no_attempt(ledger: Ledger) -> None:
    ledger.announce(RELEASE, PARAMETERS)
    ledger.claim(KEY, "first")
    assert ledger.give_back(KEY, "first")
    (entry,) = ledger.unfinished(PARAMETERS)
    assert (entry.state, entry.attempts) == (FOUND, 0)


def announce_and_claim(url: str, owner: str, start: Barrier, results: "SimpleQueue[list[tuple[bool, bool]]]") -> None:
    start.wait(timeout=100)
    ledger = Ledger(url, lease_seconds=60)
    outcomes = []
    for number in range(50):
        release = Release(f"model{number}", Download(folder="/models", revision=REVISION))
        announced = ledger.announce(release, PARAMETERS)
        outcomes.append((announced, ledger.claim(Key(release.name, release.revision, PARAMETERS), owner)))
    results.put(outcomes)


def race(url: str) -> None:
    """Two processes that begin at the same moment, the creation of the tables included."""
    start, results = FORKED.Barrier(2), FORKED.SimpleQueue()
    racers = [FORKED.Process(target=announce_and_claim, args=(url, owner, start, results)) for owner in ("one", "two")]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(timeout=100)
    assert [racer.exitcode for racer in racers] == [0, 0]
    outputs = [results.get(), results.get()]
    assert [len(output) for output in outputs] == [50, 50]
    for first, second in zip(*outputs, strict=True):
        assert [a + b for a, b in zip(first, second, strict=True)] == [1, 1]


def test_of_two_processes_one_announces_and_one_claims(url: str) -> None:
    race(url)


@pytest.fixture
def postgresql() -> Iterator[str]:
    """The address of an empty database of a server of its own."""
    programs = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    found = next((folder / "initdb" for folder in programs), None) or shutil.which("initdb")
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    binaries = Path(found).resolve().parent
    # It does not run as root, and another user cannot enter pytest's temporary folders.
    user = "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="numprune-") as name:
        if user is not None:
            shutil.chown(name, user)
        data = Path(name) / "data"
        initialize = [binaries / "initdb", "--pgdata", data, "--username", "test", "--auth", "trust", "--no-sync"]
        subprocess.run(initialize, user=user, cwd=name, check=True, capture_output=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = ["-c", "fsync=off", "-c", f"unix_socket_directories={name}", "-c", "listen_addresses=127.0.0.1"]
        server = subprocess.Popen(
            [binaries / "postgres", "-D", data, "-p", str(port), *settings],
            user=user,
            cwd=name,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            ready = [binaries / "pg_isready", "--host", "127.0.0.1", "--port", str(port)]
            deadline = time.monotonic() + 60
            while subprocess.run(ready, check=False, capture_output=True).returncode != 0:
                assert time.monotonic() < deadline, "PostgreSQL does not answer"
                time.sleep(0.2)
            yield f"postgresql://test@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)


def test_postgresql(postgresql: str) -> None:
    race(postgresql)
    ledger = Ledger(postgresql, lease_seconds=LEASE)
    ledger.announce(RELEASE, PARAMETERS)
    assert ledger.claim(KEY, "first")
    time.sleep(1.5 * LEASE)
    assert ledger.claim(KEY, "second")
    assert not ledger.finish(KEY, "first")
    assert ledger.fail(KEY, "second", "no disk", retryable=True)
    (entry,) = [entry for entry in ledger.unfinished(PARAMETERS) if entry.key == KEY]
    assert (entry.attempts, entry.error) == (2, "no disk")


def test_folder_is_read_once(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    first = ledger.folder_revision(folder)
    assert first == folder_revision(folder)
    with monkeypatch.context() as patch:
        patch.setattr(module, "folder_revision", lambda _: pytest.fail("It was read again."))
        assert ledger.folder_revision(folder) == first
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    assert ledger.folder_revision(folder) == folder_revision(folder) != first


def test_hash_says_what_shapes_results(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")

    def changed(old: str, new: str) -> str:
        assert old in text
        path = tmp_path / "params.yaml"
        path.write_text(text.replace(old, new), encoding="utf-8")
        return shaping_hash(load_parameters(path))

    original = changed("", "")
    assert changed("# What is null is as in the preset.", "# Another comment.") == original
    assert changed("workers: null", "workers: 2") == original
    assert changed("lease_seconds: 60", "lease_seconds: 61") == original
    assert changed("max_perplexity_ratio: 1.1", "max_perplexity_ratio: 1.2") == original
    assert changed("budgets: [0.2, 0.5]", "budgets: [0.2]") != original
    assert changed("samples: 128", "samples: 64") != original
    assert changed("repeats: 5", "repeats: 6") != original


def test_relative_path_counts_from_the_main_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = tmp_path / "main"
    main.mkdir()
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for command in (
        ["init", "-q"],
        [*identity, "commit", "-q", "--allow-empty", "-m", "Empty"],
        ["worktree", "add", "-q", "-b", "other", str(tmp_path / "other")],
    ):
        subprocess.run(["git", *command], cwd=main, check=True)
    monkeypatch.chdir(main)
    Ledger("sqlite:///.numprune/ledger.db", lease_seconds=LEASE).announce(RELEASE, PARAMETERS)
    monkeypatch.chdir(tmp_path / "other")
    assert not Ledger("sqlite:///.numprune/ledger.db", lease_seconds=LEASE).announce(RELEASE, PARAMETERS)
    assert (main / ".numprune/ledger.db").is_file()


@pytest.mark.parametrize("url", ["no address", "postgresql://user:secret@127.0.0.1:1/ledger", "unknown://x"])
def test_database_that_cannot_be_opened(url: str) -> None:
    with pytest.raises(NumpruneError, match=r"watch\.ledger: cannot open") as caught:
        Ledger(url, lease_seconds=LEASE)
    assert "secret" not in str(caught.value)


def test_address_with_a_password_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configured, secret = (f"sqlite:///{tmp_path}/{name}.db" for name in ("configured", "secret"))
    watch = Watch(ledger=configured, lease_seconds=LEASE)
    Ledger.of(watch).announce(RELEASE, PARAMETERS)
    monkeypatch.setenv("NUMPRUNE_LEDGER", secret)
    assert Ledger.of(watch).announce(RELEASE, PARAMETERS)
