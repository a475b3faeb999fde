import pytest

from numprune.card import NOT_IN_LLAMA_CPP, RAGGED_IN_LLAMA_CPP, how_to_load, pipeline_tag
from numprune.export.llama_cpp_architectures import TARGETS
from numprune.ragged import LAYOUTS


def test_what_llama_cpp_reads_is_what_is_exported():
    assert {name for name, targets in TARGETS.items() if any(t.per_layer for t in targets)} == RAGGED_IN_LLAMA_CPP
    assert LAYOUTS.keys() - TARGETS.keys() - {"llamagen"} == NOT_IN_LLAMA_CPP


@pytest.mark.parametrize(
    ("config", "served", "exported"),
    [
        ({"model_type": "llama"}, True, True),
        ({"model_type": "opt"}, True, False),
        ({"model_type": "ragged_llama", "auto_map": {}}, True, True),
        ({"model_type": "ragged_gemma2", "auto_map": {}}, True, False),
        ({"model_type": "ragged_qwen2", "auto_map": {}, "per_layer_config": {}}, True, True),
        (
            {"model_type": "ragged_llama", "auto_map": {}, "per_layer_config": {"1": {"num_attention_heads": 0}}},
            False,
            True,
        ),
        ({"model_type": "ragged_llamagen", "auto_map": {}, "codebook_size": 16}, False, False),
    ],
)
def test_only_engines_that_take_a_folder_are_named(config, served, exported):
    text = how_to_load(config, "out")
    assert "AutoModelForCausalLM.from_pretrained" in text
    assert ("trust_remote_code=True" in text) == ("auto_map" in config)
    assert ("vllm serve out" in text) == served
    assert ("numprune export gguf out" in text) == exported
    images = "codebook_size" in config
    assert ("AutoTokenizer" in text) != images
    assert pipeline_tag(config) == (None if images else "text-generation")
