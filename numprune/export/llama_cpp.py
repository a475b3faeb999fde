"""GGUF files for llama.cpp.

A model whose layers have the same widths is written as its own architecture, or as one that computes the same. One
whose layers differ is written as an architecture of llama.cpp that reads head and channel counts for every layer:
`deci`, which computes what LLaMA does, with biases in all projections if they are there. What a family can be written
as is said in `numprune.export.llama_cpp_architectures`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from safetensors import safe_open
from torch import Tensor

from numprune.architectures import check_supported, head_dim, layer_widths
from numprune.checkpoint import load_config, load_shapes, weight_files
from numprune.errors import NumpruneError
from numprune.export.gguf_tokenizer import add_tokenizer
from numprune.export.llama_cpp_architectures import TARGETS, Target, check_settings
from numprune.export.llama_cpp_rope import Rope
from numprune.files import replace_on_success
from numprune.ragged import LAYOUTS, row_counts
from numprune.stock import family

Type = Literal["f32", "f16", "bf16", "q8_0"]

_TYPES: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_BLOCK = 32  # Weights of a row that q8_0 gives one scale.


# Settings and the methods that write them, for every family that has them.
_SETTINGS: Mapping[str, Callable[[GGUFWriter, Any], None]] = {
    "rms_norm_eps": GGUFWriter.add_layer_norm_rms_eps,
    "layer_norm_eps": GGUFWriter.add_layer_norm_eps,
    "logit_scale": GGUFWriter.add_logit_scale,
    "attn_logit_softcapping": GGUFWriter.add_attn_logit_softcapping,
    "final_logit_softcapping": GGUFWriter.add_final_logit_softcapping,
    "use_parallel_residual": GGUFWriter.add_parallel_residual,
}


class Exported(NamedTuple):
    """What a file holds.

    Attributes:
        architecture: Name of llama.cpp's architecture.
        filled: What was filled up with zeros because the architecture has no smaller form; empty if nothing was.
    """

    architecture: str
    filled: str


def export_gguf(folder: Path, output: Path, *, kind: Type = "f16") -> Exported:
    """Writes a pruned or dense checkpoint as a GGUF file, tensor by tensor.

    Args:
        folder: Of the checkpoint.
        output: File to write; it appears only when complete.
        kind: Of the matrices; norms and biases stay in single precision.

    Raises:
        NumpruneError: If llama.cpp has no architecture that computes the same, or cannot read the tokenizer.
    """
    exported = _Export(folder, kind)
    with replace_on_success(output) as temporary:
        exported.write(temporary)
    return Exported(exported.target.name, exported.filled)


class _Widths(NamedTuple):
    """Of one layer."""

    queries: int
    keys: int
    channels: int


_WEIGHT = re.compile(r"(?P<blocks>.+\.layers)\.(?P<block>\d+)\.(?P<path>.+)\.(?P<kind>weight|bias)")
# What projections that the family fuses are called where they are apart.
_PARTS = {part: f"self_attn.{part}_proj" for part in "qkvo"} | {p: f"mlp.{p}_proj" for p in ("gate", "up", "down")}
# Buffers in checkpoints of early versions of transformers.
_BUFFERS = re.compile(r".+\.attention\.(bias|masked_bias)|.+\.inv_freq")


class _Export:
    """One checkpoint on its way into a file."""

    def __init__(self, folder: Path, kind: Type) -> None:
        self._folder, self._config = folder, load_config(folder)
        check_supported(self._config)
        shapes = load_shapes(folder)
        # Rotary embeddings may ask for the head count; widths are read off the tensors.
        self._config.allow_global_per_layer_attribute_access = True
        self._layout = LAYOUTS[family(self._config)]
        self._files = {name: file for file in weight_files(folder) for name in _names(file)}
        self._head_dim = head_dim(shapes)
        self._widths = [
            _Widths(layer["num_attention_heads"], layer["num_key_value_heads"], layer["intermediate_size"])
            for layer in layer_widths(shapes)
        ]
        attention, mlp = self._layout.attention, self._layout.mlp
        self._rows_of = {**attention.producers, **mlp.producers, attention.consumer: "o", mlp.consumer: "down"}
        self.target, full = self._chosen()
        self._rope = Rope.of(self._config, self._head_dim, self.target)
        self._quantization, self._file_type = _TYPES[kind]
        multiple = _BLOCK if kind == "q8_0" else 1
        # A module that is absent is written as one of zeros, as small as can be.
        self._written = [
            _Widths(queries or 1, keys or 1, -(-max(channels, 1) // multiple) * multiple)
            for queries, keys, channels in full
        ]
        self._names = gguf.get_tensor_name_map(self.target.arch, len(full))

    @property
    def filled(self) -> str:
        """What was filled up with zeros."""
        most = max(new.queries - old.queries for new, old in zip(self._written, self._widths, strict=True))
        if not self.target.all_heads or most <= 0:
            return ""
        return f"heads are filled up with zeros to {self._written[0].queries}, which {self.target.name} takes for given"

    def write(self, path: Path) -> None:
        writer = GGUFWriter(path, self.target.name)
        self._add_settings(writer)
        add_tokenizer(writer, self._folder, self._config.vocab_size)
        # The file describes all tensors before it holds one, so shapes go through the same steps first.
        for name, tensor in self._tensors(_shape_of):
            writer.add_tensor_info(name, *self._description(tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in self._tensors(_read):
            writer.write_tensor_data(self._encoded(name, tensor))
        writer.close()

    def _chosen(self) -> tuple[Target, list[_Widths]]:
        """The first architecture of the family with a place for everything, and the widths of its layers."""
        name, targets = family(self._config), TARGETS.get(family(self._config), ())
        if not targets:
            raise NumpruneError(
                f"llama.cpp has no architecture for the family {name}. Exported are {', '.join(TARGETS)}."
            )
        biases = {
            part
            for found in map(_WEIGHT.fullmatch, self._files)
            if found and found["kind"] == "bias"
            for part in re.findall(r"\w+", self._rows_of.get(found["path"], ""))
        }
        fitting = [target for target in targets if biases <= set(target.biases.split())]
        for fill in (False, True):
            for target in fitting:
                widths = [self._filled_up(layer) if fill and target.all_heads else layer for layer in self._widths]
                free = not target.all_heads or all(
                    layer.queries * self._head_dim == self._config.hidden_size for layer in widths
                )
                if free and (target.per_layer or (len(set(widths)) == 1 and 0 not in widths[0])):
                    check_settings(self._config, target)
                    return target, widths
        arch = " or ".join(target.name for target in targets)
        raise NumpruneError(
            f"llama.cpp's architecture {arch} has one width for all layers, or no place for biases that the family "
            f"{name} lacks. Prune with --uniform, and not with --depth or the recovery bias."
        )

    def _filled_up(self, layer: _Widths) -> _Widths:
        queries = self._config.hidden_size // self._head_dim
        return layer._replace(queries=queries, keys=queries * layer.keys // max(layer.queries, 1))

    def _add_settings(self, writer: GGUFWriter) -> None:
        config: Any = self._config
        writer.add_name(self._folder.resolve().name)
        writer.add_file_type(self._file_type)
        writer.add_vocab_size(config.vocab_size)
        window = getattr(config, "sliding_window", None)
        if window and self.target.period:
            writer.add_sliding_window(window)
            window = None
        # Within its window a sliding attention is a full one, which is all that other architectures have.
        limits = (config.max_position_embeddings, window, self._rope.length)
        writer.add_context_length(min(limit for limit in limits if limit))
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(len(self._written))
        queries, keys, channels = (list(counts) for counts in zip(*self._written, strict=True))
        per_layer = self.target.per_layer
        writer.add_head_count(queries if per_layer else queries[0])
        writer.add_head_count_kv(keys if per_layer else keys[0])
        writer.add_feed_forward_length(channels if per_layer else channels[0])
        writer.add_key_length(self._head_dim)
        writer.add_value_length(self._head_dim)
        self._rope.add_to(writer)
        for name, add in _SETTINGS.items():
            if getattr(config, name, None) is not None:
                add(writer, getattr(config, name))

    def _tensors(self, read: Callable[[Path, str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors as llama.cpp has them, always in the same order."""
        if self._rope.factors is not None:
            yield f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight", self._rope.factors
        tied = self._config.tie_word_embeddings
        for name, file in sorted(self._files.items()):
            if _BUFFERS.fullmatch(name) or (tied and name in {"lm_head.weight", "embed_out.weight"}):
                continue
            found = _WEIGHT.fullmatch(name)
            if not found:
                tensor = self._plain(name, read(file, name))
                yield self._name(name), tensor
                if tied and self.target.output and tensor.dim() > 1:
                    yield f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.OUTPUT]}.weight", tensor
                continue
            for path, tensor in self._of_block(int(found["block"]), found["path"], name, read(file, name)):
                yield self._name(f"{found['blocks']}.{found['block']}.{path}.{found['kind']}"), tensor
        for name, shape in self._absent():
            yield self._name(name), torch.zeros(shape)

    def _name(self, name: str) -> str:
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise NumpruneError(f"{self._folder}: llama.cpp's architecture {self.target.name} has no place for {name}.")
        return found

    def _of_block(self, block: int, path: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Paths and tensors of what one tensor of a block becomes."""
        rows, old, new = self._rows_of.get(path), self._widths[block], self._written[block]
        if rows is None:
            yield path, self._norm(path, tensor, old, new)
        elif rows in {"o", "down"}:
            columns = new.queries * self._head_dim if rows == "o" else new.channels
            yield path, _padded(tensor, 1, columns) if name.endswith(".weight") else tensor
        else:
            pieces = {
                part: self._rows(part, piece, new) for part, piece in _split(tensor, rows, old, self._head_dim).items()
            }
            if len(pieces) == 1:
                yield path, self._scaled(path, *pieces.values())
            elif self.target.fused and "q" in pieces:
                yield path, torch.cat([pieces[part] for part in "qkv"])
            else:
                yield from ((_PARTS[part], piece) for part, piece in pieces.items())

    def _rows(self, part: str, tensor: Tensor, new: _Widths) -> Tensor:
        """Rows of queries and keys in llama.cpp's order, and as many as it wants."""
        if self.target.reorder and part in "qk":
            tensor = self._rope.reordered(tensor)
        heads = {"q": new.queries, "k": new.keys, "v": new.keys}.get(part)
        return _padded(tensor, 0, new.channels if heads is None else heads * self._head_dim)

    def _norm(self, path: str, tensor: Tensor, old: _Widths, new: _Widths) -> Tensor:
        """A norm of a block; one over the channels of all heads is filled up with the heads."""
        if path in self._layout.attention.joint_norms:
            before, after = (old.queries, new.queries) if path.endswith("q_norm") else (old.keys, new.keys)
            # The mean square is taken over the zeros as well.
            tensor = _padded(tensor.float() * math.sqrt(before / after), 0, after * self._head_dim)
        return self._scaled(path, self._plain(path, tensor))

    def _plain(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that belongs to no units; norms without the family's offset."""
        return tensor.float() + self._layout.norm_offset if "norm" in name else tensor

    def _scaled(self, path: str, tensor: Tensor) -> Tensor:
        """What the family multiplies attention by, over what llama.cpp does, goes into a weight."""
        if path != self.target.query_scale:
            return tensor
        config: Any = self._config
        largest = len(self._written) == self.target.largest
        channels = config.hidden_size // self._written[0].queries if largest else self._head_dim
        return tensor * math.sqrt(channels / config.query_pre_attn_scalar)

    def _absent(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Names, in LLaMA's checkpoints, and shapes of what is not there."""
        hidden = self._config.hidden_size
        for block, (old, new) in enumerate(zip(self._widths, self._written, strict=True)):
            rows: dict[str, int] = {}
            if not old.queries:
                rows |= dict.fromkeys("qkvo", self._head_dim)
            if not old.channels:
                rows |= dict.fromkeys(("gate", "up", "down"), new.channels)
            for part, count in rows.items():
                shape = (hidden, count) if part in {"o", "down"} else (count, hidden)
                yield f"model.layers.{block}.{_PARTS[part]}.weight", shape

    def _kind(self, tensor: Tensor) -> GGMLQuantizationType:
        if tensor.dim() == 1:
            return GGMLQuantizationType.F32
        divisible = tensor.shape[-1] % gguf.GGML_QUANT_SIZES[self._quantization][0] == 0
        return self._quantization if divisible else GGMLQuantizationType.F16

    def _description(self, tensor: Tensor) -> tuple[tuple[int, ...], np.dtype[Any], int, GGMLQuantizationType]:
        kind, shape = self._kind(tensor), tuple(tensor.shape)
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        if kind in plain:
            return shape, np.dtype(plain[kind]), tensor.numel() * np.dtype(plain[kind]).itemsize, kind
        in_bytes = gguf.quant_shape_to_byte_shape(shape, kind)
        return in_bytes, np.dtype(np.uint8), int(np.prod(in_bytes)), kind

    def _encoded(self, name: str, tensor: Tensor) -> np.ndarray[Any, Any]:
        kind = self._kind(tensor)
        if kind == GGMLQuantizationType.F16 and tensor.abs().max() > torch.finfo(torch.float16).max:
            raise NumpruneError(f"{name} has values beyond the range of f16: use --type bf16 or f32.")
        return gguf.quantize(tensor.float().numpy(), kind)


def _split(tensor: Tensor, rows: str, widths: _Widths, head_dim: int) -> dict[str, Tensor]:
    """The parts of a projection, each with its rows in the order of heads or channels."""
    if "up" in rows or "gate" in rows:
        units, sizes = widths.channels, {"gate": 1, "up": 1}
    else:
        units, sizes = widths.keys, {"q": widths.queries // widths.keys * head_dim} | dict.fromkeys("kv", head_dim)
    pieces: dict[str, Tensor] = {}
    of_parts = tensor.split([units * count for count in row_counts(rows, sizes)])
    for part, of_part in zip(rows.split("|"), of_parts, strict=True):
        names = part.split("+")
        by_unit = of_part.unflatten(0, (units, -1)).split([sizes[name] for name in names], dim=1)
        pieces |= {name: piece.flatten(0, 1) for name, piece in zip(names, by_unit, strict=True)}
    return pieces


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _shape_of(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return torch.empty(opened.get_slice(name).get_shape(), device="meta")


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor


def _padded(tensor: Tensor, dimension: int, entries: int) -> Tensor:
    """With zeros at the end of a dimension, so that it has so many entries."""
    missing = entries - tensor.shape[dimension]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dimension] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dimension)
