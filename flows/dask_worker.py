"""What the workers of a Dask cluster on this machine need beside the stages."""

import signal

from distributed import Worker, WorkerPlugin


class Uninterrupted(WorkerPlugin):
    """Leaves Ctrl-C, which a terminal sends to all processes alike, to the flow: it stops the stages in order."""

    def setup(self, worker: Worker) -> None:  # noqa: ARG002 - As Dask calls it.
        """Called by a worker when it starts."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
