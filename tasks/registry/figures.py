"""The figures of a version, from the metric files of its stages: MLflow's metrics, and the tags people filter by."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# What has to be the same before figures of two versions can be compared; dates and library versions do not.
_EVALUATION_PROTOCOL = ("tokens_sha256", "windows", "length", "stride", "bos_token", "dtype")
_BENCHMARK_PROTOCOL = ("prompt_length", "new_tokens", "batch", "dtype", "device", "threads", "compiled")

# As tags, because MLflow's page filters versions by tags, not by the metrics of their runs.
_TAGGED = (
    "perplexity",
    "dense_perplexity",
    "perplexity_ratio",
    "tokens_per_second",
    "speed_up",
    "peak_memory_bytes",
    "checkpoint_bytes",
    "parameters",
)


def metrics(documents: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What the run of a version logs.

    Args:
        documents: The contents of plan.json, evaluation.json, benchmark.json and dense/evaluation.json by these names.
    """
    plan, evaluation, benchmark, dense = (
        documents[name] for name in ("plan.json", "evaluation.json", "benchmark.json", "dense/evaluation.json")
    )
    found: dict[str, Any] = {"achieved_ratio": plan["achieved_ratio"]}
    found |= {f"dense_{name}": dense[name] for name in ("perplexity", "bits_per_byte")}
    found |= evaluation
    found["perplexity_ratio"] = evaluation["perplexity"] / dense["perplexity"]
    for name, value in benchmark["pruned"].items():
        found |= {name: value, f"dense_{name}": benchmark["dense"][name]}
    found["speed_up"] = benchmark["pruned"]["tokens_per_second"] / benchmark["dense"]["tokens_per_second"]
    for task, result in evaluation.get("tasks", {}).items():
        found |= {f"accuracy.{task}": result["accuracy"], f"accuracy_stderr.{task}": result.get("stderr")}
        found |= {f"accuracy_difference_stderr.{task}": result.get("against_dense", {}).get("stderr")}
    for name, text in evaluation.get("texts", {}).items():
        found[f"perplexity.{name}"] = text["perplexity"]
    for name, text in dense.get("texts", {}).items():
        found[f"dense_perplexity.{name}"] = text["perplexity"]
    for side, document in (("", evaluation), ("dense_", dense)):
        found |= {f"{side}{name}": value for name, value in document.get("images", {}).items()}
        for task, result in document.get("likelihoods", {}).items():
            found[f"{side}bits_per_byte.{task}"] = result["bits_per_byte"]
    for task, result in dense.get("tasks", {}).items():
        found |= {f"dense_accuracy.{task}": result["accuracy"]}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def figure_tags(documents: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What a version says of its figures, so that versions can be searched by them; documents as for `metrics`."""
    found = metrics(documents)
    tags = {name: f"{found[name]:.6g}" for name in _TAGGED if name in found}
    # Counts in full: 8714640 bytes, not 8.71464e+06.
    tags |= {name: str(int(found[name])) for name in _TAGGED if name in found and found[name].is_integer()}
    tags |= {name: f"{value:.6g}" for name, value in found.items() if name.startswith("accuracy.")}
    return tags | {"protocol_hash": _protocol_hash(documents)}


def _protocol_hash(documents: Mapping[str, Mapping[str, Any]]) -> str:
    evaluation, benchmark = (documents[name].get("protocol", {}) for name in ("evaluation.json", "benchmark.json"))
    protocol = [
        {name: evaluation.get(name) for name in _EVALUATION_PROTOCOL},
        {name: benchmark.get(name) for name in _BENCHMARK_PROTOCOL},
    ]
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()
