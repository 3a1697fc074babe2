"""Variants of attention: a sliding window, shared keys and values, other rotary angles.

    SlidingWindow       a query sees the last `window` tokens only: the cache stops growing
    GroupedAttention    several query heads share a head of keys and values: a smaller cache
    RotaryVariant       rotary positions with another base, or with only some channels rotated

Symbols are those of attention.py; G is the number of heads of keys and values.
`python -m family.attention_variants` shows that single steps agree, and how large the caches are.
"""

import math

import torch
import torch.nn as nn

from attention import Attention, KVCache, append_to_cache, check_heads, rotary
from family.chunks import show_steps


class SlidingWindow(Attention):
    """Attention whose queries see the last `window` tokens only, their own included (Longformer,
    Beltagy et al. 2020, arXiv 2004.05150). The cache keeps window - 1 tokens, so it stays small.

    A decode step computes the scores of the window alone. A long call computes all scores and masks
    those outside, which saves no time.
    """

    def __init__(self, d_model, n_heads=1, window=16, position="rope", recency=None):
        super().__init__(d_model, n_heads, position, recency)
        if window < 1:
            raise ValueError(f"window is {window}, but a query sees at least 1 token, its own")
        self.window = window

    def mask(self, Q, length, device):
        """(Q, length) bool: each of the last Q tokens sees itself and the window - 1 before it."""
        return super().mask(Q, length, device).triu(length - Q - self.window + 1)

    def forward(self, x, state=None, last_only=False):
        """As Attention.forward. The keys in the cache are not rotated yet: scores depend on
        distances alone, so each call may count positions from the first token in its cache."""
        if x.shape[1] == 0:
            return x, state
        q, k, v = self.heads(self.qkv(x))
        k, v = append_to_cache(state, k, v)                              # (B, H, S+L, P)
        length = k.shape[2]
        S = length - x.shape[1]                      # tokens in the old cache
        first = max(0, length - self.window + 1)     # the next query sees window - 1 before itself
        # Copies: views would keep all keys and values in memory.
        cache = KVCache(k[:, :, first:].clone(), v[:, :, first:].clone())
        if self.position == "rope":
            q, k = self.rotate(q, S), self.rotate(k, 0)
        if last_only:
            q = q[:, :, -1:]
        y = self.attend(q, k, v, self.mask(q.shape[2], length, x.device))        # (B, H, Q, P)
        return self.out_proj(y.transpose(1, 2).flatten(2)), cache


class GroupedAttention(Attention):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245): each of the G = kv_heads
    heads of keys and values serves H / G query heads. The cache holds G heads, not H."""

    def __init__(self, d_model, n_heads, kv_heads, position="none"):
        nn.Module.__init__(self)       # not Attention's, which would draw a qkv of another size
        if n_heads > 0 and d_model % n_heads:    # check_heads would blame --n-heads
            raise ValueError(f"--d is {d_model}, but grouped attention's {n_heads} heads must "
                             "divide it")
        check_heads(d_model, n_heads, position)
        if kv_heads < 1 or n_heads % kv_heads:
            raise ValueError(f"kv_heads is {kv_heads}, but it must divide the {n_heads} heads")
        self.n_heads, self.kv_heads, self.position = n_heads, kv_heads, position
        width = d_model // n_heads * kv_heads                            # G P
        self.sizes = [d_model, width, width]                             # of q, k and v
        self.qkv = nn.Linear(d_model, sum(self.sizes))
        self.out_proj = nn.Linear(d_model, d_model)

    def heads(self, qkv):
        """The output of self.qkv (B, L, ...) -> q (B, H, L, P), k and v (B, G, L, P)."""
        q, k, v = qkv.split(self.sizes, dim=-1)
        q = q.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)          # (B, H, L, P)
        k = k.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)         # (B, G, L, P)
        v = v.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)         # (B, G, L, P)
        return q, k, v

    def attend(self, q, k, v, mask=None):
        """As Attention.attend, with k and v (B, G, S+L, P)."""
        k = k.repeat_interleave(self.n_heads // self.kv_heads, dim=1)    # (B, H, S+L, P)
        v = v.repeat_interleave(self.n_heads // self.kv_heads, dim=1)
        return super().attend(q, k, v, mask)


class RotaryVariant(Attention):
    """Rotary attention with another base, or with only some channels rotated.

    base: a smaller one rotates the slow channels faster; 10,000 in `attention.rotary`.
    rotated: the share of each head's channels that are rotated, rounded down to pairs; the rest
    carry no position.
    """

    def __init__(self, d_model, n_heads=1, recency=None, base=10000.0, rotated=1.0):
        super().__init__(d_model, n_heads, "rope", recency)
        self.base = base
        self.n_rotated = 2 * int(rotated * (d_model // n_heads) / 2)     # channels of a head
        if self.n_rotated == 0:
            raise ValueError(f"--d is {d_model}, but rotating {rotated:g} of a head's channels, in "
                             f"pairs, needs heads of at least {math.ceil(2 / rotated)}")

    def rotate(self, x, start):
        """As Attention.rotate."""
        rotated, rest = x[..., :self.n_rotated], x[..., self.n_rotated:]
        return torch.cat([rotary(rotated, start, self.base, self.scale), rest], dim=-1)


@torch.no_grad()
def main():
    """Show that one call and single steps agree, and how large the caches are."""
    torch.manual_seed(0)
    print("2 sequences of 64 tokens, d = 32, 4 heads, a window of 16, 2 heads of k and v\n")
    x = torch.randn(2, 64, 32)
    for layer in (Attention(32, 4), SlidingWindow(32, 4), GroupedAttention(32, 4, kv_heads=2),
                  RotaryVariant(32, 4, rotated=0.5)):
        show_steps(layer, x)
        _, cache = layer(x)
        numbers = (cache.k.numel() + cache.v.numel()) // len(x)
        print(f"    cache of a sequence of {x.shape[1]} tokens: {numbers:,} numbers")


if __name__ == "__main__":
    main()
