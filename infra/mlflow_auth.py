"""Writes the settings of MLflow's basic authentication from the environment.

`python mlflow_auth.py FILE`, with MLFLOW_AUTH_DATABASE_URI and MLFLOW_AUTH_DEFAULT_PERMISSION set. The administrator is
not part of the file: MLflow takes MLFLOW_AUTH_ADMIN_USERNAME and MLFLOW_AUTH_ADMIN_PASSWORD from the environment, and
creates the user in an empty database only. It runs in the image of the server as well, and so imports nothing.
"""

import configparser
import os
import sys
from pathlib import Path


def write_auth_settings(path: Path, database_uri: str, default_permission: str = "READ") -> None:
    """Writes the file, readable for its owner only, because the address of the database holds a password.

    Args:
        path: Where to.
        database_uri: Of the users and permissions, as SQLAlchemy names it.
        default_permission: What every user may do with everything that no permission names: READ, USE, EDIT, MANAGE or
            NO_PERMISSIONS.
    """
    settings = configparser.ConfigParser()
    settings["mlflow"] = {
        "default_permission": default_permission,
        # In this format a percent sign, as quoted passwords have it, is written twice.
        "database_uri": database_uri.replace("%", "%%"),
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        settings.write(file)


if __name__ == "__main__":
    write_auth_settings(
        Path(sys.argv[1]),
        os.environ["MLFLOW_AUTH_DATABASE_URI"],
        os.environ.get("MLFLOW_AUTH_DEFAULT_PERMISSION", "READ"),
    )
