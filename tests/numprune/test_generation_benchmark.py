import shutil

import pytest
import torch

from numprune.architectures import all_groups
from numprune.checkpoint import load_model, weight_bytes
from numprune.cutting import cut, twin
from numprune.generation_benchmark import count_work, generate, peak_memory, timed_generations
from tests.numprune.conftest import CONFIGS, random_model


def test_models_take_turns_and_the_first_round_warms_up(llama):
    timings = list(timed_generations({"a": llama, "b": llama}, prompt_length=4, new_tokens=3, repeats=2))
    assert [name for name, _ in timings] == ["a", "b", "a", "b"]
    assert all(timing.total > 0 for _, timing in timings)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="compiling needs a C++ compiler")
def test_compiled_generation_of_ragged_layers_compiles_in_the_warm_up_alone(input_ids):
    model = random_model(changed("llama", num_hidden_layers=2))
    kept = {group.name: torch.arange(group.units)[group.block :] for group in all_groups(model)}
    pruned = twin(model)
    list(cut(pruned, kept, None, recovery="none"))
    graphs = torch._dynamo.utils.counters["stats"]
    compiled = []
    generations = timed_generations({"a": model, "b": pruned}, prompt_length=4, new_tokens=4, repeats=2, compiled=True)
    for _, timing in generations:
        assert 0 < timing.first_token < timing.total
        compiled.append(graphs["unique_graphs"])
    assert len(compiled) == 4
    assert compiled[0] == compiled[-1] > 0
    prompt = input_ids[:1, :4]
    assert torch.equal(generate(pruned, prompt, 4, compiled=True), generate(pruned, prompt, 4))
    assert graphs["unique_graphs"] == compiled[-1]


def test_an_end_token_does_not_shorten_the_work(llama, input_ids):
    llama.generation_config.eos_token_id = generate(llama, input_ids[:1, :4], 1)[0, -1].item()
    assert generate(llama, input_ids[:1, :4], 6).shape == (1, 10)


def test_first_token_comes_before_the_others(llama):
    ((_, timing),) = timed_generations({"a": llama}, batch=2, prompt_length=4, new_tokens=5, repeats=1)
    assert 0 < timing.first_token < timing.total
    assert timing.tokens_per_second == pytest.approx(10 / timing.total)
    assert timing.prefill_tokens_per_second == pytest.approx(8 / timing.first_token)
    assert timing.first_token + 4 * timing.seconds_per_token == pytest.approx(timing.total)


@pytest.mark.parametrize("tied", [True, False])
def test_work_is_counted_by_hand(make_checkpoint, tied):
    folder = make_checkpoint(changed("llama", tie_word_embeddings=tied))
    model = load_model(folder)
    context = 10
    work = count_work(folder, context)
    config, width = model.config, model.dtype.itemsize
    layers, hidden, head = config.num_hidden_layers, config.hidden_size, config.head_dim
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    embedding = config.vocab_size * hidden
    matrices += embedding if tied else 0  # Tied: the head is the embedding.
    attention = layers * 4 * config.num_attention_heads * head * context
    cache = layers * 2 * config.num_key_value_heads * head * width
    assert work.parameters == model.num_parameters()
    assert work.flops_per_token == 2 * matrices + attention
    assert work.cache_bytes_per_token == cache
    assert work.bytes_per_token == (model.num_parameters() - (0 if tied else embedding)) * width + context * cache


def changed(name, **settings):
    return CONFIGS[name].__class__(**CONFIGS[name].to_dict() | settings)


def test_memory_is_that_of_a_process_of_its_own(make_checkpoint):
    folder = make_checkpoint(changed("llama", intermediate_size=20_000))
    ballast = torch.ones(200_000_000, dtype=torch.uint8)
    measured = peak_memory(folder, batch=2, prompt_length=4, new_tokens=10, device="cpu")
    assert 0.9 * weight_bytes(folder) < measured < 4 * weight_bytes(folder)
    assert ballast.numel() > 4 * weight_bytes(folder)  # What this process holds does not count.
