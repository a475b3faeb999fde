"""Whether the weights have the shapes that plan and configuration give them; headers are read, no tensor is loaded."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from numprune.checkpoint import PLAN_FILE
from numprune.plan import PruningPlan
from tasks.provenance.disagreement import Disagreement, differing
from tasks.provenance.version_files import BENCHMARK, EVALUATION, read_json

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PROJECTION = re.compile(r"(?:^|\.)layers\.(?P<block>\d+)\.(?P<module>self_attn|mlp)\.(?P<name>\w+_proj)\.weight$")
_MODULES = {"attention": "self_attn", "mlp": "mlp"}

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
    yield from _check_shapes(config, plan, shapes)

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


def _check_shapes(config: Mapping[str, Any], plan: PruningPlan, shapes: Mapping[str, Shape]) -> Iterator[Disagreement]:
    projections: dict[tuple[int, str], dict[str, Shape]] = {}
    for name, shape in shapes.items():
        if match := _PROJECTION.search(name):
            projections.setdefault((int(match["block"]), match["module"]), {})[match["name"]] = shape
    blocks = range(config["num_hidden_layers"])
    beyond = sorted({block for block, _ in projections} - set(blocks))
    if beyond:
        yield Disagreement("the weights", f"have the blocks {beyond}, but {_CONFIG} says there are {len(blocks)}")
    planned = {f"{block}.{kind}" for block in blocks for kind in _MODULES}
    for name in sorted(plan.groups.keys() - planned):
        yield Disagreement(f"{PLAN_FILE}: {name}", f"is no group of a model with {len(blocks)} blocks")
    for block in blocks:
        for kind, module in _MODULES.items():
            group = plan.groups.get(f"{block}.{kind}")
            kept = len(group.kept) if group else 0
            widths, expected = _expected(kind, kept, config)
            found = projections.get((block, module), {})
            for name in sorted(found.keys() | expected.keys()):
                where = f"the weights: {block}.{module}.{name}"
                yield from differing(where, found.get(name), expected.get(name), f"{PLAN_FILE} (keeps {kept} units)")
            layer = {**config, **config.get("per_layer_config", {}).get(str(block), {})}
            for key, width in widths.items():
                where = f"{_CONFIG}: block {block}: {key}"
                yield from differing(where, layer.get(key), width, f"{PLAN_FILE} (keeps {kept} units)")


def _expected(kind: str, kept: int, config: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Shape]]:
    """Widths as the configuration names them, and shapes of the projections, of a module of which units are kept."""
    hidden = config["hidden_size"]
    if kind == "mlp":
        return {"intermediate_size": kept}, _projections(("gate_proj", "up_proj"), kept, "down_proj", kept, hidden)
    # A unit is a key/value head with the query heads that share it.
    queries = kept * (config["num_attention_heads"] // config["num_key_value_heads"])
    widths = {"num_attention_heads": queries, "num_key_value_heads": kept}
    shapes = _projections(("q_proj",), queries * config["head_dim"], "o_proj", queries * config["head_dim"], hidden)
    return widths, shapes | _projections(("k_proj", "v_proj"), kept * config["head_dim"], None, 0, hidden)


def _projections(
    producers: Iterable[str], rows: int, consumer: str | None, columns: int, hidden: int
) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {name: (rows, hidden) for name in producers if rows}
    if consumer and columns:
        shapes[consumer] = (hidden, columns)
    return shapes
