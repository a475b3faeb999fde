"""In which order the units of a group go: the selection."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from numprune.architectures import KINDS, PrunableGroup
from numprune.baselines import baseline_score, standardised
from numprune.box import box_score
from numprune.files import replace_on_success
from numprune.newton import newton_direction
from numprune.obs import loss_curve, removal_order
from numprune.resume import reading
from numprune.statistics import Moments

Selection = Literal["newton", "box", "obs", "random", "magnitude", "wanda_sp", "flap"]

# Of a group's units go together before the greedy order weighs the rest anew: 1 in so many.
_GREEDY_ROUNDS = 128


@dataclass(frozen=True)
class Ranking:
    """The order in which the units of one group go.

    Attributes:
        scores: (units,) float64; the lowest of all groups go first.
        order: (units,) indices of units, the first to go first.
        losses: (units + 1,) float64, the share of the output projection's squared output that is lost at best after the
            first units of the order are gone; None if it was not asked for.
        rises: (units + 1,) float64, the same as a rise of the model's loss in nats per token; None if not measured.
    """

    scores: Tensor
    order: Tensor
    losses: Tensor | None = None
    rises: Tensor | None = None


def rank(
    group: PrunableGroup,
    moments: Moments,
    weight: Tensor,
    *,
    selection: Selection,
    ratio: float | None = None,
    penalty: float,
    damping: float,
    seed: int = 0,
    with_losses: bool = False,
) -> Ranking:
    """Ranks the units of one group; a unit's score is the mean over its channels.

    Args:
        group: The group.
        moments: Of its consumer's input.
        weight: (D_out, D) of its consumer.
        selection: `newton`, the paper's score: the relaxed mask z in the direction of its Newton step, at ratio 1, as
            the order is the same at every ratio; `box`, the same with z held in [0, 1], at the ratio given; `obs`, the
            greedy removal order, scored by the share of the output lost when the unit goes; or a baseline.
        ratio: Share that is to go, in (0, 1); needed for `box`.
        penalty: Lambda of `newton` and `box`.
        damping: Of all factorisations, relative to the mean diagonal.
        seed: Of `random`.
        with_losses: Whether `losses` is computed for other selections than `obs`.
    """
    gram = moments.gram.to(weight.device, torch.float64)
    subject = f"the calibration moments of {group.name}"
    if selection == "obs":
        at_once = max(1, group.units // _GREEDY_ROUNDS)
        order = removal_order(gram, weight, channels=group.channels, damping=damping, at_once=at_once, subject=subject)
        losses = loss_curve(gram, weight, order, channels=group.channels, damping=damping, subject=subject)
        scores = torch.empty_like(losses[1:])
        scores[order] = losses[1:]
        return Ranking(scores.cpu(), order.cpu(), losses.cpu())
    # Scaled as in the paper, ||X|| = 1; it matters for a finite penalty alone.
    scaled = gram / gram.trace()
    if selection == "newton":
        channel_scores = 1 - newton_direction(scaled, weight, penalty=penalty, damping=damping, subject=subject)[0]
    elif selection == "box":
        if ratio is None:
            raise ValueError("ratio must be given for box, got None")
        channel_scores = box_score(scaled, weight, ratio, penalty=penalty, damping=damping, subject=subject)
    else:
        # A stream for each group, so that a group's draw does not depend on which were ranked before it.
        stream = len(KINDS) * group.block + KINDS.index(group.kind)
        generator = torch.Generator().manual_seed((seed << 20) + stream)
        channel_scores = baseline_score(selection, moments, weight, generator=generator)
        if selection == "flap":
            channel_scores = standardised(channel_scores)
    scores = channel_scores.view(group.units, group.channels).mean(dim=1)
    order = torch.argsort(scores, stable=True)
    if not with_losses:
        return Ranking(scores.cpu(), order.cpu())
    losses = loss_curve(gram, weight, order, channels=group.channels, damping=damping, subject=subject)
    return Ranking(scores.cpu(), order.cpu(), losses.cpu())


def save_rankings(rankings: Mapping[str, Ranking], path: Path) -> None:
    """Writes rankings, by their groups' names, as safetensors."""
    tensors = {
        f"{name}.{part}": getattr(ranking, part)
        for name, ranking in rankings.items()
        for part in (field.name for field in fields(Ranking))
        if getattr(ranking, part) is not None
    }
    with replace_on_success(path) as temporary:
        save_file(tensors, temporary)


def load_rankings(path: Path) -> dict[str, Ranking]:
    """Reads rankings by their groups' names."""
    parts: dict[str, dict[str, Tensor]] = {}
    with reading(path):
        tensors = load_file(path)
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        parts.setdefault(name, {})[part] = tensor
    return {name: Ranking(**of_group) for name, of_group in parts.items()}
