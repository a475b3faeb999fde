"""Small random models of every family, pruned to equal and to different widths, and the engines that run them."""

import json
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from numprune.architectures import decoder_blocks, prunable_groups
from numprune.checkpoint import load_model
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
SHAPES = ("uniform", "ragged")
PROMPTS = [[57, 3, 240, 18], [101], [7, 7, 7, 250, 31, 99, 14, 180, 64, 2]]
TOKENS = 12


def kept_units(group: Any, shape: str) -> torch.Tensor:
    """Of heads a half or, in turn, three quarters, a quarter and a half; of channels 32 or 24, 40 and 17."""
    if group.kind == "attention":
        count = (
            group.units // 2
            if shape == "uniform"
            else (3 * group.units // 4, group.units // 4, group.units // 2)[group.block]
        )
    else:
        count = 32 if shape == "uniform" else (24, 40, 17)[group.block]
    return torch.arange(group.units - count, group.units)


def cut(model: PreTrainedModel, shape: str) -> PreTrainedModel:
    for block, groups in zip(decoder_blocks(model), prunable_groups(model), strict=True):
        slice_block(block, groups, {group.name: kept_units(group, shape) for group in groups})
    return model


Prune = Callable[..., Path]


@pytest.fixture
def prune(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Prune:
    """Saves a random model of a configuration, pruned to a shape and changed otherwise; returns the folder."""

    def run(
        config: PreTrainedConfig, shape: str = "uniform", change: Callable[[Any], Any] = lambda model: model
    ) -> Path:
        dense, output = tmp_path / "dense", tmp_path / shape
        random_model(config).save_pretrained(dense)
        tokenizer.save_pretrained(dense)
        model = change(cut(load_model(dense, dtype=torch.float32), shape))
        plan: Any = SimpleNamespace(save=Path.touch)
        save_pruned(model, dense, output, plan, torch.zeros(1, 2, dtype=torch.long))
        return output

    return run


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
