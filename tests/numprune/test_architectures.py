import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, MixtralConfig, T5Config

from numprune.architectures import check_supported, head_dim, layer_widths, linear, prunable_groups
from numprune.errors import NumpruneError
from numprune.ragged import LAYOUTS
from numprune.slicing import slice_block


def test_groups_cover_the_blocks_exactly(model):
    """All parameters of a block are in a unit, a norm, or the consumer's own bias."""
    for block, groups in zip(model.model.layers, prunable_groups(model), strict=True):
        outside = sum(p.numel() for name, p in block.named_parameters() if "norm" in name)
        for group in groups:
            bias = linear(block, group.consumer).bias
            outside += 0 if bias is None else bias.numel()
        assert sum(group.parameters for group in groups) + outside == sum(p.numel() for p in block.parameters())


def test_key_value_heads_are_the_attention_units(model):
    attention, mlp = prunable_groups(model)[0]
    assert attention.units == model.config.num_key_value_heads
    assert attention.units * attention.channels == model.config.num_attention_heads * model.config.head_dim
    assert (mlp.units, mlp.channels) == (model.config.intermediate_size, 1)


def test_absent_modules_are_no_groups_and_have_no_width(model):
    blocks, size = prunable_groups(model), head_dim(model)
    nothing = torch.tensor([], dtype=torch.long)
    slice_block(model.model.layers[0], blocks[0], {"0.attention": nothing, "0.mlp": torch.arange(7)})
    slice_block(model.model.layers[1], blocks[1], {"1.attention": torch.arange(2), "1.mlp": nothing})
    slice_block(model.model.layers[2], blocks[2], {"2.attention": nothing, "2.mlp": nothing})
    assert [[group.name for group in groups] for groups in prunable_groups(model)] == [["0.mlp"], ["1.attention"], []]
    first, second, third = layer_widths(model)
    assert first == {"num_attention_heads": 0, "num_key_value_heads": 0, "intermediate_size": 7}
    assert (second["num_key_value_heads"], second["intermediate_size"]) == (2, 0)
    assert set(third.values()) == {0}
    assert head_dim(model) == size


@pytest.mark.parametrize(
    "config", [MixtralConfig(), T5Config(), MambaConfig(), GPT2Config()], ids=lambda c: c.model_type
)
def test_unsupported_architectures_name_the_supported(config):
    message = f"{config.model_type!r} is not supported.*llama, mistral, qwen2, .*opt.*; docs/architectures.md"
    with pytest.raises(NumpruneError, match=message):
        check_supported(config)


def test_the_page_of_architectures_lists_the_families():
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| [A-Z]", page, re.MULTILINE) == list(LAYOUTS)


def test_a_replaced_projection_is_refused(llama):
    llama.model.layers[1].mlp.down_proj = torch.nn.Identity()
    with pytest.raises(NumpruneError, match=r"mlp\.down_proj is a Identity"):
        prunable_groups(llama)


def test_shapes_need_no_weights(llama):
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(llama.config)
    assert prunable_groups(shapes) == prunable_groups(llama)
