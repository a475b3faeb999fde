"""Messages to people through Prefect's notification blocks: Slack, mail, Teams, any webhook."""

from typing import Protocol, cast

from prefect.blocks.core import Block

from numprune.errors import NumpruneError


class Notifier(Protocol):
    """What every notification block of Prefect can do."""

    def notify(self, body: str, subject: str | None = None) -> None:
        """Sends a message."""


def load_notifier(slug: str) -> Notifier:
    """The block of a slug such as `slack-webhook/team`, as Prefect's page of blocks shows it.

    Raises:
        NumpruneError: If there is no such block, or it cannot send messages.
    """
    import prefect.blocks.notifications  # noqa: F401 - makes the types of blocks known.

    try:
        block = Block.load(slug)
    except ValueError as error:
        raise NumpruneError(f"The notification block {slug!r} cannot be loaded: {error}") from None
    if not hasattr(block, "notify"):
        raise NumpruneError(f"The block {slug!r} sends no messages: name a notification block.")
    return cast(Notifier, block)
