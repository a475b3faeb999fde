"""LlamaGen against its arithmetic written down independently, converted from the official layout, in float64."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from numprune.errors import NumpruneError
from numprune.llamagen import LlamaGenConfig, LlamaGenForCausalLM
from numprune.llamagen_conversion import SIZES, convert_llamagen, convert_state, official_shapes, read_config
from tests.numprune import official_llamagen as official

SMALL = {
    "codebook_size": 19,
    "grid_size": 4,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 12,
}
CONFIGS = {
    "class": LlamaGenConfig(**SMALL, num_classes=10),
    "class-grouped": LlamaGenConfig(**SMALL | {"num_key_value_heads": 2}, num_classes=10),
    "caption": LlamaGenConfig(**SMALL, num_classes=None, caption_dim=20, condition_tokens=5),
}


def random_state(config: LlamaGenConfig, seed: int = 0) -> dict[str, Tensor]:
    """Official parameters in float64, none of them near its start of training."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * (0.3 if len(shape) > 1 else 1)
        for name, shape in official_shapes(config).items()
    }


def converted(config: LlamaGenConfig, state: dict[str, Tensor]) -> LlamaGenForCausalLM:
    model = LlamaGenForCausalLM(config).double()
    model.load_state_dict(convert_state(state, config, "test"))
    return model.eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(SMALL["codebook_size"], (3, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["class", "class-grouped"])
def test_logits_of_classes_equal_the_official_arithmetic(name: str, tokens: Tensor) -> None:
    config, state = CONFIGS[name], random_state(CONFIGS[name])
    labels = torch.tensor([0, 9, 10])  # The last stands for no class.
    expected = official.logits(state, official.embedded_class(state, labels), tokens, heads=4, grid=4)
    input_ids = torch.cat([config.codebook_size + labels[:, None], tokens], dim=1)
    torch.testing.assert_close(converted(config, state)(input_ids).logits, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_logits_of_captions_equal_the_official_arithmetic(tokens: Tensor) -> None:
    """Padded on the left, as official captions are; and without features, the unconditional caption."""
    config, state = CONFIGS["caption"], random_state(CONFIGS["caption"])
    features = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    features = features * mask[..., None]
    model = converted(config, state)
    input_ids = torch.cat([torch.full((3, 5), config.codebook_size), tokens], dim=1)
    attention_mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    found = model(input_ids, attention_mask=attention_mask, caption_features=features).logits
    expected = official.logits(state, official.embedded_caption(state, features), tokens, heads=4, grid=4, mask=mask)
    # What stands at the padding itself is seen by nothing.
    torch.testing.assert_close(found[:, 4:], expected[:, 4:], rtol=1e-9, atol=1e-9)
    nothing = official.embedded_caption(state, state["cls_embedding.uncond_embedding"]).expand(3, -1, -1)
    expected = official.logits(state, nothing, tokens, heads=4, grid=4)
    torch.testing.assert_close(model(input_ids).logits, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_guided_generation_with_a_cache_equals_it_without(name: str) -> None:
    """Token by token, greedily: u + s (c - u), from whole forward passes of the official arithmetic."""
    config, scale = CONFIGS[name], 3.0
    state = random_state(config)
    model, prompt_length = converted(config, state), config.condition_tokens
    extra: dict[str, Tensor] = {}
    mask = None
    if config.caption_dim is None:
        prompt = config.codebook_size + torch.tensor([[3], [7]])
        conditional = official.embedded_class(state, torch.tensor([3, 7]))
        unconditional = official.embedded_class(state, torch.tensor([10, 10]))
    else:
        prompt = torch.full((2, 5), config.codebook_size)
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
        features = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        extra = {"caption_features": features * mask[..., None], "attention_mask": mask}
        conditional = official.embedded_caption(state, extra["caption_features"])
        unconditional = official.embedded_caption(state, state["cls_embedding.uncond_embedding"]).expand(2, -1, -1)
    found = model.generate(prompt, guidance_scale=scale, do_sample=False, max_new_tokens=16, pad_token_id=0, **extra)[
        :, prompt_length:
    ]
    tokens = torch.empty(2, 0, dtype=torch.int64)
    for _ in range(16):
        with_condition, without = (
            official.logits(state, condition, tokens, heads=4, grid=4, mask=mask)[:, -1]
            for condition in (conditional, unconditional)
        )
        tokens = torch.cat([tokens, (without + scale * (with_condition - without)).argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, tokens)
    assert len(found.unique()) > 3


# Parameters that the paper states, in millions: 111, 343, 775, 1.4 B, 3.1 B. The code of the paper adds the others, and
# names them after what they come to: 1.2, 3.9 and 6.6 B.
STATED = {"B": 111, "L": 343, "XL": 775, "XXL": 1411, "3B": 3096}
MILLIONS = STATED | {"1B": 1222, "XXXL": 3858, "7B": 6608}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["class", "caption"])
def test_every_size_converts_shape_by_shape(size: str, kind: str) -> None:
    width, blocks, heads = SIZES[size]
    channels = 256 * -(-int(8 * width / 3) // 256)
    condition = {"num_classes": 1000} if kind == "class" else {}
    if kind == "caption":
        condition = {"num_classes": None, "caption_dim": 2048, "condition_tokens": 120}
    config = LlamaGenConfig(
        hidden_size=width,
        intermediate_size=channels,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        **condition,
    )
    tensors = {name: torch.empty(shape, device="meta") for name, shape in official_shapes(config).items()}
    read = read_config(tensors, "test", size=size)
    assert (read.num_attention_heads, read.intermediate_size, read.num_key_value_heads) == (heads, channels, heads)
    with torch.device("meta"):
        model = LlamaGenForCausalLM(read)
    shapes = {name: tensor.shape for name, tensor in convert_state(tensors, read, "test").items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    if kind == "class":
        assert sum(tensor.numel() for tensor in tensors.values()) / 1e6 == pytest.approx(MILLIONS[size], rel=0.03)


@pytest.mark.parametrize("wrapper", [None, "model", "module", "state_dict", "ema"])
def test_a_checkpoint_file_becomes_a_folder_that_loads(tmp_path: Path, wrapper: str | None, tokens: Tensor) -> None:
    config = CONFIGS["class"]
    state = {name: tensor.float() for name, tensor in random_state(config).items()}
    stored = {f"module.{name}" if wrapper == "module" else name: tensor for name, tensor in state.items()}
    stored["freqs_cis"] = torch.zeros(17, 6, 2)
    torch.save(stored if wrapper is None else {wrapper: stored, "steps": 3}, tmp_path / "official.pt")
    convert_llamagen(tmp_path / "official.pt", tmp_path / "out", heads=4, grid_size=4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    input_ids = torch.cat([torch.full((3, 1), config.codebook_size + 5), tokens], dim=1)
    expected = converted(config, {name: tensor.double() for name, tensor in state.items()}).float()
    assert torch.equal(loaded(input_ids).logits, expected(input_ids).logits)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"llamagen.py", "ragged.py", "model.safetensors"}


def test_the_average_of_the_weights_is_taken_where_asked_for(tmp_path: Path) -> None:
    last, average = (random_state(CONFIGS["class"], seed) for seed in (0, 1))
    torch.save({"model": last, "ema": average}, tmp_path / "official.pt")
    for option, expected in ((False, last), (True, average)):
        output = tmp_path / str(option)
        convert_llamagen(tmp_path / "official.pt", output, heads=4, grid_size=4, average=option)
        loaded = AutoModelForCausalLM.from_pretrained(output)
        assert torch.equal(loaded.lm_head.weight, expected["output.weight"])


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in random_state(CONFIGS["class"]).items() if key != name}


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (random_state(CONFIGS["class"]), {"size": "XXL"}, "width 48 and 3 blocks, but size XXL has width 1536"),
        (random_state(CONFIGS["class"]), {"size": "M"}, "--size must be one of B, L, XL"),
        (random_state(CONFIGS["class"]), {}, "either --size or --heads"),
        (random_state(CONFIGS["class"]), {"size": "B", "heads": 4}, "either --size or --heads"),
        (random_state(CONFIGS["class"]), {"heads": 5}, "--heads must divide the width 48"),
        (without("layers.1.feed_forward.w2.weight"), {"heads": 4}, "missing: layers.1.feed_forward.w2.weight"),
        (random_state(CONFIGS["class"]) | {"extra": torch.zeros(2)}, {"heads": 4}, "of unknown use: extra"),
        (without("cls_embedding.embedding_table.weight"), {"heads": 4}, "neither class- nor text-conditional"),
        (
            random_state(CONFIGS["class"]) | {"output.weight": torch.zeros(3, 48)},
            {"heads": 4},
            r"wrong shape: output.weight is \(3, 48\) instead of \(19, 48\)",
        ),
        ({"encoder.conv_in.weight": torch.zeros(1)}, {"heads": 4}, "is no LlamaGen"),
    ],
)
def test_what_is_no_llamagen_of_this_size_is_refused(tmp_path: Path, state, options, message: str) -> None:
    torch.save(state, tmp_path / "official.pt")
    with pytest.raises(NumpruneError, match=message):
        convert_llamagen(tmp_path / "official.pt", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": random_state(CONFIGS["class"]), "args": Harmful()}, tmp_path / "official.pt")
    with pytest.raises(NumpruneError, match="more than tensors"):
        convert_llamagen(tmp_path / "official.pt", tmp_path / "out", heads=4)
    assert not (tmp_path / "harm").exists()
    for content, message in ((b"", "no checkpoint or damaged"), (b"\x80\x02garbage", "no checkpoint|more than")):
        (tmp_path / "official.pt").write_bytes(content)
        with pytest.raises(NumpruneError, match=message):
            convert_llamagen(tmp_path / "official.pt", tmp_path / "out", heads=4)
