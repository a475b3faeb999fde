"""A consumer who has MLflow, torch and transformers, and not numprune."""

import json
import os
import subprocess
import sys
from pathlib import Path

from mlflow import MlflowClient

from tasks.publish import publish
from tasks.registry.promote import promote
from tests.tasks.conftest import MODEL

CONSUMER = """
import json, sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numprune", "tasks", "flows"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Forbidden())

import mlflow
import pandas
import torch

mlflow.set_tracking_uri(sys.argv[1])
address = sys.argv[2]
served = mlflow.pyfunc.load_model(address)
prompts = ["The quick brown", "dog dog"]
seen = {
    "frame": list(served.predict(pandas.DataFrame({"prompt": prompts}), params={"max_new_tokens": 8})),
    "list": list(served.predict(prompts, params={"max_new_tokens": 8})),
    "one": list(served.predict("dog dog", params={"max_new_tokens": 8})),
    "default": list(served.predict(["x"])),
    "sampled": list(served.predict(["x"], params={"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9})),
}
try:
    served.predict([""])
except Exception as error:
    seen["empty"] = str(error)

from transformers import AutoModelForCausalLM, AutoTokenizer

folder = mlflow.artifacts.download_artifacts(address)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
expected = []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
seen["expected"] = expected
seen["class"] = type(model).__name__
print(json.dumps(seen))
"""


def test_champion_is_served_without_numprune(client: MlflowClient, tmp_path: Path) -> None:
    publish(MODEL, "0.2")
    assert promote(MODEL).promoted
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(elsewhere / "hf"), "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(
        [sys.executable, "-c", CONSUMER, client.tracking_uri, f"models:/{MODEL}@champion"],
        cwd=elsewhere,
        env=environment,
        stdin=subprocess.DEVNULL,  # A question would wait for ever.
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["class"] == "RaggedLlamaForCausalLM"
    assert seen["frame"] == seen["list"] == seen["expected"]
    assert seen["one"] == seen["expected"][1:]
    assert seen["frame"][0]
    assert len(seen["default"]) == len(seen["sampled"]) == 1
    assert "at least one token" in seen["empty"]
