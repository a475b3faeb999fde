"""Likelihood of whole documents, one by one, so that two models can be compared on the same ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Of a normal distribution: 95 % lie within so many standard errors.
Z = 1.96


@dataclass(frozen=True)
class Likelihood:
    """What lm-eval calls a rolling log-likelihood: every token given those before it in the document.

    Attributes:
        losses: Negative log-likelihood of every document in nats.
        sizes: UTF-8 bytes of every document.
        words: Words of every document.
        task_sha256: As of `tasks.accuracy.Answers`.
    """

    losses: tuple[float, ...]
    sizes: tuple[int, ...]
    words: tuple[int, ...]
    task_sha256: str

    @property
    def bits_per_byte(self) -> float:
        """Over all documents."""
        return sum(self.losses) / math.log(2) / sum(self.sizes)

    @property
    def word_perplexity(self) -> float:
        """Exp of the loss per word."""
        return math.exp(sum(self.losses) / sum(self.words))

    def difference(self, dense: "Likelihood") -> dict[str, float]:
        """What the bits per byte differ by from the dense model's on the same documents, with a 95 % interval.

        A ratio of sums over documents: its standard error is that of the residuals d_i - R b_i, with d_i the difference
        of the losses, b_i the bytes and R the ratio (Cochran, Sampling Techniques, section 2.11).

        Raises:
            ValueError: If the documents are others.
        """
        if self.task_sha256 != dense.task_sha256:
            raise ValueError(f"the dense model read other documents: {dense.task_sha256}, not {self.task_sha256}")
        bits = [(mine - its) / math.log(2) for mine, its in zip(self.losses, dense.losses, strict=True)]
        total, count = sum(self.sizes), len(bits)
        ratio = sum(bits) / total
        residuals = sum((d - ratio * size) ** 2 for d, size in zip(bits, self.sizes, strict=True))
        error = math.sqrt(count / (count - 1) * residuals) / total if count > 1 else 0.0
        return {"difference": ratio, "stderr": error, "low": ratio - Z * error, "high": ratio + Z * error}


def likelihood(samples: Sequence[Mapping[str, Any]], task_sha256: str) -> Likelihood:
    """From lm-eval's samples of a task whose `output_type` is `loglikelihood_rolling`, in the order of documents.

    Args:
        samples: With the metrics `bits_per_byte` and `word_perplexity`, which lm-eval keeps as pairs of the
            log-likelihood and the count it is divided by.
        task_sha256: Of the task.
    """
    pairs = [(sample["bits_per_byte"], sample["word_perplexity"]) for sample in samples]
    return Likelihood(
        losses=tuple(-float(loss) for (loss, _), _ in pairs),
        sizes=tuple(int(size) for (_, size), _ in pairs),
        words=tuple(int(words) for _, (_, words) in pairs),
        task_sha256=task_sha256,
    )
