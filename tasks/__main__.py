"""Run a step of the pipeline: `python -m tasks STEP MODEL [BUDGET]`, the steps being modules of this package."""

import sys

from tasks.forked import run

if __name__ == "__main__":
    if len(sys.argv) < 2 or not sys.argv[1].isidentifier():
        sys.exit("error: usage: python -m tasks STEP [MODEL [BUDGET]], with the steps that dvc.yaml has.")
    run(f"tasks.{sys.argv[1]}", sys.argv[2:])
