import collections
import ctypes
import re
import resource
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from numprune.architectures import decoder_blocks
from numprune.capture import capture
from numprune.checkpoint import load_model, open_model
from numprune.cutting import cut, twin
from numprune.errors import NumpruneError
from numprune.memory import HiddenStates
from numprune.perplexity import window_losses
from numprune.pruning import capture_to
from numprune.reconstruction import hidden_state_errors
from numprune.statistics import Measured
from numprune.streaming import StoredTensors, answering, is_streamed, visit
from tests.numprune.conftest import CONFIGS, SIZES, random_model
from tests.processes import FORKED

CPU = torch.device("cpu")
_M_MMAP_THRESHOLD = -3  # Of malloc.h.


@pytest.fixture(params=["llama", "llama-multi-head", "llama-tied", "qwen3"])
def folder(request, make_checkpoint):
    return make_checkpoint(CONFIGS[request.param])


def weights_in_memory(model):
    return sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)


def test_one_block_and_the_next_are_in_memory(make_checkpoint):
    model = open_model(make_checkpoint())
    outside = weights_in_memory(model)
    blocks = decoder_blocks(model)
    whole = {name: tensor.nbytes for name, tensor in load_model(make_checkpoint(name="again")).state_dict().items()}
    for index, block in visit(blocks, CPU):
        assert weights_in_memory(model) == outside + sum(p.nbytes for p in block.parameters())
        assert sum(p.nbytes for p in block.parameters()) == sum(
            size for name, size in whole.items() if name.startswith(f"model.layers.{index}.")
        )
    assert weights_in_memory(model) == outside
    assert outside == sum(size for name, size in whole.items() if ".layers." not in name)


def test_a_visit_that_ends_early_leaves_nothing(make_checkpoint):
    model = open_model(make_checkpoint())
    outside = weights_in_memory(model)
    visiting = visit(decoder_blocks(model), CPU)
    next(visiting)
    visiting.close()
    assert weights_in_memory(model) == outside


def test_everything_is_as_with_the_whole_model(folder, input_ids, tmp_path):
    """Statistics, perplexity, generation, recovery and what comes of it, bit by bit."""
    opened, loaded = open_model(folder), load_model(folder)
    assert is_streamed(decoder_blocks(opened))
    captured = (capture(model, input_ids, batch_size=5) for model in (opened, loaded))
    for ours, theirs in zip(*captured, strict=True):
        for name, moments in ours.moments.items():
            assert torch.equal(moments.gram, theirs.moments[name].gram)
    with answering(opened, CPU):
        options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
        assert torch.equal(opened.generate(input_ids[:2], **options), loaded.generate(input_ids[:2], **options))

    list(capture_to(tmp_path / "statistics", loaded, input_ids, batch_size=5))
    measured = Measured(tmp_path / "statistics", input_ids, batch_size=5)
    kept = {f"{index}.{kind}": torch.arange(3) for index in range(3) for kind in ("attention", "mlp")}
    pruned = {}
    for name, model in (("opened", opened), ("loaded", loaded)):
        pruned[name] = twin(model)
        work = tmp_path / name if name == "opened" else None
        list(cut(pruned[name], kept, measured, recovery="refit", work=work))
    assert is_streamed(decoder_blocks(pruned["opened"]))
    losses = [torch.cat(list(window_losses(model, input_ids, batch_size=5))) for model in pruned.values()]
    assert torch.equal(*losses)
    errors = [hidden_state_errors(model, pruned, input_ids, batch_size=5) for model in (opened, loaded)]
    assert errors[0]["opened"][-1] > 0
    for name in pruned:
        assert torch.equal(errors[0][name], errors[1][name])
        assert torch.equal(errors[0]["opened"], errors[0][name])


@pytest.mark.parametrize("damage", ["nan", "truncated", "missing"])
def test_damage_that_comes_while_running_is_named(make_checkpoint, input_ids, damage):
    folder = make_checkpoint(max_shard_size="30KB")
    model = open_model(folder)
    (path,) = {path for path, _ in decoder_blocks(model)[2].stored.files.values()} - {
        path for block in decoder_blocks(model)[:2] for path, _ in block.stored.files.values()
    } or {next(iter(decoder_blocks(model)[2].stored.files.values()))[0]}
    if damage == "nan":
        tensors = load_file(path)
        for tensor in tensors.values():
            tensor.flatten()[0] = float("nan")
        save_file(tensors, path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    with pytest.raises(NumpruneError, match=path.name):
        list(capture(model, input_ids))


def test_a_batch_that_does_not_fit_is_halved(llama, input_ids, caplog):
    """The middle block's MLP has memory for three sequences, after its attention has been measured."""
    expected = list(capture(llama, input_ids, batch_size=12))

    def full(_module, inputs):
        if len(inputs[0]) > 3:
            raise torch.OutOfMemoryError

    llama.model.layers[1].mlp.register_forward_pre_hook(full)
    found = list(capture(llama, input_ids, batch_size=12))
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 12 sequences at a time: going on with 6",
        "out of memory with 6 sequences at a time: going on with 3",
    ]
    for ours, theirs in zip(found, expected, strict=True):
        for name, moments in ours.moments.items():
            assert moments.count == theirs.moments[name].count
            torch.testing.assert_close(moments.gram, theirs.moments[name].gram, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("room_after", [1, 2])
def test_a_block_without_room_beside_the_one_before_is_read_after_it(monkeypatch, make_checkpoint, room_after):
    folder = make_checkpoint()
    read, tries = StoredTensors.read, collections.Counter()

    def full(tensors):
        tries[id(tensors)] += 1
        if tries[id(tensors)] <= room_after:
            raise torch.OutOfMemoryError
        return read(tensors)

    blocks = decoder_blocks(open_model(folder))
    monkeypatch.setattr(StoredTensors, "read", full)
    expected = decoder_blocks(load_model(folder))
    if room_after > 1:
        with pytest.raises(torch.OutOfMemoryError):
            list(visit(blocks, CPU))
        return
    for index, block in visit(blocks, CPU):
        for name, tensor in expected[index].state_dict().items():
            assert torch.equal(block.state_dict()[name], tensor)
    assert list(tries.values()) == [2, 2, 2]


@pytest.mark.parametrize("recovery", ["sequential", "refit"])
def test_recovery_goes_on_with_half_a_batch(llama, input_ids, tmp_path, caplog, recovery):
    list(capture_to(tmp_path, llama, input_ids, batch_size=12))
    kept = {f"{index}.{kind}": torch.arange(3) for index in range(3) for kind in ("attention", "mlp")}
    results = []
    for limit in (12, 3):

        def full(_module, inputs, limit=limit):
            if len(inputs[0]) > limit:
                raise torch.OutOfMemoryError

        model = twin(llama)
        model.model.layers[1].mlp.register_forward_pre_hook(full)
        list(cut(model, kept, Measured(tmp_path, input_ids, batch_size=12), recovery=recovery))
        results.append(model.state_dict())
    assert "going on with 3" in caplog.text
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_one_sequence_that_does_not_fit_names_the_setting(llama, input_ids):
    def full(*_):
        raise torch.OutOfMemoryError

    llama.model.layers[1].mlp.register_forward_pre_hook(full)
    with pytest.raises(NumpruneError, match=r"one sequence of 24 tokens: lower --length \(calibration.length"):
        list(capture(llama, input_ids))


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_hidden_states_are_the_same_wherever_they_lie(monkeypatch, tmp_path, place):
    monkeypatch.setattr("numprune.memory.place_for", lambda *_: place)
    states = torch.randn(5, 3, 4, dtype=torch.bfloat16)
    hidden = HiddenStates(5, CPU, tmp_path)
    for batch in states.split(2):
        hidden.append(batch)
    assert list(tmp_path.iterdir()) == []  # A file has no name, and goes with the process.
    hidden[1] = 2 * hidden[1]
    states[2:4] *= 2
    assert torch.equal(torch.cat(list(hidden.copy())), states)
    assert [len(batch) for batch in hidden.split(4)] == [4, 1]
    with (tmp_path / "file").open("wb") as file:
        hidden.write(file)
    hidden[0] = torch.zeros(2, 3, 4)
    with (tmp_path / "file").open("rb") as file:
        hidden.read(file)
    assert torch.equal(torch.cat(list(hidden)), states)


def prune_within(room, arguments, log):
    """In a process that begins with everything imported: what it needs beyond that is what pruning needs."""
    from numprune import shards
    from numprune.checkpoint import load_tokenizer
    from numprune.cli import app

    sys.stderr = log.open("w", encoding="utf-8", buffering=1)  # As long as the process.
    load_tokenizer(arguments[0])
    # Small against this model, as they are against one that matters.
    shards.SHARD_BYTES = 1 << 23
    threading.stack_size(1 << 20)
    # Tensors that are freed go back to the system at once, so that the limit is one on those in use.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))
    app(["prune", *map(str, arguments)], standalone_mode=False)


def test_a_model_larger_than_memory_is_pruned(tmp_path, tokenizer, text_file):
    """In half the memory that its weights take."""
    sizes = SIZES | {"num_hidden_layers": 48, "hidden_size": 320, "intermediate_size": 448, "head_dim": 40}
    folder, log = tmp_path / "deep", tmp_path / "log"
    model = random_model(LlamaConfig(**sizes))
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 120e6
    model.bfloat16().save_pretrained(folder, max_shard_size="8MB")
    tokenizer.save_pretrained(folder)
    options = ["--ratio", "0.3", "--calibration", text_file, "--output", tmp_path / "out"]
    options += ["--samples", "4", "--length", "16", "--recipe", "paper", "--recovery", "refit"]
    process = FORKED.Process(target=prune_within, args=(size // 2, [folder, *options], log))
    process.start()
    process.join()
    assert process.exitcode == 0, log.read_text(encoding="utf-8")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
