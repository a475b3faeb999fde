"""What `numprune prune` and `numprune plan` are told: model, budget, recipe, calibration and machine."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
import typer

from numprune.allocation import Allocation
from numprune.architectures import check_supported
from numprune.budget import Budget, parse_budget
from numprune.calibration import DEFAULT_SAMPLES, check_data
from numprune.checkpoint import commit_of, fetch, load_config, weight_files
from numprune.device import resolve_device
from numprune.errors import NumpruneError
from numprune.multimodal import language_config
from numprune.ranking import Selection
from numprune.recipe import RECIPES, Recipe
from numprune.recovery import Recovery

_BUDGET = "Budget (one of them)"
_RECIPE = "Recipe"
_CALIBRATION = "Calibration"
_MACHINE = "Machine"

Length = Annotated[
    int | None,
    typer.Option(
        help="Tokens a sequence; by default 2048 or the model's maximum if that is less.", rich_help_panel=_CALIBRATION
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Sequences that are computed together; by default as many as have 8192 tokens, less by memory.",
        rich_help_panel=_MACHINE,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=_MACHINE)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Model = Annotated[str, typer.Argument(help="Folder of the dense model, or its id on the Hugging Face Hub.")]


def _limit(unit: str, example: str) -> Any:
    return typer.Option(help=f"{unit}, for example {example}.", rich_help_panel=_BUDGET)


def _override(text: str, **settings: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=_RECIPE, show_default=False, **settings)


@dataclass
class Job:
    """The options; what is wrong with them and cheap to find out is found out by `check`."""

    model: Model
    calibration: Annotated[
        str,
        typer.Option(
            help="What second moments are measured on: a text file, .jsonl with a `text` field, .safetensors with "
            "`input_ids`, or a Hub data set NAME:SPLIT or NAME:CONFIGURATION:SPLIT.",
            rich_help_panel=_CALIBRATION,
        ),
    ]
    ratio: Annotated[float | None, _limit("Share of the attention and MLP parameters to remove, in (0, 1)", "0.2")] = (
        None
    )
    parameters: Annotated[str | None, _limit("Parameters of the pruned model", "4M")] = None
    size: Annotated[str | None, _limit("Bytes of its weights", "8GB")] = None
    memory: Annotated[str | None, _limit("Bytes of weights and key/value cache, at --batch x --context", "10GB")] = None
    flops: Annotated[str | None, _limit("Operations a token, after --context tokens", "6G")] = None
    latency: Annotated[str | None, _limit("Time a generated token, measured here", "20ms")] = None
    batch: Annotated[
        int, typer.Option(min=1, help="Sequences that --memory and --latency are for.", rich_help_panel=_BUDGET)
    ] = 1
    context: Annotated[
        int, typer.Option(min=1, help="Tokens that --memory, --flops and --latency are for.", rich_help_panel=_BUDGET)
    ] = 2048
    recipe: Annotated[
        Literal["best", "paper"],
        typer.Option(help="The preset that the options below change.", rich_help_panel=_RECIPE),
    ] = "best"
    selection: Annotated[
        Selection | None,
        _override(
            "In which order a layer's units go: newton, the paper's score; box, the same within [0, 1]; obs, greedily "
            "by what the output loses; or a baseline's score."
        ),
    ] = None
    allocation: Annotated[
        Allocation | None,
        _override(
            "How many go from every layer: global, one threshold on the scores; literal, the paper's Eq. 8 as printed; "
            "uniform, the same share everywhere; loss_aware, what raises the model's loss least."
        ),
    ] = None
    recovery: Annotated[
        Recovery | None,
        _override(
            "How the kept weights make up for the pruned ones: none; bias, by the mean of what is lost; least_squares, "
            "each projection by itself; sequential, each also for what went wrong before it; refit, sequential with "
            "the producers refitted."
        ),
    ] = None
    steps: Annotated[int | None, _override("In how many cuts the budget is reached.", min=1)] = None
    planning_tokens: Annotated[
        int | None, _override("Calibration tokens that rises of the loss are measured on, in whole sequences.", min=1)
    ] = None
    heads: Annotated[int | None, _override("Kept query heads of a layer are a multiple of this, or all.", min=1)] = None
    channels: Annotated[int | None, _override("Kept MLP channels are a multiple of this, or all.", min=1)] = None
    uniform: Annotated[bool | None, _override("All layers keep as many heads and channels as the others.")] = None
    depth: Annotated[bool | None, _override("Whole attention or MLP modules may go.")] = None
    penalty: Annotated[float | None, _override("Lambda of the numerical score.")] = None
    damping: Annotated[
        str | None, _override("Of calibration moments, relative to their mean diagonal, or auto: from the spectrum.")
    ] = None
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.", rich_help_panel=_CALIBRATION)] = (
        DEFAULT_SAMPLES
    )
    length: Length = None
    seed: Annotated[int, typer.Option(help="Of the draw of calibration sequences.", rich_help_panel=_CALIBRATION)] = 0
    batch_size: BatchSize = None
    device: Device = "auto"
    revision: Revision = None
    folder: Path = field(init=False)
    commit: str | None = field(init=False)
    place: torch.device = field(init=False)
    budget: Budget = field(init=False)
    settings: Recipe = field(init=False)

    def check(self) -> None:
        """Reads the options.

        Raises:
            NumpruneError: If one is wrong, or the model is missing or not supported.
        """
        self.budget = self._budget()
        self.settings = self._settings()
        check_data(self.calibration)
        self.place = resolve_device(self.device)
        self.folder = fetch(self.model, self.revision)
        self.commit = commit_of(self.model, self.folder)
        check_supported(language_config(load_config(self.folder)))
        weight_files(self.folder)

    def _budget(self) -> Budget:
        kinds = ("ratio", "parameters", "size", "memory", "flops", "latency")
        given = {kind: getattr(self, kind) for kind in kinds if getattr(self, kind) is not None}
        if len(given) != 1:
            found = " and ".join(f"--{kind}" for kind in given) or "none"
            raise NumpruneError(f"One budget is needed, --ratio 0.2 for example, got {found}.")
        ((kind, value),) = given.items()
        text = str(value) if kind == "ratio" else f"{kind}-{value}"
        return parse_budget(text, batch=self.batch, length=self.context)

    def _settings(self) -> Recipe:
        recipe = RECIPES[self.recipe]
        names = ("selection", "allocation", "recovery", "steps", "planning_tokens", "penalty")
        changes: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.penalty is not None and not self.penalty > 0:
            raise NumpruneError(f"--penalty must be above 0, got {self.penalty}.")
        if self.damping is not None:
            changes["damping"] = self.damping if self.damping == "auto" else _damping(self.damping)
        shapes = {name: getattr(self, name) for name in ("heads", "channels", "uniform", "depth")}
        changes["shapes"] = replace(recipe.shapes, **{k: v for k, v in shapes.items() if v is not None})
        return replace(recipe, **changes)


def takes_job(command: Callable[..., None]) -> Callable[..., None]:
    """Makes a command's first argument, the job, from options that typer sees as the command's own."""
    hints = get_type_hints(Job, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(
            option.name,
            keyword,
            annotation=hints[option.name],
            default=inspect.Parameter.empty if option.default is MISSING else option.default,
        )
        for option in fields(Job)
        if option.init
    ]
    own_hints = get_type_hints(command, include_extras=True)
    _, *own = inspect.signature(command).parameters.values()
    own = [parameter.replace(kind=keyword, annotation=own_hints[parameter.name]) for parameter in own]

    @wraps(command)
    def run(**values: Any) -> None:
        job = Job(**{option.name: values.pop(option.name) for option in options})
        job.check()
        command(job, **values)

    parameters = sorted([*options, *own], key=lambda p: p.default is not inspect.Parameter.empty)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _damping(text: str) -> float:
    try:
        damping = float(text)
    except ValueError:
        damping = -1.0
    if not 0 <= damping < float("inf"):
        raise NumpruneError(f"--damping must be auto or a number of at least 0, got {text!r}.")
    return damping
