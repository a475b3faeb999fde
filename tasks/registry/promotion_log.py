"""The append-only log of promotions, from which the aliases `champion` and `previous` follow.

MLflow has no compare-and-set: two processes that read an alias and then set it overwrite each other. What it has that
is atomic is the numbering of the versions of a registered model, which its database enforces. The log is therefore a
registered model of its own, and each record a version of it, written with all its tags in one transaction. A record
says in `after` which number was the last when its writer looked. It has an effect only if its own number is the next
one: then nothing happened in between. Otherwise somebody else was faster; the record stays, without effect.

Each record holds the SHA-256 of the one before it, so that none can be changed later without changing all that follow,
and a signature where a key is configured. Deleted records leave gaps, because MLflow gives no number twice.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, get_args

from numprune.errors import NumpruneError
from tasks.parameters import Signing
from tasks.provenance.signing import check_record_signature, sign_record
from tasks.registry.connection import all_pages
from tasks.registry.policy import Criterion
from tasks.registry.references import get_version

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

LOG = "numprune-promotions"
CHAMPION = "champion"
PREVIOUS = "previous"

Action = Literal["promote", "rollback"]

_DESCRIPTION = (
    "The log of promotions of all models: each version is one record, and nothing to load. The aliases champion and "
    "previous of a model follow from it. Written by numprune promote and numprune rollback; never edit or delete it."
)
_RECORD, _SIGNATURE = "record", "signature"
# Others may be faster so many times in a row; a record takes milliseconds, a promotion happens a few times a day.
_ATTEMPTS = 50


@dataclass(frozen=True)
class Promotion:
    """A record of the log.

    Attributes:
        number: Its place in the log, from 1.
        after: The last number of the log when the writer looked.
        model: The registered model.
        version: The one that was to become champion.
        statement_hash: Of that version.
        action: A promotion, or a rollback to the version that was champion before.
        replaced: The champion until then; None if there was none.
        by: Who did it.
        at: When, in UTC, as in ISO 8601.
        reason: Why, in that person's words.
        criteria: What the gate found.
        chain: SHA-256 of the record before this one; empty for the first.
        text: The record as it was written, which hash and signature are over.
        signature: Over the text; None if there was no key.
        effective: Whether nothing came between the look and the record.
    """

    number: int
    after: int
    model: str
    version: int
    statement_hash: str
    action: Action
    replaced: int | None
    by: str
    at: str
    reason: str
    criteria: tuple[Criterion, ...]
    chain: str
    text: str
    signature: str | None

    @property
    def effective(self) -> bool:
        """Whether nothing came between the look and the record."""
        return self.number == self.after + 1


def read_promotions(client: "MlflowClient", model: str) -> list[Promotion]:
    """All readable records of a model in their order, those without effect included."""
    return [record for record in _read(_records(client)) if record.model == model]


def champion(promotions: Iterable[Promotion]) -> int | None:
    """The version that is champion after these records of one model; None if there is none."""
    line = _line(promotions)
    return line[-1] if line else None


def previous(promotions: Iterable[Promotion]) -> int | None:
    """The version that a rollback goes to after these records of one model; None if there is none."""
    line = _line(promotions)
    return line[-2] if len(line) > 1 else None


def append(
    client: "MlflowClient",
    signing: Signing,
    *,
    seen: Sequence[Promotion],
    version: "ModelVersion",
    action: Action,
    by: str,
    reason: str,
    criteria: Iterable[Criterion],
) -> bool:
    """Adds a record; returns whether it has an effect.

    Args:
        client: Of the registry.
        signing: The key, if there is one.
        seen: The records of the model that the decision rests on; with another one since then, there is no effect.
        version: What becomes champion.
        action: How.
        by: Who did it.
        reason: Why.
        criteria: What the gate found.
    """
    decided_on = [record.number for record in seen if record.effective]
    for _ in range(_ATTEMPTS):
        records = _records(client)
        now = [record.number for record in _read(records) if record.model == version.name and record.effective]
        if now != decided_on:
            return False
        last = records[-1] if records else None
        after = int(last.version) if last else 0
        content = {
            "after": after,
            "model": version.name,
            "version": int(version.version),
            "statement_hash": version.tags.get("statement_hash", ""),
            "action": action,
            "replaced": champion(seen),
            "by": by,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "reason": reason,
            "criteria": [asdict(criterion) for criterion in criteria],
            "chain": _digest(last) if last else "",
        }
        text = json.dumps(content, indent=1, ensure_ascii=False)
        tags = {_RECORD: text}
        if signing.key is not None:
            tags[_SIGNATURE] = sign_record(text.encode(), signing)
        if not records:
            _create_log(client)
        source = f"models:/{version.name}/{version.version}"
        if int(client.create_model_version(LOG, source=source, tags=tags).version) == after + 1:
            return True
        # A record of another model, perhaps: look again.
    raise NumpruneError(f"Others write to {LOG} all the time: nothing was changed. Try again.")


def settle_aliases(client: "MlflowClient", model: str) -> None:
    """Brings the aliases `champion` and `previous` up to the log, where a crash left them behind it.

    An alias that never followed from the log stays as it is: `check_log` says so, and a person has to look.
    """
    # Who sets an alias looks at the log again afterwards. So the last one to set it knows all records before.
    while _settle_once(client, model):
        pass


def check_log(client: "MlflowClient", model: str, signing: Signing) -> list[str]:
    """What is wrong with the log as a whole, or with the records and aliases of one model; one line each.

    Without `signing.public_key` signatures are not checked.
    """
    records = _records(client)
    numbers = [int(record.version) for record in records]
    problems = [
        f"record {number} is missing: it was deleted"
        for number in range(1, max(numbers, default=0))
        if number not in numbers
    ]
    problems += [
        line for record, before in zip(records, [None, *records], strict=False) for line in _faults(record, before)
    ]
    if signing.public_key is not None:
        problems += [line for record in records for line in _signature_faults(record, signing)]
    own = [record for record in _read(records) if record.model == model]
    return [*problems, *_rollback_faults(own), *_version_faults(client, own), *_alias_faults(client, model, own)]


def _line(promotions: Iterable[Promotion]) -> list[int]:
    """The champions of one model, the present one last; a rollback takes the last one away."""
    line: list[int] = []
    for record in promotions:
        if not record.effective:
            continue
        if record.action == "promote":
            line.append(record.version)
        elif line[-2:-1] == [record.version]:
            line.pop()
    return line


def _records(client: "MlflowClient") -> list["ModelVersion"]:
    found = all_pages(lambda token: client.search_model_versions(f"name = '{LOG}'", page_token=token))
    return sorted(found, key=lambda record: int(record.version))


def _read(records: Iterable["ModelVersion"]) -> list[Promotion]:
    parsed = (_parse(record) for record in records)
    return [promotion for promotion in parsed if promotion is not None]


def _parse(record: "ModelVersion") -> Promotion | None:
    text = record.tags.get(_RECORD, "")
    try:
        content: dict[str, Any] = json.loads(text)
        if not (isinstance(content["after"], int) and isinstance(content["version"], int)):
            return None
        content["criteria"] = tuple(Criterion(**criterion) for criterion in content["criteria"])
        promotion = Promotion(number=int(record.version), text=text, signature=record.tags.get(_SIGNATURE), **content)
    except (ValueError, TypeError, KeyError):
        return None
    return promotion if promotion.action in get_args(Action) else None


def _digest(record: "ModelVersion") -> str:
    return hashlib.sha256(record.tags.get(_RECORD, "").encode()).hexdigest()


def _create_log(client: "MlflowClient") -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(LOG, description=_DESCRIPTION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _settle_once(client: "MlflowClient", model: str) -> bool:
    from mlflow.exceptions import MlflowException

    promotions = [record for record in read_promotions(client, model) if record.effective]
    if not promotions:
        return False
    before = promotions[:-1]
    aliases = _aliases(client, model)
    changed = False
    for alias, wanted, was in (
        (CHAMPION, champion(promotions), champion(before)),
        (PREVIOUS, previous(promotions), previous(before)),
    ):
        # Behind is what was right before the last record, or missing. Everything else was set by hand.
        if aliases.get(alias) == wanted or aliases.get(alias) not in (was, None):
            continue
        try:
            if wanted is None:
                client.delete_registered_model_alias(model, alias)
            else:
                client.set_registered_model_alias(model, alias, str(wanted))
        except MlflowException as error:
            if _aliases(client, model).get(alias) == aliases.get(alias):
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    continue  # The version was deleted, which check_log reports.
                raise
            # Somebody else set it at the same moment, which MLflow takes for an error: look again.
        changed = True
    return changed


def _aliases(client: "MlflowClient", model: str) -> dict[str, int]:
    return {alias: int(number) for alias, number in client.get_registered_model(model).aliases.items()}


def _faults(record: "ModelVersion", before: "ModelVersion | None") -> list[str]:
    promotion = _parse(record)
    if promotion is None:
        return [f"record {record.version} cannot be read"]
    faults = []
    if record.source != f"models:/{promotion.model}/{promotion.version}":
        faults.append(
            f"record {record.version} promotes {promotion.model}/{promotion.version} and names {record.source}"
        )
    # A record without effect followed one that is not its neighbour.
    if promotion.effective and promotion.chain != (_digest(before) if before else ""):
        faults.append(f"record {record.version} does not follow the record before it: one of the two was changed")
    return faults


def _signature_faults(record: "ModelVersion", signing: Signing) -> list[str]:
    signature = record.tags.get(_SIGNATURE)
    if signature is None:
        return [f"record {record.version} is not signed"]
    if not check_record_signature(record.tags.get(_RECORD, "").encode(), signature, signing):
        return [f"record {record.version}: its signature does not hold"]
    return []


def _rollback_faults(promotions: Sequence[Promotion]) -> list[str]:
    return [
        f"record {record.number} is a rollback to version {record.version}, which was not the champion before"
        for index, record in enumerate(promotions)
        if record.effective and record.action == "rollback" and previous(promotions[:index]) != record.version
    ]


def _version_faults(client: "MlflowClient", promotions: Sequence[Promotion]) -> list[str]:
    """Whether the champion and the one before are still the versions that were promoted."""
    faults = []
    for number in {champion(promotions), previous(promotions)} - {None}:
        record = next(p for p in reversed(promotions) if p.effective and p.version == number)
        try:
            version = get_version(client, record.model, record.version)
        except NumpruneError:
            faults.append(f"version {number}, which record {record.number} promoted, was deleted")
            continue
        if version.tags.get("statement_hash", "") != record.statement_hash:
            faults.append(
                f"version {number} is not the one that record {record.number} promoted: its statement differs"
            )
    return faults


def _alias_faults(client: "MlflowClient", model: str, promotions: Sequence[Promotion]) -> list[str]:
    aliases = _aliases(client, model)
    faults = []
    for alias, wanted in ((CHAMPION, champion(promotions)), (PREVIOUS, previous(promotions))):
        found = aliases.get(alias)
        if found == wanted:
            continue
        stands, follows = (f"version {number}" if number else "nothing" for number in (found, wanted))
        faults.append(
            f"the alias {alias} points at {stands}; from the log follows {follows}. If a promotion was interrupted, "
            "the next one mends it; if the alias was set by hand, delete it in MLflow"
        )
    return faults
