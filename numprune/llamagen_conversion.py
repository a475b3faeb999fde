"""From the official LlamaGen checkpoints to transformers' form.

What differs between the two layouts:

    official                                     here
    tok_embeddings, cls_embedding                model.embed_tokens: image tokens, classes, no class
    cls_embedding.cap_proj.fc1, fc2              model.caption_projection.fc1, fc2
    cls_embedding.uncond_embedding               model.caption_projection.unconditional
    layers.N.attention.wqkv (fused)              model.layers.N.self_attn.q_proj, k_proj, v_proj
    rotary pairs side by side: 2i, 2i + 1        rotary pairs half a head apart: i, i + head_dim / 2
    layers.N.attention.wo                        model.layers.N.self_attn.o_proj
    layers.N.feed_forward.w1, w3, w2             model.layers.N.mlp.gate_proj, up_proj, down_proj
    layers.N.attention_norm, ffn_norm            model.layers.N.input_layernorm, post_attention_layernorm
    norm, output                                 model.norm, lm_head

The number of heads is not in the tensors; it comes from the size's name or from the caller.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from numprune.errors import NumpruneError
from numprune.files import replace_on_success
from numprune.llamagen import LlamaGenConfig, LlamaGenForCausalLM
from numprune.pickled import load_tensors, tensor_misfits

# Width, blocks and heads of every size of the paper and of its code.
SIZES: dict[str, tuple[int, int, int]] = {
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
    "3B": (3200, 24, 32),
    "1B": (2048, 22, 32),
    "XXXL": (2560, 48, 40),
    "7B": (4096, 32, 32),
}
# Of DDP, DeepSpeed and Lightning, in the order of the official scripts; then averages of the weights.
_WRAPPERS = ("model", "module", "state_dict")
_AVERAGES = ("ema", "model_ema")
# Computed, not learned.
_DERIVED = ("freqs_cis", "causal_mask", "kv_cache.k_cache", "kv_cache.v_cache")
_PREFIXES = ("module.", "_orig_mod.")


def convert_llamagen(
    checkpoint: Path,
    output: Path,
    *,
    size: str | None = None,
    heads: int | None = None,
    grid_size: int | None = None,
    average: bool = False,
) -> LlamaGenConfig:
    """Writes an official LlamaGen checkpoint as a folder that `from_pretrained` loads.

    Args:
        checkpoint: The official file, `.pt` or `.safetensors`.
        output: Folder to write; it appears only when complete.
        size: B, L, XL, XXL, 3B, ...; checked against the tensors.
        heads: Attention heads, instead of a size.
        grid_size: Tokens a side: image size / 16 (24 for 384 pixels); by default 24 for classes, 16 for captions.
        average: Take the running average of the weights if the file holds one beside the last ones.

    Returns:
        The configuration.

    Raises:
        NumpruneError: If size and heads are both given or both missing, the file is no LlamaGen, of another size,
            incomplete, or holds tensors of unknown use.
    """
    wrappers = (*_AVERAGES, *_WRAPPERS) if average else (*_WRAPPERS, *_AVERAGES)
    tensors = plain_names(load_tensors(checkpoint, wrappers=wrappers), checkpoint)
    config = read_config(tensors, str(checkpoint), size=size, heads=heads, grid_size=grid_size)
    state = convert_state(tensors, config, str(checkpoint))
    with torch.device("meta"):
        model = LlamaGenForCausalLM(config)
    model.load_state_dict(state, assign=True)
    config.dtype = state["lm_head.weight"].dtype
    # With the code it needs where numprune is not installed.
    LlamaGenConfig.register_for_auto_class()
    LlamaGenForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    save_llamagen(model, output)
    return config


def save_llamagen(model: LlamaGenForCausalLM, output: Path) -> None:
    """Saves a LlamaGen with settings for generation; the folder appears when complete."""
    config: Any = model.config
    # An image has no end of its own: it is complete.
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=config.grid_size**2, pad_token_id=0
    )
    with replace_on_success(output) as temporary:
        model.save_pretrained(temporary)


def plain_names(tensors: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Tensors by the names of the official model, without the prefixes of wrappers and without derived ones."""
    plain = {}
    for name, tensor in tensors.items():
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)  # noqa: PLW2901 - Prefixes are taken off one after the other.
        if not name.endswith(_DERIVED):
            plain[name] = tensor
    if "tok_embeddings.weight" not in plain or "layers.0.attention.wqkv.weight" not in plain:
        found = ", ".join(sorted(plain)[:5])
        raise NumpruneError(
            f"{source} is no LlamaGen: tok_embeddings.weight or layers.0.attention.wqkv.weight is missing. It holds "
            f"{found}, ... A VQ tokenizer is converted by `numprune convert llamagen-vq`."
        )
    return plain


def read_config(
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    size: str | None = None,
    heads: int | None = None,
    grid_size: int | None = None,
) -> LlamaGenConfig:
    """The configuration that official tensors fit; see `convert_llamagen`."""
    if (size is None) == (heads is None):
        raise NumpruneError("Give either --size or --heads: the number of heads is not in the checkpoint.")
    if size is not None and size not in SIZES:
        raise NumpruneError(f"--size must be one of {', '.join(SIZES)}, got {size!r}; or give --heads.")
    codebook, width = tensors["tok_embeddings.weight"].shape
    blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
    if size is not None:
        expected_width, expected_blocks, heads = SIZES[size]
        if (width, blocks) != (expected_width, expected_blocks):
            fitting = [name for name, (w, b, _) in SIZES.items() if (w, b) == (width, blocks)]
            hint = f"--size {fitting[0]} fits" if fitting else "no size fits: give --heads"
            raise NumpruneError(
                f"{source} has width {width} and {blocks} blocks, but size {size} has width {expected_width} and "
                f"{expected_blocks}; {hint}."
            )
    assert heads is not None
    if heads < 1 or width % heads or (width // heads) % 4:
        raise NumpruneError(
            f"--heads must divide the width {width} into heads of a multiple of 4 channels, got {heads}."
        )
    head_dim = width // heads
    fused = tensors["layers.0.attention.wqkv.weight"].shape[0]
    key_value_heads, rest = divmod(fused - width, 2 * head_dim)
    if rest or key_value_heads < 1 or heads % key_value_heads:
        raise NumpruneError(f"{source}: wqkv has {fused} rows, which do not fit {heads} heads of {head_dim} channels.")
    condition: dict[str, Any]
    if "cls_embedding.embedding_table.weight" in tensors:
        # The last row stands for no class.
        classes = len(tensors["cls_embedding.embedding_table.weight"]) - 1
        condition = {"num_classes": classes, "caption_dim": None, "condition_tokens": 1}
    elif "cls_embedding.uncond_embedding" in tensors:
        tokens, features = tensors["cls_embedding.uncond_embedding"].shape
        condition = {"num_classes": None, "caption_dim": features, "condition_tokens": tokens}
    else:
        raise NumpruneError(
            f"{source} is neither class- nor text-conditional: cls_embedding.embedding_table.weight or "
            "cls_embedding.uncond_embedding is missing."
        )
    default_grid = 24 if condition["num_classes"] else 16
    return LlamaGenConfig(
        codebook_size=codebook,
        grid_size=grid_size or default_grid,
        hidden_size=width,
        intermediate_size=_rows(tensors, "layers.0.feed_forward.w1.weight", source),
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        **condition,
    )


def convert_state(tensors: Mapping[str, Tensor], config: LlamaGenConfig, source: str) -> dict[str, Tensor]:
    """Official tensors under the names, and in the order of rows, of `LlamaGenForCausalLM`.

    Args:
        tensors: As from `plain_names`; on the meta device shapes alone are checked.
        config: As from `read_config`.
        source: For messages.

    Raises:
        NumpruneError: If tensors are missing, left over, or of a wrong shape.
    """
    if misfits := tensor_misfits(tensors, official_shapes(config)):
        raise NumpruneError(f"{source} does not fit this configuration. Tensors {misfits}.")
    state: dict[str, Tensor] = {
        "model.norm.weight": tensors["norm.weight"],
        "lm_head.weight": tensors["output.weight"],
    }
    embedding = tensors["tok_embeddings.weight"]
    if config.caption_dim is None:
        rows = tensors["cls_embedding.embedding_table.weight"]
    else:
        # The place of a caption; its row is never read.
        rows = torch.zeros_like(embedding[:1])
        for layer in ("fc1", "fc2"):
            state[f"model.caption_projection.{layer}.weight"] = tensors[f"cls_embedding.cap_proj.{layer}.weight"]
        state["model.caption_projection.unconditional"] = tensors["cls_embedding.uncond_embedding"]
    state["model.embed_tokens.weight"] = torch.cat([embedding, rows.to(embedding.dtype)])
    for index in range(config.num_hidden_layers):
        state |= _block(tensors, f"layers.{index}", f"model.layers.{index}", config)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def official_shapes(config: LlamaGenConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official model's parameters."""
    width, channels = config.hidden_size, config.intermediate_size
    queries, keys, _ = _widths(config)
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (config.codebook_size, width),
        "norm.weight": (width,),
        "output.weight": (config.codebook_size, width),
    }
    if config.caption_dim is None:
        shapes["cls_embedding.embedding_table.weight"] = (int(config.num_classes or 0) + 1, width)
    else:
        shapes["cls_embedding.cap_proj.fc1.weight"] = (width, config.caption_dim)
        shapes["cls_embedding.cap_proj.fc2.weight"] = (width, width)
        shapes["cls_embedding.uncond_embedding"] = (config.condition_tokens, config.caption_dim)
    for index in range(config.num_hidden_layers):
        shapes |= {
            f"layers.{index}.attention.wqkv.weight": (queries + 2 * keys, width),
            f"layers.{index}.attention.wo.weight": (width, queries),
            f"layers.{index}.feed_forward.w1.weight": (channels, width),
            f"layers.{index}.feed_forward.w3.weight": (channels, width),
            f"layers.{index}.feed_forward.w2.weight": (width, channels),
            f"layers.{index}.attention_norm.weight": (width,),
            f"layers.{index}.ffn_norm.weight": (width,),
        }
    return shapes


def _block(tensors: Mapping[str, Tensor], official: str, ours: str, config: LlamaGenConfig) -> dict[str, Tensor]:
    queries, keys, head_dim = _widths(config)
    q, k, v = tensors[f"{official}.attention.wqkv.weight"].split([queries, keys, keys])
    return {
        f"{ours}.self_attn.q_proj.weight": _halves(q, head_dim),
        f"{ours}.self_attn.k_proj.weight": _halves(k, head_dim),
        f"{ours}.self_attn.v_proj.weight": v,
        f"{ours}.self_attn.o_proj.weight": tensors[f"{official}.attention.wo.weight"],
        f"{ours}.mlp.gate_proj.weight": tensors[f"{official}.feed_forward.w1.weight"],
        f"{ours}.mlp.up_proj.weight": tensors[f"{official}.feed_forward.w3.weight"],
        f"{ours}.mlp.down_proj.weight": tensors[f"{official}.feed_forward.w2.weight"],
        f"{ours}.input_layernorm.weight": tensors[f"{official}.attention_norm.weight"],
        f"{ours}.post_attention_layernorm.weight": tensors[f"{official}.ffn_norm.weight"],
    }


def _widths(config: Any) -> tuple[int, int, int]:
    """Rows of all queries and of all keys, and channels of a head."""
    head_dim = config.head_dim
    return config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim, head_dim


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """The rows of every head with the first channels of all rotary pairs before the second ones."""
    rows, width = weight.shape
    return weight.view(rows // head_dim, head_dim // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _rows(tensors: Mapping[str, Tensor], name: str, source: str) -> int:
    if name not in tensors:
        raise NumpruneError(f"{source}: {name} is missing.")
    return len(tensors[name])
