"""The model card: a README.md that says what is known of a version, and nothing else."""

from collections.abc import Mapping
from typing import Any

import yaml

from numprune.card import how_to_load, pipeline_tag
from tasks.layout import model_folder
from tasks.provenance.bom import LIMITS
from tasks.provenance.statement import CALIBRATION, CODE, SOURCE
from tasks.provenance.version_files import CARD, read_json

_ROWS = (
    ("parameters", "parameters", "{:,.0f}"),
    ("weights, bytes", "checkpoint_bytes", "{:,.0f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("bits per byte", "bits_per_byte", "{:.4f}"),
    ("tokens per second", "tokens_per_second", "{:.1f}"),
    ("peak memory, bytes", "peak_memory_bytes", "{:,.0f}"),
)


def source_licence(model: str) -> str | None:
    """The licence of a source model, if its card or its configuration names one."""
    folder = model_folder(model)
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        front = None
    named = front.get("license") if isinstance(front, dict) else None
    licence = named or read_json(folder / "config.json").get("license")
    return licence if isinstance(licence, str) else None


def make_card(
    provenance: Mapping[str, Any],
    figures: Mapping[str, float],
    protocols: Mapping[str, Mapping[str, Any]],
    licence: str | None,
    config: Mapping[str, Any],
) -> str:
    """The text of the model card.

    Args:
        provenance: The predicate of the statement.
        figures: What was measured, by name.
        protocols: How: `evaluation` and `benchmark`.
        licence: Of the source model, if known.
        config: Content of the pruned model's `config.json`.
    """
    definition = provenance["buildDefinition"]
    model, budget = (definition["externalParameters"][key] for key in ("model", "budget"))
    recipe = definition["internalParameters"]["recipe"]
    known = {entry["name"]: entry for entry in definition["resolvedDependencies"]}
    origin = known[SOURCE]["annotations"]
    base = origin.get("repository", model)
    title = f"{model}-{budget}"
    front: dict[str, Any] = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": pipeline_tag(config),
        "tags": ["numprune", "pruned", "structured-pruning"],
    }
    if licence:
        front["license"] = licence
    front = {key: value for key, value in front.items() if value is not None}
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    state = f", revision `{origin['revision']}`" if "revision" in origin else ""
    commit = known[CODE].get("digest", {}).get("gitCommit")
    code = f"commit `{commit}`" if commit else "no known commit"
    if commit and known[CODE]["annotations"]["changed_since_commit"] != "false":
        code += " with changes that were not committed"
    drawn = known[CALIBRATION]["annotations"]
    return f"""---
{head}---
# {title}

`{base}`{state}, made smaller by structural pruning without training: {figures["achieved_ratio"]:.2%} of the
attention and MLP parameters are gone. Budget `{budget}`, recipe `{recipe}`.

## Figures

{_figures_table(figures)}

{_protocol(protocols, figures)}

## Load

{how_to_load(config, title)}

## Limits

{chr(10).join(f"- {limit}" for limit in LIMITS)}

## Origin

- Calibrated on {drawn["samples"]} token sequences of `{drawn["data"]}`, seed {drawn["seed"]}; they are in
  `calibration/`.
- Made by numprune at {code}.
- `pruning_plan.json` says what stayed in every layer; `provenance/` holds the parameters, the hashes of every step
  (`dvc.lock`), the measurements, an in-toto statement with SLSA provenance and a CycloneDX bill of materials.
- {_signature(signed=definition["internalParameters"]["signed"])}

## Verify

    numprune verify FOLDER

compares every file with the statement, and statement, plan, tensors, measurements and bill of materials with each
other. `numprune verify MODEL/VERSION` compares them with the registry as well.
"""


def _figures_table(figures: Mapping[str, float]) -> str:
    lines = ["| | dense | pruned |", "|---|---:|---:|"]
    for title, name, form in _ROWS:
        if name in figures:
            dense = figures.get(f"dense_{name}")
            lines.append(f"| {title} | {'' if dense is None else form.format(dense)} | {form.format(figures[name])} |")
    if "perplexity_without_compensation" in figures:
        lines.append(f"| perplexity without compensation | | {figures['perplexity_without_compensation']:.3f} |")
    return "\n".join(lines)


def _protocol(protocols: Mapping[str, Mapping[str, Any]], figures: Mapping[str, float]) -> str:
    lines = []
    for name, protocol in protocols.items():
        settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in protocol.items())
        lines.append(f"Protocol of the {name}: {settings}.")
    if figures.get("dense_tokens_per_second"):
        ratio = figures["tokens_per_second"] / figures["dense_tokens_per_second"]
        lines.append(f"Dense and pruned were timed in turn: {ratio:.2f} times the dense model's tokens per second.")
    return "\n\n".join(lines)


def _signature(*, signed: bool) -> str:
    if signed:
        return (
            "`model.sig` is an OpenSSF model signature over all files; it is checked with the publisher's public key."
        )
    return "This version carries no signature."
