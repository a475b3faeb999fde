"""The same text through lm-eval's rolling log-likelihood."""

from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from numprune.checkpoint import load_model
from numprune.perplexity import window_losses

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models/reference-llama"
LENGTH = 64


def test_log_likelihood_equals_lm_evals() -> None:
    model, tokenizer = load_model(MODEL, dtype=torch.float64), AutoTokenizer.from_pretrained(MODEL)
    document = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    # So that the last window is whole.
    text = next(t for n in range(2000, 0, -1) if len(tokenizer(t := document[:n]).input_ids) % LENGTH == 0)
    adapter = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=1, device="cpu")
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (theirs,) = adapter.loglikelihood_rolling([request], disable_tqdm=True)

    # lm-eval puts one token before the text; each of its windows begins with the last token of the one before.
    windows = torch.tensor([adapter.prefix_token_id, *tokenizer(text).input_ids]).unfold(0, LENGTH + 1, LENGTH)
    assert len(windows) > 5
    ours = sum(losses.sum().item() for losses in window_losses(model, windows))
    assert ours == pytest.approx(-theirs, rel=1e-6)
