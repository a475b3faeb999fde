"""LlamaGen's arithmetic written down once more, in plain tensors and the official layout, to compare with.

A function of the official state dict: fused q, k, v; rotary pairs side by side; condition tokens whose rotary factors
are zero.
"""

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu


def rotary_factors(grid: int, head_dim: int, condition_tokens: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's pairs, (condition_tokens + grid^2, head_dim / 2)."""
    half = head_dim // 2
    frequencies = 1.0 / 10000 ** (torch.arange(0, half, 2).float() / half)
    rows, columns = [], []
    for row in range(grid):
        for column in range(grid):
            rows.append(row * frequencies)
            columns.append(column * frequencies)
    angles = torch.cat([torch.stack(rows), torch.stack(columns)], dim=1)
    nothing = torch.zeros(condition_tokens, half)
    return torch.cat([nothing, angles.cos()]).double(), torch.cat([nothing, angles.sin()]).double()


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates pairs of neighbouring channels of (batch, heads, length, head_dim)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cosine - odd * sine
    out[..., 1::2] = odd * cosine + even * sine
    return out


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """In float32 whatever the data type is, as the official norm."""
    single = x.float()
    return (single * torch.rsqrt((single * single).mean(-1, keepdim=True) + 1e-5)).to(x) * weight


def embedded_class(state: dict[str, Tensor], labels: Tensor) -> Tensor:
    return state["cls_embedding.embedding_table.weight"][labels][:, None]


def embedded_caption(state: dict[str, Tensor], features: Tensor) -> Tensor:
    hidden = gelu(features @ state["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
    return hidden @ state["cls_embedding.cap_proj.fc2.weight"].T


def logits(
    state: dict[str, Tensor], condition: Tensor, tokens: Tensor, *, heads: int, grid: int, mask: Tensor | None = None
) -> Tensor:
    """Logits at every position, (batch, condition + image tokens, codebook).

    Args:
        state: Official parameters, float64.
        condition: (batch, condition_tokens, width) embedded.
        tokens: (batch, n) image tokens.
        heads: Query heads.
        grid: Tokens a side.
        mask: (batch, condition_tokens), False where a caption is padded.
    """
    h = torch.cat([condition, state["tok_embeddings.weight"][tokens]], dim=1)
    batch, length, width = h.shape
    head_dim = width // heads
    seen = torch.tril(torch.ones(length, length, dtype=torch.bool)).repeat(batch, 1, 1)
    if mask is not None:
        seen[:, :, : mask.shape[1]] &= mask[:, None].bool()
        seen |= torch.eye(length, dtype=torch.bool)
    cosine, sine = (f[:length] for f in rotary_factors(grid, head_dim, condition.shape[1]))
    for layer in range(sum(name.endswith("wqkv.weight") for name in state)):
        weights = {name.removeprefix(f"layers.{layer}."): t for name, t in state.items() if f"layers.{layer}." in name}
        fused = normed(h, weights["attention_norm.weight"]) @ weights["attention.wqkv.weight"].T
        kv = (fused.shape[-1] - width) // 2
        q, k, v = (part.view(batch, length, -1, head_dim).transpose(1, 2) for part in fused.split([width, kv, kv], -1))
        q, k = turned(q, cosine, sine), turned(k, cosine, sine)
        k, v = (x.repeat_interleave(heads // (kv // head_dim), dim=1) for x in (k, v))
        scores = (q @ k.transpose(2, 3) / head_dim**0.5).masked_fill(~seen[:, None], float("-inf"))
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        h = h + attended @ weights["attention.wo.weight"].T
        x = normed(h, weights["ffn_norm.weight"])
        gated = silu(x @ weights["feed_forward.w1.weight"].T) * (x @ weights["feed_forward.w3.weight"].T)
        h = h + gated @ weights["feed_forward.w2.weight"].T
    return normed(h, state["norm.weight"]) @ state["output.weight"].T
