"""A run in plain words."""

from collections.abc import Iterator

from numprune.budget import readable
from tasks.report.results import Results


def sentences(results: Results) -> list[str]:
    """What was removed, what it costs in quality, and what it gains."""
    return [_removed(results), _quality(results), *_accuracy(results), _speed(results), _memory(results)]


def _removed(results: Results) -> str:
    dense, pruned = results.benchmark["dense"], results.benchmark["pruned"]
    parameters = [readable(side["parameters"], "parameters") for side in (pruned, dense)]
    size = [readable(side["checkpoint_bytes"], "size") for side in (dense, pruned)]
    return (
        f"{results.plan.achieved_ratio:.1%} of the attention and MLP parameters are gone. {parameters[0]} of the whole "
        f"model's {parameters[1]} parameters are left, and its weights shrink from {size[0]} to {size[1]}."
    )


def _quality(results: Results) -> str:
    dense, pruned = results.dense["perplexity"], results.pruned["perplexity"]
    without = results.pruned["perplexity_without_compensation"]
    subject = "images" if "images" in results.pruned else "text"
    said = (
        f"Perplexity on held-out {subject} goes from {dense:.2f} to {pruned:.2f} ({results.perplexity_ratio - 1:+.1%}; "
        f"lower is better). Cut in the same way without compensation it is {without:.2f}"
    )
    if without <= dense:
        return f"{said}."
    return f"{said}: compensation takes back {(without - pruned) / (without - dense):.0%} of that rise."


def _accuracy(results: Results) -> Iterator[str]:
    tasks = {name: figures["against_dense"] for name, figures in results.pruned["tasks"].items()}
    if not tasks:
        return
    worse = [name for name, against in tasks.items() if against["high"] < 0]
    better = [name for name, against in tasks.items() if against["low"] > 0]
    said = [f"clearly worse in {', '.join(worse)}"] if worse else []
    said += [f"clearly better in {', '.join(better)}"] if better else []
    rest = len(tasks) - len(worse) - len(better)
    if rest:
        said.append(
            f"no different, as far as these questions can tell, in {rest if said else 'all'} of {len(tasks)} tasks"
        )
    yield f"Its answers are {'; '.join(said)} (95% intervals of the paired difference to the dense model)."


def _speed(results: Results) -> str:
    ratios, protocol = results.benchmark["ratios"], results.benchmark["protocol"]
    return (
        f"At batch {protocol['batch']} it generates {ratios['speed_up']:.2f} times as many tokens per second, where "
        f"the bytes it reads let one expect {ratios['expected_by_bytes']:.2f} times; it reads a prompt "
        f"{ratios['prefill_speed_up']:.2f} times as fast, where its operations let one expect "
        f"{ratios['expected_by_flops']:.2f} times."
    )


def _memory(results: Results) -> str:
    dense, pruned = (results.benchmark[side]["peak_memory_bytes"] for side in ("dense", "pruned"))
    more = pruned / dense - 1
    change = f"{abs(more):.0%} {'more' if more > 0 else 'less'}"
    return f"Loading it and generating takes {readable(pruned, 'memory')} at the peak, {change} than the dense model."
