"""LlamaGen's image tokenizer: random weights in the official layout, decoded and encoded by an independent function."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, group_norm, interpolate, normalize, pad, silu
from transformers import JanusVQVAE

from numprune.errors import NumpruneError
from numprune.vq_conversion import convert_vq, read_vq_config

BASE, WIDTHS, LATENT, EMBEDDED, ENTRIES, BLOCKS, GRID = 32, [1, 2], 16, 8, 64, 1, 4


def official_state(widths: list[int] = WIDTHS, blocks: int = BLOCKS, base: int = BASE) -> dict[str, Tensor]:
    """Names and shapes as the official constructor makes them."""
    state: dict[str, Tensor] = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(outputs)

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.rand(channels) + 0.5, 0.1 * torch.randn(channels)

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    def middle(name: str, channels: int) -> None:
        residual(f"{name}.mid.0", channels, channels)
        attention(f"{name}.mid.1", channels)
        residual(f"{name}.mid.2", channels, channels)

    conv("encoder.conv_in", 3, base)
    channels = base
    for level, width in enumerate(widths):
        for block in range(blocks):
            residual(f"encoder.conv_blocks.{level}.res.{block}", channels, base * width)
            channels = base * width
            if level == len(widths) - 1:
                attention(f"encoder.conv_blocks.{level}.attn.{block}", channels)
        if level < len(widths) - 1:
            conv(f"encoder.conv_blocks.{level}.downsample.conv", channels, channels)
    middle("encoder", channels)
    norm("encoder.norm_out", channels)
    conv("encoder.conv_out", channels, LATENT)
    conv("quant_conv", LATENT, EMBEDDED, 1)
    conv("post_quant_conv", EMBEDDED, LATENT, 1)
    state["quantize.embedding.weight"] = 3 * torch.randn(ENTRIES, EMBEDDED)
    state["quantize.codebook_used"] = torch.zeros(65536)
    conv("decoder.conv_in", LATENT, channels)
    middle("decoder", channels)
    for index, width in enumerate(reversed(widths)):
        for block in range(blocks + 1):
            residual(f"decoder.conv_blocks.{index}.res.{block}", channels, base * width)
            channels = base * width
            if index == 0:
                attention(f"decoder.conv_blocks.{index}.attn.{block}", channels)
        if index < len(widths) - 1:
            conv(f"decoder.conv_blocks.{index}.upsample.conv", channels, channels)
    norm("decoder.norm_out", channels)
    conv("decoder.conv_out", channels, 3)
    return state


class Official:
    """The official arithmetic on such a state."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.codebook = normalize(state["quantize.embedding.weight"], dim=-1)

    def conv(self, name: str, x: Tensor, **options) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return conv2d(
            x, weight, self.state[f"{name}.bias"], padding=options.pop("padding", weight.shape[2] // 2), **options
        )

    def norm(self, name: str, x: Tensor) -> Tensor:
        return group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def residual(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", silu(self.norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = (torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5).softmax(-1)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view_as(x))

    def middle(self, name: str, x: Tensor) -> Tensor:
        return self.residual(f"{name}.mid.2", self.attention(f"{name}.mid.1", self.residual(f"{name}.mid.0", x)))

    def level(self, name: str, x: Tensor) -> Tensor:
        for block in range(sum(key.startswith(f"{name}.res.") and "norm1.w" in key for key in self.state)):
            x = self.residual(f"{name}.res.{block}", x)
            if f"{name}.attn.{block}.q.weight" in self.state:
                x = self.attention(f"{name}.attn.{block}", x)
        return x

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x)
        for level in range(len(WIDTHS)):
            x = self.level(f"encoder.conv_blocks.{level}", x)
            if level < len(WIDTHS) - 1:
                name = f"encoder.conv_blocks.{level}.downsample.conv"
                x = self.conv(name, pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        x = self.conv("encoder.conv_out", silu(self.norm("encoder.norm_out", self.middle("encoder", x))))
        x = normalize(self.conv("quant_conv", x), dim=1)
        return torch.einsum("bchw,nc->bhwn", x, self.codebook).argmax(-1).flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        x = self.codebook[tokens].view(len(tokens), GRID, GRID, -1).permute(0, 3, 1, 2)
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", x)))
        for level in range(len(WIDTHS)):
            x = self.level(f"decoder.conv_blocks.{level}", x)
            if level < len(WIDTHS) - 1:
                name = f"decoder.conv_blocks.{level}.upsample.conv"
                x = self.conv(name, interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv("decoder.conv_out", silu(self.norm("decoder.norm_out", x)))


@torch.no_grad()
def test_decodes_and_encodes_as_the_official_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = official_state()
    torch.save({"model": state, "steps": 7}, tmp_path / "vq.pt")
    convert_vq(tmp_path / "vq.pt", tmp_path / "decoder", grid_size=GRID)
    converted, official = JanusVQVAE.from_pretrained(tmp_path / "decoder").eval(), Official(state)
    tokens = torch.randint(ENTRIES, (3, GRID**2))
    torch.testing.assert_close(converted.decode(tokens), official.decode(tokens), rtol=1e-4, atol=1e-4)
    pixels = torch.rand(3, 3, 2 * GRID, 2 * GRID) * 2 - 1
    found = converted.encode(pixels).image_tokens.view(3, -1)
    assert torch.equal(found, official.encode(pixels))
    assert len(found.unique()) > 3


@pytest.mark.parametrize(("widths", "factor"), [([1, 2, 2, 4], 8), ([1, 1, 2, 2, 4], 16)])
def test_both_official_tokenizers_have_these_shapes(widths: list[int], factor: int) -> None:
    """VQ-8 and VQ-16, shape by shape, without their memory."""
    with torch.device("meta"):
        state = official_state(widths, blocks=2, base=128)
        model = JanusVQVAE(read_vq_config(state, "test", grid_size=384 // factor))
    expected = sorted(tuple(tensor.shape) for tensor in model.state_dict().values())
    del state["quantize.codebook_used"]
    assert sorted(tuple(tensor.shape) for tensor in state.values()) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("decoder.mid.1.q.weight"), "missing: decoder.mid.attn_1.q.weight"),
        (lambda state: state.update({"loss.weight": torch.zeros(1)}), "of unknown use: loss.weight"),
        (lambda state: state.pop("quant_conv.weight"), "is no image tokenizer of LlamaGen: quant_conv.weight missing"),
        (
            lambda state: state.update({"decoder.conv_in.weight": torch.zeros(1, 2, 3, 3)}),
            "of a wrong shape: decoder.conv_in.weight",
        ),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, change, message: str) -> None:
    state = official_state()
    change(state)
    torch.save(state, tmp_path / "vq.pt")
    with pytest.raises(NumpruneError, match=message):
        convert_vq(tmp_path / "vq.pt", tmp_path / "decoder", grid_size=GRID)
    assert not (tmp_path / "decoder").exists()
