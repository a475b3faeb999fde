"""The lineage of a version: everything it came from, as one structure, a tree, or a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numprune.errors import NumpruneError
from numprune.files import replace_on_success
from tasks.dvc_lock import LockedStage, read_lock, stages_behind, version_outputs
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

# Sections of params.yaml that shape a version.
_SHAPING = ("budgets", "workload", "corpus", "calibration", "recipe", "evaluation", "benchmark")

PICTURE_FORMATS = (".svg", ".png")
# Left and right ends of the columns of the picture: inputs, stages, outcome.
_COLUMNS = ((0.0, 42.0), (50.0, 86.0), (106.0, 150.0))
# The stages have room beside them for arrows from one to another.
_FRAMES = ((-1.0, 43.0), (49.0, 99.0), (105.0, 151.0))


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
        results: Figures as MLflow has them, and the contents of the metric files.
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
            for stage in _in_order(stages_behind(stages, version_outputs(external["model"], external["budget"])))
        },
        environment={"packages": details["builder"]["version"], **internal["environment"]},
        runs={
            "mlflow": details["metadata"]["invocationId"],
            **internal["orchestrator"],
            "finished": details["metadata"]["finishedOn"],
        },
        results={
            "figures": internal["figures"],
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
    """What a person looks for, as a tree for the terminal; the JSON form has everything."""
    from rich.markup import escape
    from rich.tree import Tree

    tree = Tree(f"[bold]{escape(_title(lineage))}[/bold]")

    def grow(branch: Tree, key: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            limb = branch.add(escape(key))
            for name, item in value.items():
                grow(limb, str(name), item)
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            branch.add(f"{escape(key)}: [cyan]{escape(text)}[/cyan]")

    for section, value in _essentials(lineage).items():
        grow(tree, section, value)
    return tree


def _essentials(lineage: Lineage) -> dict[str, Any]:
    """Without parameters that are not set or do not shape the result, code among what stages read, and repetitions."""
    results = lineage.results
    protocols = {name: results[name].get("protocol", {}) for name in ("evaluation", "benchmark")}
    return {
        "subject": lineage.subject,
        "source": lineage.source,
        "calibration": lineage.calibration,
        "parameters": _set({name: lineage.parameters.get(name) for name in _SHAPING}),
        "code": lineage.code,
        "stages": {
            name: {
                way: {path: md5 for path, md5 in paths.items() if not path.endswith(".py")}
                for way, paths in stage.items()
            }
            for name, stage in lineage.stages.items()
        },
        "environment": lineage.environment,
        "runs": lineage.runs,
        "figures": results["figures"],
        "measured": protocols,
        "promotions": {
            str(record["number"]): f"{record['action']} by {record['by']} at {record['at']} {record['reason']}".strip()
            for record in lineage.promotions
        }
        or "none",
    }


def _set(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None or empty, at any depth."""
    inner = {key: _set(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return {key: value for key, value in inner.items() if value not in (None, {}, [])}


def draw_lineage(lineage: Lineage, path: Path) -> None:
    """Draws inputs, stages and the version as boxes and arrows; arrows between stages are what one reads of another.

    Args:
        lineage: What to draw.
        path: Of an .svg or .png file.

    Raises:
        NumpruneError: If the file's name ends otherwise.
    """
    if path.suffix not in PICTURE_FORMATS:
        raise NumpruneError(f"{path}: a picture's name must end in {' or '.join(PICTURE_FORMATS)}.")
    from matplotlib.figure import Figure

    columns = [_input_boxes(lineage), _stage_boxes(lineage), _outcome_boxes(lineage)]
    height = max(sum(map(_lines, column)) + 2 * len(column) for column in columns)
    figure = Figure(figsize=(15, 0.24 * height + 0.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-1, 151), ylim=(-height - 0.5, 0.5))
    axes.axis("off")
    axes.set_title(_title(lineage), loc="left", fontweight="bold")
    spans = []
    for column, (left, right), colour in zip(columns, _COLUMNS, ("#e8f0fe", "#f3f3f3", "#e6f4ea"), strict=True):
        spans.append(_draw_column(axes, column, left=left, right=right, colour=colour, height=height))
    for (left, right), (following, _) in pairwise([*_FRAMES, (0.0, 0.0)]):
        _draw_frame(axes, left=left, right=right, height=height)
        if following:
            _draw_arrow(axes, (right, -height / 2), (following, -height / 2), width=3)
    _draw_dependencies(axes, lineage, spans[1])
    with replace_on_success(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=130)


Box = tuple[str, list[str]]


def _title(lineage: Lineage) -> str:
    subject = lineage.subject
    name = subject.get("registered") or f"{subject['model']}, budget {subject['budget']}"
    return f"Lineage of {name}"


def _input_boxes(lineage: Lineage) -> list[Box]:
    source, drawn, code = lineage.source, lineage.calibration, lineage.code
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


def _stage_boxes(lineage: Lineage) -> list[Box]:
    return [
        (name, [f"{Path(path).name}  {_brief(md5)}" for path, md5 in stage["makes"].items()])
        for name, stage in lineage.stages.items()
    ]


def _outcome_boxes(lineage: Lineage) -> list[Box]:
    evaluation, dense = lineage.results["evaluation"], lineage.results["dense_evaluation"]
    benchmark = lineage.results["benchmark"]
    pruned, before = benchmark["pruned"], benchmark["dense"]
    measured = [
        f"perplexity {evaluation['perplexity']:.4g}, dense {dense['perplexity']:.4g}",
        f"tokens/s {pruned['tokens_per_second']:,.1f}, dense {before['tokens_per_second']:,.1f}",
        f"parameters {pruned['parameters']:,}, dense {before['parameters']:,}",
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
    axes: Any, boxes: Sequence[Box], *, left: float, right: float, colour: str, height: float
) -> list[tuple[float, float]]:
    """Draws boxes one below the other, spread over the height; returns their upper and lower ends."""
    from matplotlib.patches import FancyBboxPatch

    gap = (height - sum(map(_lines, boxes))) / len(boxes)
    top, spans = -gap / 2, []
    for title, lines in boxes:
        tall = _lines((title, lines))
        shape = "round,pad=0,rounding_size=0.6"
        axes.add_patch(
            FancyBboxPatch((left, top - tall), right - left, tall, boxstyle=shape, facecolor=colour, edgecolor="#777")
        )
        axes.text(left + 1, top - 1, title, fontsize=9, fontweight="bold", va="center")
        for number, line in enumerate(lines, start=2):
            text = _brief(line, int(1.3 * (right - left)))
            axes.text(left + 1, top - number, text, fontsize=8, va="center", family="monospace")
        spans.append((top, top - tall))
        top -= tall + gap
    return spans


def _draw_dependencies(axes: Any, lineage: Lineage, spans: Sequence[tuple[float, float]]) -> None:
    maker = {path: index for index, stage in enumerate(lineage.stages.values()) for path in stage["makes"]}
    left, right = _COLUMNS[1]
    for index, stage in enumerate(lineage.stages.values()):
        for before in {maker[path] for path in stage["reads"] if path in maker}:
            if before == index - 1:
                middle = (left + right) / 2
                _draw_arrow(axes, (middle, spans[before][1]), (middle, spans[index][0]))
            else:
                ends = ((right, sum(spans[place]) / 2) for place in (before, index))
                _draw_arrow(axes, *ends, bend=-0.2)


def _draw_frame(axes: Any, *, left: float, right: float, height: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, -height), right - left, height, fill=False, edgecolor="#bbb", linestyle=":"))


def _draw_arrow(
    axes: Any, start: tuple[float, float], end: tuple[float, float], *, width: float = 1.2, bend: float = 0.0
) -> None:
    style = {"arrowstyle": "-|>", "color": "#555", "lw": width, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", xy=end, xytext=start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})


def _lines(box: Box) -> int:
    return len(box[1]) + 2


def _brief(text: str, length: int = 12) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _in_order(stages: Mapping[str, LockedStage]) -> list[LockedStage]:
    maker = {path: stage.name for stage in stages.values() for path in stage.outputs}
    needs = {name: {maker[path] for path in stage.dependencies if path in maker} for name, stage in stages.items()}
    return [stages[name] for name in TopologicalSorter(needs).static_order()]
