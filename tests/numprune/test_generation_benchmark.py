import torch

from numprune.checkpoint import load_model, weight_bytes
from numprune.generation_benchmark import cost, generate, timed_generations
from tests.numprune.conftest import CONFIGS


def test_models_take_turns_and_the_first_round_warms_up(llama):
    timings = list(timed_generations({"a": llama, "b": llama}, prompt_length=4, new_tokens=3, repeats=2))
    assert [name for name, _ in timings] == ["a", "b", "a", "b"]
    assert all(seconds > 0 for _, seconds in timings)


def test_an_end_token_does_not_shorten_the_work(llama, input_ids):
    llama.generation_config.eos_token_id = generate(llama, input_ids[:1, :4], 1)[0, -1].item()
    assert generate(llama, input_ids[:1, :4], 6).shape == (1, 10)


def test_cost_is_that_of_the_files_and_of_a_process_of_its_own(make_checkpoint):
    config = CONFIGS["llama"].__class__(**CONFIGS["llama"].to_dict() | {"intermediate_size": 20_000})
    folder = make_checkpoint(config)
    ballast = torch.ones(200_000_000, dtype=torch.uint8)
    measured = cost(folder, [0.5, 1.0, 3.0], prompt_length=4, new_tokens=10, device="cpu")
    assert measured.parameters == load_model(folder).num_parameters()
    assert measured.checkpoint_bytes == weight_bytes(folder)
    assert measured.tokens_per_second == 10
    assert 0.9 * weight_bytes(folder) < measured.peak_memory_bytes < 4 * weight_bytes(folder)
    assert ballast.numel() > 4 * weight_bytes(folder)  # What this process holds does not count.
