import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from numprune import memory
from numprune.memory import available_memory, total_memory
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

# Tensors of 1 MB come from the heap, and every second one stays.
HEAP = """
from pathlib import Path

import torch
from numprune.memory import return_unused_memory


def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


torch.ones(2**22)
tensors = [torch.ones(2**18) for _ in range(300)]
del tensors[::2]
before = resident()
return_unused_memory()
print(before, resident())
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can give it back")
def test_what_lies_between_tensors_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before - after > 100 * 2**10


def test_the_memory_of_a_machine_is_what_it_may_have_at_most(monkeypatch, tmp_path):
    machine = total_memory(torch.device("cpu"))
    assert machine >= available_memory()
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert total_memory(torch.device("cpu")) >= machine
    (tmp_path / "memory.max").write_text("1000000\n")
    assert total_memory(torch.device("cpu")) == 1_000_000
