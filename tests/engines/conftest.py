"""Small random models of every family, pruned to equal and to different widths, and the engines that run them."""

import json
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from numprune.architectures import decoder_blocks, prunable_groups
from numprune.checkpoint import load_model
from numprune.ragged import LAYOUTS
from numprune.saving import save_pruned
from numprune.slicing import slice_block
from tests.numprune.conftest import random_model, tokenizer

__all__ = ["tokenizer"]

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,  # The smallest that vLLM has.
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
# Families take the channels of a head from the hidden size where they know no head_dim.
_WIDE = SIZES | {"hidden_size": 256}
_FOUR = {"num_hidden_layers": 4}  # One layer in four differs, the last.
_WINDOW = {"sliding_window": 16}  # The longest prompt outgrows it.
# What differs from `_WIDE`.
_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "smollm3": _FOUR,
    "gemma2": _WINDOW | {"query_pre_attn_scalar": 24},
    "gemma3_text": _WINDOW | {"query_pre_attn_scalar": 24, "num_hidden_layers": 6},
    "phi3": {},
    "olmo2": {},
    "olmo3": _WINDOW | _FOUR,
    "stablelm": {"use_qkv_bias": True},
    "cohere": {"logit_scale": 0.3},
    "cohere2": _WINDOW | _FOUR,
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 256},
}
FAMILIES: dict[str, PreTrainedConfig] = {
    name: LAYOUTS[name].stock.config_class(**_WIDE | settings) for name, settings in _SETTINGS.items()
}
SHAPES = ("uniform", "ragged")
CELLS = [(name, shape) for name in FAMILIES for shape in SHAPES]
PROMPTS = [[57, 3, 240, 18], [101], [7, 7, 7, 250, 31, 99, 14, 180, 64, 2]]
TOKENS = 12


# Of the heads in quarters and of the channels, what three layers keep in turn.
_QUARTERS = {"uniform": (2, 2, 2), "channels": (4, 4, 4), "ragged": (3, 1, 2), "even": (4, 2, 4)}
_CHANNELS = {"uniform": (32, 32, 32), "channels": (32, 32, 32), "ragged": (24, 40, 17), "even": (24, 40, 16)}


def kept_units(group: Any, shape: str) -> torch.Tensor:
    """The last ones of a group, as many as the shape has."""
    turn = group.block % 3
    count = _CHANNELS[shape][turn] if group.kind == "mlp" else group.units * _QUARTERS[shape][turn] // 4
    return torch.arange(group.units - count, group.units)


def cut(model: PreTrainedModel, shape: str) -> PreTrainedModel:
    for block, groups in zip(decoder_blocks(model), prunable_groups(model), strict=True):
        slice_block(block, groups, {group.name: kept_units(group, shape) for group in groups})
    return model


Prune = Callable[..., Path]


@pytest.fixture(scope="session")
def prune(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Prune:
    """Saves a random model of a configuration, pruned to a shape and changed otherwise; returns the folder."""

    def run(
        config: PreTrainedConfig, shape: str = "uniform", change: Callable[[Any], Any] = lambda model: model
    ) -> Path:
        folder = tmp_path_factory.mktemp(config.model_type)
        random_model(config).save_pretrained(folder / "dense")
        tokenizer.save_pretrained(folder / "dense")
        model = change(cut(load_model(folder / "dense", dtype=torch.float32), shape))
        plan: Any = SimpleNamespace(save=Path.touch)
        save_pruned(model, folder / "dense", folder / shape, plan, torch.zeros(1, 2, dtype=torch.long))
        return folder / shape

    return run


_RESULTS = pytest.StashKey[dict[str, dict[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine-results", type=Path, help="JSON file to write what works in which engine to.")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = {}


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str, str, str], None]]:
    """Notes what became of a family and a shape in an engine; it counts if the test passes."""
    found: list[tuple[str, str, str, str]] = []
    yield lambda family, engine, shape, outcome: found.append((family, engine, shape, outcome))
    if not request.session.testsfailed:
        for family, engine, shape, outcome in found:
            request.config.stash[_RESULTS].setdefault(family, {})[f"{engine} {shape}"] = outcome


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--engine-results", default=None)
    if path and exitstatus == pytest.ExitCode.OK:
        path.write_text(json.dumps(session.config.stash[_RESULTS], indent=2, sort_keys=True) + "\n", encoding="utf-8")


def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(
    model: PreTrainedModel, prompt: list[int], tokens: int = TOKENS, never: list[int] | None = None
) -> list[int]:
    """What transformers continues a prompt with, one token after the other; some never."""
    output = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        eos_token_id=None,
        suppress_tokens=never,
    )
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def shortfalls(model: PreTrainedModel, prompt: list[int], tokens: list[int], never: list[int]) -> torch.Tensor:
    """(tokens,) by how much the logit of each, after those before it, is below that of what transformers chooses."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    logits[:, never] = -torch.inf
    return logits.max(-1).values - logits[torch.arange(len(tokens)), torch.tensor(tokens)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class LlamaCpp:
    """llama.cpp with one model, as a server on this machine."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = 512
        parameters.cpuparams.n_threads = 1
        parameters.warmup = False
        parameters.verbosity = 0
        single = xllamacpp.ggml_type.GGML_TYPE_F32  # Keys and values, which are f16 by default.
        parameters.cache_type_k = parameters.cache_type_v = single
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.port = free_port()  # The one that it draws by itself is taken now and then.
        self._server = xllamacpp.Server(parameters)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(  # An address of this process.
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def tokenize(self, text: str) -> list[int]:
        found: list[int] = self._post("/tokenize", {"content": text, "add_special": True})["tokens"]
        return found

    def greedy(self, prompt: list[int], tokens: int = TOKENS) -> list[int]:
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "return_tokens": True, "ignore_eos": True}
        found: list[int] = self._post("/completion", body | {"cache_prompt": False})["tokens"]
        return found

    def next_token(self, prompt: list[int], vocabulary: int) -> torch.Tensor:
        """(vocabulary,) log-probabilities of the token after a prompt."""
        # The probabilities are those before a token is forced, one that is a whole character: others are held back.
        (letter,) = self.tokenize("a")[-1:]
        body = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "logit_bias": [[letter, 1000]]}
        (found,) = self._post("/completion", body)["completion_probabilities"]
        result = torch.full((vocabulary,), -torch.inf)
        for entry in found["top_logprobs"]:
            result[entry["id"]] = entry["logprob"]
        return result
