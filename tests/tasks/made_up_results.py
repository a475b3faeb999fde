"""Made-up results of the stages, for what sums them up."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from numprune.architectures import PrunableGroup, all_groups
from numprune.plan import Choice, Source, make_plan
from numprune.ranking import Ranking, save_rankings
from numprune.recipe import RECIPES
from tasks.layout import (
    benchmark_file,
    comparison_file,
    evaluation_file,
    model_folder,
    plan_file,
    report_page,
    scores_file,
    timing_file,
)
from tasks.parameters import load_parameters
from tasks.report.pages import write_pages

ROOT = Path(__file__).parents[2]
MODEL = "small"
LAYERS = 3
# What a model writes is nobody's markup.
HOSTILE = "<script>console.error('ran')</script> & \"quoted\""


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _groups() -> list[PrunableGroup]:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=80,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
    )
    config.save_pretrained(model_folder(MODEL))
    with torch.device("meta"):
        return all_groups(AutoModelForCausalLM.from_config(config))


def _rankings(groups: list[PrunableGroup]) -> dict[str, Ranking]:
    generator = torch.Generator().manual_seed(0)
    rankings = {}
    for group in groups:
        order = torch.randperm(group.units, generator=generator)
        steps = torch.rand(group.units, generator=generator, dtype=torch.float64).sort().values
        curve = torch.cat([steps.new_zeros(1), steps.cumsum(0) / steps.sum()])
        scores = torch.empty_like(steps)
        scores[order] = curve[1:]
        rankings[group.name] = Ranking(scores, order, curve, curve / 10)
    return rankings


def _workload(batch: int, tokens_per_second: float) -> dict[str, Any]:
    return {
        "tokens_per_second": tokens_per_second,
        "prefill_tokens_per_second": 10 * tokens_per_second,
        "seconds_to_first_token": 0.02,
        "seconds_per_token": 1 / tokens_per_second,
        "seconds": [0.9 * batch * 64 / tokens_per_second, 1.1 * batch * 64 / tokens_per_second],
    }


def _benchmark(ratio: float) -> dict[str, Any]:
    counts = {"parameters": 10_000_000, "checkpoint_bytes": 20_000_000, "peak_memory_bytes": 5e7}
    counts |= {"flops_per_token": 2e7, "bytes_per_token": 2e7, "cache_bytes_per_token": 3072, "cache_bytes": 393216}
    dense = counts | _workload(1, 50.0)
    pruned = {name: value * (1 - ratio) for name, value in counts.items()} | _workload(1, 60.0)
    return {
        "dense": dense,
        "pruned": pruned,
        "ratios": {
            "speed_up": 1.2,
            "prefill_speed_up": 1.2,
            "expected_by_bytes": 1 / (1 - ratio),
            "expected_by_flops": 1 / (1 - ratio),
        },
        "workloads": [
            {"batch": batch, "prompt_length": 64, "dense": _workload(batch, 50.0), "pruned": _workload(batch, 60.0)}
            for batch in (1, 8)
        ],
        "protocol": {"prompt_length": 64, "new_tokens": 64, "repeats": 2, "batch": 1, "device": "cpu"},
    }


def _write_run(budget: str, groups: list[PrunableGroup], rankings: dict[str, Ranking], tasks: dict[str, Any]) -> None:
    ratio = float(budget)
    removed = {group.name: round(ratio * group.units) for group in groups}
    choice = Choice(
        kept={name: ranking.order[removed[name] :].sort().values for name, ranking in rankings.items()},
        lowest_kept={name: ranking.losses[removed[name] + 1].item() for name, ranking in rankings.items()},
        highest_removed={
            name: ranking.losses[removed[name]].item() if removed[name] else None for name, ranking in rankings.items()
        },
        threshold=1e-4,
    )
    source = Source(MODEL, None, "f" * 64, "c" * 64)
    make_plan(groups, choice, budget, source=source, recipe=RECIPES["best"]).save(plan_file(MODEL, budget))
    content = json.loads(plan_file(MODEL, budget).read_text(encoding="utf-8"))
    write_json(plan_file(MODEL, budget), content | {"achieved_ratio": ratio - 0.001})
    against = {"against_dense": {"difference": -0.01, "stderr": 0.01, "low": -0.03, "high": 0.01}}
    evaluation: dict[str, Any] = {"perplexity": 20 + ratio, "perplexity_without_compensation": 30 + ratio}
    evaluation |= {"bits_per_byte": 1.1 + ratio, "protocol": {"tokens_sha256": "e" * 64, "windows": 4}}
    evaluation["texts"] = {"wikitext2": {"perplexity": 30 + ratio, "windows": 4, "length": 64}}
    against_read = {"against_dense": {"difference": 0.1, "stderr": 0.01, "low": 0.08, "high": 0.12}}
    evaluation["likelihoods"] = {"c": {"bits_per_byte": 1.25, "documents": 70, "task_sha256": "d" * 64} | against_read}
    evaluation["tasks"] = {name: task | {"accuracy": task["accuracy"] - 0.01} | against for name, task in tasks.items()}
    write_json(evaluation_file(MODEL, budget), evaluation)
    write_json(benchmark_file(MODEL, budget), _benchmark(ratio))
    errors = {"pruned": [0.01, 0.02, 0.03, 0.03], "without_compensation": [0.1, 0.2, 0.3, 0.3]}
    sample = {"prompt": HOSTILE, "text": HOSTILE, "dense": HOSTILE, "pruned": "x", "new_tokens": 8, "equal_tokens": 0}
    protocol = {"windows": 4, "length": 64}
    comparison = {"hidden_state_errors": errors, "protocol": protocol, "generations": [sample]}
    write_json(comparison_file(MODEL, budget), comparison)
    write_json(timing_file(MODEL, budget), {"seconds": 1.5, "finished": "2026-01-01T00:00:00+00:00"})


def write_results() -> list[str]:
    """Two runs of a model in the working directory; returns their budgets."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content |= {"models": [MODEL], "budgets": ["0.5", "0.2"]}
    Path("params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    shown = {"questions": 400, "task_sha256": "a" * 64, "metric": "acc"}
    tasks = {"a": {"accuracy": 0.5, "stderr": 0.02} | shown, "b": {"accuracy": 0.9, "stderr": 0.01} | shown}
    texts = {"wikitext2": {"perplexity": 30.0, "windows": 4, "length": 64}}
    dense = {"perplexity": 20.0, "bits_per_byte": 1.1, "texts": texts, "tasks": tasks}
    dense["likelihoods"] = {"c": {"bits_per_byte": 1.15, "documents": 70, "task_sha256": "d" * 64}}
    write_json(evaluation_file(MODEL, None), dense)
    groups = _groups()
    rankings = _rankings(groups)
    save_rankings(rankings, scores_file(MODEL))
    for budget in content["budgets"]:
        _write_run(budget, groups, rankings, tasks)
    return content["budgets"]


@pytest.fixture
def budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The made-up results in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return write_results()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The pages made of them, that of all runs first; drawn once for all tests that only read them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("pages"))
        made = write_results()
        write_pages(load_parameters())
        yield [report_page(), *(report_page(MODEL, budget) for budget in made)]
