"""Work that was killed goes on where it stopped, and what comes out is the same bit by bit."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from fnmatch import fnmatch
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from numprune.errors import NumpruneError
from numprune.files import held_bytes
from numprune.resume import unfinished, writing
from tests.numprune.conftest import CONFIGS
from tests.processes import FORKED


def prune(arguments, log, kill_at):
    """Prunes, and kills itself when it is about to give a file of that name to what it has written."""
    from numprune.cli import app

    def watch(event, details):
        if event == "os.rename" and fnmatch(str(details[1]), f"*/{kill_at}"):
            os.kill(os.getpid(), signal.SIGKILL)

    if kill_at:
        sys.addaudithook(watch)
    sys.stderr = log.open("w", encoding="utf-8", buffering=1)  # As long as the process.
    app(["prune", *map(str, arguments)], standalone_mode=False)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def work_folder(output):
    return next(output.parent.glob(f".{output.name}.*.work"), None)


def run(arguments, output, kill_at=None):
    """Prunes in a process of its own."""
    log = output.with_suffix(".log")
    process = FORKED.Process(target=prune, args=([*arguments, "--output", output], log, kill_at))
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if kill_at else 0), log.read_text(encoding="utf-8")


def made(output):
    """Times of all blocks and rankings in the work folder of a result."""
    folder = work_folder(output)
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_killed_at_every_stage(make_checkpoint, text_file, tmp_path):
    """In the capture, the rankings of both steps, the cut and the capture between them, and the recovery."""
    config = CONFIGS["llama"].__class__(**CONFIGS["llama"].to_dict() | {"num_hidden_layers": 12})
    options = ["--ratio", "0.3", "--calibration", text_file, "--samples", "8", "--length", "32", "--steps", "2"]
    arguments = [make_checkpoint(config), *options]
    run(arguments, tmp_path / "whole")
    output = tmp_path / "killed"
    stages = {"block-004*": "nothing", "rankings-000*": "statistics", "step-2-*/pruned-006*": "step-1"}
    stages |= {"step-2-*/block-007*": "step-1", "step-2-*/rankings-000*": "step-2-*/block", "pruned-003*": "step-2"}
    finished = {}
    for pattern, before in [*stages.items(), ("pruned-009*", "step-2")]:
        run(arguments, output, kill_at=pattern)
        # What stages before this one had finished was not made again.
        assert finished.items() <= made(output).items()
        finished = {path: time for path, time in made(output).items() if fnmatch(str(path), f"{before}*")}
        assert finished or pattern == "block-004*"
    run(arguments, output)
    assert contents(output) == contents(tmp_path / "whole")
    assert work_folder(output) is None


@pytest.fixture
def disk(tmp_path):
    """A file system of its own; called with its size in bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size):
        options = f"size={size}" if not os.path.ismount(folder) else f"remount,size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a file system is not allowed here: {done.stderr.strip()}")
        return folder

    yield resize
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("spare", [0, 96 * 1024])
def test_a_disk_that_runs_full_loses_nothing(make_checkpoint, text_file, tmp_path, disk, spare):
    """While blocks are written, and with more to spare while the result is; there was room when the run began."""
    from numprune.checkpoint import weight_bytes
    from numprune.cli import _statistics_bytes, app

    folder = make_checkpoint()
    arguments = ["prune", folder, "--ratio", "0.3", "--calibration", text_file, "--samples", "8", "--length", "32"]

    def prune_to(output):
        app([*map(str, [*arguments, "--output", output])], standalone_mode=False)

    output = disk(_statistics_bytes(folder) + weight_bytes(folder) + spare) / "out"
    with (
        patch("numprune.cli.check_space"),
        pytest.raises(NumpruneError, match=r"cannot be written: .*free some space and run again"),
    ):
        prune_to(output)
    assert not output.exists()
    finished = made(output)
    assert finished
    disk(2**24)
    prune_to(output)
    prune_to(tmp_path / "whole")
    assert contents(output) == contents(tmp_path / "whole")


def test_what_is_done_needs_no_space_again(make_checkpoint, text_file, tmp_path):
    from numprune.cli import app

    options = ["--ratio", "0.3", "--calibration", text_file, "--samples", "8", "--length", "32"]
    arguments = ["prune", make_checkpoint(), *options]

    def prune_to(output, free):
        with patch("shutil.disk_usage", return_value=SimpleNamespace(free=free)):
            app([*map(str, [*arguments, "--output", output])], standalone_mode=False)

    def needed(output):
        with pytest.raises(NumpruneError, match="bytes are needed, 0 are free") as caught:
            prune_to(output, free=0)
        return int(re.search(r"([\d,]+) bytes", str(caught.value))[1].replace(",", ""))

    output = tmp_path / "out"
    before = needed(output)
    assert work_folder(output) is None  # Nothing is in it.
    with patch("numprune.cli.save_pruned", side_effect=RuntimeError), pytest.raises(RuntimeError):
        prune_to(output, free=before)
    assert needed(output) == before - held_bytes(work_folder(output))
    prune_to(output, free=needed(output))
    assert output.exists()


def test_another_text_under_the_same_name_begins_anew(make_checkpoint, text_file, tmp_path):
    options = ["--ratio", "0.3", "--calibration", text_file, "--samples", "8", "--length", "32"]
    arguments = [make_checkpoint(), *options]
    output = tmp_path / "killed"
    run(arguments, output, kill_at="rankings-000*")
    text_file.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    run(arguments, output)
    run(arguments, tmp_path / "whole")
    assert contents(output) == contents(tmp_path / "whole")


def interrupted(result, **depends_on):
    """The work folder of a run that came to an error after it had done something."""
    with suppress(RuntimeError), unfinished(result, **depends_on) as folder:
        (folder / "done").touch()
        raise RuntimeError
    return folder


def test_work_for_another_result_stays(tmp_path):
    other = interrupted(tmp_path / "out.v2")
    for name in ("out", "[o]ut.v2"):
        with unfinished(tmp_path / name):
            assert other.exists()


def test_work_for_something_else_is_not_continued(tmp_path):
    first = interrupted(tmp_path / "out", ratio=0.2)
    assert first.exists()
    with unfinished(tmp_path / "out", ratio=0.3) as second:
        assert not first.exists()
        assert second.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_known_by_size_and_time(tmp_path):
    (tmp_path / "weights").write_bytes(b"one")
    with pytest.raises(RuntimeError), unfinished(tmp_path / "out", files=tmp_path / "weights") as first:
        raise RuntimeError
    (tmp_path / "weights").write_bytes(b"other")
    with unfinished(tmp_path / "out", files=tmp_path / "weights") as second:
        assert first != second


def test_a_full_disk_is_said_to_be_full_and_loses_nothing(tmp_path):
    def work():
        with unfinished(tmp_path / "out") as folder, writing(folder):
            (folder / "done").touch()
            raise OSError(28, "No space left on device")

    with pytest.raises(NumpruneError, match="What is done stays there: free some space and run again to go on"):
        work()
    assert (work_folder(tmp_path / "out") / "done").exists()
