"""What the quality benchmarks share: cut a model by a recipe, measure its perplexity, keep every row that is done."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from numprune.architectures import decoder_blocks
from numprune.budget import parse_budget
from numprune.calibration import draw_samples, evaluation_windows
from numprune.checkpoint import fingerprint as model_fingerprint
from numprune.checkpoint import load_model, load_shapes
from numprune.choice import rank_model
from numprune.cutting import cut, twin
from numprune.device import resolve_device, working_dtype
from numprune.errors import NumpruneError
from numprune.perplexity import perplexity, scored_tokens, window_losses
from numprune.plan import Choice
from numprune.planning import choose_within
from numprune.pruning import capture_to, prunable_parameters
from numprune.ranking import Ranking
from numprune.recipe import Recipe
from numprune.samples import Samples, fingerprint
from numprune.statistics import Measured

Row = dict[str, Any]

Model = Annotated[Path, typer.Option(help="Folder of the dense model.")]
Calibration = Annotated[str, typer.Option(help="Text to calibrate on.")]
SampleCount = Annotated[int, typer.Option(help="Calibration sequences.")]
Evaluation = Annotated[str, typer.Option(help="Text to measure perplexity on.")]
Seeds = Annotated[str, typer.Option(help="Of the draws of calibration sequences.")]
MaxTokens = Annotated[int, typer.Option(help="Of the evaluation text.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Sequences that are computed together.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
Output = Annotated[
    Path, typer.Option(help="Folder for rows and what is made of them; rows that are there are not measured again.")
]


@dataclass
class Bench:
    """A dense model, the text it is measured on, and what was measured of it with one calibration.

    Attributes:
        folder: Of the dense model.
        evaluation: Text, in the forms that `numprune perplexity` takes.
        max_tokens: Of the evaluation text.
        batch_size: Sequences that go through a block together.
        device: auto, cpu, cuda, ...
        dtype: Of the model; by default the one that the pipeline computes in.
    """

    folder: Path
    evaluation: str
    max_tokens: int
    batch_size: int | None
    device: str
    dtype: torch.dtype | None = None
    model: PreTrainedModel = field(init=False)
    windows: Samples = field(init=False)
    _measured: Measured = field(init=False)
    _rankings: dict[str, dict[str, Ranking]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.place = resolve_device(self.device)
        self.model = load_model(self.folder, dtype=self.dtype or working_dtype(self.place), device=self.place)
        self.windows, _ = evaluation_windows(self.evaluation, str(self.folder), max_tokens=self.max_tokens)

    @property
    def protocol(self) -> Row:
        """What a row depends on whatever is measured: model and text by their content, and how it is computed."""
        found = {"model": model_fingerprint(self.folder), "evaluation": fingerprint(self.windows)}
        return found | {"device": str(self.place), "batch_size": self.batch_size}

    @contextmanager
    def calibrated(self, data: str, samples: int, seed: int) -> Iterator[None]:
        """Captures statistics of the dense model for all measurements inside."""
        drawn = draw_samples(data, str(self.folder), samples=samples, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            self._measured = Measured(Path(folder), drawn, self.batch_size, self.place)
            self._rankings = {}
            for _ in capture_to(Path(folder), self.model, drawn, batch_size=self.batch_size, device=self.place):
                pass
            yield

    def grams(self) -> dict[str, Tensor]:
        """X^T X of every prunable group's consumer, in float64, by the group's name."""
        blocks = (self._measured.block(index) for index in range(len(decoder_blocks(self.model))))
        return {name: moments.gram.double() for block in blocks for name, moments in block.moments.items()}

    def dense_perplexity(self) -> float:
        """Perplexity of the dense model."""
        return self._perplexity(self.model)

    def measure(
        self, recipe: Recipe, ratio: float, *, further: Callable[[PreTrainedModel], Row] = lambda _model: {}
    ) -> Row:
        """Cuts the model by a recipe: share removed and perplexity.

        A ratio that the recipe cannot reach on this model gives a row that says why, and no perplexity. `further`
        measures what else is asked for of the pruned model.
        """
        try:
            choice = self.choose(recipe, ratio)
        except NumpruneError as error:
            return {"impossible": str(error)}
        pruned = twin(self.model)
        for _ in cut(pruned, choice.kept, self._measured, recovery=recipe.recovery, damping=recipe.damping):
            pass
        return {
            "removed": 1 - prunable_parameters(pruned) / prunable_parameters(self.model),
            "perplexity": self._perplexity(pruned),
            **further(pruned),
        }

    def choose(self, recipe: Recipe, ratio: float) -> Choice:
        """Which units stay.

        Raises:
            NumpruneError: If the recipe cannot reach the ratio on this model.
        """
        budget = parse_budget(str(ratio))
        rankings = None if recipe.selection == "box" else self.rank(recipe)
        return choose_within(budget, self.model, load_shapes(self.folder), recipe, self._measured, rankings=rankings)

    def rank(self, recipe: Recipe) -> dict[str, Ranking]:
        """Ranks the dense model; recipes that differ in nothing that matters to them share one."""
        matters = asdict(recipe)
        for choice in ("recovery", "steps"):
            matters.pop(choice)
        matters["shapes"] = recipe.shapes.depth
        matters["allocation"] = recipe.allocation == "loss_aware"
        key = repr(matters)
        if key not in self._rankings:
            self._rankings[key] = dict(rank_model(self.model, recipe, self._measured, ratio=0.5))
        return self._rankings[key]

    def _perplexity(self, model: PreTrainedModel) -> float:
        losses = torch.cat(list(window_losses(model, self.windows, batch_size=self.batch_size, device=self.place)))
        return perplexity(losses, self.windows.length, scored=scored_tokens(model, self.windows)).perplexity


def collect(path: Path, cases: Sequence[Row], measure: Callable[[Row], Row]) -> Iterator[Row]:
    """Measures every case that the file does not hold yet, adding it there at once; yields the rows of all cases.

    Args:
        path: JSON lines.
        cases: What identifies a row.
        measure: What a row says beyond its case.
    """
    done: list[Row] = []
    if path.exists():
        done = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for case in cases:
        row = next((row for row in done if case.items() <= row.items()), None)
        if row is None:
            row = case | measure(case)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        yield row
