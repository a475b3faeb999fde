"""Several processes that share the calibration samples, as `torchrun` starts them; one process is the case of one rank.

Every rank carries its own samples through the model; sums over samples are added up over all ranks, and what follows
from them is computed everywhere alike. The first rank alone writes what the others read.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch import Tensor

from numprune.errors import NumpruneError
from numprune.samples import Samples


def is_under_torchrun() -> bool:
    """Whether `torchrun` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def joined() -> Iterator[None]:
    """Joins the ranks that `torchrun` started; without it there is one."""
    if not is_under_torchrun() or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        own, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= gpus:
            raise NumpruneError(f"{own + 1} processes or more, but {gpus} GPUs: start one process a GPU.")
        torch.cuda.set_device(own)
    # Tensors of a GPU by NCCL; those of a CPU, decisions and meetings by gloo, which the GPU does not wait for.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        _part()
    except SystemExit as end:  # How commands end well, too.
        if not end.code:
            _part()
        raise
    finally:
        dist.destroy_process_group()


def _part() -> None:
    """Leaves together: gloo may lose what was sent last to a rank if the sender is gone before it is read."""
    with suppress(RuntimeError):
        dist.barrier()


def ranks() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def own_share(samples: Samples) -> Samples:
    """The samples that this rank computes.

    Raises:
        NumpruneError: If there are fewer samples than ranks.
    """
    if ranks() == 1:
        return samples
    if len(samples) < ranks():
        raise NumpruneError(f"{len(samples)} samples cannot be shared by {ranks()} processes: use fewer processes.")
    return samples[rank() :: ranks()]


def add_up(*tensors: Tensor) -> None:
    """Replaces tensors by their sums over all ranks, in place."""
    if ranks() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def largest(value: int) -> int:
    """The largest of what every rank gives."""
    if ranks() == 1:
        return value
    of_ranks = [0] * ranks()
    dist.all_gather_object(of_ranks, value)
    return max(of_ranks)


def meet() -> None:
    """Waits until every rank is here: what the first one wrote before can be read after."""
    if ranks() > 1:
        dist.barrier()


def agreed(decision: bool) -> bool:
    """What the first rank decided."""
    if ranks() == 1:
        return decision
    answer = [decision]
    dist.broadcast_object_list(answer)
    return answer[0]


def held_by_all(own: set[int]) -> set[int]:
    """What every rank holds."""
    if ranks() == 1:
        return own
    of_ranks: list[set[int]] = [set()] * ranks()
    dist.all_gather_object(of_ranks, own)
    return set.intersection(*of_ranks)
