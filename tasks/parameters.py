"""The schema of `params.yaml`: every key, its meaning, its default and its allowed range."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from numprune.allocation import Allocation
from numprune.budget import parse_budget
from numprune.device import resolve_device
from numprune.errors import NumpruneError
from numprune.ranking import Selection
from numprune.recipe import RECIPES, Recipe
from numprune.recovery import Recovery
from numprune.texts import TEXTS

PARAMETERS_FILE = Path("params.yaml")


def _folder_name(name: str) -> str:
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise ValueError(f"{name!r} must be a folder name of letters, digits, '.', '_' and '-'")
    return name


def _without_dots(name: str) -> str:
    if "." in name:
        raise ValueError(f"{name!r} must have no dot: DVC takes it for a level of params.yaml; write '_'")
    return name


def _budget(value: Any) -> str:
    try:
        parse_budget(str(value))
    except NumpruneError as error:
        raise ValueError(str(error)) from None
    return str(value)


def _bytes(value: Any) -> str:
    try:
        parse_budget(f"memory-{value}")
    except NumpruneError as error:
        raise ValueError(str(error)) from None
    return str(value)


def _without_repeats(items: list[Any]) -> list[Any]:
    repeated = sorted({item for item in items if items.count(item) > 1})
    if repeated:
        raise ValueError(f"named twice: {', '.join(map(str, repeated))}")
    return items


def _without_password(address: str) -> str:
    parts = urlsplit(address)
    # Before a web address a user's name alone is as good as a password: it is a token.
    is_token = parts.username is not None and parts.scheme in {"http", "https"}
    if parts.password is not None or is_token or "password" in parse_qs(parts.query):
        place = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
        raise ValueError(
            f"{place} stands with a password in it, which would be logged and committed: leave it out, and give it by "
            "the environment or a file of credentials"
        )
    return address


def _wherever_it_runs(key: str) -> str:
    if not key.startswith(("pkcs11:", "~")) and not Path(key).is_absolute():
        raise ValueError(f"{key} must be an absolute path: releases are signed in folders of their own")
    return key


def _database_in_a_folder(uri: str) -> str:
    if uri.startswith("sqlite:///") and len(Path(uri.removeprefix("sqlite:///")).parts) < 2:
        raise ValueError(f"{uri} must lie in a folder of its own, as in sqlite:///mlflow/mlflow.db")
    return uri


def _text(name: str) -> str:
    if name not in TEXTS:
        raise ValueError(f"{name!r} must be one of {', '.join(TEXTS)}")
    return name


TextName = Annotated[str, AfterValidator(_text)]
FolderName = Annotated[str, AfterValidator(_folder_name)]
DownloadName = Annotated[FolderName, AfterValidator(_without_dots)]
BudgetText = Annotated[str, BeforeValidator(_budget)]
ByteText = Annotated[str, BeforeValidator(_bytes)]
Address = Annotated[str, AfterValidator(_without_password)]
Count = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Download(_Section):
    """One exact state of a model elsewhere that is fetched into `models/<name>`."""

    repository: str | None = Field(default=None, description="On the Hugging Face Hub, as in meta-llama/Llama-3.1-8B.")
    folder: str | None = Field(default=None, description="Or the absolute path of a model folder on disk.")
    revision: str = Field(
        pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})$",
        description="The Hub's commit, 40 hexadecimal digits, or the SHA-256 of the folder's model, 64.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> "Download":
        if (self.repository is None) == (self.folder is None):
            raise ValueError("give either repository or folder")
        digits = 40 if self.folder is None else 64
        if len(self.revision) != digits:
            raise ValueError(f"the revision must have {digits} hexadecimal digits, got {len(self.revision)}")
        return self

    @property
    def origin(self) -> str:
        """The repository or the folder."""
        return str(self.repository or self.folder)


class Corpus(_Section):
    """Text made from the documentation of installed packages, split by package."""

    calibration: list[str] = Field(min_length=1, description="Packages whose text calibrates.")
    evaluation: list[str] = Field(min_length=1, description="Packages whose text evaluates.")
    questions: Count = Field(default=400, description="Of each kind, made of the evaluation text (tasks/questions.py).")
    seed: int = Field(default=0, description="Of the order of the documents and the choice of questions.")

    @model_validator(mode="after")
    def _apart(self) -> "Corpus":
        shared = sorted(set(self.calibration) & set(self.evaluation))
        if shared:
            raise ValueError(f"calibration and evaluation share the packages {', '.join(shared)}")
        return self


class Calibration(_Section):
    """What the second moments are measured on."""

    data: str = Field(description="Text file, .jsonl with a field text, or .safetensors with input_ids.")
    samples: Count = Field(default=128, description="Token sequences to draw.")
    length: Count | None = Field(default=None, description="Tokens a sequence; null: 2048 or the model's maximum.")
    seed: int = Field(default=0, description="Of the draw.")


class Compute(_Section):
    """Where and in which portions things run; results do not depend on it beyond rounding."""

    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
    batch_size: Count | None = Field(
        default=None,
        description="Sequences that go through a block together; null: as many as have 8192 tokens, less by memory.",
    )
    processes: Count = Field(
        default=1, description="Of this machine that share the calibration samples; on a GPU machine one a GPU."
    )


class ShapesOverride(_Section):
    """Which widths layers may have; what is null is as in the preset."""

    heads: Count | None = Field(default=None, description="Kept query heads of a layer are a multiple of this, or all.")
    channels: Count | None = Field(default=None, description="Kept MLP channels are a multiple of this, or all.")
    uniform: bool | None = Field(default=None, description="All layers keep as many heads and channels as the others.")
    depth: bool | None = Field(default=None, description="Whole attention or MLP modules may go.")


class RecipeChoice(_Section):
    """A preset, and what is chosen otherwise; what is null is as in the preset. See docs/method.md."""

    preset: Literal["best", "paper"] = Field(default="best", description="Where everything else comes from.")
    selection: Selection | None = Field(default=None, description="In which order the units of a layer go.")
    allocation: Allocation | None = Field(default=None, description="How many units go from every layer.")
    recovery: Recovery | None = Field(default=None, description="How kept weights make up for pruned ones.")
    steps: Count | None = Field(default=None, description="In how many cuts the budget is reached.")
    planning_tokens: Count | None = Field(
        default=None, description="Calibration tokens that rises of the loss are measured on, in whole sequences."
    )
    shapes: ShapesOverride = ShapesOverride()
    penalty: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Lambda of the numerical score; .inf is its limit."
    )
    damping: Annotated[float, Field(ge=0)] | Literal["auto"] | None = Field(
        default=None, description="Of calibration moments, relative to their mean diagonal; auto: from the spectrum."
    )
    seed: int | None = Field(default=None, description="Of the selection random.")

    def resolve(self) -> Recipe:
        """The preset with what is chosen otherwise."""
        preset = RECIPES[self.preset]
        shapes = replace(preset.shapes, **self.shapes.model_dump(exclude_none=True))
        chosen = self.model_dump(exclude_none=True, exclude={"preset", "shapes"})
        return replace(preset, shapes=shapes, **chosen)


class Workload(_Section):
    """What a budget of memory, operations or latency is counted for."""

    batch: Count = Field(default=1, description="Sequences at a time.")
    length: Count = Field(default=2048, description="Tokens of the context.")


class Evaluation(_Section):
    """Perplexity in non-overlapping windows, and accuracy on tasks of lm-eval."""

    data: str = Field(description="In the same forms as calibration.data.")
    length: Count | None = Field(default=None, description="Tokens a window; null: 2048 or the model's maximum.")
    max_tokens: Count | None = Field(default=None, description="Stop after so many tokens; null: all of the text.")
    texts: Annotated[list[TextName], AfterValidator(_without_repeats)] = Field(
        default=[],
        description="Further texts, cut as published figures have them (numprune/texts.py): wikitext2, ptb, c4.",
    )
    tasks: Annotated[list[str], AfterValidator(_without_repeats)] = Field(
        default=[],
        description="Of lm-eval, such as boolq or arc_easy, or of tasks_folder; paper stands for those of the paper.",
    )
    tasks_folder: str = Field(default="evaluation", description="Task files of one's own, in lm-eval's form.")
    questions: Count | None = Field(default=None, description="Of each task at most; null: all.")
    shots: int | None = Field(
        default=None,
        ge=0,
        description="Solved examples before every question of every task; null: as each task's own configuration says.",
    )


class ImageFeatures(_Section):
    """The classifier whose features images are compared by."""

    kind: Literal["digits", "inception"] = Field(description="See tasks/images/features.py.")
    weights: str = Field(description="Its weights: a file.")


class Images(_Section):
    """Models that write images: how images are drawn, and what they are compared with."""

    calibration_per_condition: Count = Field(
        default=128, description="Images drawn for each class or caption to calibrate on, seeded by calibration.seed."
    )
    data: str = Field(description="Held-out images to measure perplexity on: .safetensors with input_ids.")
    reference: str = Field(description="Reference statistics: .npz in ADM's form.")
    features: ImageFeatures
    samples: Count = Field(default=1000, description="Images drawn to compare, of all conditions in turn.")
    guidance_scale: float = Field(default=1.0, ge=1, description="Of classifier-free guidance; 1: none.")
    temperature: float = Field(default=1.0, gt=0, description="Of the draw.")
    top_k: int = Field(default=0, ge=0, description="Only so many most likely tokens are drawn from; 0: all.")
    seed: int = Field(default=0, description="Of the images that are compared.")
    batch_size: Count = Field(default=100, description="Images drawn together; which are drawn depends on it.")


class Benchmark(_Section):
    """Greedy generation, dense and pruned in alternation."""

    batches: list[Count] = Field(default=[1], min_length=1, description="Sequences at a time.")
    prompt_lengths: list[Count] = Field(default=[64], min_length=1, description="Tokens of the prompt.")
    new_tokens: int = Field(default=64, ge=2, description="Tokens to generate.")
    repeats: Count = Field(default=5, description="Timed runs of each model; the median is reported.")
    compile: bool = Field(default=False, description="Generate with torch.compile and a cache of fixed size.")


class Sweep(_Section):
    """What `flows/sweep.py` measures beside each other; it registers nothing."""

    budgets: Annotated[list[BudgetText], AfterValidator(_without_repeats)] = Field(
        default=["0.1", "0.2", "0.3", "0.4", "0.5"], min_length=1, description="As in budgets; models are the same."
    )


class Registry(_Section):
    """Where results are published."""

    tracking_uri: Annotated[Address, AfterValidator(_database_in_a_folder)] = Field(
        default="sqlite:///mlflow/mlflow.db", description="Of MLflow: a database or a server."
    )
    artifacts: Address = Field(default="mlflow/artifacts", description="Folder or bucket of a new experiment's files.")
    experiment: str = Field(default="numprune", description="Name of the MLflow experiment.")


class Promotion(_Section):
    """What a version has to reach to become the champion; a limit that is null is not applied."""

    max_perplexity: Annotated[float, Field(gt=1)] | None = Field(default=None, description="Of the pruned model.")
    max_perplexity_ratio: Annotated[float, Field(gt=0)] | None = Field(
        default=1.1, description="Perplexity of the pruned model over that of the dense one."
    )
    max_accuracy_drop: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="Accuracy that any task may lose against the dense model, in [0, 1)."
    )
    standard_errors: float = Field(
        default=2.0, ge=0, description="By how many standard errors a drop must exceed its limit to count."
    )
    min_speed_up: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Tokens per second of the pruned model over those of the dense one."
    )
    max_memory: ByteText | None = Field(default=None, description="Peak of generation, such as 12GB.")
    undominated: bool = Field(
        default=True, description="Whether the champion must not be better in quality, speed and memory at once."
    )
    tolerance: float = Field(
        default=0.05, ge=0, lt=1, description="Relative difference below which two measurements count as equal."
    )
    signed: bool = Field(
        default=False, description="Whether a version must carry a signature that signing.public_key confirms."
    )


class Signing(_Section):
    """Signatures of versions and promotions; nothing is signed without a key. Passwords come from the environment."""

    key: Annotated[str, AfterValidator(_wherever_it_runs)] | None = Field(
        default=None,
        description="Private key to sign with: the absolute path of a PEM file outside the repository, or a PKCS#11 "
        "URI.",
    )
    public_key: str | None = Field(default=None, description="PEM file to check signatures with.")


class FolderSource(_Section):
    """Model folders below a folder: each is a release, by the hash of its content."""

    kind: Literal["folder"]
    path: str = Field(description="The folder that holds one folder a model.")
    pattern: str = Field(default="*", description="Which of them, as in a shell.")


class HubSource(_Section):
    """Models of a user or an organisation on the Hugging Face Hub: the newest commit of each is a release."""

    kind: Literal["hub"]
    owner: str = Field(description="User or organisation, such as meta-llama.")
    pattern: str = Field(default="*", description="Which of its models, as in a shell.")


class FeedSource(_Section):
    """A JSON document that lists releases: for everything else that announces models."""

    kind: Literal["feed"]
    url: Address = Field(
        description="http://, https:// or file:// of a list of {name, repository or folder, revision}."
    )


Source = Annotated[FolderSource | HubSource | FeedSource, Field(discriminator="kind")]


class Watch(_Section):
    """Where new model releases are looked for (`flows/watch.py`), and what remembers them."""

    sources: list[Source] = Field(default=[], description="What is polled.")
    ledger: Address = Field(
        default="sqlite:///.numprune/ledger.db",
        description="Database of the releases seen, as SQLAlchemy names it; watchers on several machines share one. "
        "The variable NUMPRUNE_LEDGER goes before it.",
    )
    worktrees: str = Field(default=".numprune/worktrees", description="Folder of the git worktrees of scheduled runs.")
    git_remote: Address | None = Field(
        default=None, description="Where the branch of a release is pushed to, such as origin; null: nowhere."
    )
    settle_seconds: float = Field(
        default=30, ge=0, description="A folder whose files changed within this time is still being written."
    )
    lease_seconds: float = Field(
        default=60, gt=0, description="A run that gave no sign of life for so long is dead, and another takes over."
    )


class Orchestration(_Section):
    """How the flow runs the stages."""

    runner: Literal["threads", "dask"] = Field(
        default="threads", description="Of this machine; or workers of a Dask cluster, which share a file system."
    )
    address: Address | None = Field(
        default=None,
        description="Of the scheduler of a Dask cluster, as in tcp://node-1:8786; null: a cluster on this machine.",
    )
    workers: Count | None = Field(
        default=None,
        description="Stages that run side by side on one machine; null: 2 on a CPU, whose cores they share, and 1 on "
        "a GPU. A cluster at an address has as many workers as it was started with.",
    )
    retries: int = Field(default=1, ge=0, description="Further tries of a stage that failed for no fault of its input.")
    timeout_hours: float = Field(default=12, gt=0, description="Of one stage.")

    @model_validator(mode="after")
    def _address_of_dask(self) -> "Orchestration":
        if self.address is not None and self.runner != "dask":
            raise ValueError(
                f"address {self.address} is that of a Dask cluster: set runner to dask, or address to null"
            )
        return self


class ReferenceShape(_Section):
    """Shape of the reference model, a LLaMA with grouped-query attention."""

    vocabulary: Count = 4096
    hidden: Count = 256
    intermediate: Count = 640
    layers: Count = 6
    heads: Count = 8
    key_value_heads: Count = 4
    head_dim: Count = 32
    length: Count = 512


class Training(_Section):
    """Training of a reference model."""

    steps: Count = 3000
    batch: Count = Field(default=16, description="Sequences a step.")
    warmup_steps: Count = 100
    muon_rate: float = Field(default=4e-3, gt=0, description="Peak learning rate of the matrices.")
    adamw_rate: float = Field(default=4e-3, gt=0, description="Peak learning rate of embeddings and norms.")
    weight_decay: float = Field(default=0.05, ge=0, description="Of the matrices.")
    checkpoint_steps: Count = Field(default=100, description="Steps between two checkpoints.")
    compile: bool = Field(default=True, description="Fuse the step by torch.compile, which needs a C++ compiler.")
    seed: int = 0


class ReferenceTraining(Training):
    """Training of the reference language model."""

    packages: list[str] = Field(min_length=1, description="Packages whose documentation is the training text.")


class Reference(_Section):
    """The language model that ships with the repository and how it is trained (`flows/train_reference.py`)."""

    shape: ReferenceShape = ReferenceShape()
    training: ReferenceTraining


class ReferenceImageShape(_Section):
    """Shape of the reference image model, a LlamaGen."""

    hidden: Count = 96
    intermediate: Count = 256
    layers: Count = 3
    heads: Count = 3


class ReferenceImageTraining(Training):
    """Training of the reference image model."""

    held_out: Count = Field(default=500, description="Digits that are not trained on.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Of embeddings and of what each module adds.")
    condition_dropout: float = Field(default=0.1, ge=0, lt=1, description="Share of digits trained without class.")


class ReferenceImages(_Section):
    """The image model that ships with the repository and how it is trained (`flows/train_reference_images.py`)."""

    shape: ReferenceImageShape = ReferenceImageShape()
    training: ReferenceImageTraining = ReferenceImageTraining()


class Parameters(_Section):
    """All of `params.yaml`."""

    models: Annotated[list[FolderName], AfterValidator(_without_repeats)] = Field(
        min_length=1, description="Folders below models/ to compress."
    )
    downloads: dict[DownloadName, Download] = Field(
        default={}, description="Models to fetch first, from the Hub or from another folder."
    )
    budgets: Annotated[list[BudgetText], AfterValidator(_without_repeats)] = Field(
        min_length=1,
        description="What pruned models may cost: 0.2 removes that share of the attention and MLP parameters; others "
        "are limits such as parameters-4M, size-8MB, memory-2GB, flops-6G or latency-5ms.",
    )
    workload: Workload = Workload()
    corpus: Corpus
    calibration: Calibration
    compute: Compute = Compute()
    recipe: RecipeChoice = RecipeChoice()
    evaluation: Evaluation
    images: Images
    benchmark: Benchmark = Benchmark()
    sweep: Sweep = Sweep()
    registry: Registry = Registry()
    promotion: Promotion = Promotion()
    signing: Signing = Signing()
    watch: Watch = Watch()
    orchestration: Orchestration = Orchestration()
    reference: Reference
    reference_images: ReferenceImages = ReferenceImages()

    @property
    def workers(self) -> int:
        """Stages that run side by side."""
        return self.orchestration.workers or (1 if resolve_device(self.compute.device).type == "cuda" else 2)

    @model_validator(mode="after")
    def _training_apart(self) -> "Parameters":
        held_out = {*self.corpus.calibration, *self.corpus.evaluation}
        shared = sorted(held_out & set(self.reference.training.packages))
        if shared:
            raise ValueError(f"reference.training.packages contains held-out packages: {', '.join(shared)}")
        return self


def load_parameters(path: Path = PARAMETERS_FILE, *, changes: Mapping[str, Any] | None = None) -> Parameters:
    """Reads and checks `params.yaml`.

    Args:
        path: Of the file.
        changes: Sections and keys that take the place of those in the file.

    Raises:
        NumpruneError: If the file is missing or wrong; it lists all mistakes.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Parameters.model_validate({**content, **changes} if changes else content)
    except FileNotFoundError:
        raise NumpruneError(f"{path} not found in {Path.cwd()}: run from the root of the repository.") from None
    except yaml.YAMLError as error:
        raise NumpruneError(f"{path} is no valid YAML: {error}") from None
    except ValidationError as error:
        mistakes = [f"  {'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        raise NumpruneError("\n".join([f"{path} has {len(mistakes)} mistake(s):", *mistakes])) from None
