"""The plots, a function each."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from numprune.allocation import Allocation
from numprune.architectures import KINDS, Kind
from numprune.budget import BudgetKind, parse_budget
from numprune.plan import GroupPlan, PruningPlan
from numprune.ranking import Selection
from tasks.report.drawing import BLUE, INK, MUTED, ORANGE, PAPER, Plot, figure
from tasks.report.pareto import pareto_front
from tasks.report.results import Results

# Cells of a row of the heat map at most; more units share a cell.
_CELLS = 64
_BINS = 40

# More ink, more kept: it reads on light and on dark paper.
_KEPT = LinearSegmentedColormap.from_list("kept", [to_rgba(BLUE, 0.05), to_rgba(BLUE, 1.0)])

_UNITS: Mapping[Kind, str] = {"attention": "heads", "mlp": "channels"}
_COLOURS: Mapping[Kind, str] = {"attention": ORANGE, "mlp": BLUE}

SCORES: Mapping[Selection, str] = {
    "obs": "share of the output lost once it is gone",
    "newton": "relaxed mask z",
    "box": "relaxed mask z",
    "random": "random number",
    "magnitude": "norm of the weights",
    "wanda_sp": "weights times inputs",
    "flap": "standardised fluctuation",
}


def kept_units(plan: PruningPlan) -> Plot:
    """What stays of every layer: key/value heads with their query heads, and MLP channels."""
    groups = {kind: _groups_of(plan, kind) for kind in KINDS}
    blocks = max(block for of_kind in groups.values() for block in of_kind) + 1
    row = min(0.24, 9.0 / blocks)
    with figure(2 * row * blocks + 1.9, rows=2) as (drawn, panels):
        for panel, kind in zip(panels, KINDS, strict=True):
            _draw_kept(panel, groups[kind], blocks, _UNITS[kind])
        colours = panels[1].collections[0]
        bar = drawn.colorbar(colours, ax=panels, location="bottom", shrink=0.6, aspect=30, pad=0.02)
        bar.set_label("share kept")
        bar.ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        bar.outline.set_visible(False)
    rows = [
        (block, _UNITS[kind], group.units, len(group.kept), round(len(group.kept) / group.units, 4))
        for kind in KINDS
        for block, group in groups[kind].items()
    ]
    said = "; ".join(
        f"of the {unit} {sum(r[3] for r in rows if r[1] == unit):,} of {sum(r[2] for r in rows if r[1] == unit):,}"
        for unit in _UNITS.values()
    )
    return Plot(
        name="kept",
        title="What stays in every layer",
        description=f"Heat map of the units kept in each of {blocks} layers: {said}. The table below has the numbers.",
        caption="A row is a layer, the first at the top. Heads are key/value heads with the query heads that share "
        "them; a cell is one of them. Channels are too many for a cell each: a cell is some neighbouring ones, the "
        "fuller the more of them stay.",
        figure=drawn,
        columns=("layer", "units", "dense", "kept", "share kept"),
        rows=rows,
    )


def _draw_kept(panel: Axes, groups: Mapping[int, GroupPlan], blocks: int, units: str) -> None:
    cells = min(_CELLS, max(group.units for group in groups.values()))
    shares = torch.full((blocks, cells), math.nan)
    for block, group in groups.items():
        mask = torch.zeros(group.units)
        mask[list(group.kept)] = 1
        parts = mask.tensor_split(min(cells, group.units))
        shares[block, : len(parts)] = torch.stack([part.mean() for part in parts])
    panel.pcolormesh(shares.numpy(), cmap=_KEPT, vmin=0, vmax=1, edgecolors=PAPER, linewidth=0.4)
    panel.invert_yaxis()
    every = math.ceil(blocks / 40)
    panel.set_yticks([block + 0.5 for block in range(0, blocks, every)], [str(b) for b in range(0, blocks, every)])
    counts = panel.secondary_yaxis("right")
    shown = [block for block in groups if block % every == 0]
    counts.set_yticks([block + 0.5 for block in shown], [f"{len(groups[b].kept)} of {groups[b].units}" for b in shown])
    counts.spines["right"].set_visible(False)
    counts.tick_params(length=0)
    panel.set_xticks([])
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    panel.set_title(units.capitalize())
    panel.set_ylabel("layer")


def unit_scores(results: Results) -> Plot:
    """How the scores of each layer's units spread, and where the cut fell."""
    plan, name = results.plan, SCORES[results.recipe.selection]
    rows: list[tuple[Any, ...]] = []
    with figure(4.6, rows=2, sharex=True) as (drawn, panels):
        for panel, kind in zip(panels, KINDS, strict=True):
            groups = _groups_of(plan, kind)
            for block, group in groups.items():
                scores = results.rankings[f"{block}.{kind}"].scores
                rows.append(_draw_scores(panel, block, kind, scores, group))
            panel.set_title(_UNITS[kind].capitalize())
            panel.grid(axis="y")
        panels[1].set_xlabel("layer")
        panels[1].xaxis.get_major_locator().set_params(integer=True)
        drawn.supylabel(name, fontsize="medium")
    return Plot(
        name="scores",
        title="Scores of the units and where the cut fell",
        description=f"For every layer the range of its units' scores ({name}), and the highest score that was removed.",
        caption=f"Score: {name}. Thick: the middle half of a layer's units; thin: all. The mark across is the highest "
        "score that went; a layer without one lost nothing. Each layer has its own, because scores of different layers "
        "are weighed by what they cost the model.",
        figure=drawn,
        columns=(
            "layer",
            "units",
            "lowest",
            "first quartile",
            "median",
            "third quartile",
            "highest",
            "highest removed",
        ),
        rows=rows,
    )


def _draw_scores(panel: Axes, block: int, kind: Kind, scores: Tensor, group: GroupPlan) -> tuple[Any, ...]:
    lowest, first, median, third, highest = scores.double().quantile(torch.linspace(0, 1, 5).double()).tolist()
    panel.plot([block, block], [lowest, highest], color=_COLOURS[kind], linewidth=1)
    panel.plot([block, block], [first, third], color=_COLOURS[kind], linewidth=5, solid_capstyle="butt")
    if group.highest_removed is not None:
        panel.plot(block, group.highest_removed, color=INK, marker="_", markersize=13, markeredgewidth=2)
    return (block, _UNITS[kind], lowest, first, median, third, highest, group.highest_removed)


def prices(results: Results) -> Plot:
    """How the parameters of all units spread over prices, and the threshold that the budget led to."""
    plan, threshold = results.plan, results.plan.threshold
    by_kind: dict[Kind, Tensor] = {}
    weights: dict[Kind, Tensor] = {}
    for kind in KINDS:
        names = [name for name in results.prices if name.endswith(f".{kind}")]
        of_kind = torch.cat([results.prices[name] for name in names])
        sizes = torch.cat(
            [torch.full((plan.groups[n].units,), plan.groups[n].unit_parameters, dtype=torch.float64) for n in names]
        )
        finite = torch.isfinite(of_kind)
        by_kind[kind], weights[kind] = of_kind[finite], sizes[finite] / plan.dense_parameters
    edges = _edges(torch.cat(list(by_kind.values())))
    counts = {
        kind: torch.histogram(by_kind[kind].clamp(edges[0], edges[-1]), edges, weight=weights[kind]).hist
        for kind in KINDS
    }
    logarithmic = _is_logarithmic(edges)
    unit = _PRICES[results.recipe.allocation].format(_COSTED.get(parse_budget(results.budget).kind, "parameter"))
    with figure(3.2) as (drawn, panel):
        below = torch.zeros(len(edges) - 1, dtype=torch.float64)
        for kind in KINDS:
            panel.bar(
                edges[:-1].tolist(),
                counts[kind].tolist(),
                width=edges.diff().tolist(),
                bottom=below.tolist(),
                align="edge",
                color=_COLOURS[kind],
                hatch="////" if kind == "attention" else None,
                edgecolor=PAPER,
                linewidth=0.3,
                label=_UNITS[kind],
            )
            below += counts[kind]
        if logarithmic:
            panel.set_xscale("log")
        panel.axvline(threshold, color=INK, linestyle="--", linewidth=1.2, label=f"threshold {threshold:.3g}")
        panel.set_xlabel(unit)
        panel.set_ylabel("share of the parameters")
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.grid(axis="y")
        drawn.legend(loc="outside upper left", ncols=3)
    ranges = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    rows = [(low, high, *(counts[kind][index].item() for kind in KINDS)) for index, (low, high) in enumerate(ranges)]
    stuck = 1 - sum(part.sum().item() for part in weights.values())
    return Plot(
        name="threshold",
        title="The price of every unit and the threshold",
        description=f"Histogram of the parameters by price ({unit}), with the threshold at {threshold:.3g}: what lies "
        "left of it is removed.",
        caption=f"Price: {unit}. What is left of the dashed line went, but for units that did not fit the rest of the "
        f"budget. {stuck:.1%} of the parameters may not go and have no price.",
        figure=drawn,
        columns=("from price", "to price", *(f"share of the parameters, {_UNITS[kind]}" for kind in KINDS)),
        rows=rows,
    )


_PRICES: Mapping[Allocation, str] = {
    "loss_aware": "rise of the loss (nats) per {} saved",
    "global": "score",
    "uniform": "share of the layer's units that are gone",
}
_COSTED: Mapping[BudgetKind, str] = {"size": "byte", "memory": "byte", "flops": "operation"}


def _edges(values: Tensor) -> Tensor:
    """Of histogram bins: logarithmic where values are positive and spread widely."""
    low, high = values.quantile(0.005).item(), values.quantile(0.995).item()
    if high <= low:
        low, high = low - 0.5, high + 0.5
    if low > 0 and high > 100 * low:
        return torch.logspace(math.log10(low), math.log10(high), _BINS + 1, dtype=torch.float64)
    return torch.linspace(low, high, _BINS + 1, dtype=torch.float64)


def _is_logarithmic(edges: Tensor) -> bool:
    widths = edges.diff()
    return bool(widths[-1] > 2 * widths[0])


def hidden_states(results: Results) -> Plot:
    """How far the pruned model's hidden states are off after every layer, with and without compensation."""
    errors, protocol = results.comparison["hidden_state_errors"], results.comparison["protocol"]
    without, pruned = errors["without_compensation"], errors["pruned"]
    places = [*map(str, range(len(pruned) - 1)), "norm"]
    with figure(3.2) as (drawn, panel):
        positions = range(len(places))
        panel.plot(positions, without, color=ORANGE, marker="s", linestyle="--", label="before compensation")
        panel.plot(positions, pruned, color=BLUE, marker="o", label="after compensation")
        every = math.ceil((len(places) - 1) / 16)
        shown = sorted({*range(0, len(places) - 1, every), len(places) - 1} - {len(places) - 2 if every > 1 else -1})
        panel.set_xticks(shown, [places[index] for index in shown])
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        panel.set_xlabel("after layer")
        panel.set_ylabel("relative squared error")
        panel.grid(axis="y")
        drawn.legend(loc="outside upper left", ncols=2)
    return Plot(
        name="reconstruction",
        title="Reconstruction error of every layer",
        description="Relative squared error of the hidden states after each layer. After the last one it is "
        f"{without[-2]:.1%} before compensation and {pruned[-2]:.1%} after.",
        caption="Mean over tokens of ‖h′ − h‖² / ‖h‖², where h is the dense model's hidden state after a layer and h′ "
        f"the pruned one's, on {protocol['windows']} held-out sequences of {protocol['length']} tokens. Errors add up "
        "from layer to layer: a point is what all layers up to it have left. The last point is the output of the norm "
        "behind the last layer.",
        figure=drawn,
        columns=("after layer", "before compensation", "after compensation"),
        rows=list(zip(places, without, pruned, strict=True)),
    )


def quality_against(model: str, runs: Sequence[Results], what: str) -> Plot:
    """Perplexity against size, speed or memory of the dense model and every budget, with the Pareto front.

    Args:
        model: Name of the dense model.
        runs: Its runs.
        what: A key of `COSTS`.
    """
    label, less_is_better, cost_of = COSTS[what]
    # Each benchmark measures the dense model again; the first one stands for it.
    points = [("dense", cost_of(runs[0].benchmark, "dense"), runs[0].dense["perplexity"])]
    points += [(run.budget, cost_of(run.benchmark, "pruned"), run.pruned["perplexity"]) for run in runs]
    sign = 1 if less_is_better else -1
    front = pareto_front([(sign * cost, perplexity) for _, cost, perplexity in points])
    with figure(3.1) as (drawn, panel):
        on_front = [points[index] for index in front]
        panel.plot(
            [cost for _, cost, _ in on_front],
            [perplexity for *_, perplexity in on_front],
            color=BLUE,
            drawstyle="steps-post",
            linewidth=1.2,
            label="Pareto front",
        )
        for index, (name, cost, perplexity) in enumerate(points):
            best = index in front
            panel.plot(
                cost,
                perplexity,
                color=BLUE if best else MUTED,
                marker="s" if name == "dense" else "o",
                markersize=7,
                fillstyle="full" if best else "none",
            )
            panel.annotate(
                name,
                (cost, perplexity),
                # On the side that the front never crosses.
                xytext=(-7 * sign, -12),
                textcoords="offset points",
                ha="right" if less_is_better else "left",
            )
        panel.xaxis.set_major_locator(_few_round_ticks())
        panel.set_xlabel(label)
        panel.set_ylabel("perplexity")
        panel.margins(0.22, 0.2)
        panel.grid()
    best_names = ", ".join(points[index][0] for index in front)
    return Plot(
        name=f"{model}-{what}",
        title=f"Quality against {what}",
        description=f"Perplexity against {label} of {model}, dense and at {len(runs)} budgets. On the Pareto front: "
        f"{best_names}.",
        caption=f"Lower is better, and {'left' if less_is_better else 'right'}. Filled: on the Pareto front, no other "
        "is as good in both and better in one. The square is the dense model.",
        figure=drawn,
        columns=("budget", label, "perplexity", "on the Pareto front"),
        rows=[(*point, index in front) for index, point in enumerate(points)],
    )


def _few_round_ticks() -> MaxNLocator:
    """Few enough that labels such as 1.0025 do not meet, and none between two whole per cent."""
    return MaxNLocator(5, steps=[1, 2, 5, 10])


def _megabytes(key: str) -> Callable[[Mapping[str, Any], str], float]:
    return lambda benchmark, side: benchmark[side][key] / 1e6


def _speed_up(benchmark: Mapping[str, Any], side: str) -> float:
    """Against the dense model of the same benchmark: from one to another the machine's speed drifts."""
    return benchmark[side]["tokens_per_second"] / benchmark["dense"]["tokens_per_second"]


# Label, whether less is better, and how it follows from a benchmark.
COSTS: Mapping[str, tuple[str, bool, Callable[[Mapping[str, Any], str], float]]] = {
    "size": ("size of the weights (MB)", True, _megabytes("checkpoint_bytes")),
    "speed": ("speed of generation (dense = 1)", False, _speed_up),
    "memory": ("peak memory (MB)", True, _megabytes("peak_memory_bytes")),
}


def compensation(model: str, runs: Sequence[Results]) -> Plot:
    """Perplexity with and without compensation against the share removed."""
    ordered = sorted(runs, key=lambda run: run.plan.achieved_ratio)
    dense = ordered[0].dense["perplexity"]
    removed = [0.0, *(run.plan.achieved_ratio for run in ordered)]
    without = [dense, *(run.pruned["perplexity_without_compensation"] for run in ordered)]
    pruned = [dense, *(run.pruned["perplexity"] for run in ordered)]
    with figure(3.1) as (drawn, panel):
        panel.plot(removed, without, color=ORANGE, marker="s", linestyle="--", label="before compensation")
        panel.plot(removed, pruned, color=BLUE, marker="o", label="after compensation")
        panel.axhline(dense, color=MUTED, linestyle=":", label="dense")
        panel.xaxis.set_major_locator(_few_round_ticks())
        panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.set_xlabel("attention and MLP parameters removed")
        panel.set_ylabel("perplexity")
        panel.grid()
        drawn.legend(loc="outside upper left", ncols=2)
    return Plot(
        name=f"{model}-compensation",
        title="What compensation is worth",
        description=f"Perplexity of {model} against the share of parameters removed. At {removed[-1]:.0%} it is "
        f"{without[-1]:.2f} before compensation and {pruned[-1]:.2f} after, {dense:.2f} dense.",
        caption="The same units are gone from both; after compensation the remaining weights are fitted anew. Lower is "
        "better.",
        figure=drawn,
        columns=("share removed", "perplexity before compensation", "perplexity after compensation"),
        rows=list(zip(removed, without, pruned, strict=True)),
    )


def _groups_of(plan: PruningPlan, kind: Kind) -> dict[int, GroupPlan]:
    """Groups of a kind by their layer."""
    named = {name.partition("."): group for name, group in plan.groups.items()}
    return {int(block): group for (block, _, found), group in named.items() if found == kind}


def run_plots(results: Results) -> list[Plot]:
    """All plots of a run's page; those of scores where the recipe ranks before it knows the budget."""
    scored = [unit_scores(results)] if results.rankings else []
    priced = [prices(results)] if results.prices else []
    return [kept_units(results.plan), *scored, *priced, hidden_states(results)]


def sweep_plots(model: str, runs: Sequence[Results]) -> list[Plot]:
    """All plots of a model on the page of all runs."""
    return [*(quality_against(model, runs, what) for what in COSTS), compensation(model, runs)]
