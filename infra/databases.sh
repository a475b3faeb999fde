#!/bin/bash
# Creates the databases and their owners when PostgreSQL's volume is empty; run by the image of PostgreSQL.
set -euo pipefail

create() {  # owner, password, databases...
    local owner=$1 password=$2
    shift 2
    psql --set=ON_ERROR_STOP=1 --username="${POSTGRES_USER:-postgres}" --set=owner="$owner" --set=password="$password" <<'SQL'
CREATE ROLE :"owner" LOGIN PASSWORD :'password';
SQL
    for database in "$@"; do
        psql --set=ON_ERROR_STOP=1 --username="${POSTGRES_USER:-postgres}" --set=owner="$owner" --set=database="$database" <<'SQL'
CREATE DATABASE :"database" OWNER :"owner";
REVOKE CONNECT ON DATABASE :"database" FROM PUBLIC;
SQL
    done
}

create prefect "$PREFECT_DATABASE_PASSWORD" prefect
create mlflow "$MLFLOW_DATABASE_PASSWORD" mlflow mlflow_auth
create ledger "$LEDGER_DATABASE_PASSWORD" ledger
