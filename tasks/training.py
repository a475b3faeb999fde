"""How the reference models are trained.

Matrices are trained by Muon, the rest by AdamW; the learning rate rises over the first steps, then falls linearly to
zero. A training that was interrupted goes on from its last checkpoint.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from numprune.errors import NumpruneError
from numprune.files import replace_on_success
from tasks.parameters import Training

Settings = dict[str, dict[str, Any]]


def train(
    model: PreTrainedModel,
    rows: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    training: Training,
    *,
    checkpoint: Path,
    settings: Settings,
    micro_batch: int,
) -> float:
    """Trains a model in place.

    Args:
        model: With the weights to start from.
        rows: (samples, length) token ids; every epoch sees each of them once, in an order of its own.
        loss_of: Mean loss of the model on some of the rows.
        training: Steps, batch and rates.
        checkpoint: File that an interrupted training is resumed from; the caller removes it once the model is saved.
        settings: What must be the same in a training that is resumed.
        micro_batch: Rows that are computed together.

    Returns:
        The loss, smoothed over the last steps.

    Raises:
        NumpruneError: If the checkpoint is of a training with other settings.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    if training.compile:
        loss_of = torch.compile(loss_of)
    decay = training.weight_decay
    optimizers = [
        torch.optim.Muon(matrices, lr=training.muon_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=training.adamw_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    first_step = _resume(checkpoint, settings, model, optimizers)
    order = _row_order(len(rows), training)
    smoothed = math.nan
    with Progress() as progress:
        bar = progress.add_task("train", total=training.steps, completed=first_step)
        for step in range(first_step, training.steps):
            # What is random in a step does not depend on where the training began.
            torch.manual_seed(training.seed + step)
            rate = min((step + 1) / training.warmup_steps, (training.steps - step) / training.steps)
            for optimizer, peak in zip(optimizers, (training.muon_rate, training.adamw_rate), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate
            loss = _step(loss_of, rows[order[step]].long().split(micro_batch), optimizers)
            smoothed = loss if math.isnan(smoothed) else 0.98 * smoothed + 0.02 * loss
            progress.update(bar, advance=1, description=f"train, loss {smoothed:.3f}")
            if (step + 1) % training.checkpoint_steps == 0:
                _checkpoint(checkpoint, settings, model, optimizers, step + 1)
    return smoothed


def _row_order(rows: int, training: Training) -> Tensor:
    """(steps, batch) indices."""
    generator = torch.Generator().manual_seed(training.seed)
    needed = training.steps * training.batch
    epochs = [torch.randperm(rows, generator=generator) for _ in range(math.ceil(needed / rows))]
    return torch.cat(epochs)[:needed].view(training.steps, training.batch)


def _step(
    loss_of: Callable[[Tensor], Tensor], micro_batches: Sequence[Tensor], optimizers: list[torch.optim.Optimizer]
) -> float:
    total = 0.0
    for batch in micro_batches:
        with torch.autocast(batch.device.type, torch.bfloat16):
            loss = loss_of(batch) / len(micro_batches)
        loss.backward()
        total += loss.item()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def _checkpoint(
    path: Path, settings: Settings, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    states = [optimizer.state_dict() for optimizer in optimizers]
    with replace_on_success(path) as temporary:
        torch.save({"settings": settings, "step": step, "model": model.state_dict(), "optimizers": states}, temporary)


def _resume(path: Path, settings: Settings, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]) -> int:
    """Loads the checkpoint of an unfinished training and returns the steps it has done."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    if saved["settings"] != settings:
        raise NumpruneError(f"{path} is of a training with other parameters: finish that one or remove the file.")
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return int(saved["step"])
