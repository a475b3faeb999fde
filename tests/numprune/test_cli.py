import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from typer.testing import CliRunner

from numprune.architectures import KINDS, all_groups, prunable_groups
from numprune.calibration import evaluation_windows
from numprune.cli import PLUGINS, _plan_table, add_plugins, app, main
from numprune.errors import NumpruneError
from numprune.perplexity import perplexity, window_losses
from numprune.plan import Choice, Source, make_plan
from numprune.ragged import LAYOUTS
from numprune.recipe import RECIPES
from numprune.slicing import slice_block
from tests.numprune.conftest import CONFIGS


def process(*arguments):
    """Runs the command line in a process of its own."""
    command = [sys.executable, "-c", "from numprune.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def numprune(capfd, monkeypatch):
    """Runs the command line in this process, which has imported everything; what a process of its own would return."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    monkeypatch.setattr(app, "registered_commands", [*app.registered_commands])

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["numprune", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return subprocess.CompletedProcess(sys.argv, end.value.code, *capfd.readouterr())

    yield run
    logging.set_verbosity(level)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture
def pruning(make_checkpoint, text_file, tmp_path):
    """Arguments of a prune command that works."""
    options = {"--ratio": 0.3, "--calibration": text_file, "--output": tmp_path / "out"}
    options |= {"--samples": 8, "--length": 32}
    return [make_checkpoint(), *(part for pair in options.items() for part in pair)]


def test_prune_then_perplexity(numprune, pruning, text_file, tmp_path):
    done = numprune("prune", *pruning)
    assert done.returncode == 0, done.stderr
    assert "% of 20,736 attention and MLP parameters are gone" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    done = numprune("perplexity", tmp_path / "out", "--data", text_file, "--length", 32, "--max-tokens", 4000, "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    windows, _ = evaluation_windows(str(text_file), str(tmp_path / "out"), length=32, max_tokens=4000)
    expected = perplexity(torch.cat(list(window_losses(model, windows))), 32).perplexity
    assert printed["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert printed["windows"] == len(windows)
    assert printed["protocol"]["bos_token"] == "none added"


def test_check_says_what_holds_and_what_it_found(numprune, make_checkpoint):
    done = numprune("check", make_checkpoint())
    assert done.returncode == 0, done.stderr
    assert "family llama, 3 blocks" in done.stdout
    assert "FAILS" not in done.stdout
    assert "MistralForCausalLM: llama's stock configuration refuses the head count" in done.stdout


def test_check_needs_no_weights_and_fails_where_the_layout_is_wrong(tmp_path, monkeypatch):
    CONFIGS["llama"].save_pretrained(tmp_path)
    monkeypatch.setitem(LAYOUTS, "llama", replace(LAYOUTS["llama"], norm_offset=1.0))
    result = CliRunner().invoke(app, ["check", str(tmp_path), "--random"])
    assert result.exit_code == 1
    assert "FAILS  the last norm multiplies by its weight" in result.output
    assert "see docs/architectures.md" in result.output


def test_plan_writes_no_weights(numprune, pruning, tmp_path):
    pruning[pruning.index("--output") + 1] = tmp_path / "plan.json"
    done = numprune("plan", *pruning)
    assert done.returncode == 0, done.stderr
    assert "Budget 0.3: 30." in done.stdout
    assert "Time to prune" in done.stdout
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["budget"] == "0.3"


def test_same_seed_same_bytes(numprune, pruning, tmp_path):
    """In two processes: what they hash has another order."""
    outputs = []
    for name, run in (("first", numprune), ("second", process)):
        pruning[pruning.index("--output") + 1] = tmp_path / name
        assert run("prune", *pruning, "--seed", 7).returncode == 0
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        outputs.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("recovery", ["bias", "refit"])
def test_recovery_can_be_chosen(numprune, pruning, tmp_path, recovery):
    done = numprune("prune", *pruning, "--recovery", recovery)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "out" / "pruning_plan.json").read_text(encoding="utf-8"))
    assert plan["recipe"]["recovery"] == recovery


def test_everything_in_a_recipe_can_be_chosen(numprune, pruning, tmp_path):
    pruning[pruning.index("--ratio") : pruning.index("--ratio") + 2] = ["--parameters", "32000"]
    chosen = {"--recipe": "paper", "--selection": "flap", "--allocation": "loss_aware", "--recovery": "sequential"}
    chosen |= {
        "--steps": 2,
        "--planning-tokens": 64,
        "--heads": 2,
        "--channels": 8,
        "--penalty": 3,
        "--damping": "auto",
    }
    done = numprune("prune", *pruning, *(part for pair in chosen.items() for part in pair), "--uniform", "--depth")
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "out" / "pruning_plan.json").read_text(encoding="utf-8"))
    assert plan["budget"] == "parameters-32k"
    assert plan["recipe"] == {
        "selection": "flap",
        "allocation": "loss_aware",
        "recovery": "sequential",
        "steps": 2,
        "planning_tokens": 64,
        "shapes": {"heads": 2, "channels": 8, "uniform": True, "depth": True},
        "penalty": 3.0,
        "damping": "auto",
        "seed": 0,
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.num_parameters() <= 32000


def test_the_table_leaves_out_what_a_model_does_not_have(llama):
    for block, absent in ((0, ["attention"]), (2, ["attention", "mlp"])):
        kept = {f"{block}.{kind}": torch.arange(0 if kind in absent else 40) for kind in KINDS}
        slice_block(llama.model.layers[block], prunable_groups(llama)[block], kept)
    left = all_groups(llama)
    kept = {group.name: torch.arange(group.units) for group in left}
    choice = Choice(kept, dict.fromkeys(kept), dict.fromkeys(kept), 0.0)
    plan = make_plan(left, choice, "0.3", source=Source("test", None, "", ""), recipe=RECIPES["paper"])
    first, second, third = zip(*(column.cells for column in _plan_table(llama, plan).columns), strict=True)
    assert first[:2] == ("0", "")
    assert first[2] == "40 of 40"
    assert all(second)
    assert third == ("2", "", "", "")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--ratio", 0, "ratio must be in (0, 1), got 0.0"),
        ("--ratio", 1.5, "ratio must be in (0, 1), got 1.5"),
        ("--ratio", 0.99, "cannot be reached"),
        ("--calibration", "nowhere.txt", "nowhere.txt not found"),
        ("--samples", 100000, "Lower the samples or the length"),
        ("--length", 10000, "length must be in [2, 64]"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(numprune, pruning, option, value, message):
    output = pruning[pruning.index("--output") + 1]
    pruning[pruning.index(option) + 1] = value
    done = numprune("prune", *pruning)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not output.exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--size", "8MB"], "One budget is needed, --ratio 0.2 for example, got --ratio and --size"),
        (["--damping", "none"], "--damping must be auto or a number of at least 0, got 'none'"),
        (["--penalty", "0"], "--penalty must be above 0"),
        (["--selection", "guess"], "Invalid value for '--selection'"),
        (["--revision", "main"], "is a folder, which has no revision main: leave --revision out"),
    ],
)
def test_options_that_do_not_go_together(numprune, pruning, extra, message):
    done = numprune("prune", *pruning, *extra)
    assert done.returncode == 2
    assert message in done.stderr
    assert "capture" not in done.stderr


def test_debug_shows_the_traceback(pruning):
    done = process("prune", *pruning, "--device", "nonsense", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "device 'nonsense' cannot be used" in done.stderr


@pytest.mark.parametrize(
    ("command", "message"), [("prune", "already holds something"), ("plan", "is a folder: name a file")]
)
def test_a_taken_output_is_refused_before_any_work(numprune, pruning, tmp_path, command, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    done = numprune(command, *pruning)
    assert done.returncode == 2
    assert message in done.stderr
    assert "capture" not in done.stderr
    assert (tmp_path / "out" / "config.json").exists()


def test_an_output_that_cannot_be_replaced_is_refused_before_any_work(numprune, pruning, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    pruning[pruning.index("--output") + 1] = "."
    done = numprune("prune", *pruning)
    assert done.returncode == 2
    assert "cannot be replaced as a whole: name a folder below it" in done.stderr
    assert "capture" not in done.stderr


@pytest.mark.parametrize("command", ["prune", "plan", "perplexity"])
def test_help_teaches_by_example(numprune, command):
    done = numprune(command, "--help")
    assert done.returncode == 0
    assert f"numprune {command} " in done.stdout


def test_commands_of_other_packages_are_added(monkeypatch, capsys):
    plugin = typer.Typer()

    @plugin.command()
    def greet(name: str, loud: bool = False) -> None:
        """Says hello."""
        typer.echo(f"hello {name}{'!' if loud else ''}")

    @plugin.command()
    def publish() -> None:
        import a_package_that_is_not_installed  # noqa: F401

    monkeypatch.setitem(sys.modules, "a_plugin", SimpleNamespace(app=plugin))
    values = ("a_plugin:app", "a_broken_plugin:app", "a_plugin:app.no_commands")
    entries = [EntryPoint(f"plug-in {number}", value, PLUGINS) for number, value in enumerate(values)]
    monkeypatch.setattr("numprune.cli.entry_points", lambda group: entries if group == PLUGINS else [])
    app = typer.Typer()
    add_plugins(app)
    warned = capsys.readouterr().err
    assert all(f"{value} are left out" in warned for value in values[1:])
    runner = CliRunner()
    assert runner.invoke(app, ["greet", "you", "--loud"]).output == "hello you!\n"
    error = runner.invoke(app, ["publish"]).exception
    assert isinstance(error, NumpruneError)
    assert "a_package_that_is_not_installed" in str(error)
    assert "pip install 'numprune[pipeline]'" in str(error)
