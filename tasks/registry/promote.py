"""Promotion: a version becomes the champion if it is what it claims to be and meets the policy; and the way back."""

import contextlib
import getpass
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from numprune.errors import NumpruneError
from tasks.parameters import Parameters, load_parameters
from tasks.provenance.verify import Disagreement, verify_version
from tasks.registry import promotion_log
from tasks.registry.connection import connect, find_registry
from tasks.registry.policy import Criterion, Figures, evaluate
from tasks.registry.promotion_log import Action, Promotion, read_promotions, settle_aliases
from tasks.registry.references import get_version, resolve
from tasks.registry.version_folder import local_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE = "candidate"

# The criterion that nobody else was faster.
_OVERTAKEN = "champion"
# The table of criteria names the first of them.
_SHOWN = 3


@dataclass(frozen=True)
class Decision:
    """What became of a promotion or a rollback.

    Attributes:
        model: The registered model.
        version: What was to become the champion.
        champion: The champion before; None if there was none.
        criteria: What was required and found; empty if the version was the champion already.
        outcome: `accepted`: it is the champion now, or would be without `dry_run`; `refused`: nothing was changed;
            `unchanged`: it was the champion already.
        dry_run: Whether nothing was to be changed in any case.
    """

    model: str
    version: int
    champion: int | None
    criteria: tuple[Criterion, ...]
    outcome: Literal["accepted", "refused", "unchanged"]
    dry_run: bool

    @property
    def overtaken(self) -> bool:
        """Whether all that refused it is another champion, made while this version was looked at."""
        return [criterion.name for criterion in self.criteria if not criterion.passed] == [_OVERTAKEN]

    @property
    def promoted(self) -> bool:
        """Whether this call made the version the champion."""
        return self.outcome == "accepted" and not self.dry_run


def promote(
    reference: str, *, by: str | None = None, reason: str = "", dry_run: bool = False, registry: str | None = None
) -> Decision:
    """Makes a version the champion if it can be verified and meets the policy of params.yaml.

    Args:
        reference: MODEL, which stands for MODEL@candidate, MODEL@alias or MODEL/3.
        by: Who decides; by default the login name.
        reason: Why, for the log.
        dry_run: Only say what would be.
        registry: Address of MLflow, if not that of params.yaml.

    Raises:
        NumpruneError: If there is no such version, or params.yaml is missing or wrong.
    """
    parameters = load_parameters()
    client = connect(find_registry(registry))
    version = resolve(client, reference, default=CANDIDATE)
    if not dry_run:
        settle_aliases(client, version.name)
    seen = read_promotions(client, version.name)
    before = promotion_log.champion(seen)
    if before == int(version.version):
        return Decision(version.name, before, before, (), "unchanged", dry_run)
    champion = None if before is None else figures(client, get_version(client, version.name, before))
    criteria = [
        *_check(client, version, parameters),
        *evaluate(parameters.promotion, figures(client, version), champion),
    ]
    return _decide(client, parameters, version, seen, criteria, action="promote", by=by, reason=reason, dry_run=dry_run)


def rollback(
    model: str, *, by: str | None = None, reason: str = "", dry_run: bool = False, registry: str | None = None
) -> Decision:
    """Makes the champion before the present one the champion again, if it can still be verified.

    Figures are not compared again: it met the policy of its day, and a rollback must not wait for a discussion.

    Args:
        model: The registered model.
        by: Who decides; by default the login name.
        reason: Why, for the log.
        dry_run: Only say what would be.
        registry: Address of MLflow, if not that of params.yaml.

    Raises:
        NumpruneError: If there is no such model, or it never had another champion.
    """
    parameters = load_parameters()
    client = connect(find_registry(registry))
    seen = read_promotions(client, model)
    number = promotion_log.previous(seen)
    if number is None:
        raise NumpruneError(f"{model} has no champion before the present one: there is nothing to go back to.")
    if not dry_run:
        settle_aliases(client, model)
    version = get_version(client, model, number)
    criteria = _check(client, version, parameters)
    return _decide(
        client, parameters, version, seen, criteria, action="rollback", by=by, reason=reason, dry_run=dry_run
    )


def figures(client: "MlflowClient", version: "ModelVersion") -> Figures:
    """What was measured of a version."""
    metrics = client.get_run(version.run_id).data.metrics if version.run_id else {}
    return Figures(metrics, version.tags.get("protocol_hash", ""))


def _check(client: "MlflowClient", version: "ModelVersion", parameters: Parameters) -> list[Criterion]:
    """Whether the version is what it claims to be, and signed if that is required."""
    signed = parameters.promotion.signed
    with tempfile.TemporaryDirectory(prefix="numprune-") as temporary:
        folder = local_folder(client, version, Path(temporary))
        found = verify_version(client, version, folder, parameters.signing, signature_required=signed)
    criteria = [_verified(found)]
    if signed:
        wrong = [disagreement for disagreement in found if disagreement.where == "model.sig"]
        value = "; ".join(disagreement.what for disagreement in wrong) or "signed"
        criteria.append(Criterion("signature", value, "by signing.public_key", passed=not wrong))
    return criteria


def _verified(found: Sequence[Disagreement]) -> Criterion:
    value = f"{len(found)} disagreement(s)" if found else "all agrees"
    why = "; ".join(map(str, found[:_SHOWN])) + ("; ..." if len(found) > _SHOWN else "")
    return Criterion("verified", value, "no disagreement", passed=not found, why=why)


def _decide(
    client: "MlflowClient",
    parameters: Parameters,
    version: "ModelVersion",
    seen: Sequence[Promotion],
    criteria: list[Criterion],
    *,
    action: Action,
    by: str | None,
    reason: str,
    dry_run: bool,
) -> Decision:
    number, before = int(version.version), promotion_log.champion(seen)
    accepted = all(criterion.passed for criterion in criteria)
    if accepted and not dry_run:
        effective = promotion_log.append(
            client,
            parameters.signing,
            seen=seen,
            version=version,
            action=action,
            by=by or _login_name(),
            reason=reason,
            criteria=criteria,
        )
        settle_aliases(client, version.name)
        if not effective:
            now = promotion_log.champion(read_promotions(client, version.name))
            if now == number:
                return Decision(version.name, number, before, (), "unchanged", dry_run)
            accepted = False
            why = "somebody else was faster: look at the new champion and try again"
            criteria.append(Criterion(_OVERTAKEN, f"version {now}", f"version {before or 'none'}", False, why))
    return Decision(version.name, number, before, tuple(criteria), "accepted" if accepted else "refused", dry_run)


def _login_name() -> str:
    with contextlib.suppress(OSError, KeyError):  # A container's user may have no name.
        return getpass.getuser()
    return "unknown"
