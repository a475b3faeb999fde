"""Whether a family is described rightly: what must be the same in a model with units at zero and in one without them.

The reference is the family's own dense model, in which the consumers' columns of the units that go are zero. A norm
whose mean square runs over the channels of all heads needs more. With K the channels that stay of D and no queries or
keys from the others, the dense model gives

    w q / sqrt(sum_K q^2 / D + eps),

and the sliced one takes its mean over K alone. They are the same if the dense model's weight is w sqrt(|K| / D) and its
eps is eps |K| / D.
"""

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from numprune.architectures import (
    PrunableGroup,
    after_blocks,
    all_groups,
    decoder_blocks,
    decoder_output,
    layout_of,
    linear,
    logits,
    prunable_groups,
)
from numprune.capture import enter
from numprune.samples import Samples
from numprune.saving import as_ragged
from numprune.slicing import slice_block
from numprune.stock import as_stock

_LENGTH = 16
_NEW = 12
_TOLERANCE = 1e-6


@torch.no_grad()
def slice_units(model: PreTrainedModel, kept: Mapping[str, Tensor]) -> None:
    """Removes all units that are not kept from a model, in place; nothing makes up for them."""
    for block, groups in zip(decoder_blocks(model), prunable_groups(model), strict=True):
        slice_block(block, groups, kept)


@torch.no_grad()
def zero_units(model: PreTrainedModel, kept: Mapping[str, Tensor]) -> None:
    """Makes a dense model compute, in place, what it computes without the units that are not kept; shapes stay.

    Args:
        model: A dense model whose parameters are its own.
        kept: Indices of the units that stay, by the group's name.
    """
    for block, groups in zip(decoder_blocks(model), prunable_groups(model), strict=True):
        for group in groups:
            units = kept[group.name]
            gone = torch.tensor(sorted(set(range(group.units)) - set(units.tolist())), dtype=torch.long)
            consumer = linear(block, group.consumer)
            consumer.weight[:, group.columns(gone)] = 0
            if not len(units) and consumer.bias is not None:
                consumer.bias.zero_()
            if group.joint_norms and len(units):
                _silence(block, group, gone)


def _silence(block: nn.Module, group: PrunableGroup, gone: Tensor) -> None:
    for producer in group.producers:
        layer, rows = linear(block, producer.path), group.rows(producer, gone)
        layer.weight[rows] = 0
        if layer.bias is not None:
            layer.bias[rows] = 0
    share = 1 - len(gone) / group.units
    for path in group.joint_norms:
        norm: Any = block.get_submodule(path)
        norm.weight *= math.sqrt(share)
        norm.variance_epsilon *= share


@dataclass(frozen=True)
class Finding:
    """One thing that must hold for a model, whether it does, and by how much or why not."""

    claim: str
    holds: bool
    detail: str


@torch.no_grad()
def check_parity(model: PreTrainedModel, *, seed: int = 0) -> Iterator[Finding]:
    """Tries what must hold for the layout of a model's family to be right; the model is left as it is.

    Args:
        model: A dense model, in double precision if small differences are to count; copies of it are made.
        seed: Of the tokens and of the units that stay.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings: Any = model.get_input_embeddings()
    input_ids = torch.randint(embeddings.num_embeddings, (3, _LENGTH), generator=generator).to(model.device)
    groups = all_groups(model)
    every = {group.name: torch.arange(group.units) for group in groups}
    some = {
        group.name: torch.randperm(group.units, generator=generator)[: max(1, group.units * 2 // 3)].sort().values
        for group in groups
    }
    without = some | dict.fromkeys((groups[0].name, groups[-1].name), torch.tensor([], dtype=torch.long))

    def logits_of(change: Callable[..., None], kept: Mapping[str, Tensor]) -> Tensor:
        scores: Tensor = _changed(change, model, kept)(input_ids).logits
        return scores

    def same_logits(kept: Mapping[str, Tensor]) -> str:
        return _same(logits_of(slice_units, kept), logits_of(zero_units, kept))

    def same_generation() -> str:
        smaller: Any = _changed(slice_units, model, some)
        settings: Any = {"do_sample": False, "max_new_tokens": _NEW, "min_new_tokens": _NEW, "pad_token_id": 0}
        expected = smaller.generate(input_ids, use_cache=False, **settings)
        if not torch.equal(smaller.generate(input_ids, **settings), expected):
            raise _DisagreementError("the tokens differ")
        return f"{_NEW} tokens after {_LENGTH}"

    claims: dict[str, Callable[[], str]] = {
        "every weight of attention and MLP belongs to units": lambda: _all_accounted_for(model),
        "nothing removed: the same logits": lambda: _same(logits_of(slice_units, every), model(input_ids).logits),
        "units removed: the logits of the model with them at zero": lambda: same_logits(some),
        "whole modules removed: the same": lambda: same_logits(without),
        "a block adds what its modules give, behind their post-norms": lambda: _stream_adds_up(model, input_ids),
        "the last norm multiplies by its weight and the family's offset": lambda: _norm_scales(model, input_ids),
        "block by block: the logits of one forward pass": lambda: _same(
            _block_by_block(model, input_ids), model(input_ids).logits
        ),
        "generation with a cache: the tokens without one": same_generation,
        "saved and loaded: the same logits": lambda: _same(
            _saved_and_loaded(_changed(slice_units, model, some))(input_ids).logits, logits_of(slice_units, some)
        ),
    }
    for claim, find_out in claims.items():
        try:
            yield Finding(claim, True, find_out())
        except Exception as error:  # Whatever a wrong layout makes torch or transformers stumble over.
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            yield Finding(claim, False, reason[0])


def stock_shapes(model: PreTrainedModel) -> dict[str, str]:
    """Whether cutting all layers alike leaves a stock model: for fewer MLP channels, and for fewer heads as well."""
    forms = {}
    for name, kinds in {"fewer channels": ("mlp",), "fewer heads": ("attention",)}.items():
        kept = {
            group.name: torch.arange(max(1, group.units - 1) if group.kind in kinds else group.units)
            for group in all_groups(model)
        }
        form = as_stock(_changed(slice_units, model, kept))
        forms[name] = f"{type(form.model).__name__}: {form.reason}" if form.model else f"ragged: {form.reason}"
    return forms


class _DisagreementError(Exception):
    """Two things that must be the same are not."""


def _changed(
    change: Callable[[PreTrainedModel, Mapping[str, Tensor]], None], model: PreTrainedModel, kept: Mapping[str, Tensor]
) -> PreTrainedModel:
    result = copy.deepcopy(model)
    change(result, kept)
    return result


def _saved_and_loaded(model: PreTrainedModel) -> PreTrainedModel:
    with tempfile.TemporaryDirectory(prefix="numprune-") as folder:
        as_ragged(model).save_pretrained(folder)
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return loaded.to(model.device)  # type: ignore[arg-type]  # torch's device is one of what it takes.


def _same(found: Tensor, expected: Tensor) -> str:
    error = ((found - expected).norm() / expected.norm()).item()
    # Norms and softmax compute in single precision whatever the model's is.
    if not error < _TOLERANCE:
        raise _DisagreementError(f"they differ by {error:.1e} of their size, allowed is {_TOLERANCE:.0e}")
    return f"differ by {error:.0e}"


def _block_by_block(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    (hidden,), arguments = enter(model, Samples(input_ids), len(input_ids), model.device)
    for block, given in zip(decoder_blocks(model), arguments.of(0, len(input_ids)), strict=True):
        hidden = block(hidden, **given)
    return logits(model, decoder_output(model, hidden))


def _stream_adds_up(model: PreTrainedModel, input_ids: Tensor) -> str:
    (hidden,), arguments = enter(model, Samples(input_ids), len(input_ids), model.device)
    added: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        added.append(output.view_as(hidden))

    total, reached = [], []
    for block, groups, given in zip(
        decoder_blocks(model), prunable_groups(model), arguments.of(0, len(input_ids)), strict=True
    ):
        added.clear()
        hooks = [block.get_submodule(group.post_norm or group.consumer).register_forward_hook(keep) for group in groups]
        after = block(hidden, **given)
        for hook in hooks:
            hook.remove()
        total.append(hidden + sum(added))
        reached.append(after)
        hidden = after
    return _same(torch.stack(total), torch.stack(reached))


def _norm_scales(model: PreTrainedModel, input_ids: Tensor) -> str:
    norm: Any = copy.deepcopy(after_blocks(model)[0])
    states = model.get_input_embeddings()(input_ids)
    bias = getattr(norm, "bias", None)
    shift = 0.0 if bias is None else bias
    expected = 2 * (norm(states) - shift) + shift
    offset = layout_of(model.config).norm_offset
    norm.weight.copy_(2 * (norm.weight + offset) - offset)
    return _same(norm(states), expected)


def _all_accounted_for(model: PreTrainedModel) -> str:
    inside = total = 0
    shared: set[str] = set()
    for block, groups in zip(decoder_blocks(model), prunable_groups(model), strict=True):
        described: set[str] = set()
        for group in groups:
            if group.units * group.channels != linear(block, group.consumer).in_features:
                raise _DisagreementError(f"{group.consumer} has columns that belong to no unit")
            for producer in group.producers:
                if group.units * sum(producer.rows) != linear(block, producer.path).out_features:
                    raise _DisagreementError(f"{producer.path} has rows that belong to no unit")
            described |= {group.consumer, *group.norms, *(producer.path for producer in group.producers)}
        for name, parameter in block.named_parameters():
            known = any(name.startswith(f"{path}.") for path in described)
            if not known and parameter.dim() > 1:
                raise _DisagreementError(f"the layout says nothing of {name}, {tuple(parameter.shape)}")
            if not known:
                shared.add(name.rpartition(".")[0])
        inside += sum(group.parameters for group in groups)
        total += sum(parameter.numel() for parameter in block.parameters())
    return f"{inside:,} of {total:,} parameters of the blocks; not cut: {', '.join(sorted(shared)) or 'nothing'}"
