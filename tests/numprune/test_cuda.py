"""On a GPU comes out what comes out on a CPU: `pytest -m gpu` on a machine that has one."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from numprune.architectures import decoder_blocks
from numprune.capture import capture
from numprune.checkpoint import load_model, open_model
from numprune.choice import rank_model
from numprune.cutting import cut, twin
from numprune.errors import NumpruneError
from numprune.generation_benchmark import timed_generations
from numprune.memory import HiddenStates, free_memory
from numprune.perplexity import window_losses
from numprune.pruning import capture_to
from numprune.recipe import RECIPES, Recipe
from numprune.second_moments import product
from numprune.statistics import Measured
from numprune.streaming import visit
from tests.numprune.conftest import CONFIGS, SIZES, random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = [f"{index}.{kind}" for index in range(3) for kind in ("attention", "mlp")]
# Of float32 in another order, over three blocks.
NEAR = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(params=["llama", "llama-multi-head", "qwen3"])
def folder(request, make_checkpoint):
    return make_checkpoint(CONFIGS[request.param])


@pytest.mark.parametrize("place", ["device", "memory", "disk"])
def test_moments_of_streamed_blocks_are_those_of_a_cpu(monkeypatch, folder, input_ids, place):
    expected = list(capture(load_model(folder), input_ids, batch_size=5))
    monkeypatch.setattr("numprune.memory.place_for", lambda *_: place)
    found = list(capture(open_model(folder), input_ids, batch_size=5, device=CUDA))
    for ours, theirs in zip(found, expected, strict=True):
        for name, moments in ours.in_main_memory().moments.items():
            gram = theirs.moments[name].gram
            assert (moments.gram - gram).norm() < 1e-5 * gram.norm()
            torch.testing.assert_close(moments.mean, theirs.moments[name].mean, **NEAR)
            assert moments.count == input_ids.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_are_summed_in_float32(dtype):
    """Rows all of one sign: in half precision the sums would lose all but the first hundreds of them."""
    rows = (1 + torch.rand(1 << 16, 96, generator=torch.Generator().manual_seed(0))).to(CUDA, dtype)
    found, exact = product(rows, rows), rows.double().T @ rows.double()
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-4 * exact.max()


@pytest.mark.parametrize("recipe", [*RECIPES.values(), Recipe(selection="box"), Recipe(selection="flap")])
def test_rankings_are_those_of_a_cpu(folder, input_ids, tmp_path, recipe):
    model = load_model(folder)
    list(capture_to(tmp_path / "statistics", model, input_ids, batch_size=5))
    found, expected = (
        dict(rank_model(ranked, recipe, Measured(tmp_path / "statistics", input_ids, 5, place), ratio=0.4))
        for ranked, place in ((open_model(folder), CUDA), (model, CPU))
    )
    for name, ranking in expected.items():
        assert torch.equal(found[name].order, ranking.order)
        torch.testing.assert_close(found[name].scores, ranking.scores, rtol=1e-6, atol=1e-8)
        if ranking.rises is not None:
            torch.testing.assert_close(found[name].rises, ranking.rises, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("recovery", ["none", "bias", "least_squares", "sequential", "refit"])
def test_pruned_weights_are_those_of_a_cpu(folder, input_ids, tmp_path, recovery):
    dense = load_model(folder)
    list(capture_to(tmp_path / "statistics", dense, input_ids, batch_size=5))
    kept = {name: torch.arange(3) for name in NAMES}
    work = tmp_path / "work"
    work.mkdir()
    for model, place, folder_of_blocks in (
        (pruned := twin(dense), CPU, None),
        (streamed := open_model(folder), CUDA, work),
    ):
        measured = Measured(tmp_path / "statistics", input_ids, 5, place)
        list(cut(model, kept, measured, recovery=recovery, damping="auto", work=folder_of_blocks))
    for index, (ours, theirs) in enumerate(zip(decoder_blocks(streamed), decoder_blocks(pruned), strict=True)):
        found = load_file(work / f"pruned-{index:03d}.safetensors")
        assert found.keys() == ours.state_dict().keys()
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(found[name], tensor, **NEAR)
    losses = [
        torch.cat(list(window_losses(model, input_ids, batch_size=5, device=place)))
        for model, place in ((streamed, CUDA), (pruned, CPU))
    ]
    torch.testing.assert_close(*losses, **NEAR)


def large_config(layers):
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": layers, "head_dim": 32}
    return LlamaConfig(**sizes | {"max_position_embeddings": 512})


def test_a_batch_that_does_not_fit_is_halved(caplog):
    """The activations of one MLP take three times half a gigabyte, of which there are 0.9."""
    model = random_model(large_config(layers=2))
    input_ids = torch.randint(300, (64, 512), generator=torch.Generator().manual_seed(0))
    expected = list(capture(model, input_ids, batch_size=8, device=CUDA))
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.9e9) / total)
        found = list(capture(model, input_ids, batch_size=64, device=CUDA))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with 64 sequences at a time: going on with 32" in caplog.text
    for ours, theirs in zip(found, expected, strict=True):
        for name, moments in ours.moments.items():
            assert moments.count == input_ids.numel()
            gram = theirs.moments[name].gram
            assert (moments.gram - gram).norm() < 1e-5 * gram.norm()


def test_no_more_than_two_blocks_are_on_the_device(make_checkpoint):
    """However far the program is ahead of what the device computes."""
    folder = make_checkpoint(large_config(layers=8))
    model = open_model(folder)
    load = torch.randn(4096, 4096, device=CUDA)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sums = torch.zeros(8, device=CUDA)
    for index, block in visit(decoder_blocks(model), CUDA):
        size = sum(parameter.nbytes for parameter in block.parameters())
        for _ in range(20):
            torch.mm(load, load, out=torch.empty_like(load))
        sums[index] = block.mlp.down_proj.weight.double().sum()
    scratch = 2 * load.nbytes + 2 * 8 * 256 * 4096
    assert torch.cuda.max_memory_allocated() - before < 2.2 * size + scratch
    exact = [block.mlp.down_proj.weight.double().sum() for block in decoder_blocks(load_model(folder))]
    torch.testing.assert_close(sums.cpu().double(), torch.stack(exact), rtol=1e-5, atol=1e-3)


def test_damage_is_found_on_the_device(make_checkpoint, input_ids):
    folder = make_checkpoint()
    model = open_model(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = math.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(NumpruneError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN"):
        list(capture(model, input_ids, device=CUDA))


@pytest.mark.parametrize("place", ["device", "memory", "disk"])
def test_what_is_read_is_not_overtaken_by_what_was_written_before(monkeypatch, tmp_path, place):
    monkeypatch.setattr("numprune.memory.place_for", lambda *_: place)
    states = torch.randn(6, 512, 512, device=CUDA)
    hidden = HiddenStates(6, CUDA, tmp_path)
    for batch in states.split(2):
        hidden.append(batch)
    with (tmp_path / "file").open("wb") as file:
        hidden.write(file)
    load = torch.randn(8192, 8192, device=CUDA)
    load @ load  # The copies that follow wait for it.
    for index in range(3):
        hidden[index] = torch.zeros(2, 512, 512, device=CUDA)
    with (tmp_path / "file").open("rb") as file:
        hidden.read(file)
    assert torch.equal(torch.cat(list(hidden)), states)


def test_memory_that_torch_keeps_counts_as_free():
    torch.cuda.empty_cache()
    before = free_memory(CUDA)
    block = torch.empty(1 << 30, dtype=torch.uint8, device=CUDA)
    assert free_memory(CUDA) <= before - block.nbytes
    del block
    assert torch.cuda.memory_reserved() >= 1 << 30
    assert abs(free_memory(CUDA) - before) < 1 << 28


def test_generation_is_timed(llama):
    (_, timing), *_ = timed_generations({"one": llama.to(CUDA)}, prompt_length=8, new_tokens=16, repeats=2)
    assert 0 < timing.first_token < timing.total
