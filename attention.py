"""Causal self-attention with a key-value cache, and two ways to tell it the order of the tokens.

Every token t has a query, a key and a value. Its output is a mean of the values of all tokens up to
itself, weighted by how well their keys match its query (Vaswani et al. 2017, section 3.2):

    y_t = sum over s <= t of w_ts v_s          w_ts = softmax over s of q_t . k_s / sqrt(P)

The output at t costs t dot products, and the keys and values of all tokens stay in memory. This
state grows with the context; that of a state space model has a fixed size.

    symbol   meaning
    B        sequences in the batch
    L        tokens in this call
    Q        the last Q queries of this call: all L, or the last one alone
    S        tokens of earlier calls, in the cache
    H, P     heads, and channels per head; d = H P

In the formula, only the mask s <= t depends on the order of tokens. Positions can add to that:

    position="none"     nothing is added
    position="rope"     the query and the key are rotated by an angle proportional to their position
    LearnedPosition     a layer of its own, which adds a trained vector per absolute position

family/attention_variants.py has a sliding window, shared keys and values, and other angles.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class KVCache(NamedTuple):
    """The state of attention: keys, already rotated, and values of all tokens so far. (In
    SlidingWindow: of the last, and not rotated.)"""
    k: torch.Tensor      # (B, H, S, P)
    v: torch.Tensor      # (B, H, S, P)


class Attention(nn.Module):
    """Multi-head causal self-attention, without a residual connection or a norm.

    d_model: width of x and y; n_heads must divide it, and rope needs heads of even size.
    recency: with rope, the initial value of the biases of q and k, None for torch's own. Equal
        biases add a term that depends on distance alone. It is highest at 0, lower far away on
        average, and oscillates: with P = 8, a key 6 tokens back scores above the previous one.

    The maps to q, k and v have a bias, which is the same for every token. At d = 8, recall needs
    it: a head that looks at the previous token, whatever it is, needs queries and keys that do not
    depend on the token. A linear map can send all 16 embeddings to one vector only if that is the
    zero vector.
    """

    attends = True       # hybrid.py: the norms' biases start random; eval.py: room for scores
    answers_last = True  # forward takes last_only
    scale = 1.0          # of positions; report/interpolate.py lowers it in long contexts

    def __init__(self, d_model, n_heads=1, position="none", recency=None):
        super().__init__()
        check_heads(d_model, n_heads, position)
        self.n_heads, self.position = n_heads, position
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        if recency is not None and position == "rope":
            nn.init.constant_(self.qkv.bias[:2 * d_model], recency)      # of q and k

    def heads(self, qkv):
        """The output of self.qkv, (B, L, 3 d) -> q, k and v, (B, H, L, P) each."""
        q, k, v = qkv.chunk(3, dim=-1)                                   # (B, L, d) each
        q = q.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)          # (B, H, L, P)
        k = k.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)          # (B, H, L, P)
        v = v.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)          # (B, H, L, P)
        return q, k, v

    def rotate(self, x, start):
        """x (B, H, L, P), its first token at position `start` -> x with rotary positions."""
        return rotary(x, start, scale=self.scale)

    def forward(self, x, state=None, last_only=False):
        """Run a segment of a sequence, continuing from `state`: a KVCache, None at the start.

        x (B, L, d) -> y (B, L, d), the longer KVCache. last_only: y of the last token alone,
        (B, 1, d), from 1/L of the scores. A NaN in a token can spoil outputs before it, too:
        masked scores have weight 0, but 0 times NaN is NaN.
        """
        if x.shape[1] == 0:
            return x, state
        q, k, v = self.heads(self.qkv(x))
        S = 0 if state is None else state.k.shape[2]
        if self.position == "rope":      # q and k in one call: fewer operations
            both = self.rotate(torch.cat([q, k], dim=1), S)              # (B, 2 H, L, P)
            q, k = both.split([q.shape[1], k.shape[1]], dim=1)
        cache = append_to_cache(state, k, v)
        if last_only:
            q = q[:, :, -1:]                                             # (B, H, 1, P)
        y = self.attend(q, cache.k, cache.v)                             # (B, H, Q, P)
        return self.out_proj(y.transpose(1, 2).flatten(2)), cache        # (B, Q, d)

    def attend(self, q, k, v, mask=None):
        """q (B, H, Q, P), the last Q queries; k, v (B, H, S+L, P) -> y (B, H, Q, P).

        mask (Q, S+L) bool: the keys that a query sees; None for all keys up to its own token.
        """
        Q, length = q.shape[2], k.shape[2]
        # A single query sees all keys. The first segment, Q = S + L, is masked by is_causal. In a
        # later one, is_causal would let the first query see one key only, so it gets a mask.
        if mask is None and 1 < Q < length:
            mask = self.mask(Q, length, q.device)
        causal = mask is None and Q > 1
        # The call computes the following; a fused kernel, where torch has one, stores no scores.
        #     score = q @ k.mT / sqrt(P), -inf where the mask is False   (B, H, Q, S+L)
        #     y = softmax(score) @ v                                     (B, H, Q, P)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    def mask(self, Q, length, device):
        """(Q, length) bool: the keys that each of the last Q tokens sees. A window overrides it;
        inside.py asks for it, too."""
        return causal_mask(Q, length, device)


def causal_mask(Q, length, device):
    """(Q, length) bool: each of the last Q tokens sees the keys up to its own."""
    return torch.ones(Q, length, dtype=torch.bool, device=device).tril(length - Q)


def append_to_cache(state, k, v):
    """The cache with the keys and values of a segment added."""
    if state is not None:
        k = torch.cat([state.k.to(k.dtype), k], dim=2)
        v = torch.cat([state.v.to(v.dtype), v], dim=2)
        return KVCache(k, v)
    # Copies: k and v can be views of a larger tensor, which would stay in memory.
    return KVCache(k.clone(), v.clone())


def rotary(x, start, base=10000.0, scale=1.0):
    """Rotate the channels of each head by their token's position (RoFormer, Su et al. 2021, section
    3.2.2).

    Channels j and j + P/2 are the coordinates of a point; at position t it turns by the angle
    t base^(-2j/P). The product of a query at t and a key at s then depends on position only through
    t - s. The paper pairs channels 2j and 2j + 1, which only reorders the channels.
    scale: positions are multiplied by it; below 1, a longer context has the angles of a shorter one
    (position interpolation, Chen et al. 2023, arXiv 2306.15595).

    x (..., L, P), the first token at position `start` (from 0) -> the same shape. Angles are
    computed in float64, if the device has it: in float32, with P = 128, they are off by up to 0.06
    at position 10^6, and above 2^24 neighbouring positions get the same angle.
    """
    P = x.shape[-1]
    wide = torch.float32 if x.device.type == "mps" else torch.float64    # Apple's GPUs have none
    t = torch.arange(start, start + x.shape[-2], device=x.device, dtype=wide)
    frequency = base ** (-torch.arange(0, P, 2, device=x.device, dtype=wide) / P)
    angle = scale * t[:, None] * frequency                               # (L, P/2)
    cos = angle.cos().to(x.dtype)
    sin = angle.sin().to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)                                          # (..., L, P/2) each
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


def check_heads(d_model, n_heads, position="none"):
    """Raise a ValueError of one sentence if attention cannot have these heads."""
    if n_heads < 1 or d_model % n_heads:
        raise ValueError(f"--n-heads is {n_heads}, but it must divide the width {d_model}")
    if position not in ("none", "rope"):
        raise ValueError(f"position is {position!r}, but it must be 'none' or 'rope'")
    if position == "rope" and (d_model // n_heads) % 2:
        raise ValueError(f"--d is {d_model}, but with --n-heads {n_heads} this gives heads of odd "
                         f"size {d_model // n_heads}, and rope rotates pairs of channels")


class LearnedPosition(nn.Module):
    """A trained vector per absolute position: a layer whose output does not depend on x's values.

    positions: rows of the table. Rows beyond the training length get no gradient, so a model fails
    there; a sequence longer than the table is a ValueError. Rows start with length 0.1, a tenth of
    the embeddings': in a search, `learned` so solved tau = 5 in 3 of 8 runs; with length 1 in none.
    """

    skips_norm = True

    def __init__(self, d_model, positions):
        super().__init__()
        self.table = nn.Parameter(random_rows(positions, d_model))
        self.register_buffer("extra_rows", torch.empty(0, d_model), persistent=False)

    def extend_positions(self, positions):
        """Make room for this many positions. The new rows are random and stay so: they are neither
        parameters nor part of the state dict."""
        missing = positions - len(self.table) - len(self.extra_rows)
        if missing > 0:
            rows = random_rows(missing, self.table.shape[1]).to(self.extra_rows)
            self.extra_rows = torch.cat([self.extra_rows, rows])

    def forward(self, x, state=None):
        """x (B, L, d), state: the number of earlier tokens or None -> (1, L, d), the new number."""
        start = 0 if state is None else state
        end = start + x.shape[1]
        table = self.table
        if end > len(table):
            table = torch.cat([table, self.extra_rows])
        if end > len(table):
            raise ValueError(f"a sequence of {end} tokens is longer than the table of {len(table)} "
                             "positions")
        return table[None, start:end], end


def random_rows(positions, d):
    """(positions, d), rows of length about 0.1."""
    return 0.1 * torch.randn(positions, d) / d**0.5


def main():
    """Check one call and decode steps against the formula, and rope against a shift."""
    torch.manual_seed(0)
    layer, x = Attention(8, n_heads=2).double(), torch.randn(1, 6, 8).double()
    q, k, v = layer.heads(layer.qkv(x))
    y = torch.zeros_like(q)
    for t in range(6):
        score = q[:, :, t:t + 1] @ k[:, :, :t + 1].mT / q.shape[-1]**0.5
        w = torch.softmax(score, dim=-1)
        y[:, :, t:t + 1] = w @ v[:, :, :t + 1]
    y = layer.out_proj(y.transpose(1, 2).flatten(2))
    difference = (layer(x)[0] - y).abs().max()
    print(f"one call against the formula:  largest difference {difference:.0e}")
    for name, size in ("decode steps with the cache:", 1), ("segments of four tokens:", 4):
        state, segments = None, []
        for segment in x.split(size, dim=1):
            y_segment, state = layer(segment, state)
            segments.append(y_segment)
        difference = (torch.cat(segments, dim=1) - y).abs().max()
        print(f"{name:<31}largest difference {difference:.0e}")
    numbers = state.k.numel() + state.v.numel()
    print(f"the cache after 6 tokens: {numbers} numbers, {numbers // 6} per token")
    q, k = torch.randn(2, 1, 8).double()                     # one query and one key
    scores = [rotary(q, t) @ rotary(k, t - 3).mT for t in (3, 1000)]
    difference = (scores[0] - scores[1]).abs().max()
    print(f"rope, a key 3 tokens back: same score at t = 3 and 1,000, difference {difference:.0e}")


if __name__ == "__main__":
    main()
