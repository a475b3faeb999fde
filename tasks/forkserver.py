"""A process that has imported PyTorch, transformers and DVC, and is forked for every step.

Each stage is a process, which can be stopped, killed and repeated without the others; its imports take longer than its
work on a small model. The fork server imports once.

    python -m tasks.forkserver dvc repro

runs a module, here DVC, with a fork server for all that `tasks.forked` is asked for below it. A flow starts one for its
stages. It ends when the code of a module that it has imported from its folder changes: what runs then must be the code
that DVC sees. How `tasks.forked` and a forked process talk, over a connection that the fork server hands on:

    asks: standard streams, then a request  ->  takes the streams over
                                            <-  "+"; runs the module
    number of a signal                      ->  passes it to its process group
    end of the connection                   ->  kills its process group: who asked has been killed
    ends with the same code                 <-  exit code
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from tasks.forked import FORKED, SOCKET, STREAMS, Request, run, run_here

# What most stages import.
IMPORTED = (
    "datasets",
    "dvc.cli.parser",
    "dvc.repo",
    "dvc.scm",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "numprune.pruning",
    "ruamel.yaml",
    "tasks.accuracy",
    "tasks.images.evaluation",
    "tasks.step",
)

_SERVE = "import sys; from tasks.forkserver import serve; serve(int(sys.argv[1]), sys.argv[2:])"


@contextlib.contextmanager
def fork_server(folder: Path, imported: Sequence[str] = IMPORTED) -> Iterator[dict[str, str]]:
    """Starts a fork server and ends it; it also ends if this process is killed.

    Args:
        folder: That modules are imported from, before those installed.
        imported: Names of modules; those that are not installed are left out.

    Yields:
        The environment variable by which `tasks.forked` finds it; none where processes cannot be forked safely.
    """
    if sys.platform != "linux":
        yield {}
        return
    # A short path, as sockets want it, in a folder that nobody else can enter.
    place = Path(tempfile.mkdtemp(prefix="numprune-", dir="/tmp"))
    path = place / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(listener.fileno()), *imported],
            cwd=folder,
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        yield {SOCKET: str(path)}
    finally:
        process.kill()  # It may still import; what it has forked does not need it.
        process.wait()
        shutil.rmtree(place)


def serve(listener: int, imported: Sequence[str]) -> None:
    """Imports, and forks for every connection, until standard input is closed or the code changes.

    Args:
        listener: Descriptor of the socket.
        imported: Names of modules.
    """
    # The process that started this one says when it ends, and not Ctrl-C at a terminal. Nobody waits for a child.
    for number in (signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    start = time.time_ns()
    _import(imported)
    code = _modified(_own_files())
    with socket.socket(fileno=listener) as accepting:
        connection = _fork_for_each(accepting, code) if max(code.values(), default=0) < start else None
    if connection is not None:
        _run_forked(connection)


def _import(names: Sequence[str]) -> None:
    # Asking for a GPU would otherwise leave forked processes unable to use it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    # What is imported stays: looking for garbage in it would only delay.
    gc.disable()
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # Else the first collection in a forked process writes to, and so copies, every page.
    gc.collect()
    gc.freeze()
    gc.enable()


def _own_files() -> list[Path]:
    """Of the modules that were imported from this folder."""
    files = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    here = Path.cwd()
    return [path for path in files if path.is_relative_to(here) and not path.is_relative_to(sys.prefix)]


def _modified(files: Iterable[Path]) -> dict[Path, int]:
    """When files were written, in nanoseconds; 0 for one that is no longer there."""
    return {path: path.stat().st_mtime_ns if path.exists() else 0 for path in files}


def _fork_for_each(listener: socket.socket, code: Mapping[Path, int]) -> socket.socket | None:
    """Returns in every forked process with its connection, and in this one with None at the end."""
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return None
        connection, _ = listener.accept()
        if _modified(code) != code:
            return None
        if os.fork() == 0:
            return connection
        connection.close()


def _run_forked(connection: socket.socket) -> NoReturn:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(connection, 1, len(STREAMS))
    for stream, own in zip(streams, STREAMS, strict=True):
        os.dup2(stream, own)
        os.close(stream)
    with connection.makefile("rb", buffering=0) as lines:
        request: Request = json.loads(lines.readline())
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if tqdm := sys.modules.get("tqdm"):
        # Forked processes would share one: if one was killed in the middle of a bar, the others would wait for it.
        tqdm.tqdm.set_lock(threading.RLock())
    threading.Thread(target=_obey, args=(connection,), name="signals", daemon=True).start()
    connection.send(FORKED)
    code = 1
    try:
        run_here(request["module"], request["arguments"])
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        _end(connection, code)


def _end(connection: socket.socket, code: int) -> NoReturn:
    """Ends as an interpreter does, but for taking apart all that was imported, which takes seconds."""
    threading._shutdown()  # type: ignore[attr-defined] # Waits for threads, as at the end of every program.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with contextlib.suppress(OSError):
        connection.send(bytes([code % 256]))
    os._exit(code)


def _obey(connection: socket.socket) -> None:
    while number := connection.recv(1):
        os.killpg(0, number[0])
    os.killpg(0, signal.SIGKILL)


def main() -> NoReturn:
    """Runs the module that the command line names, with a fork server."""
    with fork_server(Path.cwd()) as environment:
        os.environ.update(environment)
        run(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    main()
