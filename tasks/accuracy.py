"""Tasks of lm-eval, question by question, so that two models can be compared on the same ones."""

import hashlib
import json
import logging
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PreTrainedModel

from numprune.errors import NumpruneError
from numprune.progress import track
from tasks.likelihood import Likelihood, Z, likelihood

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# Names that stand for several tasks in params.yaml.
TASK_SETS: Mapping[str, tuple[str, ...]] = {
    # The seven of the paper's mean, and the two it reports beside them.
    "paper": (
        "boolq",
        "piqa",
        "hellaswag",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
        "mmlu",
        "gsm8k",
    ),
}

# Of lm-eval, as its own command has them; the last one chooses the examples of few-shot prompts.
SEEDS: Mapping[str, int] = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}

# Between two lines of progress; lm-eval sorts the requests of a portion by length.
_BATCHES_A_PORTION = 32


@dataclass(frozen=True)
class Answers:
    """What a model got right in one task.

    Attributes:
        metric: The task's own: `acc_norm` where it has it, else `acc` or `exact_match`.
        correct: Of every question, in the task's order; in [0, 1].
        task_sha256: Of the task's configuration: the prompts' templates, the shots, the data's name.
    """

    metric: str
    correct: tuple[float, ...]
    task_sha256: str

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return statistics.fmean(self.correct)

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy."""
        return _standard_error(self.correct)

    def difference(self, dense: "Answers") -> dict[str, float]:
        """What the accuracy differs by from the dense model's on the same questions, with a 95 % interval.

        The questions are paired: their differences spread less than both accuracies do.

        Raises:
            ValueError: If the questions are others.
        """
        if (self.task_sha256, self.metric) != (dense.task_sha256, dense.metric):
            raise ValueError(f"the dense model answered another task: {dense.task_sha256}, not {self.task_sha256}")
        differences = [mine - its for mine, its in zip(self.correct, dense.correct, strict=True)]
        mean, error = statistics.fmean(differences), _standard_error(differences)
        return {"difference": mean, "stderr": error, "low": mean - Z * error, "high": mean + Z * error}


def expand(tasks: Sequence[str]) -> list[str]:
    """The tasks that names of tasks and of sets of them stand for, each once."""
    return list(dict.fromkeys(name for task in tasks for name in TASK_SETS.get(task, (task,))))


def unknown_tasks(tasks: Sequence[str], folder: Path) -> list[str]:
    """Those that are neither in a folder of task files nor lm-eval's; the latter's are listed only if they are needed.

    Args:
        tasks: Names of tasks, groups of tasks or sets.
        folder: With task files of one's own.
    """
    own = {name for path in folder.rglob("*.yaml") for name in _NAMED.findall(path.read_text(encoding="utf-8"))}
    further = [task for task in expand(tasks) if task not in own]
    return sorted(set(further) - set(_manager(further, folder).all_tasks)) if further else []


# A task file may hold tags that only lm-eval can read.
_NAMED = re.compile(r"^(?:task|group|tag): *[\"']?([^\s\"']+)", re.MULTILINE)


def _manager(tasks: Sequence[str], folder: Path | None) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    include = str(folder) if folder else None
    manager = TaskManager(include_path=include, include_defaults=False)
    return manager if set(tasks) <= set(manager.all_tasks) else TaskManager(include_path=include)


def answer(
    model: PreTrainedModel,
    tokenizer_folder: Path,
    tasks: Sequence[str],
    *,
    include: Path | None,
    limit: int | None,
    shots: int | None,
    batch_size: int,
) -> dict[str, Answers | Likelihood]:
    """Runs tasks of lm-eval on a model in memory.

    Args:
        model: On its device.
        tokenizer_folder: Where its tokenizer lies.
        tasks: Their names; a group of tasks, such as mmlu, gives one entry for all its questions.
        include: A folder with task files of one's own; if it has all of them, lm-eval's are not even listed.
        limit: Questions of each task at most.
        shots: Solved examples before every question; None: as many as each task's own configuration says. Tasks that
            do not allow for examples have none.
        batch_size: Sequences that are computed together.

    Returns:
        By the names of the tasks: what was answered right, or where whole documents are asked for, their likelihood.

    Raises:
        NumpruneError: If there is no such task, or its data cannot be had.
    """
    # lm-eval announces every request; a step shows progress of its own.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from datasets.utils.logging import disable_progress_bar
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    class Adapter(HFLM):
        """Shows this project's progress in place of lm-eval's."""

        def loglikelihood(self, requests: list[Any], **_: Any) -> list[Any]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[Any]:
            # Sorted, the documents of a batch are of about one length, and little of it is padding.
            order = sorted(range(len(requests)), key=lambda index: len(requests[index].args[0]))
            found = super().loglikelihood_rolling([requests[index] for index in order], disable_tqdm=True)
            return [value for _, value in sorted(zip(order, found, strict=True))]

        def _loglikelihood_tokens(self, requests: list[Any], **settings: Any) -> list[Any]:
            size = _BATCHES_A_PORTION * batch_size
            portions = [requests[start : start + size] for start in range(0, len(requests), size)]
            answers: list[Any] = []
            # Whole documents come here in many small calls, which are no progress to speak of.
            for portion in track(portions, len(portions), "answer") if len(portions) > 1 else portions:
                answers += super()._loglikelihood_tokens(portion, **settings | {"disable_tqdm": True})
            return answers

        def generate_until(self, requests: list[Any], **_: Any) -> list[Any]:
            size = _BATCHES_A_PORTION * batch_size
            portions = [requests[start : start + size] for start in range(0, len(requests), size)]
            written: list[Any] = []
            for portion in track(portions, len(portions), "generate"):
                written += super().generate_until(portion, disable_tqdm=True)
            return written

    disable_progress_bar()
    manager = _manager(tasks, include)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise NumpruneError(
            f"evaluation.tasks: lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists all."
        )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    adapter = Adapter(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
    try:
        # No cache: lm-eval's knows neither the model's weights nor the data set.
        results: Any = simple_evaluate(
            adapter,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=shots,
            bootstrap_iters=0,
            verbosity="ERROR",
            **SEEDS,
        )
    except (FileNotFoundError, ConnectionError) as error:
        raise NumpruneError(f"evaluation.tasks: the data of {', '.join(tasks)} cannot be had: {error}") from error
    found = {name: _result(samples, results["configs"][name]) for name, samples in results["samples"].items()}
    return dict(sorted(_pooled(found, tasks, results.get("group_subtasks", {})).items()))


def _pooled(
    found: Mapping[str, Answers | Likelihood], tasks: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> dict[str, Answers | Likelihood]:
    """One entry for each group that was asked for, with the questions of all its tasks: lm-eval's mean by size."""

    def members(name: str) -> list[str]:
        return [name] if name in found else sorted({leaf for part in groups.get(name, ()) for leaf in members(part)})

    pooled = dict(found)
    for group in tasks:
        leaves = members(group)
        if group in found or not leaves:
            continue
        parts = [part for leaf in leaves if isinstance(part := found[leaf], Answers)]
        metrics = sorted({part.metric for part in parts})
        if len(metrics) != 1 or len(parts) < len(leaves):
            raise NumpruneError(
                f"evaluation.tasks: the tasks of {group} have no metric in common: name them one by one."
            )
        digest = hashlib.sha256("".join(part.task_sha256 for part in parts).encode()).hexdigest()
        pooled[group] = Answers(metrics[0], tuple(c for part in parts for c in part.correct), digest)
        for leaf in leaves:
            pooled.pop(leaf, None)
    return pooled


def _result(samples: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> Answers | Likelihood:
    # A task with several filters of the answer lists every question once for each; the first filter counts.
    wanted = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    # By document: the order of the requests depends on the batch size.
    wanted.sort(key=lambda sample: sample["doc_id"])
    described = json.dumps(config, sort_keys=True, default=str)
    prompts = "".join(sample["doc_hash"] for sample in wanted)
    digest = hashlib.sha256((described + prompts).encode()).hexdigest()
    if {"bits_per_byte", "word_perplexity"} <= wanted[0].keys():
        return likelihood(wanted, digest)
    metric = next((name for name in ("acc_norm", "acc", "exact_match") if name in wanted[0]), None)
    if metric is None:
        raise NumpruneError(
            f"evaluation.tasks: {config['task']} has neither an accuracy nor bits_per_byte and word_perplexity: leave "
            "it out."
        )
    return Answers(metric, tuple(float(sample[metric]) for sample in wanted), digest)


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
