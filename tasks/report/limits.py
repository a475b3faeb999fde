"""The limits of `params.yaml`, section `promotion`, held against a run by the same rules as at its promotion."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.parameters import Promotion
from tasks.registry.figures import metrics
from tasks.registry.policy import Criterion, Figures, evaluate

# The line of the table that a criterion is about; a drop of accuracy is about the task's.
_LINES = {
    "perplexity": "Perplexity",
    "perplexity ratio": "Perplexity",
    "speed-up": "Tokens per second",
    "peak memory": "Peak memory",
}


@dataclass(frozen=True)
class Check:
    """One limit.

    Attributes:
        metric: What is limited; a line of the table has the same name.
        criterion: What was required and found.
    """

    metric: str
    criterion: Criterion


def check_limits(documents: Mapping[str, Mapping[str, Any]], promotion: Promotion) -> list[Check]:
    """All limits on a run's own figures that are not null; how it compares with a champion is left to the registry.

    Args:
        documents: As `tasks.registry.figures.metrics` takes them.
        promotion: The limits.
    """
    own = promotion.model_copy(update={"undominated": False})
    criteria = evaluate(own, Figures(metrics(documents), protocol=""), champion=None)
    return [Check(_LINES.get(c.name, c.name.removeprefix("accuracy drop ")), c) for c in criteria]
