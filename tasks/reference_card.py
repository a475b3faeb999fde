"""The card of the reference model: what it was trained on, how, and how well it does on text it never saw."""

import textwrap
from pathlib import Path
from typing import Any

import torch

from numprune.calibration import evaluation_windows
from numprune.checkpoint import load_model
from numprune.files import replace_on_success
from numprune.perplexity import perplexity, window_losses
from tasks.parameters import Evaluation, Reference


def measure(folder: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Perplexity on the evaluation text, by the protocol of the pipeline's evaluation, and the size."""
    windows, text_bytes = evaluation_windows(
        evaluation.data, str(folder), length=evaluation.length, max_tokens=evaluation.max_tokens
    )
    model = load_model(folder, dtype=torch.float32)
    measured = perplexity(torch.cat(list(window_losses(model, windows))), windows.length, text_bytes)
    return {
        "perplexity": measured.perplexity,
        "bits_per_byte": measured.bits_per_byte,
        "windows": measured.windows,
        "length": measured.length,
        "parameters": model.num_parameters(),
    }


def write_card(folder: Path, reference: Reference, training: dict[str, Any], quality: dict[str, Any]) -> None:
    """Writes `README.md` into the model's folder."""
    shape, settings = reference.shape, reference.training
    packages = textwrap.fill(
        f"Packages trained on: {', '.join(settings.packages)}. Their versions are in `constraints.txt`; their "
        "documentation is under their own licences. Calibration and evaluation text comes from other packages "
        "(`params.yaml`, `corpus`).",
        width=120,
        break_on_hyphens=False,
    )
    card = f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# {folder.name}

A small LLaMA with grouped-query attention that numprune is tried on. It writes text that looks like Python
documentation and is of no use for anything else.

| | |
|---|---|
| parameters | {quality["parameters"]:,} (embeddings tied) |
| shape | {shape.layers} blocks, hidden {shape.hidden}, MLP {shape.intermediate}, {shape.heads} query and \
{shape.key_value_heads} key/value heads of {shape.head_dim}, {shape.length} tokens |
| tokenizer | byte-level BPE, {shape.vocabulary} tokens |
| training text | {training["corpus_tokens"]:,} tokens: docstrings of {len(settings.packages)} installed packages |
| training | {training["steps"]:,} steps of {settings.batch} x {shape.length} tokens, {training["tokens"]:,} in all, \
seed {settings.seed} |
| last training loss | {training["train_loss"]:.3f} |
| perplexity on held-out packages | {quality["perplexity"]:.2f} ({quality["windows"]} non-overlapping windows of \
{quality["length"]} tokens, no BOS token) |

{packages}

Train it again: `make train`.
"""
    with replace_on_success(folder / "README.md") as path:
        path.write_text(card, encoding="utf-8")
