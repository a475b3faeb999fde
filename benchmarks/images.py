"""Images after several recipes at several ratios: their metrics in a table, the images themselves in a picture.

python -m benchmarks.images --help
"""

import base64
import io
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import typer
from PIL import Image
from transformers import PreTrainedModel

from benchmarks.measuring import BatchSize, Bench, Device, Model, Output, Row, collect
from benchmarks.quality import VARIANTS
from numprune.errors import NumpruneError
from numprune.progress import track
from numprune.samples import fingerprint, load_samples
from tasks.images.drawing import encoded, grid
from tasks.images.evaluation import draw
from tasks.images.features import extractor
from tasks.images.metrics import measure, read_reference
from tasks.parameters import Images, load_parameters
from tasks.report.table import IMAGE_METRICS
from tasks.step import run_step

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_SHOWN = 20


def compare(
    *,
    model: Model = Path("models/reference-llamagen"),
    calibration: Annotated[
        Path, typer.Option(help="Sequences that the dense model drew: the stage `calibrate` writes them.")
    ] = Path("artifacts/reference-llamagen/calibration.safetensors"),
    ratios: Annotated[str, typer.Option(help="Shares of the layers' parameters to remove.")] = "0.1,0.15,0.2,0.5",
    recipes: Annotated[str, typer.Option(help="Names from benchmarks/quality.py, separated by ;.")] = "best;paper;FLAP",
    batch_size: BatchSize = None,
    device: Device = "auto",
    output: Output = Path("report/images"),
) -> None:
    """Compares recipes by the images that pruned models draw, as section `images` of params.yaml says."""
    names = [name.strip() for name in recipes.split(";")]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise NumpruneError(f"--recipes names {unknown}; known are: {'; '.join(VARIANTS)}.")
    if not calibration.is_file():
        raise NumpruneError(f"{calibration} not found: run `python -m tasks calibrate {model.name}` first.")
    settings = load_parameters().images
    output.mkdir(parents=True, exist_ok=True)
    bench = Bench(model, settings.data, 10**9, batch_size, device)
    judge = _Judge(model, settings)
    sequences = load_samples(calibration)
    protocol = bench.protocol | {"calibration": fingerprint(sequences), "images": settings.model_dump(mode="json")}
    cases: list[Row] = [protocol | {"recipe": "dense", "ratio": 0.0}]
    cases += [protocol | {"recipe": name, "ratio": float(ratio)} for ratio in ratios.split(",") for name in names]

    def row(case: Row) -> Row:
        if case["recipe"] == "dense":
            return {"removed": 0.0, "perplexity": bench.dense_perplexity(), **judge(bench.model)}
        return bench.measure(VARIANTS[case["recipe"]], case["ratio"], further=judge)

    with bench.calibrated(str(calibration), len(sequences), seed=0):
        rows = list(track(collect(output / "rows.jsonl", cases, row), len(cases), "images"))
    table = _table(rows)
    stated = (
        f"{model.name}: {settings.samples} images, guidance {settings.guidance_scale}, temperature "
        f"{settings.temperature}, seed {settings.seed}; features: {settings.features.kind}; calibrated on "
        f"{settings.calibration_per_condition} images a condition that the dense model drew."
    )
    (output / "images.md").write_text(f"{table}\n\n{stated}\n", encoding="utf-8")
    _draw(rows, output / "images.png")
    print(table, stated, sep="\n\n")


class _Judge:
    """Draws images of a model and compares them with the reference, which is read once."""

    def __init__(self, dense: Path, settings: Images) -> None:
        self._dense = dense
        self._settings = settings
        self._extract = extractor(settings.features.kind, Path(settings.features.weights))
        self._reference = read_reference(Path(settings.reference), self._extract)

    def __call__(self, model: PreTrainedModel) -> Row:
        """Metrics, and the first images as base64 of a PNG file."""
        pixels = draw(model, self._dense, self._settings, self._settings.samples, "images of one")
        metrics = measure(self._extract(pixels), self._reference).as_dict()
        return {**metrics, "shown": encoded(grid(pixels[:_SHOWN], columns=_SHOWN))}


def _table(rows: list[Row]) -> str:
    titles = ["recipe", "removed", "perplexity", *(name for name, _ in IMAGE_METRICS.values())]
    lines = [f"| {' | '.join(titles)} |", f"|---{'|---:' * (len(titles) - 1)}|"]
    for row in rows:
        if "impossible" in row:
            lines.append(f"| {row['recipe']} | {row['ratio']:.0%} | not possible |" + " |" * len(IMAGE_METRICS))
            continue
        cells = [write(row[key]) if row[key] is not None else "" for key, (_, write) in IMAGE_METRICS.items()]
        lines.append(f"| {row['recipe']} | {row['removed']:.1%} | {row['perplexity']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _draw(rows: list[Row], path: Path) -> None:
    """One line of images a model, drawn with the same random numbers."""
    drawn = [row for row in rows if "shown" in row]
    figure, panels = plt.subplots(len(drawn), 1, figsize=(10, 0.5 * len(drawn)), layout="constrained", squeeze=False)
    for panel, row in zip(panels[:, 0], drawn, strict=True):
        picture: Any = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["shown"]))))
        panel.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        label = "dense" if row["recipe"] == "dense" else f"{row['recipe']}, {row['ratio']:.0%}"
        panel.set_ylabel(label, rotation=0, ha="right", va="center")
        panel.set(xticks=[], yticks=[])
        for spine in panel.spines.values():
            spine.set_visible(False)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    run_step(compare)
