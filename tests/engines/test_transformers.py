"""What people do with a checkpoint in transformers and around it, with one of equal and one of different widths."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache, Trainer, TrainingArguments, pipeline

from tests.engines.conftest import CELLS, FAMILIES, PROMPTS, SHAPES, SIZES, TOKENS, greedy, reference


@pytest.mark.engines
@pytest.mark.parametrize(("name", "shape"), CELLS)
def test_every_family_reloads_and_generates_with_its_cache(prune, record, name, shape, tmp_path):
    folder = prune(FAMILIES[name], shape)
    model = reference(folder)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for prompt in PROMPTS:
        expected = greedy(model, prompt)
        ids = torch.tensor([prompt + expected])
        assert model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == expected
        assert greedy(again, prompt) == expected
    record(name, "transformers", shape, "yes")


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, prune):
    return prune(FAMILIES["llama"], request.param)


@pytest.fixture
def model(folder):
    return reference(folder)


IDS = torch.tensor([PROMPTS[2]])
TORCHAO = Path(__file__).parents[2] / ".venv-vllm/torchao"  # Made by `make test-engines`.


def test_pipeline_continues_text(folder):
    continued = pipeline("text-generation", model=str(folder))("def", max_new_tokens=4, do_sample=False)
    assert continued[0]["generated_text"].startswith("def")


def test_static_cache_gives_the_same_tokens(model):
    settings = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    expected = model.generate(IDS, **settings)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **settings), expected)


@torch.no_grad()
def test_compiled_and_exported_it_gives_the_same_logits(model):
    expected = model(IDS, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager")  # Traces everything; writing C++ would take a minute.
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)
    exported = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
    torch.testing.assert_close(exported.module()(IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates(folder, dtype):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert len(greedy(loaded, PROMPTS[0])) == TOKENS


@torch.no_grad()
def test_accelerate_places_it(folder, model):
    placed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="auto")
    torch.testing.assert_close(placed(IDS).logits.cpu(), model(IDS).logits)


def test_lora_attaches_learns_and_merges(model):
    from peft import LoraConfig, get_peft_model

    before = model(IDS).logits.detach()
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    for _ in range(2):
        tuned(IDS, labels=IDS).loss.backward()
        optimizer.step()
    after = tuned.eval()(IDS).logits.detach()
    assert not torch.allclose(before, after)
    torch.testing.assert_close(tuned.merge_and_unload()(IDS).logits.detach(), after, rtol=1e-3, atol=1e-3)


def test_trainer_takes_a_step(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = TrainingArguments(
        tmp_path, max_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}]
    Trainer(model, settings, train_dataset=rows).train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.engines
def test_torchao_quantizes_as_it_loads(prune, tmp_path):
    """In a process of its own: once torchao can be imported, transformers imports it everywhere."""
    folders = {shape: str(prune(FAMILIES["llama"], shape)) for shape in SHAPES}
    script = f"""
import json
import numprune.ragged
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig
for folder in {list(folders.values())}:
    settings = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)
    kinds = {{type(layer.weight).__name__ for name, layer in model.named_modules() if name.endswith("_proj")}}
    ids = torch.tensor({IDS.tolist()})
    tokens = model.generate(ids, do_sample=False, max_new_tokens={TOKENS}, min_new_tokens={TOKENS})
    print(json.dumps([sorted(kinds), model(ids).logits.tolist(), tokens.shape[1]]))
"""
    environment = os.environ | {"PYTHONPATH": str(TORCHAO)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    for line, folder in zip(done.stdout.splitlines(), folders.values(), strict=True):
        kinds, logits, length = json.loads(line)
        assert kinds == ["Int8Tensor"]
        assert length == IDS.shape[1] + TOKENS
        expected = reference(Path(folder))(IDS).logits
        assert 0 < (torch.tensor(logits) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.engines
@torch.no_grad()
def test_inductor_compiles_a_step_of_generation_with_a_static_cache(prune):
    """Layers of different widths in one piece of code."""
    model = reference(prune(LlamaConfig(**SIZES | {"num_hidden_layers": 2}), "ragged"))
    logits = []
    for step in (model, torch.compile(model, backend="inductor", fullgraph=True)):
        cache = StaticCache(model.config, max_cache_len=16)
        model(IDS[:, :-1], past_key_values=cache)
        logits.append(step(IDS[:, -1:], past_key_values=cache).logits)
    torch.testing.assert_close(*logits)
    torch.testing.assert_close(logits[0], model(IDS).logits[:, -1:])
