"""Serves the pruned model beside it as an MLflow python_function.

This file is shipped in the folder of every registered version and depends on nothing but torch and transformers.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class TextGenerator:
    """Continues prompts with a causal language model.

    Attributes:
        tokenizer: Of the folder.
        model: Of the folder, on a GPU if there is one.
    """

    def __init__(self, folder: str | Path) -> None:
        # The layers' widths differ, and ragged.py in this folder is the code that builds them. It runs here because it
        # is a file of the same version as this one, which runs already, and both are under the same hashes and
        # signature; code from elsewhere is not fetched, since the folder is a local path.
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=True, local_files_only=True
        )
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """The text that follows each prompt, without the prompt.

        Args:
            model_input: A list of prompts, or a data frame with one column of them, or with a column `prompt`.
            params: `max_new_tokens`, at least 1; `temperature`, where 0 always takes the most likely token; `top_p` in
                (0, 1], which matters only above temperature 0.

        Raises:
            ValueError: If a prompt has no tokens.
        """
        prompts: Iterable[Any] = model_input
        if hasattr(model_input, "columns"):  # MLflow makes a data frame of a list, too.
            prompts = model_input["prompt" if "prompt" in model_input else model_input.columns[0]]
        # One at a time: memory is that of one sequence, and no answer depends on its neighbours.
        return [self._continue(str(prompt), **(params or {})) for prompt in prompts]

    @torch.inference_mode()
    def _continue(self, prompt: str, *, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0) -> str:
        inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        if not length:
            raise ValueError("a prompt must have at least one token")
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
        generated = self.model.generate(
            **inputs,
            **{"do_sample": False, **sampling},
            max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
        )
        text: str = self.tokenizer.decode(generated[0, length:], skip_special_tokens=True)
        return text


def _load_pyfunc(folder: str) -> TextGenerator:
    """What MLflow calls to load the folder."""
    return TextGenerator(folder)
