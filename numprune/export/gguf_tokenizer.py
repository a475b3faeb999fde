"""Tokenizers as llama.cpp reads them: from `tokenizer.json`, byte-level BPE or SentencePiece's BPE.

llama.cpp splits text into words by expressions of its own, which a file names. A tokenizer whose way of splitting has
no name there is refused: its tokens would silently be others.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from numprune.checkpoint import load_tokenizer
from numprune.errors import NumpruneError

_SPACE = "▁"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
# llama.cpp's names, by the steps in which tokenizers splits text.
_SPLITS: Mapping[tuple[str, ...], str] = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_LLAMA3, "bytes"): "llama-bpe",
    (_QWEN2, "bytes"): "qwen2",
}


def add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Adds the tokenizer of a model folder to a GGUF file.

    Args:
        writer: Of the file.
        folder: Of the model.
        vocabulary: Rows of the model's embedding; tokens beyond the tokenizer's own are written as unused.

    Raises:
        NumpruneError: If there is no `tokenizer.json`, or llama.cpp cannot tokenize in the same way.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NumpruneError(f"{folder} has no tokenizer.json: without it llama.cpp cannot read text. Add the file.")
    tokenizer: Any = load_tokenizer(folder)
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    if model["type"] != "BPE":
        raise NumpruneError(f"{path}: a tokenizer of type {model['type']} is not exported; BPE is.")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, types = _tokens(content, vocabulary)
    if model.get("byte_fallback"):
        _check_sentencepiece(content, path)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_prefixes_space(content))
        types = _sentencepiece_types(tokens, types, model.get("unk_token"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(content.get("pre_tokenizer"), path))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(content: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[TokenType]]:
    by_number = {number: (token, TokenType.NORMAL) for token, number in content["model"]["vocab"].items()}
    for added in content["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        by_number[added["id"]] = (added["content"], kind)
    beyond = sorted(number for number in by_number if number >= vocabulary)
    if beyond:
        raise NumpruneError(f"The tokenizer has token {beyond[-1]}, but the model has {vocabulary} embeddings.")
    pairs = [by_number.get(number, (f"[unused {number}]", TokenType.UNUSED)) for number in range(vocabulary)]
    return [token for token, _ in pairs], [kind for _, kind in pairs]


def _split_name(step: Mapping[str, Any] | None, path: Path) -> str:
    steps = [step or {"type": "none"}]
    if steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    described = tuple(_describe(step) for step in steps)
    if described not in _SPLITS:
        raise NumpruneError(
            f"{path}: llama.cpp has no name known here for text split by {' then '.join(described)}. Convert the dense "
            "model with llama.cpp's own script to see which it takes, and add it to numprune/export/gguf_tokenizer.py."
        )
    return _SPLITS[described]


def _describe(step: Mapping[str, Any]) -> str:
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "words" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex", step["pattern"]))
    return json.dumps(step)


def _check_sentencepiece(content: Mapping[str, Any], path: Path) -> None:
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")], ensure_ascii=False)
    if _SPACE not in text:
        raise NumpruneError(
            f"{path}: a BPE with byte fallback is exported if it writes spaces as {_SPACE}, as LLaMA 2."
        )


def _prefixes_space(content: Mapping[str, Any]) -> bool:
    normalizer, split = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Prepend" for step in steps) or split.get("prepend_scheme") in {"first", "always"}


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece joins what gives the token of the highest score, BPE by the first merge in its list that fits."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(ranks.get(token, 0)) for token in tokens]


def _sentencepiece_types(tokens: list[str], types: list[TokenType], unknown: str | None) -> list[TokenType]:
    bytes_ = {f"<0x{value:02X}>" for value in range(256)}
    found = [TokenType.BYTE if token in bytes_ else kind for token, kind in zip(tokens, types, strict=True)]
    return [TokenType.UNKNOWN if token == unknown else kind for token, kind in zip(tokens, found, strict=True)]
