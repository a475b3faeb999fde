import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numprune.allocation import Allocated, Shapes, allocate, allocate_literally, unit_prices
from numprune.architectures import PrunableGroup
from numprune.errors import NumpruneError
from numprune.ranking import Ranking

SEEDS = st.integers(0, 2**31)


def group(block: int, kind: str, units: int, parameters: int, width: int = 1) -> PrunableGroup:
    return PrunableGroup(block, kind, "consumer", (), units, channels=1, width=width, unit_parameters=parameters)


def model_of(blocks: int, heads: int = 4, channels: int = 30, width: int = 1) -> list[PrunableGroup]:
    return [
        g for i in range(blocks) for g in (group(i, "attention", heads, 16, width), group(i, "mlp", channels, 3, 1))
    ]


def small_groups(seed: int) -> list[PrunableGroup]:
    """Two to four groups of a few units that all cost something else."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    kinds = ["attention", "mlp", "attention", "mlp"][: draw(2, 5)]
    return [group(i // 2, kind, draw(2, 5), draw(1, 9)) for i, kind in enumerate(kinds)]


def rankings_by(scores: dict[str, torch.Tensor]) -> dict[str, Ranking]:
    return {name: Ranking(score, score.argsort()) for name, score in scores.items()}


def random_scores(groups: list[PrunableGroup], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.randn(g.units, generator=generator, dtype=torch.float64) for g in groups}


def rankings_with(rises: dict[str, list[float]]) -> dict[str, Ranking]:
    rankings = {}
    for name, curve in rises.items():
        units = len(curve) - 1
        scores = torch.arange(units, dtype=torch.float64)
        rankings[name] = Ranking(scores, torch.arange(units), rises=torch.tensor(curve, dtype=torch.float64))
    return rankings


def random_rises(groups: list[PrunableGroup], seed: int, *, convex: bool) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(seed)
    rises = {}
    for g in groups:
        steps = torch.rand(g.units, generator=generator, dtype=torch.float64) + 0.01
        steps = steps.sort().values if convex else steps
        rises[g.name] = [0.0, *steps.cumsum(0).tolist()]
    return rises


def removed_cost(groups, removed, costs=None):
    return sum(removed[g.name] * (costs[g.name] if costs else g.unit_parameters) for g in groups)


def every_way(groups):
    """All combinations of counts that leave every group a unit."""
    names = [g.name for g in groups]
    for counts in itertools.product(*(range(g.units) for g in groups)):
        yield dict(zip(names, counts, strict=True))


def lowest_rise(groups, rises, amount):
    ways = (way for way in every_way(groups) if removed_cost(groups, way) >= amount)
    return min(total_rise(rises, way) for way in ways)


def total_rise(rises, way):
    return sum(rises[name][count] for name, count in way.items())


# ---- The global walk


@given(seed=SEEDS, blocks=st.integers(1, 5), ratio=st.floats(0.02, 0.8))
def test_global_walk_equals_a_plain_loop(seed, blocks, ratio):
    """The lowest scores first, units that no longer fit passed over together with the rest of their group; at the end
    the smallest unit that is next in its group covers what is left."""
    groups = model_of(blocks)
    scores = random_scores(groups, seed)
    amount = ratio * sum(g.parameters for g in groups)
    ranked = sorted(
        (score, index)
        for index, g in enumerate(groups)
        for score in scores[g.name].sort().values[:-1].tolist()  # Each group keeps its best unit.
    )
    gone, blocked, left = [0] * len(groups), set(), amount
    for _, index in ranked:
        if groups[index].unit_parameters > left + 1e-12 * amount:
            blocked.add(index)
        if index not in blocked:
            gone[index] += 1
            left -= groups[index].unit_parameters
    if left > 1e-12 * amount:
        open_ones = [i for i, g in enumerate(groups) if gone[i] < g.units - 1 and g.unit_parameters > left]
        smallest = min(groups[i].unit_parameters for i in open_ones)

        def price(i):
            return scores[groups[i].name].sort().values[gone[i]].item()

        gone[min((i for i in open_ones if groups[i].unit_parameters == smallest), key=price)] += 1
    assert allocate(groups, rankings_by(scores), amount).removed == {
        g.name: n for g, n in zip(groups, gone, strict=True)
    }


@given(seed=SEEDS, ratio=st.floats(0.05, 0.8))
def test_what_goes_is_the_amount_and_less_than_a_channel_more(seed, ratio):
    groups = model_of(4)
    amount = ratio * sum(g.parameters for g in groups)
    removed = allocate(groups, rankings_by(random_scores(groups, seed)), amount).removed
    assert -1e-6 < removed_cost(groups, removed) - amount < 3
    assert all(removed[g.name] < g.units for g in groups)


def test_the_threshold_is_the_highest_score_that_went():
    groups = model_of(2, channels=40)
    scores = random_scores(groups, 3)
    removed, threshold = allocate(groups, rankings_by(scores), 60.0)
    gone = torch.cat([scores[g.name].sort().values[: removed[g.name]] for g in groups])
    assert threshold == pytest.approx(gone.max().item(), rel=1e-12)


def test_counts_of_a_large_model_are_exact():
    """With 10^11 parameters, float32 would not tell which side of the budget a channel is on."""
    groups = [group(0, "attention", 1000, 10**8 + 1), group(0, "mlp", 1001, 3)]
    scores = {"0.attention": torch.arange(1000.0), "0.mlp": 10**6 + torch.arange(1001.0)}
    removed = allocate(groups, rankings_by(scores), 999 * (10**8 + 1) + 3 * 200).removed
    assert removed == {"0.attention": 999, "0.mlp": 200}


# ---- Against all combinations


@settings(deadline=None)
@given(seed=SEEDS, convex=st.booleans())
def test_loss_aware_is_optimal_at_every_vertex(seed, convex):
    """Where the hulls' edges add up to the budget, no combination of counts that meets it has a lower rise."""
    groups = small_groups(seed)
    rises = random_rises(groups, seed, convex=convex)
    edges = []
    for g in groups:
        curve = rises[g.name][: g.units]  # The last unit stays.
        at = 0
        while at < len(curve) - 1:
            slope, end = min(((curve[n] - curve[at]) / (n - at), n) for n in range(at + 1, len(curve)))
            edges.append((slope / g.unit_parameters, g, end - at))
            at = end
    amount = 0
    for _, g, units in sorted(edges, key=lambda edge: edge[0]):
        amount += units * g.unit_parameters
        removed = allocate(groups, rankings_with(rises), amount, allocation="loss_aware").removed
        assert removed_cost(groups, removed) == amount
        assert total_rise(rises, removed) == pytest.approx(lowest_rise(groups, rises, amount), rel=1e-9)


@settings(deadline=None)
@given(seed=SEEDS, convex=st.booleans(), share=st.floats(0.01, 1), allocation=st.sampled_from(["global", "loss_aware"]))
def test_any_budget_is_met_and_overshot_by_less_than_the_smallest_unit_left(seed, convex, share, allocation):
    groups = small_groups(seed)
    rises = random_rises(groups, seed, convex=convex)
    amount = share * sum((g.units - 1) * g.unit_parameters for g in groups)
    removed = allocate(groups, rankings_with(rises), amount, allocation=allocation).removed
    over = removed_cost(groups, removed) - amount
    assert over >= -1e-10 * amount
    assert all(0 <= removed[g.name] < g.units for g in groups)
    left = [g.unit_parameters for g in groups if removed[g.name] < g.units - 1]
    assert over < min(left, default=max(g.unit_parameters for g in groups))


def test_a_cheap_unit_behind_a_dear_one_goes_with_it():
    """The dear unit alone would cost 1.0 per parameter, with the cheap one behind it 0.55 each."""
    groups = [group(0, "mlp", 3, 1), group(1, "mlp", 3, 1)]
    rises = {"0.mlp": [0.0, 1.0, 1.1, 9.0], "1.mlp": [0.0, 0.7, 1.4, 9.0]}
    allocated = allocate(groups, rankings_with(rises), 2, allocation="loss_aware")
    assert allocated == Allocated({"0.mlp": 2, "1.mlp": 0}, pytest.approx(0.55))
    # One unit alone is what fits; it is still taken from where the hull is lowest.
    allocated = allocate(groups, rankings_with(rises), 1, allocation="loss_aware")
    assert sum(allocated.removed.values()) == 1
    assert allocate(groups, rankings_with(rises), 3, allocation="loss_aware").removed == {"0.mlp": 2, "1.mlp": 1}


def test_a_unit_that_does_not_fit_is_passed_over_for_smaller_ones():
    groups = [group(0, "attention", 3, 10), group(0, "mlp", 9, 2)]
    rises = {"0.attention": [0.0, 0.1, 0.2, 0.3], "0.mlp": [0.0, *range(1, 10)]}
    removed = allocate(groups, rankings_with(rises), 14, allocation="loss_aware").removed
    assert removed == {"0.attention": 1, "0.mlp": 2}


def test_global_and_loss_aware_answer_to_other_costs():
    """What counts is the rise per cost: of the same rises the ones of the dearer units are the better bargain."""
    groups = [group(0, "mlp", 5, 1), group(1, "mlp", 5, 1)]
    rises = {name: [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] for name in ("0.mlp", "1.mlp")}
    costs = {"0.mlp": 2.5, "1.mlp": 7.5}
    removed = allocate(groups, rankings_with(rises), 15.0, allocation="loss_aware", costs=costs).removed
    assert removed == {"0.mlp": 0, "1.mlp": 2}
    # With global the scores themselves are the price: 0, 1, 2, ... in both groups in turn.
    removed = allocate(groups, rankings_with(rises), 20.0, costs=costs).removed
    assert removed == {"0.mlp": 2, "1.mlp": 2}


@settings(deadline=None)
@given(seed=SEEDS, share=st.floats(0.02, 1))
def test_a_budget_in_other_costs_is_met(seed, share):
    groups = small_groups(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    costs = {g.name: 1e-4 * (0.1 + torch.rand((), generator=generator).item()) for g in groups}
    amount = share * sum((g.units - 1) * costs[g.name] for g in groups)
    removed = allocate(groups, rankings_by(random_scores(groups, seed)), amount, costs=costs).removed
    over = removed_cost(groups, removed, costs) - amount
    left = [costs[g.name] for g in groups if removed[g.name] < g.units - 1]
    assert -1e-10 * amount <= over < min(left, default=max(costs.values()))


# ---- Shapes


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (Shapes(), [0, 1, 2, 3, 4]),
        (Shapes(depth=True), [0, 1, 2, 3, 4, 5]),
        (Shapes(heads=4), [0, 1, 3]),  # 5 units of 2 heads: 10 is no multiple of 4, all may stay all the same.
        (Shapes(heads=4, depth=True), [0, 1, 3, 5]),
        (Shapes(heads=16), [0]),
        (Shapes(heads=16, depth=True), [0, 5]),
        (Shapes(channels=4), [0, 1, 2, 3, 4]),
    ],
)
def test_counts_that_may_go(shapes, expected):
    assert shapes.removable(group(0, "attention", 5, 1, width=2)) == expected


def test_multiples_of_channels_concern_the_mlp_alone():
    shapes = Shapes(channels=8)
    assert shapes.removable(group(0, "mlp", 30, 1)) == [0, 6, 14, 22]
    assert shapes.removable(group(0, "attention", 3, 1)) == [0, 1, 2]


@settings(deadline=None)
@given(
    seed=SEEDS,
    ratio=st.floats(0.05, 0.4),
    allocation=st.sampled_from(["global", "uniform", "loss_aware"]),
    shapes=st.builds(
        Shapes,
        heads=st.sampled_from([1, 2, 4]),
        channels=st.sampled_from([1, 4, 8, 7]),
        uniform=st.booleans(),
        depth=st.booleans(),
    ),
)
def test_shapes_hold_for_every_allocation(seed, ratio, allocation, shapes):
    groups = model_of(3, heads=5, channels=30, width=2)
    rises = random_rises(groups, seed, convex=False)
    amount = ratio * sum(g.parameters for g in groups)
    removed = allocate(groups, rankings_with(rises), amount, allocation=allocation, shapes=shapes).removed
    assert removed_cost(groups, removed) >= amount * (1 - 1e-10)
    for g in groups:
        kept = g.units - removed[g.name]
        multiple = shapes.heads if g.kind == "attention" else shapes.channels
        assert kept == g.units or kept * g.width % multiple == 0
        assert kept > 0 or shapes.depth
    if shapes.uniform or allocation == "uniform":
        for kind in ("attention", "mlp"):
            assert len({removed[g.name] for g in groups if g.kind == kind}) == 1


@settings(deadline=None)
@given(seed=SEEDS, multiple=st.sampled_from([1, 2]), convex=st.booleans())
def test_uniform_shapes_are_optimal_among_uniform_ones(seed, multiple, convex):
    """At budgets that the best uniform shapes meet exactly and that lie on the hull."""
    groups = model_of(3, heads=4, channels=5)
    rises = random_rises(groups, seed, convex=convex)
    shapes = Shapes(heads=multiple, uniform=True)
    ways = [
        {g.name: (a if g.kind == "attention" else m) for g in groups}
        for a in shapes.removable(groups[0])
        for m in shapes.removable(groups[1])
    ]
    for price in torch.logspace(-3, 1, 20).tolist():
        # The minimiser of rise - price * cost is a vertex of the lower hull over all combinations.
        best = min(ways, key=lambda way: total_rise(rises, way) - price * removed_cost(groups, way))
        amount = removed_cost(groups, best)
        if amount:
            allocated = allocate(groups, rankings_with(rises), amount, allocation="loss_aware", shapes=shapes)
            assert allocated.removed == best


def test_uniform_takes_the_same_share_of_everything():
    groups = model_of(3, heads=10, channels=100)
    rankings = rankings_by(random_scores(groups, 0))
    for ratio in (0.1, 0.2, 0.5):
        removed = allocate(groups, rankings, ratio * sum(g.parameters for g in groups), allocation="uniform").removed
        assert all(removed[g.name] == pytest.approx(ratio * g.units) for g in groups)


def test_whole_modules_go_only_with_depth():
    groups = model_of(2, heads=2, channels=4)
    rises = {g.name: [0.0, *(1e-6 * n for n in range(1, g.units + 1))] for g in groups}
    rises |= {"1.attention": [0.0, 5.0, 9.0], "1.mlp": [0.0, 5.0, 9.0, 13.0, 17.0]}
    amount = 2 * 16 + 4 * 3
    with_depth = allocate(groups, rankings_with(rises), amount, allocation="loss_aware", shapes=Shapes(depth=True))
    assert with_depth.removed == {"0.attention": 2, "0.mlp": 4, "1.attention": 0, "1.mlp": 0}
    without = allocate(groups, rankings_with(rises), amount, allocation="loss_aware").removed
    assert max(without["0.attention"], without["1.attention"]) == 1
    assert max(without["0.mlp"], without["1.mlp"]) <= 3


def test_all_may_go_with_depth():
    groups = model_of(2)
    total = sum(g.parameters for g in groups)
    removed = allocate(groups, rankings_by(random_scores(groups, 0)), total, shapes=Shapes(depth=True)).removed
    assert removed == {g.name: g.units for g in groups}


# ---- Eq. 8 as printed


def test_literal_reading_spares_attention_and_removes_less():
    groups = model_of(4)
    masks = {name: score.abs() for name, score in random_scores(groups, 0).items()}
    literal, threshold = allocate_literally(groups, masks, 0.3)
    total = sum(g.parameters for g in groups)
    assert sum(literal.values()) == math.ceil(0.3 * sum(g.units for g in groups))
    weighted = {g.name: (masks[g.name] * g.unit_parameters / 3).sort().values for g in groups}
    gone = torch.cat([weighted[name][:count] for name, count in literal.items()])
    stays = torch.cat([weighted[name][count:] for name, count in literal.items()])
    assert gone.max() == threshold
    assert threshold <= stays.min()
    assert removed_cost(groups, literal) < 0.3 * total


def test_literal_reading_keeps_a_unit_of_every_group():
    groups = model_of(1, heads=2, channels=3)
    masks = {"0.attention": torch.tensor([0.0, 0.0]), "0.mlp": torch.tensor([0.1, 0.2, 0.3])}
    assert allocate_literally(groups, masks, 0.99).removed == {"0.attention": 1, "0.mlp": 2}
    assert allocate_literally(groups, masks, 0.99, minimum=0).removed == {"0.attention": 2, "0.mlp": 3}
    assert allocate_literally(groups, masks, 0.5, minimum=9) == Allocated({"0.attention": 0, "0.mlp": 0}, -math.inf)


@pytest.mark.parametrize("ratio", [0, 1, -1, math.nan])
def test_literal_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\)"):
        allocate_literally(model_of(1), {}, ratio)


# ---- Refusals


def test_a_budget_that_would_empty_layers_is_refused():
    groups = model_of(1, heads=2, channels=2)
    rankings = rankings_by(random_scores(groups, 0))
    with pytest.raises(NumpruneError, match=r"34.2 must go, .* at most 19 go, a share of 0.500"):
        allocate(groups, rankings, 0.9 * 38)
    assert allocate(groups, rankings, 19).removed == {"0.attention": 1, "0.mlp": 1}
    assert removed_cost(groups, allocate(groups, rankings, 0.9 * 38, shapes=Shapes(depth=True)).removed) == 38


def test_a_budget_beyond_the_multiples_is_refused():
    groups = model_of(1, heads=2, channels=30)
    with pytest.raises(NumpruneError, match=r"The budget cannot be met: 90 must go, .* at most 66 go"):
        allocate(groups, rankings_by(random_scores(groups, 0)), 90, shapes=Shapes(heads=4, channels=8))


@pytest.mark.parametrize("change", [{"units": 31}, {"width": 2}])
@pytest.mark.parametrize("options", [{"allocation": "uniform"}, {"shapes": Shapes(uniform=True)}])
def test_layers_that_differ_cannot_be_uniform(change, options):
    groups = model_of(2)
    groups[3] = replace(groups[3], **change)
    with pytest.raises(NumpruneError, match=r"equal widths; this one's differ"):
        allocate(groups, rankings_by(random_scores(groups, 0)), 10, **options)


def test_loss_aware_needs_rises():
    groups = model_of(1)
    with pytest.raises(ValueError, match="loss_aware needs rankings with rises"):
        allocate(groups, rankings_by(random_scores(groups, 0)), 10, allocation="loss_aware")


@pytest.mark.parametrize("amount", [0, -1, math.nan])
def test_amount_out_of_range(amount):
    with pytest.raises(ValueError, match="amount must be above 0"):
        allocate(model_of(1), {}, amount)


def test_price_of_a_unit_is_its_score_where_scores_rise():
    groups = model_of(2)
    scores = random_scores(groups, 3)
    prices = unit_prices(groups, rankings_by(scores), shapes=Shapes(depth=True))
    for g in groups:
        torch.testing.assert_close(prices[g.name], scores[g.name].sort().values)


@given(SEEDS, st.floats(0.05, 0.7))
@settings(max_examples=30, deadline=None)
def test_units_below_the_threshold_are_those_that_go(seed, ratio):
    """With units of one size nothing is passed over; of the group whose turn it was last, a part may stay."""
    groups = [group(i, "mlp", 9, 5) for i in range(4)]
    rankings = rankings_with(random_rises(groups, seed, convex=False))
    amount = ratio * sum(g.parameters for g in groups)
    removed, threshold = allocate(groups, rankings, amount, allocation="loss_aware")
    prices = unit_prices(groups, rankings, allocation="loss_aware")
    for g in groups:
        assert (prices[g.name] < threshold).sum() <= removed[g.name] <= (prices[g.name] <= threshold).sum()
        assert prices[g.name][-1] == math.inf
