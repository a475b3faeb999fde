"""The card of a pruned folder: what was removed, the widths that are left, and how each engine loads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numprune.architectures import layer_widths
from numprune.checkpoint import PLAN_FILE, load_shapes
from numprune.files import replace_on_success
from numprune.multimodal import AUTO_CLASS, HOLDERS
from numprune.plan import PruningPlan

CARD = "README.md"

# Families that llama.cpp reads with layers of different widths, and those that it does not read; both are what
# numprune.export knows, which needs a package of its own.
RAGGED_IN_LLAMA_CPP = frozenset({"llama", "mistral", "phi3", "qwen2"})
NOT_IN_LLAMA_CPP = frozenset({"opt"})


def write_card(folder: Path, form: str) -> None:
    """Writes the card of a folder that `numprune.saving.save_pruned` wrote.

    Args:
        folder: Of the pruned checkpoint.
        form: The class that it loads into and why, as `save_pruned` returns it.
    """
    with replace_on_success(folder / CARD) as temporary:
        temporary.write_text(make_card(folder, form), encoding="utf-8")


def make_card(folder: Path, form: str) -> str:
    """The text of the card."""
    plan = PruningPlan.load(folder / PLAN_FILE)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    widths = layer_widths(load_shapes(folder))
    rows = [
        f"| {block} | {layer['num_attention_heads']} | {layer['num_key_value_heads']} | {layer['intermediate_size']} |"
        for block, layer in enumerate(widths)
    ]
    source = plan.source
    # Of the model, not of the folder: the same run gives the same bytes wherever it writes them.
    title = f"{Path(source.model).name}-{plan.budget}"
    revision = f", revision `{source.revision}`" if source.revision else ""
    choices = ", ".join(f"{name} {plan.recipe[name]}" for name in ("selection", "allocation", "recovery", "steps"))
    tag = pipeline_tag(config)
    task = f"pipeline_tag: {tag}\n" if tag else ""
    return f"""---
library_name: transformers
{task}tags: [numprune, pruned, structured-pruning]
---
# {title}

`{source.model}`{revision}, made smaller by structural pruning without training: {plan.achieved_ratio:.2%} of
{plan.dense_parameters:,} attention and MLP parameters are gone. Budget `{plan.budget}`; {choices}.
`{PLAN_FILE}` says what stayed in every layer, and `calibration/` holds the tokens it was decided on.

## Load

{how_to_load(config, title)}

Saved as {form}

## Widths

| block | query heads | key/value heads | MLP channels |
|---:|---:|---:|---:|
{chr(10).join(rows)}

## Origin

SHA-256 of the dense model's configuration and weights: `{source.fingerprint}`; of the calibration tokens:
`{source.calibration}`.
"""


def pipeline_tag(config: Mapping[str, Any]) -> str | None:
    """What the Hugging Face Hub calls the task of a model, by the content of its `config.json`; None: no name fits."""
    if _family(config) in HOLDERS:
        return "any-to-any"
    return None if _writes_images(config) else "text-generation"


def _family(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type", "")).removeprefix("ragged_")


def _writes_images(config: Mapping[str, Any]) -> bool:
    return "codebook_size" in config


def how_to_load(config: Mapping[str, Any], title: str) -> str:
    """How a folder loads in transformers, vLLM and llama.cpp, as far as it does, in Markdown.

    Args:
        config: Content of its `config.json`.
        title: The folder's name or its id on the Hub.
    """
    ragged = "auto_map" in config
    family = _family(config)
    if family in HOLDERS:
        return _how_to_load_whole(title, ragged=ragged)
    trust = ", trust_remote_code=True" if ragged else ""
    flag = " --trust-remote-code" if ragged else ""
    channels = config["num_attention_heads"] * config.get("head_dim", 0) if family == "qwen2" and not ragged else 0
    if channels not in {0, config.get("hidden_size")}:
        flag = " --model-impl transformers"  # vLLM's own Qwen2 takes the channels of a head from the head count.
    about = (
        "`trust_remote_code` lets transformers and vLLM run `ragged.py`, which lies in this folder and builds layers "
        "of different widths; where numprune is installed it is not needed."
        if ragged
        else "It is an ordinary checkpoint of a class that transformers ships: no code comes with it."
    )
    if _writes_images(config):
        return f"""```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{title}"{trust})
```

`{title}` is this folder. {about}"""
    layers = (config.get("per_layer_config") or {}).values()
    engines = []
    if all(layer.get("num_attention_heads") != 0 for layer in layers):  # vLLM takes no layer without an attention.
        engines.append(f"    vllm serve {title}{flag}")
    if family in RAGGED_IN_LLAMA_CPP if ragged else family not in NOT_IN_LLAMA_CPP:
        engines.append(f"    numprune export gguf {title} -o model.gguf     # for llama.cpp")
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{title}"{trust})
```

{chr(10).join([*engines, ""])}
`{title}` is this folder. {about}"""


def _how_to_load_whole(title: str, *, ragged: bool) -> str:
    trust = ", trust_remote_code=True" if ragged else ""
    about = (
        " `trust_remote_code` lets transformers run the code that lies in this folder and builds layers of different "
        "widths; where numprune is installed, `import numprune` takes its place."
        if ragged
        else ""
    )
    return f"""```python
from transformers import AutoProcessor, {AUTO_CLASS}

model = {AUTO_CLASS}.from_pretrained("{title}"{trust})
processor = AutoProcessor.from_pretrained("{title}")
```

`{title}` is this folder. The parts around the language model are those of the dense model.{about}"""
