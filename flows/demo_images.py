"""The demo of image models: the whole flow on reference-llamagen, then other recipes beside it.

It runs in a workspace beside the checkout (`tasks/workspace.py`), so that the results of the language model stay where
they are: `python -m flows.demo_images`.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from numprune.errors import reported
from tasks.parameters import load_parameters
from tasks.workspace import alone, open_workspace

WORKSPACE = Path(".numprune/demo-images")
MODEL = "reference-llamagen"
BUDGETS = [0.1, 0.15, 0.2, 0.5]
_REPORT = ("report/index.html", "report/summary.md", "report/images/images.md", "report/images/images.png")


def main() -> int:
    """Brings the workspace up to date, runs the flow and the comparison there; returns the exit code."""
    with reported(), alone(WORKSPACE):
        return _run()


def _run() -> int:
    changes = _changes()
    open_workspace(WORKSPACE, Path(), load_parameters(changes=changes), changes)
    # Threads do not pay for a model this small: what one of them computes takes less time than handing it over.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    for module in ("flows.compress", "benchmarks.images"):
        done = subprocess.run([sys.executable, "-m", module], cwd=WORKSPACE, env=environment, check=False)
        if done.returncode != 0:
            return done.returncode
    print("\nWritten:", *(f"  {WORKSPACE / name}" for name in _REPORT), sep="\n")
    return 0


def _changes() -> dict[str, Any]:
    given = load_parameters()
    # Text is not asked for, but the stage that makes it is part of the graph: a little of it.
    corpus = {"calibration": ["datasets"], "evaluation": ["huggingface_hub"], "questions": 1}
    return {
        "models": [MODEL],
        "budgets": BUDGETS,
        "corpus": given.corpus.model_dump() | corpus,
        "evaluation": given.evaluation.model_dump() | {"texts": []},
        "benchmark": given.benchmark.model_dump() | {"batches": [1], "repeats": 3},
    }


if __name__ == "__main__":
    sys.exit(main())
