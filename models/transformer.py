"""The pre-norm transformer block that the character transformer and the vision transformer are made of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class Block(nn.Module):
    """Attention and a feed-forward layer of four times the width, each normalised before and added to the stream."""

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.attend_norm = nn.LayerNorm(width)
        self.attend = _Attention(width, heads, causal=causal)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = _FeedForward(width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map the stream ``(B, T, width)`` to itself."""
        hidden = hidden + self.attend(self.attend_norm(hidden))
        fed: Tensor = self.feed(self.feed_norm(hidden))
        return hidden + fed


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.split = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        query, key, value = self.split(hidden).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        merged: Tensor = self.merge(mixed.transpose(1, 2).reshape(batch, length, width))
        return merged


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.widen = nn.Linear(width, 4 * width)
        self.merge = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        merged: Tensor = self.merge(gelu(self.widen(hidden)))
        return merged
