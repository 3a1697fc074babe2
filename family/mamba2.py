"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a state space model that is also attention.

The recurrence is Mamba's, with one simplification: all channels of a head share one number A < 0 and one dt_t,

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t         y_t = C_t h_t

Unrolled, with a_ts = exp(A (dt_{s+1} + ... + dt_t)) for what is left at t of what was written at s,

    y_t = sum over s <= t of (C_t . B_s) a_ts dt_s x_s

This is attention with queries C, keys B and values dt x; where attention has a softmax, here a decay weights the past (the
paper's "duality", section 5). As a sum over all s it costs L^2, as a recurrence it takes L steps, one after another; ssd below
is between the two, and made of matrix products, for which a GPU is built:

    ssd_ref     the recurrence, one step at a time
    ssd         chunks of T steps: attention within a chunk, the recurrence from chunk to chunk (section 6)
    Mamba2      the layer, which goes on from where an earlier piece of the sequence ended

Imports fused_scan, for its way to cut time, and mamba, for its convolution; hybrid and ladder use it.

Letters as in mamba.py, and H heads, P channels in a head, G groups of heads that share B and C, c chunks of T steps.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from fused_scan import split
from mamba import causal_conv


def ssd_ref(x, dt, A, B, C, h=None):
    """The recurrence, in any dtype; autograd finds the gradient.

    x (b, L, H, P); dt (b, L, H); A (H,), negative; B, C (b, L, G, N), G a divisor of H; h (b, H, P, N), the state before the
    first step, or None for zero. Returns y (b, L, H, P) and the state after the last step (b, H, P, N).
    The official counterpart is ssd_minimal_discrete / mamba_chunk_scan_combined, less its D, z and softplus.
    """
    heads = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(heads, 2), C.repeat_interleave(heads, 2)                # (b, L, H, N)
    if h is None:
        h = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])                # (b, H, P, N)
    y = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]                               # (b, H, 1, 1)
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]    # (b, H, P, N)
        y.append((h @ C[:, t, ..., None])[..., 0])                                     # (b, H, P)
    return torch.stack(y, dim=1), h


def ssd(x, dt, A, B, C, h=None, T=None):
    """ssd_ref in chunks of at most T steps: same arguments, same results, same gradients, to rounding.

    A GPU likes few large products best, and for a CPU a larger T is more arithmetic: T, if not given, is 64 on the one, or all
    of up to 128 steps, and 16 on the other.
    """
    L, (H, P), (G, N) = x.shape[1], x.shape[2:], B.shape[2:]
    T = T or (16 if not x.is_cuda else L if L <= 128 else 64)
    # A step that decays by exp(-40) has forgotten everything; a larger number would only swallow the digits of its neighbours.
    u, log_decay, B, C = (split(v, T).transpose(2, 3) for v in (dt[..., None] * x, (dt * A).clamp(min=-40), B, C))
    chunks = u.shape[1]                                        # u (b, c, H, T, P), log_decay (b, c, H, T), B, C (b, c, G, T, N)
    def of_heads(v):                                           # what the heads of a group share, for each of them
        return v.repeat_interleave(H // G, 2) if 1 < G < H else v

    # (1) Within a chunk: attention, with a_ts from differences of running sums. Each is <= 0 where s <= t, so nothing overflows;
    # a CPU's exp is slow below exp(-80), which is as good as 0.
    sums = log_decay.cumsum(-1)                                                        # (b, c, H, T)
    a = (sums[..., :, None] - sums[..., None, :]).clamp(-80, 0).exp().tril()           # (b, c, H, T, T)
    y = (of_heads(C @ B.mT) * a) @ u                                                   # (b, c, H, T, P)

    # (2) What a chunk adds to the state by its end, and the recurrence from chunk to chunk.
    left = (sums[..., -1:] - sums).clamp(min=-80).exp()[..., None]                     # (b, c, H, T, 1)
    ends = (left * u).mT @ of_heads(B)                                                 # (b, c, H, P, N)
    decay = sums[..., -1].clamp(min=-80).exp()[..., None, None]                        # (b, c, H, 1, 1)
    from_zero, starts = h is None, []
    h = x.new_zeros(x.shape[0], H, P, N) if from_zero else h
    for k in range(chunks):
        starts.append(h)
        h = decay[:, k] * h + ends[:, k]

    # (3) What a chunk's first state adds to its outputs: nothing, if there is one chunk, from zero.
    if chunks > 1 or not from_zero:
        y = y + sums.clamp(min=-80).exp()[..., None] * (of_heads(C) @ torch.stack(starts, dim=1).mT)
    return y.transpose(2, 3).flatten(1, 2)[:, :L], h


class Mamba2State(NamedTuple):
    """All that a Mamba-2 layer remembers of the tokens so far. Its size does not depend on how many they were."""
    conv: torch.Tensor  # (b, d_inner + 2 G N, d_conv - 1), the convolution's window
    h: torch.Tensor     # (b, H, P, N)


def normed(v, eps=1e-5):
    """v / sqrt(mean of v^2) over the last dimension, in plain operations, which torch.compile fuses with others."""
    return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)


class GatedNorm(nn.Module):
    """RMSNorm of y * SiLU(z), each group of channels by itself. The official RMSNormGated with norm_before_gate=False."""

    def __init__(self, d, groups=1):
        super().__init__()
        self.groups, self.weight = groups, nn.Parameter(torch.ones(d))

    def forward(self, y, z):
        y = (y * F.silu(z)).unflatten(-1, (self.groups, -1))
        return normed(y).flatten(-2) * self.weight


class Mamba2(nn.Module):
    r"""The Mamba-2 layer (section 7.1, figure 6), without a residual or a norm before it.

            x -> in_proj -> x, B, C -> causal convolution -> SiLU -> ssd -> gated norm -> out_proj -> y
                        \-> dt -> softplus --------------------------/       /
                        \-> z ----------------------------------------------/

    In Mamba, dt, B and C are computed from the convolved x. Here one map of the input makes z, x, B, C and dt at once, and x, B
    and C then pass through the convolution.
    d_inner = expand * d_model channels, in heads of headdim; d_state: N; ngroups: G. Names, shapes and initial values are
    those of mamba_ssm.Mamba2 with its default arguments: state dicts move between the two.
    """

    takes_bias = True

    def __init__(self, d_model, d_state=128, d_conv=4, expand=2, headdim=64, ngroups=1):
        super().__init__()
        self.d_inner, self.d_state, self.d_conv = expand * d_model, d_state, d_conv
        self.headdim, self.ngroups, self.nheads = headdim, ngroups, expand * d_model // headdim
        if self.nheads * headdim != self.d_inner or self.nheads % ngroups:
            raise ValueError(f"headdim {headdim} must divide {self.d_inner} channels into a multiple of {ngroups} heads")
        channels = self.d_inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + channels + self.nheads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1)
        dt = torch.exp(torch.empty(self.nheads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(torch.log(torch.expm1(dt)))
        self.A_log = nn.Parameter(torch.log(torch.empty(self.nheads).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = GatedNorm(self.d_inner, ngroups)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, x, state=None):
        """x (b, L, d_model), state a Mamba2State or None at the start -> y (b, L, d_model), the state after the last token."""
        GN = self.ngroups * self.d_state
        z, x, dt = self.in_proj(x).split([self.d_inner, self.d_inner + 2 * GN, self.nheads], dim=-1)
        x, window = causal_conv(x, self.conv1d, None if state is None else state.conv)
        x, B, C = F.silu(x).split([self.d_inner, GN, GN], dim=-1)
        x = x.unflatten(-1, (self.nheads, self.headdim))                               # (b, L, H, P)
        B, C = (v.unflatten(-1, (self.ngroups, self.d_state)) for v in (B, C))         # (b, L, G, N)
        dt, A = F.softplus(dt + self.dt_bias), -torch.exp(self.A_log)                  # (b, L, H), (H,)
        y, h = ssd(x, dt, A, B, C, None if state is None else state.h)
        y = (y + self.D[:, None] * x).flatten(2)                                       # (b, L, d_inner)
        return self.out_proj(self.norm(y, z)), Mamba2State(window, h)
