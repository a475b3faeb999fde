"""What is known of releases: found, running, done, failed. Any number of watchers and runs on any machine share it.

Every change is one statement whose condition the database checks, so that of several who try, one succeeds.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Engine,
    Float,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    UniqueConstraint,
    and_,
    create_engine,
    insert,
    inspect,
    or_,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.schema import CreateTable

from numprune.errors import NumpruneError
from tasks.download import folder_revision
from tasks.parameters import Download, Parameters, Watch
from tasks.releases.git import main_checkout
from tasks.releases.sources import Release

ADDRESS_VARIABLE = "NUMPRUNE_LEDGER"

FOUND, RUNNING, DONE, FAILED = "found", "running", "done", "failed"

# What failed for no fault of its input is announced again, but not forever.
MAX_ATTEMPTS = 3

# An announcement that nobody took up for so many leases is made again: the watcher died, or the event was lost.
PATIENCE = 10

# They decide where, when and for whom things run, not what comes out; or they name the release itself.
_NOT_SHAPING = {
    "models",
    "downloads",
    "compute",
    "orchestration",
    "registry",
    "promotion",
    "signing",
    "sweep",
    "watch",
    "reference",
}

_METADATA = MetaData()
_RELEASES = Table(
    "releases",
    _METADATA,
    Column("name", String(200), primary_key=True),
    Column("revision", String(64), primary_key=True),
    Column("parameters", String(64), primary_key=True),
    Column("repository", Text),
    Column("folder", Text),
    Column("branch", String(300), nullable=False),
    Column("state", String(10), nullable=False),
    Column("announced", Float, nullable=False),
    Column("owner", String(100)),
    Column("heartbeat", Float),
    Column("attempts", Integer, nullable=False, default=0),
    Column("retryable", Boolean, nullable=False, default=True),
    Column("error", Text),
    UniqueConstraint("branch"),
)
_FOLDERS = Table(
    "folder_revisions",
    _METADATA,
    Column("fingerprint", String(64), primary_key=True),
    Column("revision", String(64), nullable=False),
)

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """What makes a release one row: the model, its exact state, and the parameters that shape results."""

    name: str
    revision: str
    parameters: str


@dataclass(frozen=True)
class Entry:
    """A row of the ledger."""

    key: Key
    release: Release
    branch: str
    state: str
    owner: str | None
    attempts: int
    retryable: bool
    error: str | None


def shaping_hash(parameters: Parameters) -> str:
    """SHA-256 of the parameters that shape results, whatever their order and comments in the file."""
    shaping = parameters.model_dump(mode="json", exclude=_NOT_SHAPING)
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


class Ledger:
    """The table of releases. Clocks of machines that share one must agree to within a part of a lease."""

    def __init__(self, url: str, *, lease_seconds: float) -> None:
        """Opens the database and makes its tables if needed.

        Args:
            url: As SQLAlchemy names it; a relative SQLite path counts from the main checkout, which worktrees share.
            lease_seconds: A run without a sign of life for so long is dead.

        Raises:
            NumpruneError: If the database cannot be opened.
        """
        self.lease_seconds = lease_seconds
        self._engine = _open(url)

    @classmethod
    def of(cls, watch: Watch) -> "Ledger":
        """The ledger of params.yaml, or that of the variable NUMPRUNE_LEDGER: an address can hold a password."""
        return cls(os.environ.get(ADDRESS_VARIABLE, watch.ledger), lease_seconds=watch.lease_seconds)

    def announce(self, release: Release, parameters: str) -> bool:
        """Whether somebody has to be told of a release: it is new, or it was announced and then left lying."""
        key = Key(release.name, release.revision, parameters)
        plain = f"release/{release.name}/{release.revision[:12]}"
        # The branch says the parameters only where the same release was compressed with others before.
        for branch in (plain, f"{plain}-{parameters[:8]}"):
            try:
                with self._engine.begin() as connection:
                    connection.execute(
                        insert(_RELEASES).values(
                            name=key.name,
                            revision=key.revision,
                            parameters=key.parameters,
                            repository=release.download.repository,
                            folder=release.download.folder,
                            branch=branch,
                            state=FOUND,
                            announced=time.time(),
                        )
                    )
            except IntegrityError:
                if self.read(key) is not None:
                    return self._announce_again(key)
            else:
                return True
        raise NumpruneError(f"The ledger has another release on the branch {plain}-{parameters[:8]}.")

    def _announce_again(self, key: Key) -> bool:
        now = time.time()
        left_lying = or_(
            _RELEASES.c.state == FOUND,
            and_(_RELEASES.c.state == RUNNING, _RELEASES.c.heartbeat < now - self.lease_seconds),
            and_(_RELEASES.c.state == FAILED, _RELEASES.c.retryable, _RELEASES.c.attempts < MAX_ATTEMPTS),
        )
        long_ago = _RELEASES.c.announced < now - PATIENCE * self.lease_seconds
        return self._change(and_(_is(key), left_lying, long_ago), announced=now)

    def claim(self, key: Key, owner: str) -> bool:
        """Takes a release up for `owner`, unless it is done or somebody alive works on it."""
        now = time.time()
        free = or_(
            _RELEASES.c.state.in_((FOUND, FAILED)),
            and_(_RELEASES.c.state == RUNNING, _RELEASES.c.heartbeat < now - self.lease_seconds),
        )
        return self._change(
            and_(_is(key), free),
            state=RUNNING,
            owner=owner,
            heartbeat=now,
            attempts=_RELEASES.c.attempts + 1,
            error=None,
        )

    def beat(self, key: Key, owner: str) -> bool:
        """A sign of life; False if the release is no longer this owner's."""
        return self._change(_held(key, owner), heartbeat=time.time())

    def finish(self, key: Key, owner: str) -> bool:
        """Marks a release done; False if it is no longer this owner's."""
        return self._change(_held(key, owner), state=DONE)

    def fail(self, key: Key, owner: str, error: str, *, retryable: bool) -> bool:
        """Marks a release failed; one that is `retryable` is announced again a few times."""
        return self._change(_held(key, owner), state=FAILED, error=error, retryable=retryable, announced=time.time())

    def give_back(self, key: Key, owner: str) -> bool:
        """Leaves a release to the next run: this one was asked to stop."""
        return self._change(_held(key, owner), state=FOUND, announced=time.time(), attempts=_RELEASES.c.attempts - 1)

    def read(self, key: Key) -> Entry | None:
        """One row, None if there is none."""
        with self._engine.connect() as connection:
            row = connection.execute(select(_RELEASES).where(_is(key))).one_or_none()
        return None if row is None else _entry(row)

    def unfinished(self, parameters: str) -> list[Entry]:
        """What is left to do with these parameters, in the order of its announcement."""
        worth_a_try = or_(
            _RELEASES.c.state.in_((FOUND, RUNNING)),
            and_(_RELEASES.c.state == FAILED, _RELEASES.c.retryable, _RELEASES.c.attempts < MAX_ATTEMPTS),
        )
        query = select(_RELEASES).where(_RELEASES.c.parameters == parameters, worth_a_try)
        with self._engine.connect() as connection:
            return [_entry(row) for row in connection.execute(query.order_by(_RELEASES.c.announced))]

    def folder_revision(self, folder: Path) -> str:
        """As `tasks.download.folder_revision`, but a folder whose files did not change is not read again.

        Raises:
            NumpruneError: If weights are missing or truncated, or there are only pickles.
        """
        fingerprint = _fingerprint(folder)
        known = select(_FOLDERS.c.revision).where(_FOLDERS.c.fingerprint == fingerprint)
        with self._engine.connect() as connection:
            revision = connection.execute(known).scalar_one_or_none()
        if revision is None:
            revision = folder_revision(folder)
            if _fingerprint(folder) != fingerprint:
                return revision  # It changed while it was read.
            try:
                with self._engine.begin() as connection:
                    connection.execute(insert(_FOLDERS).values(fingerprint=fingerprint, revision=revision))
            except IntegrityError:
                _LOG.debug("Another watcher read %s at the same time.", folder)
        return revision

    def _change(self, condition: ColumnElement[bool], **values: object) -> bool:
        with self._engine.begin() as connection:
            return connection.execute(update(_RELEASES).where(condition).values(**values)).rowcount == 1


def _open(url: str) -> Engine:
    try:
        address = make_url(url)
        options = {}
        if address.get_backend_name() == "sqlite" and address.database:
            path = main_checkout(Path()) / address.database if not Path(address.database).is_absolute() else None
            address = address if path is None else address.set(database=str(path))
            Path(str(address.database)).parent.mkdir(parents=True, exist_ok=True)
            options = {"timeout": 30}  # Seconds to wait while another process writes.
        engine = create_engine(address, connect_args=options)
        _make_tables(engine)
    except (SQLAlchemyError, ImportError) as error:
        raise NumpruneError(f"watch.ledger: cannot open {_without_password(url)}: {error}") from None
    return engine


def _make_tables(engine: Engine) -> None:
    if inspect(engine).has_table(_FOLDERS.name):
        return
    for table in (_RELEASES, _FOLDERS):
        try:
            with engine.begin() as connection:
                connection.execute(CreateTable(table, if_not_exists=True))
        except SQLAlchemyError:
            # PostgreSQL lets two who create the same table at once collide.
            if not inspect(engine).has_table(table.name):
                raise


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "the address"


def _is(key: Key) -> ColumnElement[bool]:
    return and_(
        _RELEASES.c.name == key.name, _RELEASES.c.revision == key.revision, _RELEASES.c.parameters == key.parameters
    )


def _held(key: Key, owner: str) -> ColumnElement[bool]:
    return and_(_is(key), _RELEASES.c.state == RUNNING, _RELEASES.c.owner == owner)


def _entry(row: "Row[tuple[object, ...]]") -> Entry:
    return Entry(
        key=Key(row.name, row.revision, row.parameters),
        release=Release(row.name, Download(repository=row.repository, folder=row.folder, revision=row.revision)),
        branch=row.branch,
        state=row.state,
        owner=row.owner,
        attempts=row.attempts,
        retryable=row.retryable,
        error=row.error,
    )


def _fingerprint(folder: Path) -> str:
    def describe() -> Iterator[str]:
        for path in sorted(folder.iterdir()):
            status = path.stat()
            yield f"{path}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"

    return hashlib.sha256("\n".join(describe()).encode()).hexdigest()
