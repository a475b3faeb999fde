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

In a parallel block, where the MLP does not read what the attention gives, nothing of this changes: both are added to
the same stream, one after the other.

Where a norm stands between consumer and residual stream, as in Gemma and OLMo, the stream gets g * v / rms(v) of what
the consumer gives, v. A norm cannot give every T, so the norm is made linear about the dense output o = X V: with its
divisor that of the dense stream, r = rms(o), every token is fitted to

    x' V / r = o / r + g (T - g o / r) / (g^2 + delta),

the ridge solution of g u = T from u = o / r. delta, a tenth of the mean of g^2, keeps channels that the norm hardly
lets through from asking for what would outweigh all others. Where T is what the dense model adds, this asks for o.

Some families have norms whose mean square runs over the queries or the keys of all heads. It changes when heads go;
with `refit` their weights are refitted like the last norm's, from what the pruned model's norm gives to what the dense
one's does on the channels that stay.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune.architectures import PrunableGroup, after_blocks, channel_indices, layout_of, linear
from numprune.capture import enter, token_rows
from numprune.cholesky import damped_cholesky, solve
from numprune.memory import HiddenStates, is_out_of_memory
from numprune.ranks import add_up, largest, own_share
from numprune.resume import Saved
from numprune.samples import Samples
from numprune.second_moments import SecondMoments, product, products

Recovery = Literal["none", "bias", "least_squares", "sequential", "refit"]

# A mild pull: it decides where the calibration tokens leave the weight undetermined.
RIDGE = 1e-2
# Of the factors of a norm behind a consumer, relative to their mean square.
NORM_DAMPING = 0.1


_SUFFICED, _FAILED = 0, 1


class _OtherRankError(Exception):
    """The memory of another rank does not suffice."""


def _add_up(*tensors: Tensor) -> None:
    """Replaces tensors by their sums over all ranks.

    Raises:
        _OtherRankError: As `_ask_others`.
    """
    _ask_others()
    add_up(*tensors)


def _ask_others() -> None:
    """Asks whether memory has sufficed on all ranks; where it has not, a rank says so instead of asking.

    Ranks ask before each of their sums and at the end of a block, so that all of them leave it at the same place.

    Raises:
        _OtherRankError: If a rank says so.
    """
    if largest(_SUFFICED) != _SUFFICED:
        raise _OtherRankError


class _Regression:
    """Streams the normal equations of a linear layer's new weight over batches, in float64 sums of float32 products."""

    def __init__(self, inputs: int, targets: int, device: torch.device) -> None:
        self._gram = SecondMoments(inputs, device)
        self.cross = torch.zeros(targets, inputs, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, targets: Tensor, present: Tensor | None) -> None:
        rows, wanted = token_rows(inputs, present), token_rows(targets, present)
        self._gram.add(products(rows))
        self.cross += product(wanted, rows)

    def factor(self, ridge: float, subject: str) -> tuple[Tensor, Tensor]:
        """The Cholesky factor of the damped Gram matrix of all ranks, and gamma; nothing is added after."""
        gram = self._gram.total()
        del self._gram  # It has no room beside the factor and what is solved with it.
        _add_up(gram, self.cross)
        gamma = ridge * gram.diagonal().mean()
        return damped_cholesky(gram, ridge, subject=subject)[0], gamma


class Streams:
    """The hidden states of all calibration samples in the dense and in the pruned model, before the same block."""

    def __init__(
        self,
        model: PreTrainedModel,
        samples: Samples | Tensor,
        *,
        batch_size: int | None,
        device: torch.device,
        ridge: float = RIDGE,
        work: Path | None = None,
    ) -> None:
        """Starts both streams at the embeddings.

        Args:
            model: The dense model; its blocks may be replaced by pruned ones as the streams pass them.
            samples: Calibration samples, or their (samples, length) token ids.
            batch_size: Samples that go through a block together; None: `fitting_batch`.
            device: Where blocks compute.
            ridge: Pull towards the weights before, relative to the mean diagonal of the normal equations.
            work: Folder for hidden states, if memory is short.
        """
        self._dense, self._arguments = enter(model, own_share(Samples.of(samples)), batch_size, device, work)
        self._pruned = self._dense.copy()
        self._ridge = ridge
        self._index = 0

    def resume(self, saved: Saved, *, most: int) -> int:
        """Goes on with what was saved before a block, at most that one; returns its index."""
        self._index = saved.load([self._dense, self._pruned], most=most)
        return self._index

    def save(self, saved: Saved, *, before: Callable[[], object]) -> None:
        """Saves both streams, see `Saved.save`."""
        saved.save(self._index, [self._dense, self._pruned], before=before)

    @torch.no_grad()
    def recover(
        self,
        block: nn.Module,
        pruned: nn.Module,
        groups: Sequence[PrunableGroup],
        kept: Mapping[str, Tensor],
        *,
        refit: bool,
    ) -> bool:
        """Refits a pruned block in place, then carries both streams through it.

        Where all of a group is gone there is nothing to refit; the next group makes up for that too.

        Args:
            block: The dense block; blocks come in order.
            pruned: The same block, sliced.
            groups: The block's groups, in the order in which their outputs join the residual stream.
            kept: Indices of the units that stayed, by the group's name.
            refit: Whether the producers are refitted too.

        Returns:
            Whether memory sufficed on every rank. If not, the streams are where they were, in batches of half the
            size, and the block is to be pruned anew.

        Raises:
            NumpruneError: If memory does not suffice for one sample.
        """
        try:
            self._pruned, self._dense = self._recover(block, pruned, groups, kept, refit=refit)
        except _OtherRankError:
            pass
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            largest(_FAILED)
        else:
            self._index += 1
            return True
        # Outside of the handlers, which hold on to what has no room.
        size = self._arguments.halve(largest(len(self._dense[0])))
        self._dense, self._pruned = self._dense.split(size), self._pruned.split(size)
        return False

    def _recover(
        self,
        block: nn.Module,
        pruned: nn.Module,
        groups: Sequence[PrunableGroup],
        kept: Mapping[str, Tensor],
        *,
        refit: bool,
    ) -> tuple[HiddenStates, HiddenStates]:
        """Both streams after the block, the pruned model's first."""
        seen = self._dense_pass(block, groups)
        done: list[_Output] = []
        for position, group in enumerate(groups):
            if not len(kept[group.name]):
                continue
            if refit:
                self._refit_producers(block, pruned, group, kept[group.name], seen.inputs[position], done=done)
                self._refit_joint_norms(pruned, group, kept[group.name], seen)
            done.append(self._refit_consumer(pruned, group, seen.aims[position], seen, done=done))
        after = seen.aims[-1] if groups else self._dense
        del seen
        through = self._pruned.mapped(_joined(states, pruned, done, batch) for batch, states in enumerate(self._pruned))
        _ask_others()
        return through, after

    @torch.no_grad()
    def refit_last_norm(self, model: PreTrainedModel) -> None:
        """Refits the weight of the norm after the last block: channel by channel the best factor, by least squares."""
        last: Any = after_blocks(model)[0]
        # A copy: the parameters of `last` are the dense model's, and stay where they are.
        norm = copy.deepcopy(last).to(self._dense.device)
        outputs = zip(map(norm, self._dense), map(norm, self._pruned), strict=True)
        self._refit_norm(norm, outputs, layout_of(model.config).norm_offset)
        if norm.weight is not None:
            last.weight = nn.Parameter(norm.weight.to(last.weight.device))

    def _dense_pass(self, block: nn.Module, groups: Sequence[PrunableGroup]) -> "_Dense":
        inputs = [group.producers[0].path for group in groups]
        outputs = [_last(group) for group in groups]
        norms = [path for group in groups for path in (*group.joint_norms, *filter(None, [group.post_norm]))]
        like = self._dense.like
        found = _Dense([like() for _ in groups], {path: (like(), like()) for path in norms}, [like() for _ in groups])
        for states, given in self._given(self._dense):
            with _watching(block, [*inputs, *norms, *outputs]) as seen:
                block(states, **given)
            reached = states
            for position, path in enumerate(outputs):
                reached = reached + seen[path].output.view_as(states)
                entered = seen[inputs[position]].input
                found.inputs[position].append(entered.reshape(*states.shape[:-1], entered.shape[-1]))
                found.aims[position].append(reached)
            for path in norms:
                for kept, value in zip(found.norms[path], (seen[path].input, seen[path].output), strict=True):
                    kept.append(value)
        return found

    def _refit_producers(
        self,
        block: nn.Module,
        pruned: nn.Module,
        group: PrunableGroup,
        kept: Tensor,
        dense: HiddenStates,
        *,
        done: Sequence["_Output"],
    ) -> None:
        """The producers of a group share their input Z, so the cross moments Z'^T Z U_kept need no output of theirs."""
        size = linear(block, group.producers[0].path).in_features
        regression = _Regression(size, size, kept.device)
        together = zip(self._given(self._pruned), dense, self._present(), strict=True)
        for batch, ((states, given), inputs, present) in enumerate(together):
            with _giving(pruned, done, batch):
                cut, _ = _run_until(pruned, group.producers[0].path, states, given)
            regression.add(cut, inputs, present)
        factor, gamma = regression.factor(self._ridge, f"block {group.block}, input of {group.producers[0].path}")
        for producer in group.producers:
            layer = linear(pruned, producer.path)
            wanted = linear(block, producer.path).weight[group.rows(producer, kept)].double()
            solved = solve(factor, (wanted @ regression.cross + gamma * wanted).T).T
            layer.weight.copy_(solved)

    def _refit_joint_norms(self, pruned: nn.Module, group: PrunableGroup, kept: Tensor, dense: "_Dense") -> None:
        """The channels that stay have another mean square than all had: their factors make up for that on average."""
        for path in group.joint_norms:
            norm: Any = pruned.get_submodule(path)
            entries = channel_indices(kept, len(norm.weight) // len(kept))
            found = (
                _run_until(pruned, group.consumer, states, given, [path])[1][0]
                for states, given in self._given(self._pruned)
            )
            wanted = (output[..., entries] for output in dense.norms[path][1])
            self._refit_norm(norm, zip(wanted, found, strict=True), offset=0.0)

    def _refit_consumer(
        self,
        pruned: nn.Module,
        group: PrunableGroup,
        aims: HiddenStates,
        dense: "_Dense",
        *,
        done: Sequence["_Output"],
    ) -> "_Output":
        """Refits a group's consumer; what the groups before it give has joined the streams already."""
        layer = linear(pruned, group.consumer)
        regression = _Regression(layer.in_features, layer.out_features, layer.weight.device)
        bias = 0.0 if layer.bias is None else layer.bias
        entered = self._pruned.like()
        together = zip(self._given(self._pruned), aims, self._present(), strict=True)
        for batch, ((states, given), aim, present) in enumerate(together):
            with _giving(pruned, done, batch):
                reached, _ = _run_until(pruned, group.consumer, states, given)
            inputs = reached.view(*states.shape[:-1], layer.in_features)
            entered.append(inputs)
            wanted = aim - _joined(states, pruned, done, batch)
            if group.post_norm:
                seen = _Seen(*(states[batch] for states in dense.norms[group.post_norm]))
                size = (seen.input.float().square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()  # As norms have it.
                wanted = _before_norm(pruned.get_submodule(group.post_norm), seen, size, wanted)
                regression.add(inputs / size, wanted - bias / size, present)
            else:
                regression.add(inputs, wanted - bias, present)
        factor, gamma = regression.factor(self._ridge, f"block {group.block}, {group.consumer}")
        solved = solve(factor, (regression.cross + gamma * layer.weight.double()).T).T
        layer.weight.copy_(solved)
        return _Output(group, entered.mapped(map(layer, entered)))

    def _refit_norm(self, norm: Any, outputs: Iterable[tuple[Tensor, Tensor]], offset: float) -> None:
        rows = (
            (token_rows(wanted, present), token_rows(found, present))
            for (wanted, found), present in zip(outputs, self._present(), strict=True)
        )
        _refit_norm(norm, rows, offset)

    def _given(self, hidden: HiddenStates) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The batches of a stream, each with what the block is given besides."""
        for (start, _), states in zip(hidden.bounds, hidden, strict=True):
            yield states, self._arguments.of(start, len(states))[self._index]

    def _present(self) -> Iterator[Tensor | None]:
        """For every batch the indices of the tokens that are no padding; None: all of them."""
        return (self._arguments.present(start, end - start) for start, end in self._pruned.bounds)


def _last(group: PrunableGroup) -> str:
    """Path of the module whose output is added to the residual stream."""
    return group.post_norm or group.consumer


def _before_norm(norm: nn.Module, dense: "_Seen", size: Tensor, wanted: Tensor) -> Tensor:
    """What a consumer is to give, over the size of what the dense one gives, so that the norm behind it gives `wanted`.

    Args:
        norm: Between the consumer and the residual stream; it subtracts no mean, so ones come out as its factors.
        dense: What the norm of the dense block sees.
        size: (..., 1) root mean square of what the dense consumer gives.
        wanted: (..., D) to be added to the pruned stream.
    """
    gain = norm(torch.ones(wanted.shape[-1], device=wanted.device, dtype=wanted.dtype))
    damped = gain.square() + NORM_DAMPING * gain.square().mean()
    return dense.input / size + gain * (wanted - dense.output) / damped


def _refit_norm(norm: Any, outputs: Iterable[tuple[Tensor, Tensor]], offset: float) -> None:
    """Scales each channel of a norm by the best factor, by least squares from what it gives to what is wanted.

    Args:
        norm: Multiplies by its weight + offset and then adds its bias, if it has one; without a weight it stays.
        outputs: Pairs of wanted outputs and those that it gives, (tokens, D).
        offset: Of the weight.
    """
    if norm.weight is None:
        return
    bias = 0.0 if getattr(norm, "bias", None) is None else norm.bias.double()
    products, squares = torch.zeros(2, len(norm.weight), dtype=torch.float64, device=norm.weight.device)
    for pair in outputs:
        wanted, found = (states.double() - bias for states in pair)
        products += (wanted * found).sum(dim=0)
        squares += found.square().sum(dim=0)
    _add_up(products, squares)
    factor = torch.where(squares > 0, products / squares, 1.0)
    scaled = (norm.weight + offset) * factor - offset
    norm.weight = nn.Parameter(scaled.to(norm.weight.dtype))


@dataclass(frozen=True)
class _Dense:
    """The dense stream in a block.

    Attributes:
        inputs: What enters each group's producers.
        norms: What enters and leaves the groups' joint norms and post-norms, by their paths.
        aims: The stream after each group.
    """

    inputs: list[HiddenStates]
    norms: dict[str, tuple[HiddenStates, HiddenStates]]
    aims: list[HiddenStates]


@dataclass(frozen=True)
class _Output:
    """What the refitted consumer of a group gives, and so its module."""

    group: PrunableGroup
    states: HiddenStates


def _joined(states: Tensor, block: nn.Module, done: Sequence[_Output], batch: int) -> Tensor:
    """The stream, given before the block, after the groups that are done with."""
    for output in done:
        given, norm = output.states[batch], output.group.post_norm
        states = states + (block.get_submodule(norm)(given) if norm else given)
    return states


@contextmanager
def _giving(block: nn.Module, done: Sequence[_Output], batch: int) -> Iterator[None]:
    """Lets the modules of groups that are done with give what they gave before, instead of computing it once more."""
    modules = [block.get_submodule(output.group.module) for output in done]
    for module, output in zip(modules, done, strict=True):
        # Attention, the only one that another group comes after, also returns its weights, which nothing asks for.
        module.forward = lambda *_, given=(output.states[batch], None), **__: given
    try:
        yield
    finally:
        for module in modules:
            del module.forward


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

        return block.get_submodule(path).register_forward_hook(keep)

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
