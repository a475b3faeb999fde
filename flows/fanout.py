"""Where the stages run: on threads of this process, or on the workers of a Dask cluster.

A Dask worker runs a stage as a thread does, in a process group of its own in the same folder. So all workers see the
same files: they are on one machine, or the checkout lies on a file system that they share.
"""

import contextlib
import logging
import threading
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from prefect import Task
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows import subprocess_group
from numprune.errors import NumpruneError
from tasks.parameters import Parameters

_CONNECTING = "10s"

_open: set["StageRunner"] = set()
_lock = threading.Lock()


class StageRunner:
    """Takes stages as `params.yaml` says, and stops those that run.

    Attributes:
        owner: What the commands of these stages are known by where they run.
    """

    def __init__(self, runner: TaskRunner[Any]) -> None:
        self.owner = uuid.uuid4().hex
        self._runner: Any = runner  # What task runners of Dask have beside the others is not typed.

    def submit(
        self, task: Task[Any, Any], arguments: dict[str, Any], wait_for: Iterable[PrefectFuture[Any]]
    ) -> PrefectFuture[Any]:
        """Lets a task run as soon as others have completed."""
        return self._runner.submit(task, {**arguments, "owner": self.owner}, wait_for=list(wait_for))

    def stop(self) -> None:
        """Ends the stages that run, wherever they do, and lets no further one start."""
        subprocess_group.stop(self.owner)
        if not isinstance(self._runner, ThreadPoolTaskRunner):
            # Several flows may share the workers of a cluster; only what this one started is stopped there.
            self._runner.client.run(subprocess_group.stop, self.owner, on_error="ignore")


@contextlib.contextmanager
def stage_runner(parameters: Parameters) -> Iterator[StageRunner]:
    """Threads or Dask workers for the stages; whatever ends the flow early ends the stages that run.

    Raises:
        NumpruneError: If the Dask cluster cannot be reached.
    """
    with (_dask if parameters.orchestration.runner == "dask" else _threads)(parameters) as runner:
        own = StageRunner(runner)
        with _lock:
            _open.add(own)
        try:
            yield own
        except BaseException:  # Ctrl-C and Prefect's cancellation among them.
            own.stop()
            raise
        finally:
            with _lock:
                _open.discard(own)


def stop_all() -> None:
    """Ends all stages that flows of this process have started."""
    with _lock:
        runners = list(_open)
    for runner in runners:
        runner.stop()


@contextlib.contextmanager
def _threads(parameters: Parameters) -> Iterator[TaskRunner[Any]]:
    runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=parameters.workers)
    with runner:
        yield runner


@contextlib.contextmanager
def _dask(parameters: Parameters) -> Iterator[TaskRunner[Any]]:
    from prefect_dask import DaskTaskRunner

    from flows.dask_worker import Uninterrupted

    # Prefect shows what the root logger lets through. That a worker took seconds to end is of no interest.
    logging.getLogger("distributed").setLevel(logging.WARNING)
    logging.getLogger("distributed.nanny").setLevel(logging.ERROR)
    address = parameters.orchestration.address
    # Of its own: a stage is a process, so its worker needs one thread, and its memory is not the worker's.
    local: dict[str, Any] = {"n_workers": parameters.workers, "threads_per_worker": 1, "memory_limit": 0}
    local |= {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    there: dict[str, Any] = {"address": address, "client_kwargs": {"timeout": _CONNECTING}}
    runner: Any = DaskTaskRunner(**there) if address else DaskTaskRunner(cluster_kwargs=local)
    with runner:
        try:
            client = runner.client
        except OSError as error:
            raise NumpruneError(f"orchestration.address: no Dask scheduler answers at {address}: {error}") from None
        if not client.nthreads():
            raise NumpruneError(f"orchestration.address: the Dask cluster at {address} has no workers: start some.")
        if address is None:
            client.register_plugin(Uninterrupted())
        yield runner
