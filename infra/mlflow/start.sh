#!/bin/sh
# Starts MLflow with basic authentication; addresses and passwords come from the environment.
set -eu
MLFLOW_AUTH_CONFIG_PATH="$HOME/basic_auth.ini"
export MLFLOW_AUTH_CONFIG_PATH
python /opt/numprune/mlflow_auth.py "$MLFLOW_AUTH_CONFIG_PATH"
exec mlflow server --app-name basic-auth --host 0.0.0.0 --port 5000 --workers 1
