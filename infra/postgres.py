"""A PostgreSQL server of one's own in a folder, from the distribution's packages."""

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.processes import HOST, Server, check_port, program, start
from numprune.errors import NumpruneError

_INSTALL = (
    "install PostgreSQL from your distribution (Debian: apt install postgresql) and put initdb and postgres on PATH"
)
_OWNER = "numprune"
# A socket's path must fit into 108 bytes, its name `.s.PGSQL.65535` included.
_LONGEST_FOLDER = 108 - len("/.s.PGSQL.65535") - 1


@dataclass(frozen=True)
class Database:
    """A PostgreSQL server that answers."""

    port: int
    password: str

    def url(self, database: str, driver: str = "postgresql") -> str:
        """As SQLAlchemy names it, such as `postgresql+asyncpg://…` with the driver `postgresql+asyncpg`."""
        return f"{driver}://{_OWNER}:{self.password}@{HOST}:{self.port}/{database}"


def start_postgres(folder: Path, port: int, password: str, databases: Sequence[str]) -> tuple[Server, Database]:
    """Starts PostgreSQL on a folder, which is made into a cluster the first time, and creates missing databases.

    It listens on 127.0.0.1 and on a Unix socket in the folder, and asks everybody for the password. As root it runs
    under the user `postgres` or `nobody`, because PostgreSQL refuses to run as root.

    Args:
        folder: Holds data, socket and log.
        port: On 127.0.0.1.
        password: Of the owner of all databases. It is set when the folder is made.
        databases: Names of databases.

    Raises:
        NumpruneError: If PostgreSQL is not installed, the folder cannot be used, or the server does not start.
    """
    check_port(port, "PostgreSQL")
    initdb, postgres = program("initdb", _INSTALL), program("postgres", _INSTALL)
    folder = folder.resolve()
    if len(os.fsencode(folder)) > _LONGEST_FOLDER:
        raise NumpruneError(f"{folder} is too long for PostgreSQL's socket: choose a folder with a shorter path.")
    user = _user()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "postgres.log"
    log.touch()
    if user is not None:
        for path in (folder, log):
            shutil.chown(path, user, pwd.getpwnam(user).pw_gid)
        _check_reachable(folder, user)
    data = folder / "data"
    if not (data / "PG_VERSION").exists():
        _create(initdb, data, password, user, log)
    command = [postgres, "-D", str(data), "-p", str(port), "-k", str(folder), "-c", f"listen_addresses={HOST}"]
    # SIGINT is PostgreSQL's fast shutdown: it does not wait until its clients leave.
    server = start(
        "PostgreSQL",
        command,
        log=log,
        environment={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        user=user,
        folder=folder,
        end_with=signal.SIGINT,
    )
    database = Database(port, password)
    try:
        server.wait_until(lambda: _connects(database), timeout=60)
        _create_databases(database, databases)
    except BaseException:
        server.end()
        raise
    return server, database


def _user() -> str | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise NumpruneError(
        "PostgreSQL does not run as root, and there is no user postgres or nobody: run as another user."
    )


def _check_reachable(folder: Path, user: str) -> None:
    identity = pwd.getpwnam(user)
    found = subprocess.run(["test", "-w", folder], user=user, group=identity.pw_gid, extra_groups=[], check=False)
    if found.returncode != 0:
        raise NumpruneError(
            f"PostgreSQL does not run as root, and the user {user}, under whom it would run, cannot reach {folder}: "
            "run as a user who is not root, or choose a folder whose parents everybody may enter (chmod o+x)."
        )


def _create(initdb: str, data: Path, password: str, user: str | None, log: Path) -> None:
    # Neither on the command line nor in the environment, where other users could read it.
    password_file = data.parent / "password"
    password_file.touch(mode=0o600)
    try:
        password_file.write_text(password, encoding="utf-8")
        if user is not None:
            shutil.chown(password_file, user)
        command = [initdb, "-D", str(data), "-U", _OWNER, "--auth=scram-sha-256", f"--pwfile={password_file}"]
        # The locale C sorts alike everywhere, and an upgrade of the system's C library does not spoil indexes.
        command += ["--encoding=UTF8", "--locale=C"]
        step = start(
            "initdb",
            command,
            log=log,
            environment={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            user=user,
            folder=data.parent,
        )
        try:
            code = step.process.wait(120)
        finally:
            step.end()
    finally:
        password_file.unlink()
    if code != 0:
        shutil.rmtree(data, ignore_errors=True)
        raise NumpruneError(f"initdb failed with code {code}: see {log}.")


def _connects(database: Database) -> bool:
    import psycopg2

    try:
        psycopg2.connect(database.url("postgres"), connect_timeout=2).close()
    except psycopg2.OperationalError as error:
        if "password authentication failed" in str(error):
            raise NumpruneError(
                "PostgreSQL refuses the password: the folder was made with another one. Restore its secrets file."
            ) from None
        return False
    return True


def _create_databases(database: Database, names: Sequence[str]) -> None:
    import psycopg2
    from psycopg2 import sql

    connection = psycopg2.connect(database.url("postgres"))
    try:
        connection.autocommit = True  # CREATE DATABASE runs in no transaction.
        with connection.cursor() as cursor:
            cursor.execute("SELECT datname FROM pg_database")
            present = {name for (name,) in cursor.fetchall()}
            for name in names:
                if name not in present:
                    cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    finally:
        connection.close()
