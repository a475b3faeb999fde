"""Sequential recovery: every output projection makes up for all that went wrong before it.

Two streams of hidden states run through the blocks side by side, the dense model's and the pruned one's. In a block
with residual connections the dense stream is x + o after the attention and x + o + m after the MLP, where o and m are
the outputs of the two consumers. The pruned stream x' is to come back to it, so a pruned consumer with inputs X' is
refitted to the target T = (dense stream after the module) - (pruned stream before it):

    min over V:  ||X' V - T||_F^2 + gamma ||V - V0||_F^2,

with V0 the weight that compensation gives and gamma relative to the mean diagonal of X'^T X'. With `refit` the kept
rows of the producers are refitted before, from the pruned stream's input Z' of the producer to what the dense producer
gives on its own stream, Z U:

    min over U':  ||Z' U' - Z U_kept||_F^2 + gamma ||U' - U_kept||_F^2.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.architectures import PrunableGroup, after_blocks, layout_of, linear
from numprune.capture import enter
from numprune.cholesky import damped_cholesky

Recovery = Literal["none", "bias", "least_squares", "sequential", "refit"]

# A mild pull: it decides where the calibration tokens leave the weight undetermined.
RIDGE = 1e-2


class _Regression:
    """Streams the normal equations of a linear layer's new weight over batches, in float64 sums of float32 products."""

    def __init__(self, inputs: int, targets: int, device: torch.device) -> None:
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(targets, inputs, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        rows, wanted = inputs.flatten(0, -2).float(), targets.flatten(0, -2).float()
        self.gram += rows.T @ rows
        self.cross += wanted.T @ rows

    def factor(self, ridge: float, subject: str) -> tuple[Tensor, Tensor]:
        """The Cholesky factor of the damped Gram matrix, and gamma."""
        gamma = ridge * self.gram.diagonal().mean()
        return damped_cholesky(self.gram.clone(), ridge, subject=subject)[0], gamma


class Streams:
    """The hidden states of all calibration samples in the dense and in the pruned model, before the same block."""

    def __init__(
        self, model: PreTrainedModel, input_ids: Tensor, *, batch_size: int, device: torch.device, ridge: float = RIDGE
    ) -> None:
        """Starts both streams at the embeddings.

        Args:
            model: The dense model; its blocks may be replaced by pruned ones as the streams pass them.
            input_ids: (samples, length) calibration tokens.
            batch_size: Samples that go through a block together.
            device: Where blocks compute.
            ridge: Pull towards the weights before, relative to the mean diagonal of the normal equations.
        """
        self._dense, self._arguments = enter(model, input_ids.split(batch_size), device)
        self._pruned = list(self._dense)
        self._ridge = ridge
        self._index = 0

    @torch.no_grad()
    def recover(
        self,
        block: nn.Module,
        pruned: nn.Module,
        groups: Sequence[PrunableGroup],
        kept: Mapping[str, Tensor],
        *,
        refit: bool,
    ) -> None:
        """Refits a pruned block in place, then carries both streams through it.

        Where all of a group is gone there is nothing to refit; the next group makes up for that too.

        Args:
            block: The dense block; blocks come in order.
            pruned: The same block, sliced.
            groups: The block's groups, in the order in which their outputs join the residual stream.
            kept: Indices of the units that stayed, by the group's name.
            refit: Whether the producers are refitted too.
        """
        seen = [self._dense_pass(block, groups, states) for states in self._dense]
        for position, group in enumerate(groups):
            if not len(kept[group.name]):
                continue
            if refit:
                inputs = [batch.inputs[position] for batch in seen]
                self._refit_producers(block, pruned, group, kept[group.name], inputs)
            before = [g for g in groups[:position] if len(kept[g.name])]
            self._refit_consumer(pruned, group, before, [batch.aims[position] for batch in seen])
        self._dense = [batch.after for batch in seen]
        self._pruned = [pruned(states, **self._of(states, self._index)) for states in self._pruned]
        self._index += 1

    @torch.no_grad()
    def refit_last_norm(self, model: PreTrainedModel) -> None:
        """Refits the weight of the norm after the last block: channel by channel the best factor, by least squares."""
        norm = after_blocks(model)[0].to(self._dense[0].device)
        outputs = ((norm(dense), norm(cut)) for dense, cut in zip(self._dense, self._pruned, strict=True))
        _refit_norm(norm, outputs, layout_of(model.config).norm_offset)
        norm.to(model.device)

    def _dense_pass(self, block: nn.Module, groups: Sequence[PrunableGroup], states: Tensor) -> "_Dense":
        inputs = [group.producers[0].path for group in groups]
        outputs = [group.consumer for group in groups]
        with _watching(block, [*inputs, *outputs]) as seen:
            after = block(states, **self._of(states, self._index))
        aims, reached = [], states
        for path in outputs:
            reached = reached + seen[path].output
            aims.append(reached)
        return _Dense([seen[path].input for path in inputs], aims, after)

    def _refit_producers(
        self, block: nn.Module, pruned: nn.Module, group: PrunableGroup, kept: Tensor, dense: Sequence[Tensor]
    ) -> None:
        """The producers of a group share their input Z, so the cross moments Z'^T Z U_kept need no output of theirs."""
        size = linear(block, group.producers[0].path).in_features
        regression = _Regression(size, size, kept.device)
        for states, inputs in zip(self._pruned, dense, strict=True):
            cut, _ = _run_until(pruned, group.producers[0].path, states, self._of(states, group.block))
            regression.add(cut, inputs)
        factor, gamma = regression.factor(self._ridge, f"block {group.block}, input of {group.producers[0].path}")
        for producer in group.producers:
            layer = linear(pruned, producer.path)
            wanted = linear(block, producer.path).weight[group.rows(producer, kept)].double()
            solved = torch.cholesky_solve((wanted @ regression.cross + gamma * wanted).T, factor).T
            layer.weight.copy_(solved)

    def _refit_consumer(
        self, pruned: nn.Module, group: PrunableGroup, before: Sequence[PrunableGroup], aims: Sequence[Tensor]
    ) -> None:
        """Refits a group's consumer; those of the groups before it have joined the streams already."""
        layer = linear(pruned, group.consumer)
        regression = _Regression(layer.in_features, layer.out_features, layer.weight.device)
        paths = [g.consumer for g in before]
        for states, aim in zip(self._pruned, aims, strict=True):
            inputs, outputs = _run_until(pruned, group.consumer, states, self._of(states, group.block), paths)
            wanted = aim - states - sum(outputs)
            regression.add(inputs, wanted if layer.bias is None else wanted - layer.bias)
        factor, gamma = regression.factor(self._ridge, f"block {group.block}, {group.consumer}")
        solved = torch.cholesky_solve((regression.cross + gamma * layer.weight.double()).T, factor).T
        layer.weight.copy_(solved)

    def _of(self, states: Tensor, index: int) -> dict[str, Any]:
        return self._arguments[len(states)][index]


def _refit_norm(norm: Any, outputs: Iterable[tuple[Tensor, Tensor]], offset: float) -> None:
    """Scales each channel of a norm by the best factor, by least squares from what it gives to what is wanted.

    Args:
        norm: Multiplies by its weight + offset and then adds its bias, if it has one; without a weight it stays.
        outputs: Pairs of wanted outputs and those that it gives, (..., D).
        offset: Of the weight.
    """
    if norm.weight is None:
        return
    bias = 0.0 if getattr(norm, "bias", None) is None else norm.bias.double()
    products = squares = torch.zeros((), dtype=torch.float64)
    for pair in outputs:
        wanted, found = (states.flatten(0, -2).double() - bias for states in pair)
        products = products + (wanted * found).sum(dim=0).cpu()
        squares = squares + found.square().sum(dim=0).cpu()
    factor = torch.where(squares > 0, products / squares, 1.0).to(norm.weight.device)
    scaled = (norm.weight + offset) * factor - offset
    norm.weight = nn.Parameter(scaled.to(norm.weight.dtype))


@dataclass(frozen=True)
class _Dense:
    """One batch in a dense block: what enters each group's producers; the stream after each group and the block."""

    inputs: list[Tensor]
    aims: list[Tensor]
    after: Tensor


@dataclass(frozen=True)
class _Seen:
    input: Tensor
    output: Tensor


@contextmanager
def _watching(block: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, _Seen]]:
    seen: dict[str, _Seen] = {}

    def watch(path: str) -> Any:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[path] = _Seen(inputs[0], output)

        return linear(block, path).register_forward_hook(keep)

    hooks = [watch(path) for path in paths]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class _ReachedError(Exception):
    """Ends a block's forward pass where what is after it is of no interest."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs


def _run_until(
    block: nn.Module, path: str, states: Tensor, arguments: dict[str, Any], watched: Sequence[str] = ()
) -> tuple[Tensor, list[Tensor]]:
    """What enters a layer of a block, and what layers before it give; layers after it are not computed."""

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _ReachedError(inputs[0])

    hook = linear(block, path).register_forward_pre_hook(stop)
    try:
        with _watching(block, watched) as seen:
            block(states, **arguments)
    except _ReachedError as reached:
        return reached.inputs, [seen[name].output for name in watched]
    finally:
        hook.remove()
    raise AssertionError(f"{path} took no part in its block's forward pass")
