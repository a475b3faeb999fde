"""Creates the buckets of MLflow's artifacts and of DVC's cache where they are missing: `python buckets.py`.

Server and keys come from the environment: AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY. It runs in the
image of the MLflow server as well, and so imports nothing of this package.
"""

from collections.abc import Mapping

MLFLOW_BUCKET = "mlflow"
DVC_BUCKET = "dvc"


def create_buckets(environment: Mapping[str, str] | None = None) -> None:
    """Creates what is missing.

    Args:
        environment: Where address and keys are looked up; None: in that of the process.
    """
    import boto3

    names = {
        "endpoint_url": "AWS_ENDPOINT_URL_S3",
        "aws_access_key_id": "AWS_ACCESS_KEY_ID",
        "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
        "region_name": "AWS_DEFAULT_REGION",
    }
    given = {} if environment is None else {argument: environment[name] for argument, name in names.items()}
    client = boto3.client("s3", **given)
    present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for bucket in (MLFLOW_BUCKET, DVC_BUCKET):
        if bucket not in present:
            client.create_bucket(Bucket=bucket)


if __name__ == "__main__":
    create_buckets()
