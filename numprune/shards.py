"""Weights of a model written shard by shard: no more than one shard is in memory."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from numprune.streaming import stored

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# A shard is closed when the next block would make it larger.
SHARD_BYTES = 2 * 2**30


def write_weights(
    blocks: nn.ModuleList, path: str, state: Mapping[str, Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """Writes all weights of a model into a folder, with the file names and the index that transformers reads.

    Args:
        blocks: The decoder blocks, which may be stored elsewhere.
        path: Of the blocks inside the model.
        state: What is written, by the names that the checkpoint gives it; on the meta device what is stored elsewhere.
        folder: To write to.
        dtype: Of what is written; integers stay what they are.
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def close() -> None:
        save_file(shard, folder / f"{len(shards)}.partial", {"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for portion in _portions(blocks, path, state):
        cast = {
            name: tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
            for name, tensor in portion.items()
        }
        total += _bytes(cast)
        if shard and _bytes(shard) + _bytes(cast) > SHARD_BYTES:
            close()
        shard.update(cast)
    close()
    if len(shards) == 1:
        (folder / "0.partial").replace(folder / SINGLE)
        return
    where: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.partial").replace(folder / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _portions(blocks: nn.ModuleList, path: str, state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """What is outside the decoder blocks, then block by block."""
    outside = {name: tensor for name, tensor in state.items() if not name.startswith(f"{path}.")}
    # Of tensors that are one, such as tied embeddings, the first name is written; loading ties them again.
    firsts = {(tensor.data_ptr(), tensor.shape): name for name, tensor in reversed(outside.items())}
    yield {name: outside[name] for name in reversed(firsts.values())}
    for index, block in enumerate(blocks):
        start = f"{path}.{index}."
        elsewhere = stored(block)
        read = {start + name: tensor for name, tensor in elsewhere.read().items()} if elsewhere else {}
        yield {name: read.get(name, tensor) for name, tensor in state.items() if name.startswith(start)}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
