"""What a machine reaches, and what pruning a model cannot do without: operations, bytes and memory of every phase.

docs/scaling.md says how the numbers come about.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from numprune.architectures import decoder_blocks, linear, prunable_groups
from numprune.batches import activation_bytes, fitting_batch
from numprune.memory import place_for
from numprune.ranks import add_up, ranks
from numprune.recipe import Recipe
from numprune.samples import Samples
from numprune.statistics import Measured

Phase = Literal["capture", "score", "compensate"]


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches.

    Attributes:
        model: Operations a second of matrix products in the type that the model computes in.
        double: The same in float64, in which equations are solved.
        memory: Bytes a second of a copy, read and written.
        reading: Bytes a second from a file that was just written.
        sums: Bytes a second that are added up over all ranks; None if there is one.
    """

    model: float
    double: float
    memory: float
    reading: float
    sums: float | None

    @classmethod
    def measured(cls, device: torch.device) -> "Ceilings":
        """Times large products, a copy, and the reading of a file."""
        size = 8192 if device.type == "cuda" else 2048
        of_type = {}
        for dtype in (model_dtype(device), torch.float64):
            left = torch.randn(size, size, device=device, dtype=dtype)
            of_type[dtype] = 2 * size**3 / _seconds(partial(torch.mm, left, left), device)
        block = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
        # Into memory that is there: on a CPU new pages take longer than the copy.
        memory = 2 * block.nbytes / _seconds(partial(torch.zeros_like(block).copy_, block), device)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "block"
            file.write_bytes(bytes(2**27))
            reading = 2**27 / _seconds(file.read_bytes, device)
        sums = block.nbytes / _seconds(partial(add_up, block), device) if ranks() > 1 else None
        return cls(of_type[model_dtype(device)], of_type[torch.float64], memory, reading, sums)

    def __str__(self) -> str:
        return (
            f"ceilings: {self.model / 1e9:.0f} GFLOP/s, {self.double / 1e9:.0f} GFLOP/s in float64, "
            f"copy {self.memory / 1e9:.1f} GB/s, file {self.reading / 1e9:.1f} GB/s"
            + (f", sums over {ranks()} ranks {self.sums / 1e9:.2f} GB/s" if self.sums else "")
        )


@dataclass(frozen=True)
class Work:
    """Operations, bytes read and memory that each phase cannot do without, of one rank.

    Attributes:
        layers: Decoder blocks.
        block: Parameters of one.
        consumers: Inputs and outputs of a block's consumers.
        producers: Inputs and, together, outputs of the producers that feed each of them.
        outside: Bytes of embeddings, last norm and head.
        head: Parameters of the head.
        hidden: Width of the residual stream.
        vocabulary: Tokens that the head knows.
        itemsize: Bytes a number of the model.
        activations: Bytes that the activations of a batch inside a block take.
        tokens: Of the calibration, of this rank.
        planning: Tokens that rises are measured on.
        length: Tokens a sequence.
        ratio: To remove.
        device: Where it is computed.
    """

    layers: int
    block: int
    consumers: list[tuple[int, int]]
    producers: list[tuple[int, int]]
    outside: int
    head: int
    hidden: int
    vocabulary: int
    itemsize: int
    activations: int
    tokens: float
    planning: int
    length: int
    ratio: float
    device: torch.device

    @classmethod
    def of(cls, model: PreTrainedModel, measured: Measured, planning: int, ratio: float) -> "Work":
        """Of a model whose blocks are stored, and its calibration."""
        samples, device = Samples.of(measured.samples), measured.device or model.device
        block, groups = decoder_blocks(model)[0], prunable_groups(model)[0]
        consumers = [linear(block, group.consumer) for group in groups]
        producers = [[linear(block, producer.path) for producer in group.producers] for group in groups]
        head: Any = model.get_output_embeddings().weight
        batch = measured.batch_size or fitting_batch(model, samples.length, device)
        return cls(
            layers=len(decoder_blocks(model)),
            block=sum(parameter.numel() for parameter in block.parameters()),
            consumers=[(layer.in_features, layer.out_features) for layer in consumers],
            producers=[(of[0].in_features, sum(layer.out_features for layer in of)) for of in producers],
            outside=sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta),
            head=head.numel(),
            hidden=head.shape[1],
            vocabulary=head.shape[0],
            itemsize=head.itemsize,
            activations=min(batch, len(samples)) * samples.length * activation_bytes(model),
            tokens=len(samples) * samples.length / ranks(),
            planning=len(samples.within(planning)) * samples.length,
            length=samples.length,
            ratio=ratio,
            device=device,
        )

    def capture(self, ceilings: Ceilings) -> float:
        """Each token through each block, and half of the symmetric G of each consumer: D^2 a token."""
        forward = 2 * self.block * self.tokens
        grams = sum(size**2 * self.tokens for size, _ in self.consumers)
        summed = sum(8 * size**2 for size, _ in self.consumers)
        return self.layers * self._floor(forward + grams, summed, ceilings)

    def score(self, recipe: Recipe, ceilings: Ceilings) -> float:
        """W^T W and a factorisation, or an inverse and its updates; for rises four trials a block beside the model."""
        solves, rows = {"obs": (2.0, 2), "newton": (1 / 3, 1)}.get(recipe.selection, (0.0, 0))
        double = sum(solves * size**3 + rows * size**2 * out for size, out in self.consumers)
        seconds = self.layers * double / ceilings.double
        if recipe.allocation == "loss_aware":
            # The model itself, and its trials, which the ranks share; each ends with the head.
            passes = self.layers + (2 * self.layers * (self.layers + 2) - self.layers) / ranks()
            ends = 1 + 4 * self.layers / ranks()
            seconds += 2 * self.planning * (self.block * passes + self.head * ends) / ceilings.model
        return seconds

    def compensate(self, recipe: Recipe, ceilings: Ceilings) -> float:
        """Both streams through each block; sums, a factorisation and solutions for every layer that is refitted."""
        if recipe.recovery == "bias":
            return self.layers * 2 * self._block_bytes / ceilings.memory
        stays = 1 - self.ratio
        kept = [(size * stays, out) for size, out in self.consumers]
        # What the pruned inputs give, by way of the kept ones.
        taken_over = sum(_solve(size, out) + 2 * size * (size / stays - size) * out for size, out in kept)
        if recipe.recovery == "least_squares":
            return self.layers * max(taken_over / ceilings.double, self._block_bytes / ceilings.reading)
        # A producer's target is a product of its own weight with the cross moments, of the input's width.
        refitted = [(size, size, out * stays) for size, out in self.producers] if recipe.recovery == "refit" else []
        forward = 2 * self.block * (2 - self.ratio) * self.tokens
        sums = sum((size**2 + 2 * size * out) * self.tokens for size, out in kept)
        sums += sum((size**2 + 2 * size * across) * self.tokens for size, across, _ in refitted)
        summed = sum(8 * (size**2 + size * out) for size, out in kept)
        summed += sum(8 * (size**2 + size * across) for size, across, _ in refitted)
        # Compensation first, then the fit to the stream.
        solve = taken_over + sum(_solve(size, out) for size, out in kept)
        solve += sum(_solve(size, out) + 2 * size**2 * out for size, _, out in refitted)
        return self.layers * (self._floor(forward + sums, summed, ceilings) + solve / ceilings.double)

    def memory(self, phase: Phase, recipe: Recipe) -> float:
        """Bytes that a phase takes on the compute device at most; on a CPU those in main memory too."""
        widest, outputs = max(self.consumers)
        square, squares = 4 * widest**2, 4 * sum(size**2 for size, _ in self.consumers)
        on_cpu = self.device.type == "cpu"
        inside = float(self.outside + self.activations)
        if phase == "capture":
            inside += 2 * self._block_bytes + 3 * squares + (squares if on_cpu else 0)
            inside += self._kept(self.tokens, self.hidden)
        elif phase == "score":
            inside += 2 * self._block_bytes + 8 * square + (squares if on_cpu else 0)
            if recipe.allocation == "loss_aware":
                inside += 6 * 4 * self.length * self.vocabulary
                inside += (2 + 4 * min(self.layers, 32) / ranks()) * self._kept(self.planning, self.hidden)
        else:
            inside += 3 * self._block_bytes + 4 * square + 8 * widest * outputs + squares
            if recipe.recovery in {"sequential", "refit"}:
                inside += 8 * self._kept(self.tokens, self.hidden)
                inside += self._kept(self.tokens, (1 - self.ratio) * widest)
        return inside

    @property
    def _block_bytes(self) -> int:
        return self.block * self.itemsize

    def _kept(self, tokens: float, width: float) -> float:
        """Bytes that hidden states take where blocks are computed; none if they have no room there."""
        size = int(tokens * width * self.itemsize)
        return size if self.device.type == "cpu" or place_for(size, self.device) == "device" else 0

    def _floor(self, operations: float, summed: float, ceilings: Ceilings) -> float:
        seconds = max(operations / ceilings.model, self._block_bytes / ceilings.reading)
        return seconds + (summed / ceilings.sums if ceilings.sums else 0.0)


def _solve(size: float, columns: float) -> float:
    """Operations of a Cholesky factorisation, and of two triangular solutions for each column."""
    return size**3 / 3 + 2 * size**2 * columns


def model_dtype(device: torch.device) -> torch.dtype:
    """The type that models are pruned in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    run()
    times = []
    for _ in range(repeats):
        wait_for(device)
        start = time.perf_counter()
        run()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait_for(device: torch.device) -> None:
    """Waits until a GPU is through with what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
