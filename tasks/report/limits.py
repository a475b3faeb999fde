"""The limits that `params.yaml` states in its section `promotion`, held against a run."""

from collections.abc import Iterator
from dataclasses import dataclass

from numprune.budget import parse_budget, readable
from tasks.parameters import Promotion
from tasks.report.results import Results


@dataclass(frozen=True)
class Check:
    """One limit.

    Attributes:
        metric: What is limited; a line of the table has the same name.
        found: As text.
        limit: As text.
        met: Whether it holds.
    """

    metric: str
    found: str
    limit: str
    met: bool


def check_limits(results: Results, promotion: Promotion) -> list[Check]:
    """All limits on a run's own metrics that are not null."""
    return list(_checks(results, promotion))


def _checks(results: Results, promotion: Promotion) -> Iterator[Check]:
    perplexity, ratio = results.pruned["perplexity"], results.perplexity_ratio
    if (most := promotion.max_perplexity) is not None:
        yield Check("Perplexity", f"{perplexity:.2f}", f"at most {most:g}", perplexity <= most)
    if (most := promotion.max_perplexity_ratio) is not None:
        yield Check("Perplexity", f"{ratio:.3f} × the dense model's", f"at most {most:g} ×", ratio <= most)
    if (most := promotion.max_accuracy_drop) is not None:
        for task, figures in results.pruned["tasks"].items():
            drop, error = -figures["against_dense"]["difference"], figures["against_dense"]["stderr"]
            margin = promotion.standard_errors * error
            limit = (
                f"at most {most:.1%} less, give or take {promotion.standard_errors:g} standard errors of {error:.1%}"
            )
            yield Check(task, f"{-drop:+.1%}", limit, drop - most <= margin)
    if (least := promotion.min_speed_up) is not None:
        yield Check(
            "Tokens per second", f"{results.speed_up:.2f} ×", f"at least {least:g} ×", results.speed_up >= least
        )
    if promotion.max_memory is not None:
        peak = results.benchmark["pruned"]["peak_memory_bytes"]
        within = peak <= parse_budget(f"memory-{promotion.max_memory}").value
        yield Check("Peak memory", readable(peak, "memory"), f"at most {promotion.max_memory}", within)
