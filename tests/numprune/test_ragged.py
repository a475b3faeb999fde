import pytest
import torch
from transformers import DynamicCache, StaticCache

from numprune.architectures import prunable_groups
from numprune.ragged import AbsentAttention, AbsentMLP
from numprune.slicing import slice_block
from tests.numprune.conftest import CONFIGS


def laid_out_before():
    """As for export and chunked prefill: by the heads of the configuration, of which an absent attention has none."""
    cache = StaticCache(CONFIGS["llama"], max_cache_len=16)
    cache.early_initialization(2, [0, 4, 4], 4, torch.float32, torch.device("cpu"))
    return cache


CACHES = {
    "growing": DynamicCache,
    "growing-window": lambda: DynamicCache(config=CONFIGS["mistral-window"]),
    "static": lambda: StaticCache(CONFIGS["llama"], max_cache_len=16),
    "static-window": lambda: StaticCache(CONFIGS["mistral-window"], max_cache_len=16),
    "static-laid-out": laid_out_before,
}


@pytest.mark.parametrize("kind", CACHES)
def test_absent_attention_gives_zeros_and_counts_tokens(kind):
    cache, attention, length = CACHES[kind](), AbsentAttention(0, 4), 0
    for tokens in (5, 1, 4, 1):  # Beyond the window of 8.
        hidden = torch.randn(2, tokens, 32)
        output, weights = attention(hidden_states=hidden, attention_mask=None, past_key_values=cache, use_cache=True)
        length += tokens
        assert torch.equal(output, torch.zeros_like(hidden))
        assert weights is None
        assert cache.get_seq_length() == length


def test_absent_modules_have_no_parameters():
    attention, mlp = AbsentAttention(0, 4), AbsentMLP()
    assert not list(attention.parameters()) + list(mlp.parameters())
    hidden = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    for output in (attention(hidden)[0], mlp(hidden)):
        assert torch.equal(output, torch.zeros_like(hidden))
        assert output.dtype == hidden.dtype


def test_layers_of_different_widths_compile_in_one_piece_with_a_static_cache(llama, input_ids):
    """Traced without a break, one step of generation gives the logits of the whole sequence."""
    for index, block in enumerate(llama.model.layers):
        kept = {f"{index}.attention": torch.arange(index), f"{index}.mlp": torch.arange(8 * index + 8)}
        slice_block(block, prunable_groups(llama)[index], kept)
    with torch.no_grad():
        expected = llama(input_ids).logits[:, -1]
        cache = StaticCache(llama.config, max_cache_len=32)
        llama(input_ids[:, :-1], past_key_values=cache, use_cache=True)
        step = torch.compile(llama, fullgraph=True, backend="eager")
        logits = step(input_ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
