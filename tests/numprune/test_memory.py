import subprocess
import sys
from pathlib import Path

import pytest

from tasks.forkserver import IMPORTED

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Too late once a tensor has been made: the allocator asks but once.
SCRIPT = """
import contextlib
import importlib
import sys
from pathlib import Path

for name in sys.argv[1:]:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

import torch
from numprune.memory import use_huge_pages

use_huge_pages()
tensor = torch.ones(2**26)
lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
print(next(line for line in lines if line.startswith("AnonHugePages:")).split()[1])
"""


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="this system has no huge pages"
)
@pytest.mark.parametrize("imported", [["numprune.cli"], list(IMPORTED)], ids=["numprune", "a step"])
def test_large_tensors_lie_in_huge_pages_once_everything_is_imported(imported):
    command = [sys.executable, "-c", SCRIPT, *imported]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2**11  # Kilobytes: a page at least.
