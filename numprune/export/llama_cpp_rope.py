"""Rotary embeddings as llama.cpp has them."""

from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from numprune.errors import NumpruneError
from numprune.export.llama_cpp_architectures import Target


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings as a file has them.

    Attributes:
        base: Of the frequencies.
        window_base: Of those in layers with a window, if they have one of their own.
        head_dim: Channels of a head.
        turned: How many of them are turned.
        factors: (head_dim / 2,) what llama.cpp divides the frequencies by; None if by nothing.
        linear: What positions are divided by, where the architecture reads that and no factors.
        partial: Whether the file says how many channels are turned.
        scale: What turned channels are multiplied by.
        length: Of the longest text, in tokens, for which frequencies are these; None if they are for all.
    """

    base: float
    window_base: float | None
    head_dim: int
    turned: int
    factors: Tensor | None
    linear: float
    partial: bool
    scale: float = 1.0
    length: int | None = None

    @classmethod
    def of(cls, config: Any, channels: int, target: Target) -> "Rope":
        """Raises NumpruneError if the architecture has no such embeddings."""
        by_layer = config.rope_parameters
        settings = by_layer.get("full_attention", by_layer)
        in_windows = by_layer.get("sliding_attention", settings)
        kind, base = settings["rope_type"], settings["rope_theta"]
        turned = int(channels * settings.get("partial_rotary_factor", 1.0))
        known = {"default", "linear"} | ({"llama3", "longrope"} if target.rope_factors else set())
        refused = [] if kind in known else [f"of type {kind}"]
        if turned != channels and not (target.rope_factors or target.partial_rotary):
            refused.append("of a part of the channels")
        own_base = target.arch == MODEL_ARCH.GEMMA3
        if by_layer is not settings and (
            in_windows["rope_type"] != "default" or not (own_base or in_windows["rope_theta"] == base)
        ):
            refused.append("that differ in layers with a window")
        if refused:
            raise NumpruneError(
                f"Rotary embeddings {' and '.join(refused)} are not exported for llama.cpp's architecture "
                f"{target.name}."
            )
        factors, scale, linear = None, 1.0, 1.0
        if target.rope_factors and (kind != "default" or turned != channels):
            factors, scale = _rope_factors(config, kind, base, channels=channels, turned=turned)
        elif kind == "linear":
            linear = settings["factor"]
        window_base = in_windows["rope_theta"] if own_base else None
        # Longer texts have other frequencies, for all of their tokens.
        length = settings["original_max_position_embeddings"] if kind == "longrope" else None
        return cls(base, window_base, channels, turned, factors, linear, target.partial_rotary, scale, length)

    def add_to(self, writer: GGUFWriter) -> None:
        """Writes the settings; factors are a tensor."""
        writer.add_rope_dimension_count(self.turned if self.partial else self.head_dim)
        writer.add_rope_freq_base(self.base)
        if self.window_base is not None:
            writer.add_rope_freq_base_swa(self.window_base)
        if self.linear != 1:
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self.linear)

    def reordered(self, tensor: Tensor) -> Tensor:
        """Rows of queries or keys, so that those which are turned together stand next to each other."""
        heads = tensor.unflatten(0, (-1, self.head_dim))
        turned, rest = heads[:, : self.turned], heads[:, self.turned :]
        if self.scale != 1:
            turned, rest = turned.float() * self.scale, rest.float()
        pairs = turned.unflatten(1, (2, self.turned // 2)).transpose(1, 2).flatten(1, 2)
        return torch.cat([pairs, rest], dim=1).flatten(0, 1)


def _rope_factors(config: Any, kind: str, base: float, *, channels: int, turned: int) -> tuple[Tensor, float]:
    exponents = torch.arange(0, channels, 2, dtype=torch.float64) / channels
    scale = 1.0
    if kind == "default":
        frequencies = base ** -(torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    else:
        found, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        frequencies = found.double()
    # Channels that are not turned have a frequency of next to nothing.
    factors = torch.full_like(exponents, 1e30)
    factors[: len(frequencies)] = base ** -exponents[: len(frequencies)] / frequencies
    return factors.float(), scale
