"""From the simplest recurrent network to gated linear recurrences: one new idea at a time.

    RNN          h_t = tanh(A h_{t-1} + B x_t), y_t = C h_t           a state, and a loop that nothing can shorten
    LTI          the same without tanh and with a diagonal A          linear, so it is also one long convolution
    Retention    the state is a matrix, sum of decayed k v            queries, keys and values: a memory to look things up in
    RGLRU        the decay depends on the token                       gates: what to keep, what to let in

mamba.py goes on from there: there the decay, what is written and what is read all depend on the token. Each layer maps
x (b, L, d) and a state to y (b, L, d) and the next state, as every layer here does.

Imports mamba and mamba2, whose scans it uses; hybrid stacks the layers.

Letters as in mamba.py and mamba2.py.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from mamba import causal_conv, selective_scan
from family.mamba2 import normed, ssd


class RNN(nn.Module):
    """Elman's network (1990): h_t = tanh(A h_{t-1} + B x_t + bias), y_t = C h_t. Its state is h (b, n)."""

    def __init__(self, d_model, n=None):
        super().__init__()
        n = 4 * d_model if n is None else n
        self.A = nn.Linear(n, n, bias=False)
        self.B = nn.Linear(d_model, n)
        self.C = nn.Linear(n, d_model, bias=False)
        nn.init.orthogonal_(self.A.weight)                     # what goes round keeps its length, as far as tanh lets it

    def forward(self, x, state=None):
        h = x.new_zeros(len(x), self.A.in_features) if state is None else state        # (b, n)
        Bx, hs = self.B(x), []                                                         # (b, L, n)
        for t in range(x.shape[1]):
            h = torch.tanh(self.A(h) + Bx[:, t])
            hs.append(h)
        return self.C(torch.stack(hs, dim=1)), h


class LTI(nn.Module):
    """A linear state space model that treats every token alike: S4D (Gu et al. 2022, arXiv 2206.11893), section 3, real version.

    Each channel is a system h' = A h + B x, y = C h with N states, A diagonal, over a step dt of its own in which x does not
    change (zero-order hold, equation 6): h_t = Abar h_{t-1} + Bbar x_t, Abar = exp(dt A), Bbar = (Abar - 1) / A B. With
    nothing that depends on the token, y is the convolution of x with K_l = C Abar^l Bbar (equation 7): `convolve` and `recur`
    are the same function. Left out: complex A, the bilinear rule, the gate after the output's map, and a smaller learning rate
    for A and dt.
    """

    def __init__(self, d_model, d_state=16):
        super().__init__()
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(d_model, 1))        # (d, N), S4D-Real
        self.dt_log = nn.Parameter(torch.empty(d_model).uniform_(math.log(1e-3), math.log(1e-1)))      # (d,)
        self.B = nn.Parameter(torch.ones(d_model, d_state))
        self.C = nn.Parameter(torch.randn(d_model, d_state))
        self.D = nn.Parameter(torch.ones(d_model))
        self.out_proj = nn.Linear(d_model, d_model)            # the only place where channels meet

    def discretised(self):
        """-> dt A, Bbar: (d, N) each."""
        A = -torch.exp(self.A_log)
        dtA = torch.exp(self.dt_log)[:, None] * A
        return dtA, torch.expm1(dtA) / A * self.B

    def recur(self, x, h):
        """One step at a time: x (b, L, d), h (b, d, N) -> y (b, L, d), the last h."""
        (dtA, Bbar), y = self.discretised(), []
        for x_t in x.unbind(1):
            h = torch.exp(dtA) * h + Bbar * x_t[..., None]                             # (b, d, N)
            y.append((self.C * h).sum(-1))                                             # (b, d)
        return torch.stack(y, dim=1), h

    def convolve(self, x, h):
        """All steps at once, through the Fourier transform: the same."""
        (dtA, Bbar), L = self.discretised(), x.shape[1]
        left = torch.exp(dtA[..., None] * torch.arange(L + 1, device=x.device))        # (d, N, L+1), Abar^l
        K = torch.einsum("dn,dn,dnl->dl", self.C, Bbar, left[..., :L])                 # (d, L)
        y = torch.fft.irfft(torch.fft.rfft(x.mT, 2 * L) * torch.fft.rfft(K, 2 * L), 2 * L)[..., :L]    # (b, d, L)
        y = y + torch.einsum("dn,dnl,bdn->bdl", self.C, left[..., 1:], h)              # what was there before
        h = left[..., L] * h + torch.einsum("dn,dnl,bld->bdn", Bbar, left[..., :L].flip(-1), x)        # x_l has decayed L-1-l steps
        return y.mT, h

    def forward(self, x, state=None):
        h = x.new_zeros(len(x), *self.B.shape) if state is None else state             # (b, d, N)
        y, h = (self.recur if x.shape[1] == 1 else self.convolve)(x, h)
        return self.out_proj(F.gelu(y + self.D * x)), h


class Retention(nn.Module):
    """Linear attention with a fixed decay: RetNet (Sun et al. 2023, arXiv 2307.08621), sections 2.1 and 2.2.

        S_t = gamma S_{t-1} + k_t^T v_t         y_t = q_t S_t         (k_t, v_t and q_t are rows)

    with a gamma for each head, 1 - 2^-5, 1 - 2^-6, ... (equation 8). In its parallel form y_t is the sum over s <= t of
    (q_t . k_s) gamma^(t-s) v_s: attention whose softmax has become a decay. This is mamba2.ssd with x = v, B = k, C = q and
    steps that do not depend on the token, so its chunked form (equation 7) is the one there. Then, as in the paper, each
    head is normed by itself and gated. The state kept is the transpose of S. Left out: xPos, the rotation of q and k; values twice
    as wide; two more normalisations of the scores.
    """

    def __init__(self, d_model, n_heads=4):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d is {d_model}, but retention needs a multiple of its {n_heads} heads")
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.gate = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.register_buffer("log_gamma", torch.log1p(-2.0 ** (-5 - torch.arange(n_heads))), persistent=False)        # (H,)

    def forward(self, x, state=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)           # (b, L, H, P) each
        steps = torch.ones_like(v[..., 0])                                             # (b, L, H)
        y, S = ssd(v, steps, self.log_gamma.to(v), k / k.shape[-1]**0.5, q, state)
        return self.out_proj(F.silu(self.gate(x)) * normed(y).flatten(2)), S


class RGLRU(nn.Module):
    """Griffin's recurrent block (De et al. 2024, arXiv 2402.19427), sections 2.3 and 2.4, around its gated recurrence:

        r_t = sigmoid(W_a x_t + b_a)         how much of the state this token lets decay
        i_t = sigmoid(W_x x_t + b_x)         how much of this token comes in
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t,         a_t = a^(8 r_t),         a = sigmoid(a_logit)

    for each channel by itself, and then y = out_proj(GELU(z) * h). The root keeps the size of h the same whatever a_t is. This
    is selective_scan with one state a channel and dt = -log a_t, so the fast scans are those of mamba.py. What differs: the
    block is as wide as the stream, not 4/3 of it, and the gates' maps are full, not block-diagonal.
    """

    POWER = 8.0

    def __init__(self, d_model, d_conv=4):
        super().__init__()
        self.in_proj = nn.Linear(d_model, 2 * d_model)
        self.conv1d = nn.Conv1d(d_model, d_model, d_conv, groups=d_model)
        self.gates = nn.Linear(d_model, 2 * d_model)
        a = torch.empty(d_model).uniform_(0.9, 0.999)          # where a^8 starts (section 2.4)
        self.a_logit = nn.Parameter(torch.logit(a ** (1 / self.POWER)))
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x, state=None):
        """The state is the convolution's window (b, d, d_conv - 1) and h (b, d, 1)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)                                        # (b, L, d) each
        window, h = (None, None) if state is None else state
        x, window = causal_conv(x, self.conv1d, window)
        r, i = torch.sigmoid(self.gates(x)).chunk(2, dim=-1)                           # (b, L, d) each
        # selective_scan takes in dt B x, so divide by dt first; dt = 0 would be 0 / 0, and an infinite slope of the root.
        dt = (-self.POWER * r * F.logsigmoid(self.a_logit)).clamp(min=1e-12)           # (b, L, d), -log a_t
        u = torch.sqrt(-torch.expm1(-2 * dt)) * i * x                                  # 1 - a^2 without loss of digits
        B = C = torch.ones_like(x[..., :1])                                            # (b, L, 1)
        y, h = selective_scan(u / dt, dt, -torch.ones_like(x[0, 0, :, None]), B, C, h)
        return self.out_proj(F.gelu(z) * y), (window, h)
