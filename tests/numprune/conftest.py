from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from numprune.budget import Budget, to_remove
from numprune.choice import Choice, choose_units
from numprune.llamagen import LlamaGenConfig
from numprune.recipe import Recipe
from numprune.statistics import Measured

TEXT = Path(__file__).read_text(encoding="utf-8") * 3
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Every shape that slicing treats differently: grouped, multi-head and multi-query attention, biases, norms on q and k,
# a sliding window shorter than the text, tied embeddings.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-multi-head": LlamaConfig(**SIZES | {"num_key_value_heads": 8}, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral-window": MistralConfig(**SIZES, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    # The ids below 300 are image tokens, those of the conditions come after them.
    "llamagen": LlamaGenConfig(**SIZES | {"num_key_value_heads": 8}, codebook_size=300, grid_size=8, num_classes=10),
}


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model with random weights and, unlike freshly made ones, random biases and norms."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def choose(
    model: PreTrainedModel, measured: Measured, ratio: float, recipe: Recipe | None = None, **options: Any
) -> Choice:
    """The units that stay when a share of the parameters of all units goes; by the paper's recipe if there is none."""
    return choose_units(model, recipe or Recipe(), *to_remove(model, Budget("ratio", ratio)), measured, **options)


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return random_model(CONFIGS[request.param])


@pytest.fixture
def llama() -> PreTrainedModel:
    return random_model(CONFIGS["llama"])


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (12, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def make_checkpoint(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Saves a small model with its tokenizer and returns the folder."""

    def make(config: PreTrainedConfig = CONFIGS["llama"], name: str = "dense", **options: Any) -> Path:
        folder = tmp_path / name
        random_model(config).save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
        return folder

    return make
