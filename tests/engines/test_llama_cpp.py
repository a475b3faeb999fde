"""GGUF files in llama.cpp itself: the same tokens from text, and the same tokens after them, as with transformers."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

from numprune.architectures import decoder_blocks
from numprune.errors import NumpruneError
from numprune.export.gguf_tokenizer import _LLAMA3, _QWEN2
from numprune.export.llama_cpp import export_gguf
from numprune.ragged import remove_attention, remove_mlp
from numprune.slicing import add_bias
from tests.engines.conftest import CELLS, FAMILIES, PROMPTS, SIZES, LlamaCpp, reference, shortfalls
from tests.numprune.conftest import LLAMA3_ROPE

LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4],
    "long_factor": [8.0] * 8,
}
GEMMA3_ROPE = {
    "full_attention": LINEAR_ROPE | {"rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_FULL = SIZES | {"hidden_size": 256}  # As wide as all heads.
_LONG = _FULL | {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 32}
_MANY = {"num_key_value_heads": 8}
# What members of the families have beyond what `FAMILIES` has; the architecture, the shape and the configuration.
FEATURES = {
    "narrow": ("llama", "uniform", LlamaConfig(**SIZES)),
    "tied": ("llama", "uniform", LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama3": ("deci", "ragged", LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)),
    "linear": ("deci", "ragged", LlamaConfig(**SIZES, rope_parameters=LINEAR_ROPE)),
    "linear-key": ("qwen3", "uniform", Qwen3Config(**SIZES, rope_parameters=LINEAR_ROPE)),
    "all-heads": ("qwen2", "channels", Qwen2Config(**_FULL)),
    "partial": ("llama", "uniform", Phi3Config(**_FULL, rope_parameters=PARTIAL_ROPE)),
    "partial-deci": ("deci", "ragged", Phi3Config(**_FULL, rope_parameters=PARTIAL_ROPE)),
    "long": ("llama", "uniform", Phi3Config(**_LONG)),
    "long-deci": ("deci", "ragged", Phi3Config(**_LONG)),
    "scale": ("gemma2", "uniform", Gemma2Config(**SIZES | {"num_hidden_layers": 46}, query_pre_attn_scalar=8)),
    "scale-of-norm": (
        "gemma3",
        "uniform",
        Gemma3TextConfig(
            **SIZES | {"num_hidden_layers": 62}, query_pre_attn_scalar=8, rope_parameters=GEMMA3_ROPE, sliding_window=8
        ),
    ),
    "multi-head": ("olmo2", "uniform", Olmo2Config(**_FULL | _MANY)),
    "parallel": ("stablelm", "uniform", StableLmConfig(**_FULL, use_parallel_residual=True)),
    "sequential": ("gptneox", "channels", GPTNeoXConfig(**_FULL, hidden_act="gelu_new", use_parallel_residual=False)),
}
# Architectures that models of equal widths are written as, with fewer heads than the dense one.
UNIFORM = {
    "llama": "llama",
    "mistral": "llama",
    "phi3": "llama",
    "qwen2": "deci",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "stablelm": "stablelm",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "gpt_neox": "gptneox",
}
RAGGED = ("llama", "mistral", "phi3", "qwen2")
FILLED = ("olmo2", "olmo3", "stablelm", "cohere", "cohere2", "gpt_neox")
TEXT = (
    "The model's 3rd layer isn't 1024 wide:\n\n\tx = [1, 22, 333, 4444]  # Größe, naïve, 模型, 🙂\r\n"
    '    return self._weights["q_proj"]   \n\n\n  they\'ll don\u2019t <end> 12345678'
)


@torch.no_grad()
def assert_same(folder: Path, file: Path, tolerance: float = 1e-2, tie: float = 0.0) -> None:
    model, engine = reference(folder), LlamaCpp(file)
    vocabulary = model.config.vocab_size
    for prompt in PROMPTS:
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(engine.next_token(prompt, vocabulary), expected, atol=tolerance, rtol=0)
        assert shortfalls(model, prompt, engine.greedy(prompt), never=[0]).max() <= tie  # Its end token.


@pytest.mark.engines
@pytest.mark.parametrize("name", FEATURES)
def test_features_of_members_of_a_family(prune, tmp_path, name):
    architecture, shape, config = FEATURES[name]
    folder = prune(config, shape)
    exported = export_gguf(folder, tmp_path / "model.gguf", kind="f32")
    assert exported.architecture == architecture
    # llama.cpp looks GELU up in half precision, which adds up over many layers.
    assert_same(folder, tmp_path / "model.gguf", tolerance=0.03 if name.startswith("scale") else 0.01)


def test_biases_of_output_projections_and_absent_modules(prune, tmp_path):
    def change(model):
        blocks = decoder_blocks(model)
        remove_attention(blocks[0], "self_attn", 32)
        remove_mlp(blocks[1], "mlp.down_proj", ())
        remove_mlp(blocks[2], "mlp.down_proj", ())
        torch.manual_seed(0)
        add_bias(blocks[0].mlp.down_proj, torch.randn(64))
        add_bias(blocks[2].self_attn.o_proj, torch.randn(64))
        return model

    folder = prune(LlamaConfig(**SIZES), "ragged", change)
    assert export_gguf(folder, tmp_path / "model.gguf", kind="f32").architecture == "deci"
    assert_same(folder, tmp_path / "model.gguf")


@pytest.mark.engines
@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.05), ("bf16", 0.3), ("q8_0", 0.5)])
def test_smaller_types_stay_close(prune, tmp_path, kind, tolerance):
    folder = prune(LlamaConfig(**SIZES), "ragged")
    export_gguf(folder, tmp_path / "full.gguf", kind="f32")
    export_gguf(folder, tmp_path / "model.gguf", kind=kind)
    assert (tmp_path / "model.gguf").stat().st_size < 0.75 * (tmp_path / "full.gguf").stat().st_size
    full, small = LlamaCpp(tmp_path / "full.gguf"), LlamaCpp(tmp_path / "model.gguf")
    for prompt in PROMPTS:
        difference = full.next_token(prompt, 300) - small.next_token(prompt, 300)
        assert 0 < difference.abs().max() < tolerance


def byte_level(steps: list) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    return bpe


def sentencepiece() -> Tokenizer:
    """As LLaMA 2's: spaces are written as a character, unknown characters as bytes."""
    alphabet = {f"<0x{value:02X}>": number for number, value in enumerate(range(256), start=3)}
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(
        Path(__file__).read_text(encoding="utf-8").splitlines(), trainers.BpeTrainer(vocab_size=280, max_token_length=8)
    )
    learned = json.loads(trained.to_str())["model"]
    vocabulary = {"<unk>": 0, "<s>": 1, "<end>": 2} | alphabet
    for token in learned["vocab"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(merge) for merge in learned["merges"]]
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = trained.normalizer
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "<end>")])
    return bpe


def split(pattern: str) -> list:
    isolated = pre_tokenizers.Split(Regex(pattern), "isolated")
    return [isolated, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


TOKENIZERS = {
    "gpt-2": lambda: byte_level([pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "smollm": lambda: byte_level(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: byte_level(split(_LLAMA3)),
    "qwen2": lambda: byte_level(split(_QWEN2)),
    "sentencepiece": sentencepiece,
}


@pytest.mark.parametrize(
    "kind",
    ["llama-bpe", "sentencepiece", *(pytest.param(k, marks=pytest.mark.engines) for k in ("gpt-2", "smollm", "qwen2"))],
)
def test_same_tokens_from_text(prune, tmp_path, kind):
    made = TOKENIZERS[kind]()
    folder = prune(LlamaConfig(**SIZES | {"vocab_size": made.get_vocab_size() + 5}))
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(folder)
    export_gguf(folder, tmp_path / "model.gguf")
    engine, tokenizer = LlamaCpp(tmp_path / "model.gguf"), AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, *TEXT.splitlines(), Path(__file__).read_text(encoding="utf-8")[:2000]):
        assert engine.tokenize(text) == tokenizer(text)["input_ids"]


def test_what_cannot_be_exported_is_said(prune, tmp_path):
    output = tmp_path / "model.gguf"
    with pytest.raises(NumpruneError, match="no architecture for the family opt"):
        export_gguf(prune(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=64)), output)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    with pytest.raises(NumpruneError, match="Prune with --uniform, and not with --depth"):
        export_gguf(prune(Qwen3Config(**SIZES), "ragged"), output)
    with pytest.raises(NumpruneError, match="of type yarn"):
        export_gguf(prune(LlamaConfig(**SIZES, rope_parameters=yarn)), output)
    for message, config in {
        "does not know the activation gelu": LlamaConfig(**SIZES, hidden_act="gelu"),
        "does not know final_logit_softcapping=None": Gemma2Config(**SIZES, final_logit_softcapping=None),
        "layers without a window other than one in 6": Gemma3TextConfig(**SIZES, layer_types=["full_attention"] * 3),
        "layers without rotary embeddings other": SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
        "of a part of the channels": Qwen3Config(**SIZES, rope_parameters=PARTIAL_ROPE),
    }.items():
        with pytest.raises(NumpruneError, match=message):
            export_gguf(prune(config), output)
    folder = prune(LlamaConfig(**SIZES))
    lowercase = byte_level([pre_tokenizers.Whitespace()])
    PreTrainedTokenizerFast(tokenizer_object=lowercase, eos_token="<end>").save_pretrained(folder)
    with pytest.raises(NumpruneError, match=r"no name known here for text split by .*Whitespace"):
        export_gguf(folder, output)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(NumpruneError, match=r"no tokenizer.json"):
        export_gguf(folder, output)
    assert not output.exists()


@pytest.mark.engines
@pytest.mark.parametrize(("name", "shape"), CELLS)
def test_every_family_is_the_same_or_refused(prune, record, tmp_path, name, shape):
    folder, output = prune(FAMILIES[name], shape), tmp_path / "model.gguf"
    if name not in (RAGGED if shape == "ragged" else UNIFORM):
        with pytest.raises(NumpruneError, match=r"no architecture for the family opt|Prune with --uniform"):
            export_gguf(folder, output)
        record(name, "llama.cpp", shape, "no")
        return
    exported = export_gguf(folder, output, kind="f32")
    assert exported.architecture == ("deci" if shape == "ragged" else UNIFORM[name])
    assert ("filled up" in exported.filled) == (name in FILLED)
    # llama.cpp's GELU is the approximation by tanh, where that of Pythia is exact.
    assert_same(folder, output, tie=5e-3 if name == "gpt_neox" else 0.0)
    record(name, "llama.cpp", shape, "heads filled up" if exported.filled else "yes")
