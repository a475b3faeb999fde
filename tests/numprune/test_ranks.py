"""Two processes that share the samples, started by torchrun, against one."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from numprune.cli import app
from numprune.errors import NumpruneError
from numprune.ranks import own_share

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
PRUNE = "from numprune.cli import main; main()"
# The second process has memory for two sequences at a time, which it finds out in the middle of a block's refits.
SHORT_OF_MEMORY = """
import os

from numprune import recovery

run_until = recovery._run_until


def short(block, path, states, *rest):
    if os.environ["RANK"] == "1" and path == "mlp.down_proj" and len(states) > 2:
        raise RuntimeError("can't allocate memory")
    return run_until(block, path, states, *rest)


recovery._run_until = short
"""


def test_two_processes_come_to_what_one_does(make_checkpoint, text_file, tmp_path):
    """The same units; weights to within 1e-3 of their size, as sums are added in another order.

    Memory that does not suffice in one of them halves the batches of both. They plan on one sequence, with which one of
    them alone would have something to do if they shared sequences there.
    """
    options = ["--ratio", "0.3", "--calibration", text_file, "--samples", "9", "--length", "32"]
    arguments = [make_checkpoint(), *options, "--planning-tokens", "32"]
    script = tmp_path / "prune.py"
    app(["prune", *map(str, arguments), "--output", str(tmp_path / "one")], standalone_mode=False)
    script.write_text(SHORT_OF_MEMORY + PRUNE, encoding="utf-8")
    command = [*TORCHRUN, script, "prune", *arguments, "--output", tmp_path / "two"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters are gone") == 1
    # They have five and four of the nine sequences.
    assert done.stderr.count("out of memory with 5 sequences at a time: going on with 2") == 2
    plans = [json.loads((tmp_path / name / "pruning_plan.json").read_text(encoding="utf-8")) for name in ("one", "two")]
    for name, group in plans[0]["groups"].items():
        assert group["kept"] == plans[1]["groups"][name]["kept"]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        assert (two[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    assert any(not torch.equal(two[name], tensor) for name, tensor in one.items())
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".work")] == []


def test_more_processes_than_samples_are_refused(monkeypatch):
    monkeypatch.setattr("numprune.ranks.ranks", lambda: 2)
    with pytest.raises(NumpruneError, match="1 samples cannot be shared by 2 processes: use fewer processes"):
        own_share(torch.zeros(1, 8))
