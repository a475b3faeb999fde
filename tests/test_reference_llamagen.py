"""The image model that ships with the repository does what its card says."""

from pathlib import Path

import pytest
import torch

from numprune.checkpoint import load_model
from numprune.images import Sampling, class_prompts, decode, sample_images
from numprune.perplexity import perplexity, window_losses
from numprune.samples import Samples
from tasks.images.digits import load_digits, sequences, split
from tasks.images.features import extractor
from tasks.parameters import load_parameters

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "models/reference-llamagen"


def test_held_out_digits_surprise_it_hardly_more_than_those_it_was_trained_on() -> None:
    training = load_parameters(ROOT / "params.yaml").reference_images.training
    pixels, classes = load_digits()
    chosen, held_out = split(classes, training.held_out, seed=training.seed)
    rows, model = sequences(pixels, classes), load_model(FOLDER, dtype=torch.float32)
    new, known = (
        perplexity(torch.cat(list(window_losses(model, rows[some], batch_size=100))), 65).perplexity
        for some in (held_out, chosen[: len(held_out)])
    )
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"held-out digits | {new:.3f} |" in card
    assert known < new < 1.15 * known


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_classifier_recognises_what_it_writes(guidance: float) -> None:
    model = load_model(FOLDER, dtype=torch.float32)
    wanted = [number % 10 for number in range(200)]
    prompts = Samples(class_prompts(model.config, wanted))
    drawn = sample_images(model, prompts, Sampling(guidance, batch_size=200))
    images = decode(torch.cat(list(drawn)), model.config, FOLDER)
    found = extractor("digits", ROOT / "evaluation/digits/classifier.safetensors")(images).probabilities.argmax(1)
    right = (found == torch.tensor(wanted)).double().mean()
    assert right > (0.85 if guidance == 1 else 0.93)
