"""Progress of a stage on Prefect's page: one artifact a stage, at a cost below 1 % of the work."""

import re
import time
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows.stages import Progress

_SHORTEST_SECONDS = 2.0
_SHARE_OF_TIME = 0.01


class StageProgress:
    """Decides which progress lines are shown and which are sent to Prefect."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._artifact: UUID | None = None
        self._next_update = time.monotonic() + _SHORTEST_SECONDS
        self._next_line = 0.0

    def is_worth_a_line(self, progress: Progress) -> bool:
        """At most one line a second, the last always."""
        now = time.monotonic()
        if now < self._next_line and progress.done < progress.total:
            return False
        self._next_line = now + 1.0
        return True

    def update(self, progress: Progress) -> None:
        """Sends progress to Prefect, unless the last time was too recent for what a call costs."""
        begin = time.monotonic()
        is_last = progress.done >= progress.total
        if begin < self._next_update and not (is_last and self._artifact):
            return
        percent = 100 * progress.done / progress.total
        if self._artifact is None:
            description = f"{self._stage}: {progress.what}"
            artifact = create_progress_artifact(percent, key=artifact_key(self._stage), description=description)
            assert isinstance(artifact, UUID)  # A coroutine is returned to asynchronous callers only.
            self._artifact = artifact
        else:
            update_progress_artifact(self._artifact, percent)
        end = time.monotonic()
        self._next_update = end + max(_SHORTEST_SECONDS, (end - begin) / _SHARE_OF_TIME)


def artifact_key(name: str) -> str:
    """A name as Prefect wants keys: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
