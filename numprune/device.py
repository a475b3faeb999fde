"""Where computation happens and in which precision."""

import torch

from numprune.errors import NumpruneError


def resolve_device(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU if there is one.

    Raises:
        NumpruneError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise NumpruneError(f"device {name!r} cannot be used: {reason} Try auto or cpu.") from None
    return device


def working_dtype(device: torch.device) -> torch.dtype | str:
    """The precision of capture and evaluation: the checkpoint's on a GPU, float32 on a CPU."""
    return torch.float32 if device.type == "cpu" else "auto"
