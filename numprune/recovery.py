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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.architectures import PrunableGroup, linear
from numprune.capture import enter
from numprune.cholesky import damped_cholesky
from numprune.slicing import channel_indices

Recovery = Literal["none", "least_squares", "sequential", "refit"]

# A mild pull: it decides where the calibration tokens leave the weight undetermined.
RIDGE = 1e-2


class _Regression:
    """Streams the normal equations of a linear layer's new weight over batches, in float64 sums of float32 products."""

    def __init__(self, layer: nn.Linear) -> None:
        device = layer.weight.device
        self.gram = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        rows, wanted = inputs.flatten(0, -2).float(), targets.flatten(0, -2).float()
        self.gram += rows.T @ rows
        self.cross += wanted.T @ rows

    def solve(self, start: Tensor, ridge: float, subject: str) -> Tensor:
        """The (D_out, D) weight; `start` is what the ridge pulls towards."""
        gamma = ridge * self.gram.diagonal().mean()
        factor, _ = damped_cholesky(self.gram.clone(), ridge, subject=subject)
        solved = torch.cholesky_solve((self.cross + gamma * start.double()).T, factor)
        return solved.T.to(start.dtype)


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

        Args:
            block: The dense block.
            pruned: The same block, sliced.
            groups: The block's groups, in the order in which their outputs join the residual stream.
            kept: Indices of the units that stayed, by the group's name.
            refit: Whether the producers are refitted too.
        """
        for position, group in enumerate(groups):
            if refit:
                self._refit_producers(block, pruned, group, kept[group.name])
            self._refit_consumer(block, pruned, groups[: position + 1])
        for batch, (dense, cut) in enumerate(zip(self._dense, self._pruned, strict=True)):
            arguments = self._of(dense, groups[0].block)
            self._dense[batch], self._pruned[batch] = block(dense, **arguments), pruned(cut, **arguments)

    def _refit_producers(self, block: nn.Module, pruned: nn.Module, group: PrunableGroup, kept: Tensor) -> None:
        layers = [linear(pruned, producer.path) for producer in group.producers]
        regressions = [_Regression(layer) for layer in layers]
        paths = [producer.path for producer in group.producers]
        for (_, dense), (_, cut) in self._observed(block, pruned, group.block, paths):
            for producer, layer, regression in zip(group.producers, layers, regressions, strict=True):
                wanted = dense[producer.path].output[..., channel_indices(kept, producer.rows)]
                regression.add(cut[producer.path].input, wanted if layer.bias is None else wanted - layer.bias)
        for producer, layer, regression in zip(group.producers, layers, regressions, strict=True):
            layer.weight.copy_(regression.solve(layer.weight, self._ridge, f"block {group.block}, {producer.path}"))

    def _refit_consumer(self, block: nn.Module, pruned: nn.Module, groups: Sequence[PrunableGroup]) -> None:
        """Refits the consumer of the last group; those of the groups before it have joined the streams already."""
        *before, group = groups
        layer = linear(pruned, group.consumer)
        regression = _Regression(layer)
        paths = [g.consumer for g in groups]
        for (dense_states, dense), (cut_states, cut) in self._observed(block, pruned, group.block, paths):
            aim = dense_states + sum(dense[path].output for path in paths)
            reached = cut_states + sum(cut[g.consumer].output for g in before)
            wanted = aim - reached if layer.bias is None else aim - reached - layer.bias
            regression.add(cut[group.consumer].input, wanted)
        layer.weight.copy_(regression.solve(layer.weight, self._ridge, f"block {group.block}, {group.consumer}"))

    def _observed(
        self, block: nn.Module, pruned: nn.Module, index: int, paths: Sequence[str]
    ) -> "Iterator[tuple[tuple[Tensor, dict[str, _Seen]], tuple[Tensor, dict[str, _Seen]]]]":
        for dense, cut in zip(self._dense, self._pruned, strict=True):
            arguments = self._of(dense, index)
            with _watching(block, paths) as dense_seen, _watching(pruned, paths) as cut_seen:
                block(dense, **arguments)
                pruned(cut, **arguments)
            yield (dense, dense_seen), (cut, cut_seen)

    def _of(self, states: Tensor, index: int) -> dict[str, Any]:
        return self._arguments[len(states)][index]


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
