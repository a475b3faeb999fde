"""The events that start flows: `prefect.yaml` names them as triggers."""

from prefect.events import emit_event

from tasks.releases.ledger import Key

RELEASE_FOUND = "numprune.release.found"
VERSION_REGISTERED = "numprune.version.registered"


def release_found(key: Key) -> None:
    """Says that a release waits to be compressed; the deployment `release` takes it up."""
    emit_event(
        RELEASE_FOUND,
        resource={
            "prefect.resource.id": f"numprune.release.{key.name}.{key.revision}",
            "prefect.resource.name": f"{key.name} {key.revision[:12]}",
        },
        payload={"name": key.name, "revision": key.revision, "parameters": key.parameters},
    )


def version_registered(model: str, version: int) -> None:
    """Says that a version is in the registry; the deployment `promote` puts it to the gate."""
    emit_event(
        VERSION_REGISTERED,
        resource={
            "prefect.resource.id": f"numprune.version.{model}.{version}",
            "prefect.resource.name": f"{model} version {version}",
        },
        payload={"model": model, "version": version},
    )
