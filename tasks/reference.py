"""Train the small language model that ships with the repository.

A LLaMA with grouped-query attention on the documentation of its own dependencies.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from numprune.files import replace_on_success
from tasks.parameters import ReferenceShape, ReferenceTraining
from tasks.training import train

END_OF_TEXT = "<|endoftext|>"
_MICRO_BATCH = 8


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
    checkpoint = output.with_name(f"{output.name}.checkpoint.pt")
    smoothed = train(
        model,
        rows,
        partial(_next_token_loss, model),
        training,
        checkpoint=checkpoint,
        settings={"shape": shape.model_dump(), "training": training.model_dump()},
        micro_batch=_MICRO_BATCH,
    )
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
