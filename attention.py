"""Causal self-attention with a key-value cache, and the two ways to tell it where a token stands.

    position="none"     nothing: order is known only through the causal mask
    position="rope"     rotary: query and key are turned by an angle proportional to their position
    LearnedPosition     a layer of its own, which adds a trained vector for each absolute position

Imports nothing of this repository.

Letters: B batch, L tokens in this call, Q of them that ask, S tokens seen before (in the cache), H heads, P size of a head,
G heads of keys and values.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class KVCache(NamedTuple):
    """Attention's state: the keys (already rotated) and values of every token so far. It grows with the context.

    Under a sliding window it is those of the last window - 1 tokens, the keys not rotated yet, and stops growing.
    """
    k: torch.Tensor  # (B, G, S, P)
    v: torch.Tensor  # (B, G, S, P)


def rotary(x, start, base=10000.0):
    """Turn each head's vectors by their position (Su et al. 2021, RoFormer, section 3.4.2).

    The two halves of a head are the x and y coordinates of P/2 points; at position t the point j turns by the angle
    t * base^(-2j/P). A product of a query at t and a key at s then depends on t - s alone.

    x: (..., L, P), its first token at position `start` (counting from 0). Returns the same shape.
    """
    L, P = x.shape[-2:]
    t = torch.arange(start, start + L, device=x.device, dtype=torch.float32)
    frequency = base ** (-torch.arange(0, P, 2, device=x.device, dtype=torch.float32) / P)
    angle = t[:, None] * frequency                                          # (L, P/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)                                             # (..., L, P/2) each
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head causal self-attention (Vaswani et al. 2017, section 3.2), without a residual or a norm.

    d_model: width of the stream; n_heads: must divide it, and rope needs heads of even size.
    kv_heads: how many heads of keys and values there are, each shared by a group of query heads (grouped-query attention,
        Ainslie et al. 2023, arXiv 2305.13245); must divide n_heads, which is the default.
    window: how many tokens a query sees, itself among them (sliding window, Beltagy et al. 2020, arXiv 2004.05150), None for
        all. Not done: to skip the scores outside the window; all of a call are computed, and most are masked.
    recency: where the query and key biases start. With rope, equal biases add a score that is highest at distance 0 and
        falls over the first few tokens (farther on it swings with the fastest rotation, always below its start), so
        the head starts out preferring what is near.

    The query, key and value maps have a bias, and this task needs it: with normalised, fixed embeddings nothing else is
    constant across tokens, and a head that attends by position alone (the previous-token head) has to ignore
    what the token is.
    """

    attends = answers_last = True

    def __init__(self, d_model, n_heads=1, position="none", recency=None, kv_heads=None, window=None):
        super().__init__()
        kv_heads = n_heads if kv_heads is None else kv_heads
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"d is {d_model}, but it must be a multiple of its attention's number of heads, {n_heads}")
        if position not in ("none", "rope"):
            raise ValueError(f"position is {position!r}, but it must be 'none' or 'rope'")
        if position == "rope" and (d_model // n_heads) % 2:
            raise ValueError(f"--n-heads {n_heads} at d = {d_model} gives heads of odd size {d_model // n_heads}, "
                             "but rope turns pairs and needs an even one")
        if kv_heads < 1 or n_heads % kv_heads:
            raise ValueError(f"kv_heads is {kv_heads}, but it must divide the number of heads, {n_heads}")
        self.n_heads, self.kv_heads, self.position, self.window = n_heads, kv_heads, position, window
        kv = d_model // n_heads * kv_heads
        self.sizes = [d_model, kv, kv]
        self.qkv = nn.Linear(d_model, sum(self.sizes))
        self.out_proj = nn.Linear(d_model, d_model)
        if recency is not None:
            nn.init.constant_(self.qkv.bias[:d_model + kv], recency)

    def forward(self, x, state=None, last_only=False):
        """x (B, L, d_model), state a KVCache of S earlier tokens or None -> y (B, L, d_model), the longer KVCache.

        last_only: compute y for the last token alone, (B, 1, d_model), which saves nearly all of the attention.
        """
        B, L, d = x.shape
        S = 0 if state is None else state.k.shape[2]
        Q = 1 if last_only else L
        q, k, v = (part.view(B, L, heads, -1).transpose(1, 2) for part, heads in       # (B, H or G, L, P)
                   zip(self.qkv(x).split(self.sizes, dim=-1), (self.n_heads, self.kv_heads, self.kv_heads)))
        q = q[:, :, L - Q:]                                                            # (B, H, Q, P)
        rotates, slides = self.position == "rope", self.window is not None
        if rotates:
            q = rotary(q, S + L - Q)
        if rotates and not slides:
            k = rotary(k, S)
        if state is not None:
            k, v = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)      # (B, G, S+L, P)
        cache = KVCache(k, v)
        if slides:
            # Only differences of positions count, so positions can be counted from the first token in the cache, as q's were.
            cache = KVCache(*(u[:, :, max(0, S + L - self.window + 1):].clone() for u in (k, v)))      # a view would keep all
            k = rotary(k, 0) if rotates else k

        # The first query is token S + L - Q: it sees keys 0 ... S + L - Q, the next one more, the last one all.
        mask = torch.ones(Q, S + L, dtype=torch.bool, device=x.device).tril(S + L - Q) if 1 < Q < S + L else None
        if slides and S + L > self.window:
            seen = torch.ones(Q, S + L, dtype=torch.bool, device=x.device)
            mask = seen.tril(S + L - Q) & seen.triu(S + L - Q - self.window + 1)
        if self.kv_heads < self.n_heads:
            k, v = (u.repeat_interleave(self.n_heads // self.kv_heads, 1) for u in (k, v))     # (B, H, S+L, P)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and Q > 1)  # (B, H, Q, P)
        return self.out_proj(y.transpose(1, 2).reshape(B, Q, d)), cache


class LearnedPosition(nn.Module):
    """A trained vector for each absolute position: a layer whose output is the table and not a function of x.

    positions: the size of the table. Positions that training never reaches keep their random start, so a model
    is blind beyond its training length; a sequence longer than the table is a ValueError. The rows start short beside
    embeddings of length 1: the model has to see the tokens before it can learn what their places are for.
    """

    norms_itself = True

    def __init__(self, d_model, positions):
        super().__init__()
        self.table = nn.Parameter(self.rows(positions, d_model))
        self.register_buffer("untrained", self.table.detach()[:0], persistent=False)

    @staticmethod
    def rows(positions, d_model):
        return 0.1 * torch.randn(positions, d_model) / d_model**0.5                    # length about 0.1

    def extend_positions(self, positions):
        """Make room for so many positions: random rows beyond the table, which are not part of the state dict."""
        missing = positions - len(self.table) - len(self.untrained)
        if missing > 0:
            rows = self.rows(missing, self.table.shape[1]).to(self.table)
            self.untrained = torch.cat([self.untrained, rows])

    def forward(self, x, state=None):
        """x (B, L, d_model), state the number of tokens before it or None -> (1, L, d_model), the new number."""
        start = 0 if state is None else state
        end = start + x.shape[1]
        table = self.table if end <= len(self.table) else torch.cat([self.table, self.untrained])
        if end > len(table):
            raise ValueError(f"a sequence of {end} tokens is longer than the table of {len(table)} learned positions")
        return table[None, start:end], end
