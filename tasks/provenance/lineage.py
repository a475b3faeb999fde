"""The lineage of a version: everything it came from, as one structure, a tree, or a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numprune.errors import NumpruneError
from numprune.files import replace_on_success
from tasks.provenance.consistency import results
from tasks.provenance.dvc_lock import LockedStage, read_lock, stages_behind
from tasks.provenance.statement import CALIBRATION, CODE, SOURCE, dependencies, parse_statement
from tasks.provenance.version_files import (
    BENCHMARK,
    DENSE_EVALUATION,
    EVALUATION,
    LOCK,
    SIGNATURE,
    STATEMENT,
    digest_file,
    read_json,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from rich.tree import Tree

PICTURE_FORMATS = (".svg", ".png")


@dataclass(frozen=True)
class Lineage:
    """Where a version comes from, as its evidence and the registry tell it.

    Attributes:
        subject: Model, budget, recipe, statement and signature; name and version if it is registered.
        source: Of the dense model: origin, revision, fingerprint and the SHA-256 of its files.
        calibration: Data, hash of the tokens, and how they were drawn.
        parameters: All of `params.yaml`.
        code: Commit, and whether something had been changed since.
        stages: What each stage read and made, by DVC's hashes, in an order in which they ran.
        environment: Packages, machine and settings of the process that registered the version.
        runs: Of MLflow and the orchestrator, and when the evidence was written.
        results: Contents of the metric files.
        promotions: The records of the promotion log about this version.
    """

    subject: Mapping[str, Any]
    source: Mapping[str, Any]
    calibration: Mapping[str, Any]
    parameters: Mapping[str, Any]
    code: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Mapping[str, str]]]
    environment: Mapping[str, Any]
    runs: Mapping[str, str]
    results: Mapping[str, Any]
    promotions: Sequence[Mapping[str, Any]]


def folder_lineage(folder: Path) -> Lineage:
    """The lineage that a version folder tells by itself. It is not verified: see `tasks.provenance.verify`.

    Raises:
        NumpruneError: If the folder has no statement, or its evidence is damaged.
    """
    try:
        statement = parse_statement((folder / STATEMENT).read_text(encoding="utf-8"))
        stages = read_lock((folder / LOCK).read_text(encoding="utf-8"))
    except OSError as error:
        raise NumpruneError(f"{folder} is no version folder: {error}") from None
    definition, details = (statement["predicate"][key] for key in ("buildDefinition", "runDetails"))
    external, internal = definition["externalParameters"], definition["internalParameters"]
    source, drawn, code = (dependencies(statement, name) for name in (SOURCE, CALIBRATION, CODE))
    return Lineage(
        subject={
            "model": external["model"],
            "budget": external["budget"],
            "recipe": internal["recipe"],
            "statement_sha256": digest_file(folder / STATEMENT).sha256,
            "signed": (folder / SIGNATURE).exists(),
            "files": len(statement["subject"]),
        },
        source={
            **source[SOURCE]["annotations"],
            "fingerprint": source[SOURCE]["digest"]["fingerprint"],
            "files": {
                name.removeprefix(f"{SOURCE}/"): entry["digest"]["sha256"]
                for name, entry in source.items()
                if name != SOURCE
            },
        },
        calibration={
            **drawn[CALIBRATION]["annotations"],
            "tokens_sha256": drawn[CALIBRATION]["digest"]["tokensSha256"],
        },
        parameters=external["parameters"],
        code={
            "commit": code[CODE].get("digest", {}).get("gitCommit"),
            "repository": code[CODE].get("uri"),
            **code[CODE]["annotations"],
        },
        stages={
            stage.name: {"reads": dict(stage.dependencies), "makes": dict(stage.outputs)}
            for stage in _in_order(stages_behind(stages, results(external["model"], external["budget"])))
        },
        environment={"packages": details["builder"]["version"], **internal["environment"]},
        runs={
            "mlflow": details["metadata"]["invocationId"],
            **internal["orchestrator"],
            "finished": details["metadata"]["finishedOn"],
        },
        results={
            "evaluation": read_json(folder / EVALUATION),
            "dense_evaluation": read_json(folder / DENSE_EVALUATION),
            "benchmark": read_json(folder / BENCHMARK),
        },
        promotions=[],
    )


def version_lineage(client: "MlflowClient", version: "ModelVersion", folder: Path) -> Lineage:
    """The lineage of a registered version, with its aliases and promotions.

    Raises:
        NumpruneError: As in `folder_lineage`.
    """
    from tasks.registry.promotion_log import read_promotions

    told = asdict(folder_lineage(folder))
    aliases = client.get_registered_model(version.name).aliases
    told["subject"] |= {
        "registered": f"{version.name} version {version.version}",
        "aliases": sorted(alias for alias, number in aliases.items() if str(number) == str(version.version)),
    }
    told["promotions"] = [
        {**asdict(promotion), "effective": promotion.effective}
        for promotion in read_promotions(client, version.name)
        if promotion.version == int(version.version)
    ]
    return Lineage(**told)


def lineage_tree(lineage: Lineage) -> "Tree":
    """The lineage as a tree for the terminal."""
    from rich.markup import escape
    from rich.tree import Tree

    tree = Tree(f"[bold]{escape(_title(lineage))}[/bold]")

    def grow(branch: Tree, key: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            limb = branch.add(escape(key))
            for name, item in value.items():
                grow(limb, str(name), item)
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            limb = branch.add(escape(key))
            for number, item in enumerate(value, start=1):
                grow(limb, str(number), item)
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            branch.add(f"{escape(key)}: [cyan]{escape(text)}[/cyan]")

    for section, value in asdict(lineage).items():
        grow(tree, section, value or ("none" if section == "promotions" else value))
    return tree


def draw_lineage(lineage: Lineage, path: Path) -> None:
    """Draws inputs, stages and the version as boxes and arrows.

    Args:
        lineage: What to draw.
        path: Of an .svg or .png file.

    Raises:
        NumpruneError: If the file's name ends otherwise.
    """
    if path.suffix not in PICTURE_FORMATS:
        raise NumpruneError(f"{path}: a picture's name must end in {' or '.join(PICTURE_FORMATS)}.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inputs, outcome = _input_boxes(lineage), _outcome_boxes(lineage)
    stages = [
        (name, [f"{Path(made).name}  {_brief(md5)}" for made, md5 in s["makes"].items()])
        for name, s in lineage.stages.items()
    ]
    columns = [inputs, stages, outcome]
    height = max(sum(_lines(box) for box in column) + len(column) for column in columns)
    figure = Figure(figsize=(15, 0.24 * height + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlim=(0, 150), ylim=(-height, 0.5))
    axes.axis("off")
    axes.set_title(_title(lineage), loc="left", fontweight="bold")
    colours = ("#e8f0fe", "#f3f3f3", "#e6f4ea")
    places: list[list[tuple[float, float]]] = []
    for column, left, width, colour in zip(columns, (0, 55, 104), (44, 38, 46), colours, strict=True):
        places.append(_draw_column(axes, column, left=left, width=width, colour=colour, height=height))
    for spans, (start, end) in zip((places[:2], places[1:]), ((44, 55), (93, 104)), strict=True):
        _draw_arrow(axes, (start, _middle(spans[0])), (end, _middle(spans[1])))
    with replace_on_success(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=130)


Box = tuple[str, list[str]]


def _title(lineage: Lineage) -> str:
    subject = lineage.subject
    name = subject.get("registered") or f"{subject['model']}, budget {subject['budget']}"
    return f"Lineage of {name}"


def _input_boxes(lineage: Lineage) -> list[Box]:
    source, drawn, code, parameters = lineage.source, lineage.calibration, lineage.code, lineage.parameters
    origin = source.get("repository") or source.get("folder") or source.get("path")
    commit = f"commit {_brief(code['commit'])}" if code["commit"] else "no known commit"
    packages = lineage.environment["packages"]
    return [
        (
            "source model",
            [
                str(origin),
                f"revision {_brief(source.get('revision') or 'none')}",
                *(f"{name}  {_brief(sha256)}" for name, sha256 in source["files"].items()),
            ],
        ),
        (
            "calibration",
            [
                str(drawn["data"]),
                f"{drawn['samples']} x {drawn['length'] or 'default'} tokens, seed {drawn['seed']}",
                f"tokens  {_brief(drawn['tokens_sha256'])}",
            ],
        ),
        (
            "parameters",
            [
                f"budget {lineage.subject['budget']}",
                f"recipe {lineage.subject['recipe']}",
                f"workload {parameters.get('workload')}",
            ],
        ),
        ("code", [commit, f"changed since: {code['changed_since_commit']}"]),
        (
            "environment",
            [
                f"Python {lineage.environment['python']}, {lineage.environment['cpu']}",
                *(f"GPU {gpu}" for gpu in lineage.environment["gpus"]),
                *(f"{name} {packages[name]}" for name in ("numprune", "torch", "transformers") if name in packages),
            ],
        ),
    ]


def _outcome_boxes(lineage: Lineage) -> list[Box]:
    evaluation, dense = lineage.results["evaluation"], lineage.results["dense_evaluation"]
    benchmark = lineage.results["benchmark"]
    measured = [
        f"perplexity {evaluation['perplexity']:.4g}, dense {dense['perplexity']:.4g}",
        *(
            f"{title} {benchmark['pruned'][key]:,.4g}, dense {benchmark['dense'][key]:,.4g}"
            for title, key in (("tokens/s", "tokens_per_second"), ("parameters", "parameters"))
        ),
    ]
    subject = lineage.subject
    version = [
        *([subject["registered"]] if "registered" in subject else []),
        f"aliases {', '.join(subject.get('aliases', [])) or 'none'}",
        f"{subject['files']} files, statement {_brief(subject['statement_sha256'])}",
        "signed" if subject["signed"] else "not signed",
    ]
    runs = [f"{name} {_brief(value, 20)}" for name, value in lineage.runs.items()]
    promotions = [
        f"{entry.get('action')} by {entry.get('by')}: {entry.get('reason')}" for entry in lineage.promotions
    ] or ["none"]
    return [("results", measured), ("runs", runs), ("version", version), ("promotions", promotions)]


def _draw_column(
    axes: Any, boxes: Sequence[Box], *, left: float, width: float, colour: str, height: float
) -> list[tuple[float, float]]:
    """Draws boxes one below the other, in the middle of the height; returns their upper and lower ends."""
    from matplotlib.patches import FancyBboxPatch

    free = height - sum(map(_lines, boxes))
    gap = free / len(boxes)
    top, spans = -gap / 2, []
    for index, (title, lines) in enumerate(boxes):
        tall = _lines((title, lines))
        patch = FancyBboxPatch(
            (left, top - tall),
            width,
            tall,
            boxstyle="round,pad=0,rounding_size=0.6",
            facecolor=colour,
            edgecolor="#777",
        )
        axes.add_patch(patch)
        axes.text(left + 1, top - 1, title, fontsize=9, fontweight="bold", va="center", clip_on=True)
        for number, line in enumerate(lines, start=2):
            axes.text(
                left + 1, top - number, _brief(line, int(width * 1.25)), fontsize=8, va="center", family="monospace"
            )
        spans.append((top, top - tall))
        if index and left == 55:
            _draw_arrow(axes, (left + width / 2, spans[-2][1]), (left + width / 2, top))
        top -= tall + gap
    return spans


def _draw_arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": "#555", "lw": 1.2})


def _middle(spans: Sequence[tuple[float, float]]) -> float:
    return (spans[0][0] + spans[-1][1]) / 2


def _lines(box: Box) -> int:
    return len(box[1]) + 2


def _brief(text: str, length: int = 12) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _in_order(stages: Mapping[str, LockedStage]) -> list[LockedStage]:
    maker = {path: stage.name for stage in stages.values() for path in stage.outputs}
    needs = {name: {maker[path] for path in stage.dependencies if path in maker} for name, stage in stages.items()}
    return [stages[name] for name in TopologicalSorter(needs).static_order()]
