"""GGUF files for llama.cpp.

A model whose layers have the same widths is written as its own architecture. One whose layers differ is written as an
architecture of llama.cpp that reads head and channel counts for every layer: `deci`, which computes what LLaMA does,
with biases in all projections if they are there. llama.cpp turns neighbouring channels of a head by the same angle,
transformers the first half with the second, so the rows of queries and keys are reordered where it does as in LLaMA.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType
from safetensors import safe_open
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from numprune.architectures import head_dim, layer_widths
from numprune.checkpoint import load_config, load_shapes, weight_files
from numprune.errors import NumpruneError
from numprune.export.gguf_tokenizer import add_tokenizer
from numprune.files import replace_on_success
from numprune.stock import family

Type = Literal["f32", "f16", "bf16", "q8_0"]

_TYPES: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_BLOCK = 32  # Weights of a row that q8_0 gives one scale.


@dataclass(frozen=True)
class _Target:
    """An architecture of llama.cpp.

    Attributes:
        arch: Which.
        reorder: Whether it turns neighbouring channels of a head.
        rope_factors: Whether it reads factors for the rotary frequencies.
    """

    arch: MODEL_ARCH
    reorder: bool = False
    rope_factors: bool = False


_LLAMA = _Target(MODEL_ARCH.LLAMA, reorder=True, rope_factors=True)
_DECI = _Target(MODEL_ARCH.DECI, reorder=True, rope_factors=True)
_UNIFORM = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _Target(MODEL_ARCH.QWEN2), "qwen3": _Target(MODEL_ARCH.QWEN3)}
_RAGGED = {"llama": _DECI, "mistral": _DECI, "qwen2": _DECI}


def export_gguf(folder: Path, output: Path, *, kind: Type = "f16") -> str:
    """Writes a pruned or dense checkpoint as a GGUF file, tensor by tensor.

    Args:
        folder: Of the checkpoint.
        output: File to write; it appears only when complete.
        kind: Of the matrices; norms and biases stay in single precision.

    Returns:
        Name of llama.cpp's architecture.

    Raises:
        NumpruneError: If llama.cpp has no architecture that computes the same, or cannot read the tokenizer.
    """
    exported = _Export(folder, kind)
    with replace_on_success(output) as temporary:
        exported.write(temporary)
    return gguf.MODEL_ARCH_NAMES[exported.target.arch]


class _Export:
    """One checkpoint on its way into a file."""

    def __init__(self, folder: Path, kind: Type) -> None:
        shapes = load_shapes(folder)
        self._folder, self._config = folder, load_config(folder)
        self._files = {name: file for file in weight_files(folder) for name in _names(file)}
        self._head_dim, widths = head_dim(shapes), layer_widths(shapes)
        self.target = _target(self._config, widths, self._head_dim, self._files.keys())
        self._rope_factors = _rope_factors(self._config, self._head_dim, self.target)
        self._quantization, self._file_type = _TYPES[kind]
        self._multiple = _BLOCK if kind == "q8_0" else 1
        # A module that is absent is written as one of zeros, as small as can be.
        self._queries = [layer["num_attention_heads"] or 1 for layer in widths]
        self._keys = [layer["num_key_value_heads"] or 1 for layer in widths]
        self._channels = [-(-max(layer["intermediate_size"], 1) // self._multiple) * self._multiple for layer in widths]
        self._names = gguf.get_tensor_name_map(self.target.arch, len(widths))

    def write(self, path: Path) -> None:
        writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[self.target.arch])
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

    def _add_settings(self, writer: GGUFWriter) -> None:
        config: Any = self._config
        writer.add_name(self._folder.resolve().name)
        writer.add_file_type(self._file_type)
        writer.add_vocab_size(config.vocab_size)
        # Within its window a sliding attention is a full one, and llama.cpp's LLaMA has no other.
        window = getattr(config, "sliding_window", None) if family(config) == "mistral" else None
        writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(len(self._queries))
        ragged = self.target.arch == MODEL_ARCH.DECI
        writer.add_head_count(self._queries if ragged else self._queries[0])
        writer.add_head_count_kv(self._keys if ragged else self._keys[0])
        writer.add_feed_forward_length(self._channels if ragged else self._channels[0])
        writer.add_key_length(self._head_dim)
        writer.add_value_length(self._head_dim)
        writer.add_rope_dimension_count(self._head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    def _tensors(self, read: Callable[[Path, str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors as llama.cpp has them, always in the same order."""
        if self._rope_factors is not None:
            yield f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight", self._rope_factors
        for name, file in sorted(self._files.items()):
            if name == "lm_head.weight" and self._config.tie_word_embeddings:
                continue
            yield self._name(name), self._arranged(name, read(file, name))
        for name, shape in self._absent():
            yield self._name(name), torch.zeros(shape)

    def _name(self, name: str) -> str:
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            arch = gguf.MODEL_ARCH_NAMES[self.target.arch]
            raise NumpruneError(f"{self._folder}: llama.cpp's architecture {arch} has no place for {name}.")
        return found

    def _arranged(self, name: str, tensor: Tensor) -> Tensor:
        """Rows of queries and keys in llama.cpp's order, channels of the MLP on a multiple."""
        projection = name.rpartition(".")[0].rpartition(".")[2]
        if self.target.reorder and projection in {"q_proj", "k_proj"}:
            halves = tensor.unflatten(0, (-1, 2, self._head_dim // 2))
            return halves.transpose(1, 2).flatten(0, 2).contiguous()
        if projection in {"gate_proj", "up_proj"}:
            return _padded(tensor, 0, self._multiple)
        if projection == "down_proj" and name.endswith(".weight"):
            return _padded(tensor, 1, self._multiple)
        return tensor

    def _absent(self) -> Iterator[tuple[str, tuple[int, int]]]:
        hidden = self._config.hidden_size
        for block, channels in enumerate(self._channels):
            head, wide = self._head_dim, (hidden, channels)
            shapes = {f"self_attn.{name}_proj": (head, hidden) for name in "qkv"} | {"self_attn.o_proj": (hidden, head)}
            shapes |= {"mlp.gate_proj": wide[::-1], "mlp.up_proj": wide[::-1], "mlp.down_proj": wide}
            for path, shape in shapes.items():
                name = f"model.layers.{block}.{path}.weight"
                if name not in self._files:
                    yield name, shape

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


def _target(config: Any, widths: list[dict[str, int]], channels: int, tensors: Collection[str]) -> _Target:
    name = family(config)
    # Output projections with biases of their own are known to no other architecture here.
    biased = any(key.endswith(("o_proj.bias", "down_proj.bias")) for key in tensors)
    uniform = not biased and all(layer == widths[0] for layer in widths)
    if name == "qwen2":  # llama.cpp takes the channels of a head from the head count.
        uniform &= widths[0]["num_attention_heads"] * channels == config.hidden_size
    known = _UNIFORM if uniform else _RAGGED
    if name in known:
        return known[name]
    if name in _UNIFORM:
        raise NumpruneError(
            f"llama.cpp has no architecture for a {name} whose layers differ in width or that has biases which its "
            "family lacks. Prune with --uniform, and not with the recovery bias."
        )
    raise NumpruneError(f"The family {name} is not exported; {', '.join(_UNIFORM)} are.")


def _rope_factors(config: Any, channels: int, target: _Target) -> Tensor | None:
    """(channels / 2,) what llama.cpp divides the rotary frequencies by; None if by nothing."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return None
    if kind not in {"linear", "llama3"} or not target.rope_factors:
        arch = gguf.MODEL_ARCH_NAMES[target.arch]
        raise NumpruneError(f"Rotary embeddings of type {kind} are not exported for llama.cpp's architecture {arch}.")
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    exponents = torch.arange(0, channels, 2, dtype=torch.float64) / channels
    return (config.rope_parameters["rope_theta"] ** -exponents / scaled.double()).float()


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


def _padded(tensor: Tensor, dimension: int, multiple: int) -> Tensor:
    """With zeros at the end of a dimension, so that it has a multiple of entries."""
    missing = -tensor.shape[dimension] % multiple
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dimension] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dimension)
