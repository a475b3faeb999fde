"""LlamaGen: images as sequences of codebook entries, written by a LLaMA in the order of a grid.

    condition, t(0,0), t(0,1), ..., t(0,g-1), t(1,0), ..., t(g-1,g-1)

Source: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", arXiv 2406.06525. The
blocks are LLaMA's. What differs is the position, a row and a column, and the condition in front: a class, or a caption
as features of a text encoder.

Ids below `codebook_size` are image tokens. Class c has the id `codebook_size + c`, and the id after the last class
stands for no condition; so `input_ids` alone say what an image is of. A caption takes `condition_tokens` times the id
`codebook_size`, and its features come as `caption_features`; without them the caption is the unconditional one. The
output head knows image tokens alone.

Like `ragged.py`, this file lies beside the weights of every checkpoint and depends on torch and transformers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# Relative, because transformers ships files that are imported in this way along with this one.
from .ragged import FAMILIES, LAYOUTS, Layout, RaggedConfig, RaggedModel


class LlamaGenConfig(RaggedConfig, LlamaConfig):
    """Configuration of a LlamaGen; what is not said here is LLaMA's.

    Attributes:
        codebook_size: Image tokens.
        grid_size: Rows, and columns, of tokens in an image.
        num_classes: Classes to condition on, or None: captions.
        caption_dim: Features of a caption's token, or None: classes.
        condition_tokens: Positions of the condition: 1 for a class.
    """

    model_type = "llamagen"

    codebook_size: int = 16384
    grid_size: int = 16
    num_classes: int | None = 1000
    caption_dim: int | None = None
    condition_tokens: int = 1
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if (self.num_classes is None) == (self.caption_dim is None):
            raise ValueError(
                f"one of num_classes and caption_dim must be None, got {self.num_classes} and {self.caption_dim}"
            )
        self.vocab_size = self.codebook_size + (self.num_classes or 0) + 1
        self.max_position_embeddings = self.condition_tokens + self.grid_size**2
        super().__post_init__(**kwargs)

    @property
    def sample_inputs(self) -> dict[str, tuple[int, ...]]:
        """What the model is given of every image besides token ids, with the shape for one image."""
        if self.caption_dim is None:
            return {}
        length = self.condition_tokens + self.grid_size**2
        return {"caption_features": (self.condition_tokens, self.caption_dim), "attention_mask": (length,)}


class GridRotaryEmbedding(nn.Module):
    """Rotary angles of a position in a grid: half of a head's pairs turn with the row, half with the column.

    Condition tokens come before the grid. They have neither angle nor length: their queries and keys are zero, as in
    the model's training.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.base = float(config.rope_parameters["rope_theta"])
        self.pairs = config.head_dim // 4
        self.grid_size = config.grid_size
        self.condition_tokens = config.condition_tokens

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (batch, length, head_dim) in the data type of x, for (batch, length) positions."""
        exponents = torch.arange(self.pairs, dtype=torch.float32, device=x.device) / self.pairs
        frequencies = 1.0 / self.base**exponents
        place = (position_ids - self.condition_tokens)[..., None]
        row, column = place.div(self.grid_size, rounding_mode="floor"), place.remainder(self.grid_size)
        angles = torch.cat([row * frequencies, column * frequencies], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)
        in_grid = place >= 0
        return (angles.cos() * in_grid).to(x.dtype), (angles.sin() * in_grid).to(x.dtype)


class CaptionProjection(nn.Module):
    """Brings features of a text encoder to the model's width."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.unconditional = nn.Parameter(torch.zeros(config.condition_tokens, config.caption_dim))

    def forward(self, features: Tensor) -> Tensor:
        """(batch, condition_tokens, hidden_size) from (batch, condition_tokens, caption_dim)."""
        return self.fc2(gelu(self.fc1(features), approximate="tanh"))


class LlamaGenModel(LlamaModel):
    """The decoder: LLaMA's blocks behind a condition, on a grid."""

    config_class = LlamaGenConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rotary_emb: Any = GridRotaryEmbedding(config)
        if config.caption_dim is not None:
            self.caption_projection = CaptionProjection(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        caption_features: Tensor | None = None,
        position_ids: Tensor | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of image tokens behind their condition.

        Args:
            input_ids: (batch, length), the condition first unless it is in the cache.
            past_key_values: Cache of the tokens before.
            inputs_embeds: Instead of `input_ids`.
            caption_features: (batch, condition_tokens, caption_dim); None: no caption.
            position_ids: Not used. A token's place is its count from the start: generation would derive another one
                from the mask of a padded caption.
            **kwargs: As for LLaMA.

        Raises:
            ValueError: If the features have another shape, or the model is conditioned on classes.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.embed_tokens(input_ids)
            begins = past_key_values is None or not past_key_values.get_seq_length()
            if self.config.caption_dim is not None and begins:
                caption = self._embedded_caption(caption_features, len(input_ids))
                inputs_embeds = torch.cat([caption, inputs_embeds[:, caption.shape[1] :]], dim=1)
            elif self.config.caption_dim is None and caption_features is not None:
                raise ValueError("caption_features given to a model that is conditioned on classes")
        return super().forward(inputs_embeds=inputs_embeds, past_key_values=past_key_values, **kwargs)

    def _embedded_caption(self, features: Tensor | None, batch: int) -> Tensor:
        projection = self.caption_projection
        if features is None:
            features = projection.unconditional.expand(batch, -1, -1)
        expected = (batch, self.config.condition_tokens, self.config.caption_dim)
        if features.shape != expected:
            raise ValueError(f"caption_features must have the shape {expected}, got {tuple(features.shape)}")
        return projection(features.to(projection.fc1.weight))


class _DenseLlamaGen(LlamaForCausalLM):
    config_class = LlamaGenConfig

    def __init__(self, config: Any) -> None:
        # LLaMA's own constructor would build a decoder that is not used.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlamaGenModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.codebook_size, bias=False)
        self.post_init()


class LlamaGenForCausalLM(RaggedModel, _DenseLlamaGen):
    """LlamaGen, dense or pruned: `per_layer_config` gives layers widths of their own."""

    config_class = LlamaGenConfig
    layout = Layout(_DenseLlamaGen)
    # Its embedding also holds conditions, which the head does not give out.
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012 - As transformers declares it.

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        caption_features: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits over the codebook, (batch, length, codebook_size).

        Args:
            input_ids: (batch, length), the condition first unless it is in the cache.
            attention_mask: (batch, tokens so far), 0 where a caption is padded.
            past_key_values: Cache of the tokens before.
            inputs_embeds: Instead of `input_ids`.
            labels: (batch, length) `input_ids` again; conditions are not predicted.
            use_cache: Whether to return a cache.
            logits_to_keep: See LLaMA.
            caption_features: (batch, condition_tokens, caption_dim); None: no caption.
            **kwargs: As for LLaMA.
        """
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            caption_features=caption_features,
            **kwargs,
        )
        if labels is not None:
            size = self.config.codebook_size
            predicted = labels.masked_fill(labels >= size, -100)
            outputs.loss = self.loss_function(logits=outputs.logits, labels=predicted, vocab_size=size)
        return outputs

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `guidance_scale` guides away from no condition.

        With scale s the logits are u + s (c - u), where c are those given the condition and u those without.
        """
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        if prompt is not None and kwargs.get("negative_prompt_ids") is None:
            kwargs["negative_prompt_ids"] = self.without_condition(prompt)
            if kwargs.get("attention_mask") is not None:
                kwargs.setdefault("negative_prompt_attention_mask", kwargs["attention_mask"])
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]  # A mixin types itself.

    def without_condition(self, input_ids: Tensor) -> Tensor:
        """The same tokens behind no class; a caption is left out by leaving out its features."""
        last = self.config.vocab_size - 1
        return input_ids.masked_fill(input_ids >= self.config.codebook_size, last)


LAYOUTS["llamagen"] = LlamaGenForCausalLM.layout
FAMILIES["llamagen"] = (LlamaGenConfig, LlamaGenForCausalLM)
