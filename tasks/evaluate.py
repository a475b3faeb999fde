"""Step `evaluate`: perplexity, accuracy and images of the dense model, or of a pruned one beside it."""

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from numprune.batches import fitting_batch
from numprune.calibration import evaluation_windows
from numprune.checkpoint import load_config, load_or_open, load_tokenizer
from numprune.cutting import twin
from numprune.device import resolve_device, working_dtype
from numprune.files import replace_on_success
from numprune.images import writes_images
from numprune.perplexity import Perplexity, perplexity, scored_tokens, window_losses
from numprune.plan import PruningPlan
from numprune.progress import track
from numprune.pruning import apply_plan
from numprune.samples import Samples, fingerprint
from numprune.streaming import answering
from numprune.texts import bos_token, describe
from tasks.accuracy import SEEDS, Answers, answer, expand
from tasks.comparison import compare
from tasks.images.evaluation import measure_images, side_by_side
from tasks.layout import (
    TEXTS_FOLDER,
    answers_file,
    checkpoint_folder,
    comparison_file,
    evaluation_file,
    model_folder,
    plan_file,
    run_folder,
    timing_file,
)
from tasks.likelihood import Likelihood
from tasks.parameters import Evaluation, Parameters, load_parameters
from tasks.step import run_step

# What figures depend on, apart from the parameters.
_MEASURING = ("numprune", "torch", "transformers", "lm_eval", "datasets")
# That are answered together, unless the parameters say: they are of many lengths, most of them short.
_QUESTIONS = 8


def evaluate(model: str, budget: Annotated[str | None, typer.Argument()] = None) -> None:
    """Evaluates a model, dense if no budget is given, on the text and the tasks of `params.yaml`."""
    start = time.monotonic()
    parameters = load_parameters()
    settings = parameters.evaluation
    dense_folder = model_folder(model)
    device = resolve_device(parameters.compute.device)
    images = parameters.images if writes_images(load_config(dense_folder)) else None
    data = images.data if images else settings.data
    windows, text_bytes = evaluation_windows(
        data, str(dense_folder), length=settings.length, max_tokens=settings.max_tokens
    )
    texts = {name: _windows(name, dense_folder, settings) for name in ([] if images else settings.texts)}

    def measure(subject: PreTrainedModel, title: str) -> Perplexity:
        return _measure(subject, windows, text_bytes, parameters, title)

    folder = dense_folder if budget is None else checkpoint_folder(model, budget)
    loaded = load_or_open(folder, dtype=working_dtype(device), device=device)
    measured = measure(loaded, "evaluate")
    metrics: dict[str, Any] = {
        "perplexity": measured.perplexity,
        "bits_per_byte": measured.bits_per_byte,
        "parameters": loaded.num_parameters(),
        "texts": {name: _of_text(loaded, name, *texts[name], parameters) for name in texts},
    }
    if images:
        metrics["images"] = measure_images(loaded, dense_folder, images, "images")
    if budget is not None:
        dense = load_or_open(dense_folder, dtype=working_dtype(device), device=device)
        with TemporaryDirectory(dir=run_folder(model, budget)) as work:
            cut = twin(dense)
            plan = PruningPlan.load(plan_file(model, budget))
            for _ in apply_plan(cut, plan, measured=None, recovery="none", work=Path(work)):
                pass
            metrics["perplexity_without_compensation"] = measure(cut, "evaluate without compensation").perplexity
            compared = compare(dense, loaded, cut, windows, load_tokenizer(dense_folder), device=device)
            if images:
                compared["images"] = side_by_side(dense, loaded, dense_folder, images)
        _write(comparison_file(model, budget), compared)
        del dense, cut
    with answering(loaded, device):
        answers = {} if images else _answer(loaded, folder, parameters)
    metrics["tasks"] = {name: _summed_up(given) for name, given in answers.items() if isinstance(given, Answers)}
    metrics["likelihoods"] = {
        name: _likelihood(given) for name, given in answers.items() if isinstance(given, Likelihood)
    }
    if budget is not None:
        dense_answers = _load_answers(answers_file(model, None))
        for name, given in answers.items():
            shown = (metrics["tasks"] | metrics["likelihoods"])[name]
            shown["against_dense"] = given.difference(dense_answers[name])  # type: ignore[arg-type]  # The same task.
    metrics["protocol"] = {
        "data": data,
        "tokens_sha256": fingerprint(windows),
        "windows": measured.windows,
        "length": measured.length,
        "stride": measured.length,
        "bos_token": bos_token(data),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": device.type,
        "versions": {name: version(name) for name in _MEASURING},
        "seeds": dict(SEEDS),
        "shots": "of each task's own configuration" if settings.shots is None else settings.shots,
    }
    _write(answers_file(model, budget), {name: asdict(given) for name, given in answers.items()})
    _write(evaluation_file(model, budget), metrics)
    # Apart, since everything else is the same the next time.
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    _write(timing_file(model, budget), {"seconds": round(time.monotonic() - start, 1), "finished": finished})


def _measure(
    model: PreTrainedModel, windows: Samples, text_bytes: int | None, parameters: Parameters, title: str
) -> Perplexity:
    device = resolve_device(parameters.compute.device)
    batch_size = parameters.compute.batch_size or fitting_batch(model, windows.length, device)
    batches = -(-len(windows) // batch_size)
    losses = window_losses(model, windows, batch_size=batch_size, device=device)
    found = torch.cat(list(track(losses, batches, title)))
    return perplexity(found, windows.length, text_bytes, scored=scored_tokens(model, windows))


def _windows(text: str, folder: Path, settings: Evaluation) -> tuple[Samples, int | None]:
    lines = (TEXTS_FOLDER / f"{text}.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    return evaluation_windows(text, str(folder), length=settings.length, documents=documents)


def _of_text(
    model: PreTrainedModel, text: str, windows: Samples, text_bytes: int | None, parameters: Parameters
) -> dict[str, Any]:
    measured = _measure(model, windows, text_bytes, parameters, f"evaluate {text}")
    protocol = {"data": describe(text), "bos_token": bos_token(text), "tokens_sha256": fingerprint(windows)}
    return asdict(measured) | protocol


def _answer(model: PreTrainedModel, folder: Path, parameters: Parameters) -> dict[str, Answers | Likelihood]:
    settings = parameters.evaluation
    if not settings.tasks:
        return {}
    return answer(
        model,
        folder,
        expand(settings.tasks),
        include=Path(settings.tasks_folder),
        limit=settings.questions,
        shots=settings.shots,
        batch_size=parameters.compute.batch_size or _QUESTIONS,
    )


def _summed_up(answers: Answers) -> dict[str, Any]:
    return {
        "metric": answers.metric,
        "accuracy": answers.accuracy,
        "stderr": answers.stderr,
        "questions": len(answers.correct),
        "task_sha256": answers.task_sha256,
    }


def _likelihood(given: Likelihood) -> dict[str, Any]:
    return {
        "bits_per_byte": given.bits_per_byte,
        "word_perplexity": given.word_perplexity,
        "documents": len(given.losses),
        "task_sha256": given.task_sha256,
    }


def _load_answers(path: Path) -> dict[str, Answers | Likelihood]:
    def read(fields: dict[str, Any]) -> Answers | Likelihood:
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        return Answers(**values) if "correct" in values else Likelihood(**values)

    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: read(fields) for name, fields in content.items()}


def _write(path: Path, content: Any) -> None:
    with replace_on_success(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_step(evaluate, beside_others=True)
