"""The stages of `dvc.yaml`: their order, whether they are up to date, and how one of them is run."""

import atexit
import contextlib
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from graphlib import TopologicalSorter
from pathlib import Path

from flows import subprocess_group
from numprune.errors import USER_MISTAKE
from tasks.forkserver import fork_server

# Of the last lines of a step that was given something wrong; see numprune.errors.reported.
_ERROR_PREFIX = "error: "

_PROGRESS = re.compile(r"^(?P<what>\w[\w ]*) (?P<done>\d+)/(?P<total>\d+)")
_EXIT_CODE = re.compile(r"exited with (-?\d+)")
_DVC_AFTERWARDS = re.compile(r"^(ERROR: |Generating lock file|Updating lock file|WARNING: |Use `dvc push`)")

_fork_servers: dict[Path, tuple[Mapping[str, str], contextlib.ExitStack]] = {}

# DVC's Repo is not made for several threads, and asking takes milliseconds.
_asking = threading.Lock()


class Ending(Enum):
    """How a stage ended."""

    COMPLETED = "Completed"
    RESTORED = "Restored"
    """DVC had the results of the same inputs in its cache."""
    UNCHANGED = "Unchanged"
    REJECTED = "Rejected"
    """The input is wrong: trying again is of no use."""
    FAILED = "Failed"


@dataclass(frozen=True)
class Progress:
    """A line such as `capture 3/6, 12 s left`."""

    what: str
    done: int
    total: int

    @classmethod
    def read(cls, line: str) -> "Progress | None":
        """Reads a line a stage printed; None if it is no progress."""
        match = _PROGRESS.match(line)
        if match is None or int(match["total"]) == 0:
            return None
        return cls(match["what"], int(match["done"]), int(match["total"]))


@dataclass(frozen=True)
class Outcome:
    """How a stage ended, and why if it failed."""

    ending: Ending
    message: str = ""


@dataclass
class _Output:
    """Takes apart what DVC prints and what the stage itself prints."""

    on_line: Callable[[str], None]
    started: bool = False
    restored: bool = False
    exit_code: int | None = None
    dvc_errors: list[str] = field(default_factory=list)
    error: list[str] = field(default_factory=list)
    """Of the stage: from its line `error: ...` on."""
    _last: str = ""

    def take(self, line: str) -> None:
        if self.started and not _DVC_AFTERWARDS.match(line):
            if self.error or line.startswith(_ERROR_PREFIX):
                self.error.append(line.removeprefix(_ERROR_PREFIX))
                return
            self._last = line or self._last
            self.on_line(line)
            return
        if line.startswith("> "):
            self.started = True
            return
        self.started = False
        self.restored = self.restored or "is cached - skipping run" in line
        if code := _EXIT_CODE.search(line):
            self.exit_code = int(code[1])
        if line.startswith("ERROR: "):
            self.dvc_errors.append(line.removeprefix("ERROR: "))

    @property
    def message(self) -> str:
        return "\n".join(self.error).strip() or self._last or "; ".join(self.dvc_errors)


def stage_graph(root: Path) -> dict[str, set[str]]:
    """The stages of `dvc.yaml`, in an order in which they can run, each with the stages it depends on."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        graph = repo.index.graph
        names = {stage: stage.addressing for stage in graph if stage.path_in_repo == "dvc.yaml"}
        needs = {name: {names[n] for n in graph.successors(stage) if n in names} for stage, name in names.items()}
    # Level by level rather than branch by branch: several workers then find work side by side.
    return {name: needs[name] for name in TopologicalSorter(needs).static_order()}


def side_by_side(graph: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """Groups of stages that may run at the same time, one group after the other: what measures time is alone.

    Args:
        graph: What every stage needs, in an order in which they can run.
    """
    left = dict(graph)
    while left:
        waiting: set[str] = set()
        for stage, needed in left.items():
            if _measures_time(stage) or needed & waiting:
                waiting.add(stage)
        together = [stage for stage in left if stage not in waiting]
        alone = [stage for stage in left if stage in waiting and not left[stage] & waiting]
        yield from filter(None, [together, *([stage] for stage in alone)])
        left = {stage: needed for stage, needed in left.items() if stage in waiting.difference(alone)}


def _measures_time(stage: str) -> bool:
    kind, _, of = stage.partition("@")
    return kind == "benchmark" or (kind == "prune" and "-latency-" in of)


def is_unchanged(root: Path, *stages: str) -> bool:
    """Asks DVC whether the results of stages are those of their present inputs."""
    from dvc.repo import Repo, lock_repo

    with _asking, Repo(str(root), _wait_for_lock=True) as repo, lock_repo(repo):
        # By their own names: others are relative to the working directory, and a worker of Dask has any.
        found = [stage for stage in repo.index.stages if stage.path_in_repo == "dvc.yaml" and stage.name in stages]
        assert len(found) == len(stages)
        return not any(stage.changed() for stage in found)


def stage_environment(root: Path) -> Mapping[str, str]:
    """Variables by which stages find a fork server, there from the first call to `end_fork_server` or the end.

    Args:
        root: The folder of `dvc.yaml`.
    """
    if root not in _fork_servers:
        lifetime = contextlib.ExitStack()
        atexit.register(lifetime.close)
        _fork_servers[root] = lifetime.enter_context(fork_server(root)), lifetime
    return _fork_servers[root][0]


def end_fork_server(root: Path) -> None:
    """Ends the fork server of a folder in which no further stage is going to run, if there is one."""
    if root in _fork_servers:
        _fork_servers.pop(root)[1].close()


def run_stage(
    root: Path,
    stage: str,
    *,
    environment: Mapping[str, str],
    owner: str,
    timeout_hours: float,
    on_line: Callable[[str], None],
) -> Outcome:
    """Runs one stage and nothing it depends on: `dvc repro --single-item`.

    Args:
        root: The folder of `dvc.yaml`.
        stage: Its name, as in `evaluate@reference-llama-0.2`.
        environment: Of `stage_environment`.
        owner: Of the process, see `flows.subprocess_group`.
        timeout_hours: After which it is stopped.
        on_line: Called with each line that the stage itself prints, its error message excepted.

    Raises:
        StoppedError: If the owner is being stopped.
    """
    output = _Output(on_line)
    command = [sys.executable, "-m", "tasks.forked", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
    try:
        code = subprocess_group.run(
            command,
            folder=root,
            environment=environment,
            owner=owner,
            timeout=3600 * timeout_hours,
            on_line=output.take,
        )
    except TimeoutError:
        message = f"stopped after {timeout_hours:g} hours; raise orchestration.timeout_hours if it needs longer."
        return Outcome(Ending.REJECTED, message)
    if code == 0:
        return Outcome(Ending.RESTORED if output.restored else Ending.COMPLETED)
    ending = Ending.REJECTED if output.exit_code == USER_MISTAKE else Ending.FAILED
    return Outcome(ending, output.message)
