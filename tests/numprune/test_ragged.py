import pytest
import torch
from transformers import DynamicCache, StaticCache

from numprune.ragged import AbsentAttention, AbsentMLP
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
