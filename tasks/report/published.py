"""What the paper measured, to hold beside what is measured here."""

from numprune.budget import parse_budget
from tasks.report.results import Results

# LLaMA-7B on an A100 after a prompt of 64 tokens, by the ratio: tokens per second and GB of GPU memory. The paper
# (arXiv 2412.12441) has them as a chart, from which they are read off.
_MEASURED = {0.0: (26, 12.6), 0.1: (28, 11.0), 0.2: (33, 9.6), 0.3: (36, 8.8), 0.4: (40, 7.5), 0.5: (45, 6.2)}


def published(results: Results) -> str | None:
    """The paper's speed and memory at the same ratio, as a sentence; None if it has none."""
    wanted = parse_budget(results.budget)
    if wanted.kind != "ratio" or not wanted.value or wanted.value not in _MEASURED:
        return None
    (speed, memory), (dense_speed, dense_memory) = _MEASURED[wanted.value], _MEASURED[0.0]
    return (
        f"The paper's figures for LLaMA-7B at {wanted.value:.0%}, on an A100 after a prompt of 64 tokens: "
        f"{speed / dense_speed:.2f} × the tokens per second, {memory / dense_memory:.2f} × the memory."
    )
