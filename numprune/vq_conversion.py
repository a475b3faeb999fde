"""LlamaGen's image tokenizer in transformers' form: a `JanusVQVAE`, which has the official VQ model's architecture.

    official                              JanusVQVAE
    encoder.conv_blocks.L.res.N           encoder.down.L.block.N
    encoder.conv_blocks.L.attn.N          encoder.down.L.attn.N
    encoder.conv_blocks.L.downsample      encoder.down.L.downsample
    decoder.conv_blocks.L.res.N           decoder.up.L.block.N
    decoder.conv_blocks.L.attn.N          decoder.up.L.attn.N
    decoder.conv_blocks.L.upsample        decoder.up.L.upsample
    mid.0, mid.1, mid.2                   mid.block_1, mid.attn_1, mid.block_2
    quantize.embedding                    quantize.embedding, normalised
    quantize.codebook_used                a counter of the training, left out

The official model normalises its codebook at every use, transformers' decoder does so too, and its encoder does not:
with normalised entries the nearest of them is the one of largest product, whatever the length of what is looked up, so
both find the same tokens.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import JanusVQVAE, JanusVQVAEConfig

from numprune.errors import NumpruneError
from numprune.files import replace_on_success
from numprune.pickled import load_tensors, tensor_misfits

_WRAPPERS = ("model", "state_dict")
_RENAMED = (
    (re.compile(r"^encoder\.conv_blocks\."), "encoder.down."),
    (re.compile(r"^decoder\.conv_blocks\."), "decoder.up."),
    (re.compile(r"^((?:en|de)coder\.(?:down|up)\.\d+)\.res\."), r"\1.block."),
    (re.compile(r"^((?:en|de)coder\.mid)\.0\."), r"\1.block_1."),
    (re.compile(r"^((?:en|de)coder\.mid)\.1\."), r"\1.attn_1."),
    (re.compile(r"^((?:en|de)coder\.mid)\.2\."), r"\1.block_2."),
)
_COUNTER = "quantize.codebook_used"
_CODEBOOK = "quantize.embedding.weight"


def convert_vq(checkpoint: Path, output: Path, *, grid_size: int) -> JanusVQVAEConfig:
    """Writes an official VQ checkpoint as a folder that `JanusVQVAE.from_pretrained` loads.

    Args:
        checkpoint: The official file, `.pt` or `.safetensors`.
        output: Folder to write; it appears only when complete.
        grid_size: Tokens a side of the images to decode.

    Returns:
        The configuration.

    Raises:
        NumpruneError: If the file is no such tokenizer, incomplete, or holds tensors of unknown use.
    """
    tensors = load_tensors(checkpoint, wrappers=_WRAPPERS)
    config = read_vq_config(tensors, str(checkpoint), grid_size=grid_size)
    with torch.device("meta"):
        model = JanusVQVAE(config)
    model.load_state_dict(convert_vq_state(tensors, model.state_dict(), str(checkpoint)), assign=True)
    with replace_on_success(output) as temporary:
        model.save_pretrained(temporary)
    return config


def read_vq_config(tensors: Mapping[str, Tensor], source: str, *, grid_size: int) -> JanusVQVAEConfig:
    """The configuration that official tensors fit; everything is read off their shapes.

    Raises:
        NumpruneError: If the tensors are not those of such a tokenizer.
    """
    needed = [_CODEBOOK, "encoder.conv_in.weight", "quant_conv.weight", "decoder.conv_out.weight"]
    if missing := [name for name in needed if name not in tensors]:
        raise NumpruneError(
            f"{source} is no image tokenizer of LlamaGen: {', '.join(missing)} missing. The transformer is converted "
            "by `numprune convert llamagen`."
        )
    base, in_channels = tensors["encoder.conv_in.weight"].shape[:2]
    levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.conv_blocks."))
    blocks = {name.split(".")[4] for name in tensors if name.startswith("encoder.conv_blocks.0.res.")}
    widths = [tensors[f"encoder.conv_blocks.{level}.res.0.conv2.weight"].shape[0] for level in range(levels)]
    entries, embedded = tensors[_CODEBOOK].shape
    return JanusVQVAEConfig(
        embed_dim=embedded,
        num_embeddings=entries,
        latent_channels=tensors["quant_conv.weight"].shape[1],
        in_channels=in_channels,
        out_channels=tensors["decoder.conv_out.weight"].shape[0],
        base_channels=base,
        channel_multiplier=[width // base for width in widths],
        num_res_blocks=len(blocks),
        num_patches=grid_size,
    )


def convert_vq_state(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Official tensors under transformers' names.

    Args:
        tensors: Official ones.
        expected: Of the model to load them into; only names and shapes matter.
        source: For messages.

    Raises:
        NumpruneError: If tensors are missing, left over, or of a wrong shape.
    """
    state = {_renamed(name): tensor for name, tensor in tensors.items() if name != _COUNTER}
    if misfits := tensor_misfits(state, {name: tuple(tensor.shape) for name, tensor in expected.items()}):
        raise NumpruneError(f"{source} is no image tokenizer of LlamaGen. Tensors {misfits}.")
    state[_CODEBOOK] = normalize(state[_CODEBOOK], dim=-1)
    return state


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name
