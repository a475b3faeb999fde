"""Whether the weights have the shapes that plan and configuration give them; headers are read, no tensor is loaded."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from numprune.architectures import KINDS
from numprune.checkpoint import PLAN_FILE
from numprune.plan import PruningPlan
from numprune.ragged import LAYOUTS, Projections, row_counts
from tasks.provenance.disagreement import Disagreement, differing
from tasks.provenance.version_files import BENCHMARK, EVALUATION, read_json

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_IN_BLOCK = re.compile(r"(?:^|\.)layers\.(?P<block>\d+)\.(?P<path>.+)\.weight$")
# OPT has a name of its own for it.
_OTHER_NAMES = {"intermediate_size": "ffn_dim"}

Shape = tuple[int, ...]


def check_tensors(folder: Path, names: set[str]) -> Iterator[Disagreement]:
    """Yields where plan, configuration, weights and the counts in the metric files disagree.

    Args:
        folder: The version folder.
        names: Its plain files; no others are opened.
    """
    config, plan = read_json(folder / _CONFIG), PruningPlan.load(folder / PLAN_FILE)
    files = sorted(name for name in names if "/" not in name and name.endswith(".safetensors"))
    shapes: dict[str, Shape] = {}
    held_by: dict[str, str] = {}
    for file in files:
        for name, shape in _shapes(folder / file):
            if name in held_by:
                yield Disagreement(file, f"holds {name}, which {held_by[name]} holds as well")
            shapes[name], held_by[name] = shape, file
    if _INDEX in names:
        listed = read_json(folder / _INDEX)["weight_map"]
        for name in sorted(listed.keys() | held_by.keys()):
            yield from differing(f"{_INDEX}: {name}", listed.get(name), held_by.get(name), "the weights")
    else:
        yield from differing("the weights: files", files, [_SINGLE], "the lack of an index")
    yield from check_shapes(config, plan, shapes)

    parameters = sum(math.prod(shape) for shape in shapes.values())
    size = sum((folder / file).stat().st_size for file in files)
    pruned = read_json(folder / BENCHMARK)["pruned"]
    counted = read_json(folder / EVALUATION)["parameters"]
    yield from differing(f"{EVALUATION}: parameters", counted, parameters, "the sum of the weights")
    yield from differing(f"{BENCHMARK}: parameters", pruned["parameters"], parameters, "the sum of the weights")
    yield from differing(f"{BENCHMARK}: checkpoint_bytes", pruned["checkpoint_bytes"], size, "the size of the weights")


def _shapes(path: Path) -> Iterator[tuple[str, Shape]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # No dictionary.
            yield name, tuple(file.get_slice(name).get_shape())


def check_shapes(config: Mapping[str, Any], plan: PruningPlan, shapes: Mapping[str, Shape]) -> Iterator[Disagreement]:
    """Yields where the matrices of the decoder blocks, their number or the configuration are not what the plan says.

    Args:
        config: Of the pruned model, as in `config.json`.
        plan: What it was cut by.
        shapes: Of all its tensors, by their names.
    """
    family = str(config["model_type"]).removeprefix("ragged_")
    if family not in LAYOUTS:
        yield Disagreement(_CONFIG, f"is of the family {family}, which numprune does not prune")
        return
    modules: Mapping[str, Projections] = {kind: getattr(LAYOUTS[family], kind) for kind in KINDS}
    matrices: dict[int, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        if (match := _IN_BLOCK.search(name)) and len(shape) > 1:
            matrices.setdefault(int(match["block"]), {})[match["path"]] = shape
    blocks = range(config["num_hidden_layers"])
    beyond = sorted(matrices.keys() - set(blocks))
    if beyond:
        yield Disagreement("the weights", f"have the blocks {beyond}, but {_CONFIG} says there are {len(blocks)}")
    planned = {f"{block}.{kind}" for block in blocks for kind in KINDS}
    for name in sorted(plan.groups.keys() - planned):
        yield Disagreement(f"{PLAN_FILE}: {name}", f"is no group of a model with {len(blocks)} blocks")
    for block in blocks:
        layer = {**config, **config.get("per_layer_config", {}).get(str(block), {})}
        norms = {path for module in modules.values() for path in module.head_norms}
        found = {path: shape for path, shape in matrices.get(block, {}).items() if path not in norms}
        expected: dict[str, tuple[Shape, int]] = {}
        for kind, module in modules.items():
            group = plan.groups.get(f"{block}.{kind}")
            kept = len(group.kept) if group else 0
            widths, shapes_of_module = _expected(module, kept, config)
            expected |= {path: (shape, kept) for path, shape in shapes_of_module.items()}
            for key, width in widths.items():
                known = key if key in layer else _OTHER_NAMES.get(key, key)
                if known in layer or key != "num_key_value_heads":  # Which families without groups do not have.
                    where = f"{_CONFIG}: block {block}: {known}"
                    yield from differing(where, layer.get(known), width, f"{PLAN_FILE} (keeps {kept} units)")
        for path in sorted(found.keys() | expected.keys()):
            planned_shape, kept = expected.get(path, (None, 0))
            where = f"the weights: {block}.{path}"
            yield from differing(where, found.get(path), planned_shape, f"{PLAN_FILE} (keeps {kept} units)")


def _expected(module: Projections, kept: int, config: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Shape]]:
    """Widths as the configuration names them, and shapes of the projections, of a module of which units are kept."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    # A unit is a key/value head with the query heads that share it, or a channel.
    queries = kept * (heads // (config.get("num_key_value_heads") or heads))
    head_dim = config.get("head_dim") or hidden // heads
    pieces = {piece for rows in module.producers.values() for piece in re.split(r"[|+]", rows)}
    if "q" in pieces:
        widths = {"num_attention_heads": queries, "num_key_value_heads": kept}
        sizes = {"q": queries * head_dim, "k": kept * head_dim, "v": kept * head_dim}
        columns = sizes["q"]
    else:
        widths, sizes, columns = {"intermediate_size": kept}, dict.fromkeys(pieces, kept), kept
    if not kept:
        return widths, {}
    shapes: dict[str, Shape] = {path: (sum(row_counts(rows, sizes)), hidden) for path, rows in module.producers.items()}
    return widths, shapes | {module.consumer: (hidden, columns)}
