"""Runs in an environment of vLLM's own: continues prompts greedily with one folder after the other.

Reads jobs from the first file and writes the tokens, or the error, of each to the second.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(job["folder"], dtype="float32", max_model_len=job["length"], enforce_eager=True, **job["options"])
    settings = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    outputs = engine.generate(prompts, settings, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    del engine
    gc.collect()
    return {"tokens": tokens}


if __name__ == "__main__":
    answers = []
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            answers.append(run(job))
        except Exception as error:  # What vLLM says of a model it cannot load is the result.
            answers.append({"error": f"{type(error).__name__}: {error}"[:500]})
        Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")
