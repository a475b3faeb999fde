"""Put a registered version to the gate and make it the champion: the deployment `promote` (see prefect.yaml).

What a version has to reach stands in params.yaml under `promotion`. A refusal is no failure: the run is completed and
named Refused.
"""

from typing import TYPE_CHECKING, Any

from flows.environment import prepare_environment

prepare_environment()

from prefect import flow, get_run_logger, pause_flow_run  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.input import RunInput  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.states import Completed, Failed  # noqa: E402

from flows.notification import load_notifier  # noqa: E402
from flows.stages import Ending  # noqa: E402
from numprune.errors import NumpruneError  # noqa: E402

if TYPE_CHECKING:
    from tasks.registry.promote import Decision


# Others may be faster so many times in a row: more budgets than that are seldom registered at once.
_ATTEMPTS = 5


class Approval(RunInput):
    """What a person decides about a version that the gate lets through."""

    approve: bool
    by: str
    reason: str = ""


@flow(name="promote", persist_result=False)
def promote(
    model: str,
    alias: str = "candidate",
    approval: bool = False,
    notify: str | None = None,
    approval_hours: float = 72,
) -> State[Any]:
    """Verifies a version, puts it to the gate, and makes it the champion if it passes.

    Args:
        model: A registered model, or one version of it as `MODEL/3` or `MODEL@alias`.
        alias: Which version, where `model` does not say.
        approval: Whether a person has to agree: the run pauses until it is resumed on Prefect's page.
        notify: Slug of a Prefect notification block that is told how it ended, such as `slack-webhook/team`.
        approval_hours: How long the run waits for a person; after that it fails and nothing has changed.
    """
    reference = model if "/" in model or "@" in model else f"{model}@{alias}"
    try:
        notifier = load_notifier(notify) if notify else None
        state = _promote(reference, approval, approval_hours)
    except NumpruneError as error:
        return Failed(name=Ending.REJECTED.value, message=str(error))
    get_run_logger().info(state.message)
    if notifier is not None:
        notifier.notify(f"{reference}: {state.message}", subject=f"numprune: {reference} {str(state.name).lower()}")
    return state


def _promote(reference: str, approval: bool, approval_hours: float) -> State[Any]:
    from tasks.registry.promote import promote as decide

    by, reason = f"Prefect flow run {flow_run.name} ({flow_run.id})", "The gate let it through."
    if approval:
        preview = decide(reference, by=by, reason=reason, dry_run=True)
        if preview.outcome != "accepted":
            return _state(preview)
        description = f"Make {reference} the champion? {_describe(preview)}"
        question = Approval.with_initial_data(description=description, approve=False)
        answer = pause_flow_run(wait_for_input=question, timeout=int(3600 * approval_hours), poll_interval=5)
        if not answer.approve:
            return Completed(name="Declined", message=f"Declined by {answer.by}: {answer.reason}")
        by, reason = answer.by, answer.reason or "Approved."
    # Verified and measured against the champion of this moment, whatever happened while the run was paused. Versions of
    # one release are registered, and promoted, at the same time: whoever was overtaken looks at the new champion.
    for _ in range(_ATTEMPTS):
        decision = decide(reference, by=by, reason=reason)
        if not decision.overtaken:
            break
    return _state(decision)


def _state(decision: "Decision") -> State[Any]:
    names = {"accepted": "Promoted", "refused": "Refused", "unchanged": Ending.UNCHANGED.value}
    return Completed(name=names[decision.outcome], message=_describe(decision))


def _describe(decision: "Decision") -> str:
    lines = [f"{decision.model} version {decision.version}: {decision.outcome}."]
    lines += [
        f"{'passed' if criterion.passed else 'FAILED'}: {criterion.name} {criterion.value}, limit {criterion.limit}: "
        f"{criterion.why}"
        for criterion in decision.criteria
    ]
    return "\n".join(lines)
