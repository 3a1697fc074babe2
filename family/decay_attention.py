"""Attention whose scores decay, by a fixed amount per token or by one that each token sets.

ALiBi (Press et al. 2021, arXiv 2108.12409) subtracts from each score the distance between query and
key times a slope m, one per head. The forgetting transformer (FoX, Lin et al. 2025, arXiv
2503.02130) has a gate per token and head, f_t in 0 ... 1; every token after a key adds its log f,
at most 0, to the key's score:

    score_ts = q_t . k_s / sqrt(P) + log f_{s+1} + ... + log f_t
    y_t = sum over s <= t of softmax_s(score_ts) v_s

    alibi         log f_t = -m                          m = 2^(-8 h / H) for the heads h = 1 ... H
    forgetting    log f_t = log sigmoid(W x_t + b)      each token sets the decay, as in Mamba

There are no position embeddings: order comes from the decay and the mask.

    symbol   meaning
    B, L     sequences in the batch, tokens in this call
    S        tokens seen in earlier calls, now in the cache
    H, P     heads, and channels per head; d = H P
    Q        queries: all L tokens, or the last one alone

`python -m family.decay_attention` shows that one call, single steps and the definition agree.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import append_to_cache, causal_mask, check_heads
from family.chunks import difference, show_steps, widest


def decay_attention_ref(layer, x):
    """The definition, one score at a time. x (B, L, d) -> y (B, L, d)."""
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.n_heads, -1)).unbind(2)
    log_f = layer.log_f(x)
    y = torch.zeros_like(v)                                              # (B, L, H, P)
    for h in range(layer.n_heads):
        for t in range(x.shape[1]):
            scores = []
            for s in range(t + 1):
                product = (q[:, t, h] * k[:, s, h]).sum(-1)              # (B,)
                decay = log_f[:, h, s + 1:t + 1].sum(-1)                 # (B,)
                scores.append(product / math.sqrt(q.shape[-1]) + decay)
            w = torch.softmax(torch.stack(scores, dim=-1), dim=-1)       # (B, t + 1)
            y[:, t, h] = (w[..., None] * v[:, :t + 1, h]).sum(1)         # (B, P)
    return layer.out_proj(y.flatten(2))


class DecayCache(NamedTuple):
    """Keys and values of all tokens so far, and how much each has decayed since."""
    k: torch.Tensor        # (B, H, S, P)
    v: torch.Tensor        # (B, H, S, P)
    decay: torch.Tensor    # (B, H, S), log f_{s+1} + ... up to the last token; at least float32


class DecayAttention(nn.Module):
    """Multi-head causal attention with decaying scores, without a residual connection or norm.

    decay: "alibi" or "forgetting". Left out of FoX: its "Pro" block (output gate and norm, norm of
    q and k, a mix of neighbouring keys and values). Differs: q, k and v have biases, as in
    attention.py; slopes follow one formula for any H.
    """

    attends = answers_last = True        # hybrid.py explains both

    def __init__(self, d_model, n_heads=1, decay="forgetting"):
        super().__init__()
        check_heads(d_model, n_heads)
        if decay not in ("alibi", "forgetting"):
            raise ValueError(f"decay is {decay!r}, but it must be 'alibi' or 'forgetting'")
        self.n_heads, self.decay = n_heads, decay
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        if decay == "forgetting":
            self.f_proj = nn.Linear(d_model, n_heads)

    def log_f(self, x):
        """x (B, L, d) -> log f (B, H, L), at most 0, at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.decay == "forgetting":
            return F.logsigmoid(self.f_proj(x).to(dtype)).mT
        h = torch.arange(1, self.n_heads + 1, device=x.device, dtype=dtype)
        m = 2.0 ** (-8 * h / self.n_heads)                               # (H,)
        return -m[:, None].expand(x.shape[0], -1, x.shape[1])

    def forward(self, x, state=None, last_only=False):
        """Run a segment of a sequence, continuing from `state`: a DecayCache, None at the start.

        x (B, L, d) -> y (B, L, d), the longer DecayCache. last_only: y of the last token alone,
        (B, 1, d).
        """
        L = x.shape[1]
        if L == 0:
            return x, state
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)     # (B, L, H, P) each
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)        # (B, H, L, P) each

        # sums: log f summed from the start of the segment. log f_{s+1} + ... + log f_t is sums_t -
        # sums_s, so query t adds sums_t and key s adds offset_s = -sums_s. For a key of an earlier
        # call, offset is log f_{s+1} + ... to the end of the last call, and sums_t completes it.
        # float64, because differences of long float32 sums lose digits.
        log_f = self.log_f(x)                                            # (B, H, L)
        sums = log_f.to(widest(x.device)).cumsum(-1)                     # (B, H, L)
        offset = -sums                                                   # (B, H, L)
        k, v = append_to_cache(state, k, v)                              # (B, H, S+L, P) each
        if state is not None:
            offset = torch.cat([state.decay, offset], dim=2)             # (B, H, S+L)
        cache = DecayCache(k, v, (offset + sums[:, :, -1:]).to(log_f.dtype))
        if last_only:
            q, sums = q[:, :, -1:], sums[:, :, -1:]

        Q, length = q.shape[2], k.shape[2]
        bias = (sums[..., :, None] + offset[..., None, :]).to(log_f.dtype)       # (B, H, Q, S+L)
        score = q @ k.mT / math.sqrt(q.shape[-1]) + bias                 # (B, H, Q, S+L)
        seen = causal_mask(Q, length, x.device)                          # (Q, S+L)
        w = score.masked_fill(~seen, -math.inf).softmax(-1).to(v.dtype)
        y = w @ v                                                        # (B, H, Q, P)
        return self.out_proj(y.transpose(1, 2).flatten(2)), cache


@torch.no_grad()
def main():
    """Show that one call, single steps and the definition agree."""
    torch.manual_seed(0)
    for decay in ("alibi", "forgetting"):
        layer, x = DecayAttention(16, 2, decay), torch.randn(2, 24, 16)
        exact = decay_attention_ref(layer, x)
        y, _ = layer(x)
        print(f"{decay}: one call and definition  {difference(y, exact)}")
        show_steps(layer, x)


if __name__ == "__main__":
    main()
