"""Train the small language model that ships with the repository.

A LLaMA with grouped-query attention on the documentation of its own dependencies. Matrices are trained by Muon, the
rest by AdamW; the learning rate rises over the first steps, then falls linearly to zero. Training resumes from its last
checkpoint after an interruption.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from numprune.errors import NumpruneError
from numprune.files import replace_on_success
from tasks.parameters import ReferenceShape, ReferenceTraining

END_OF_TEXT = "<|endoftext|>"
_MICRO_BATCH = 8

Settings = dict[str, dict[str, Any]]


def train_tokenizer(corpus: Path, shape: ReferenceShape) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with digits apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        model_max_length=shape.length,
        clean_up_tokenization_spaces=False,
    )


def train_reference(corpus: Path, output: Path, shape: ReferenceShape, training: ReferenceTraining) -> dict[str, Any]:
    """Trains the reference model and saves it in bfloat16 with its tokenizer.

    Args:
        corpus: JSON lines with a `text` field.
        output: Folder of the finished model; `output.parent` also holds the checkpoint of an unfinished training.
        shape: Of the model.
        training: Length, batch and rates.

    Returns:
        What a model card states of the training: tokens in the corpus, steps, tokens seen, last loss.
    """
    tokenizer = train_tokenizer(corpus, shape)
    rows = _packed_rows(tokenizer, corpus, shape.length)
    torch.manual_seed(training.seed)
    model = LlamaForCausalLM(_configuration(shape, tokenizer))
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    loss_of: Callable[[torch.Tensor], torch.Tensor] = partial(_next_token_loss, model)
    if training.compile:
        loss_of = torch.compile(loss_of)
    optimizers = [
        torch.optim.Muon(matrices, lr=training.muon_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=training.adamw_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    checkpoint = output.with_name(f"{output.name}.checkpoint.pt")
    settings = {"shape": shape.model_dump(), "training": training.model_dump()}
    first_step = _resume(checkpoint, settings, model, optimizers)
    order = _row_order(len(rows), training)
    smoothed = math.nan
    with Progress() as progress:
        bar = progress.add_task("train", total=training.steps, completed=first_step)
        for step in range(first_step, training.steps):
            rate = min((step + 1) / training.warmup_steps, (training.steps - step) / training.steps)
            for optimizer, peak in zip(optimizers, (training.muon_rate, training.adamw_rate), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate
            loss = _step(loss_of, rows[order[step]], optimizers)
            smoothed = loss if math.isnan(smoothed) else 0.98 * smoothed + 0.02 * loss
            progress.update(bar, advance=1, description=f"train, loss {smoothed:.3f}")
            if (step + 1) % training.checkpoint_steps == 0:
                _checkpoint(checkpoint, settings, model, optimizers, step + 1)
    with replace_on_success(output) as temporary:
        model.bfloat16().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    checkpoint.unlink(missing_ok=True)
    tokens_seen = training.steps * training.batch * shape.length
    return {"corpus_tokens": rows.numel(), "steps": training.steps, "tokens": tokens_seen, "train_loss": smoothed}


def _texts(corpus: Path) -> list[str]:
    with corpus.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def _packed_rows(tokenizer: PreTrainedTokenizerFast, corpus: Path, length: int) -> torch.Tensor:
    encoded = tokenizer([text + END_OF_TEXT for text in _texts(corpus)], verbose=False)["input_ids"]
    tokens = torch.tensor([token for document in encoded for token in document], dtype=torch.int32)
    return tokens[: len(tokens) // length * length].view(-1, length)


def _row_order(rows: int, training: ReferenceTraining) -> torch.Tensor:
    """(steps, batch) indices: every epoch sees each row once, in an order of its own."""
    generator = torch.Generator().manual_seed(training.seed)
    needed = training.steps * training.batch
    epochs = [torch.randperm(rows, generator=generator) for _ in range(math.ceil(needed / rows))]
    return torch.cat(epochs)[:needed].view(training.steps, training.batch)


def _configuration(shape: ReferenceShape, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )


def _next_token_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    logits = model(rows, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


def _step(
    loss_of: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, optimizers: list[torch.optim.Optimizer]
) -> float:
    total = 0.0
    micro_batches = rows.long().split(_MICRO_BATCH)
    for batch in micro_batches:
        with torch.autocast(rows.device.type, torch.bfloat16):
            loss = loss_of(batch) / len(micro_batches)
        loss.backward()
        total += loss.item()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def _checkpoint(
    path: Path, settings: Settings, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    states = [optimizer.state_dict() for optimizer in optimizers]
    with replace_on_success(path) as temporary:
        torch.save({"settings": settings, "step": step, "model": model.state_dict(), "optimizers": states}, temporary)


def _resume(path: Path, settings: Settings, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> int:
    """Loads the checkpoint of an unfinished training and returns the steps it has done."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    if saved["settings"] != settings:
        raise NumpruneError(f"{path} is of a training with other parameters: finish that one or remove the file.")
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return int(saved["step"])
