"""Token sequences, what a model is told besides, the file that holds both, and their identity."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from numprune.errors import NumpruneError
from numprune.files import replace_on_success


@dataclass(frozen=True)
class Samples:
    """Token sequences, and what else a model's forward pass is given with each of them.

    Attributes:
        input_ids: (samples, length) token ids.
        inputs: Further arguments of the forward pass by their names, each (samples, ...). The one called
            `attention_mask`, (samples, length), is False at padding, which counts in no moment and no loss.
    """

    input_ids: Tensor
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: "Samples | Tensor") -> "Samples":
        """Samples as they are, or bare (samples, length) token ids as samples."""
        return cls(samples) if isinstance(samples, Tensor) else samples

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, chosen: slice | Tensor) -> "Samples":
        return Samples(self.input_ids[chosen], {name: tensor[chosen] for name, tensor in self.inputs.items()})

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.input_ids.shape[1]

    def within(self, tokens: int) -> "Samples":
        """The first samples that together have at most so many tokens; at least one."""
        return self[: max(1, tokens // self.length)]

    def split(self, size: int) -> Iterator["Samples"]:
        """Consecutive parts of so many samples, the last one perhaps of fewer."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def to(self, device: torch.device) -> "Samples":
        """The same on a device."""
        return Samples(self.input_ids.to(device), {name: tensor.to(device) for name, tensor in self.inputs.items()})

    def present(self) -> Tensor:
        """(samples, length) bool: which tokens are no padding."""
        mask = self.inputs.get("attention_mask")
        return torch.ones_like(self.input_ids, dtype=torch.bool) if mask is None else mask.bool()

    def scored(self, vocabulary: int) -> Tensor:
        """(samples, length) bool: from which tokens the next one is predicted.

        A token that the output layer does not know, such as one that stands for a condition, is not predicted, and
        padding neither is nor predicts. What follows the last token is unknown, but predicted.

        Args:
            vocabulary: Tokens that the output layer knows.
        """
        present = self.present()
        follows = present[:, 1:] & (self.input_ids[:, 1:] < vocabulary)
        return present & torch.cat([follows, torch.ones_like(present[:, :1])], dim=1)


def checked_inputs(
    inputs: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], samples: int, path: Path
) -> dict[str, Tensor]:
    """Those of the tensors of a file that a model is given with every sample.

    Args:
        inputs: All tensors, by name.
        expected: Shapes for one sample of those that the model is given.
        samples: How many there are.
        path: Of the file.

    Raises:
        NumpruneError: If some are missing, of another shape or of impossible values; it lists all of it.
    """
    found = {name: inputs[name] for name in expected if name in inputs}
    problems = [f"{name} is missing" for name in expected if name not in inputs]
    for name, tensor in found.items():
        shape = (samples, *expected[name])
        if tensor.shape != shape:
            problems.append(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} holds NaN or infinite values")
        elif name == "attention_mask":
            found[name] = tensor.bool()
            if not torch.equal(found[name].to(tensor.dtype), tensor) or (found[name].int().diff(dim=1) < 0).any():
                problems.append(f"{name} must be 0 at padding, which comes first, and 1 at everything behind it")
    if problems:
        raise NumpruneError(
            f"{path}: the model is given {' and '.join(expected)} with every sample, but {'; '.join(problems)}."
        )
    return found


def save_samples(samples: Samples | Tensor, path: Path) -> None:
    """Writes samples as a `.safetensors` file that serves as calibration data again."""
    samples = Samples.of(samples)
    tensors = {"input_ids": samples.input_ids.to(torch.int32), **samples.inputs}
    with replace_on_success(path) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, {"sha256": fingerprint(samples)})


def load_samples(path: Path) -> Samples:
    """Reads what `save_samples` wrote, token ids as int64."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - No dictionary.
    return Samples(tensors.pop("input_ids").long(), tensors)


def fingerprint(samples: Samples | Tensor) -> str:
    """SHA-256 of the token ids and their shape, and of further inputs with their names, types and shapes."""
    samples = Samples.of(samples)
    digest = hashlib.sha256(json.dumps(list(samples.input_ids.shape)).encode())
    digest.update(samples.input_ids.long().contiguous().numpy().tobytes())
    for name, tensor in sorted(samples.inputs.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
