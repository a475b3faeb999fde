"""The language model of a tiny random Janus, pruned inside it."""

import torch
from transformers import JanusConfig, JanusForConditionalGeneration

from numprune.architectures import all_groups
from numprune.cutting import cut
from numprune.janus import language_model
from numprune.pruning import capture_to
from numprune.recipe import RECIPES
from numprune.statistics import Measured
from tests.numprune.conftest import choose

TEXT = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 32,
    "mlp_ratio": 2.0,
}
VQ = {
    "embed_dim": 4,
    "num_embeddings": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 8,
    "num_patches": 4,
    "projection_dim": 32,
    "image_token_embed_dim": 32,
}


@torch.no_grad()
def test_the_language_model_is_pruned_inside_janus(tmp_path):
    torch.manual_seed(0)
    janus = JanusForConditionalGeneration(JanusConfig(text_config=TEXT, vision_config=VISION, vq_config=VQ)).eval()
    model = language_model(janus)
    input_ids = torch.randint(64, (16, 24))
    before, dense = janus.num_parameters(), janus(input_ids=input_ids).logits
    torch.testing.assert_close(model(input_ids).logits, dense)
    list(capture_to(tmp_path, model, input_ids, batch_size=8))
    measured, recipe = Measured(tmp_path, input_ids, batch_size=8), RECIPES["best"]
    removed = sum(group.parameters for group in all_groups(model))
    choice = choose(model, measured, 0.3, recipe)
    list(cut(model, choice.kept, measured, recovery=recipe.recovery, damping=recipe.damping))
    removed -= sum(group.parameters for group in all_groups(model))
    assert removed > 0
    assert janus.num_parameters() == before - removed
    pruned = janus(input_ids=input_ids).logits
    torch.testing.assert_close(pruned, model(input_ids).logits)
    assert (pruned - dense).norm() < dense.norm()
    # Image tokens are predicted by Janus's other head, from the same hidden states.
    hidden = janus.model.language_model(input_ids=input_ids).last_hidden_state
    assert janus.model.generation_head(hidden).shape == (16, 24, 32)
