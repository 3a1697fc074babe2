"""From a filter and the simplest recurrent network to gated linear recurrences, one idea at a time.

    ShortConv    y_t = w_0 x_t + w_1 x_{t-1} + ...      a memory of the last few tokens only
    RNN          h_t = tanh(A h_{t-1} + B x_t)          a state; step t waits for step t - 1
    LTI          h_t = A h_{t-1} + B x_t, A diagonal    linear: it is also one long convolution
    Retention    S_t = gamma S_{t-1} + v_t k_t^T        the state is a matrix: a key finds its value
    RGLRU        h_t = a(x_t) h_{t-1} + ...             the decay depends on the token: gates

Then mamba.py: the decay, what is written and what is read all depend on the token. Each layer maps
x (b, L, d) and a state, None at the start, to y (b, L, d) and the next state.

    symbol   meaning
    b, L     sequences in the batch, tokens in this call
    d        channels, the width of x and y
    h, S     state: RNN (b, n), LTI (b, d, N), Retention (b, H, P, P), RGLRU (b, d, 1)
    n        size of the RNN's state
    N        size of the LTI's state per channel
    H, P     heads, and channels per head
    q, k, v  query, key, value (b, L, H, P)

`python -m family.ladder` shows that a whole sequence and single steps agree, and for Retention and
RGLRU, which use the scans of other files, that they agree with the recurrence as written here.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import mamba
from family.chunks import (at_least_float32, difference, set_nan_aside, show_steps,
                           without_autocast)
from family.mamba2 import ssd
from mamba import CausalConv1d


class ShortConv(nn.Module):
    """A causal convolution of d_conv taps in each channel, nothing else.

        y_t = bias + w_0 x_t + w_1 x_{t-1} + ... + w_{d_conv - 1} x_{t - d_conv + 1}

    Mamba and most of its successors have one inside. Alone, in front of attention, it shows what
    the state adds: it marks a value with its query only up to d_conv - 1 tokens later. As a layer
    of its own: "Canon" (Allen-Zhu 2025, arXiv 2512.17351). conv1d.weight has w_0 last.
    """

    def __init__(self, d_model, d_conv=4):
        super().__init__()
        self.conv1d = CausalConv1d(d_model, d_conv)

    def forward(self, x, state=None):
        """x (b, L, d), state (b, d, d_conv - 1), the last inputs -> y (b, L, d), the next state."""
        if x.shape[1] == 0:
            return x, state
        return self.conv1d(x, state)


class RNN(nn.Module):
    """A simple recurrent network (after Elman 1990):

        h_t = tanh(A h_{t-1} + B x_t + bias)          y_t = C h_t

    n: size of the state, None for 4 d_model.
    """

    def __init__(self, d_model, n=None):
        super().__init__()
        n = 4 * d_model if n is None else n
        self.A = nn.Linear(n, n, bias=False)
        self.B = nn.Linear(d_model, n)
        self.C = nn.Linear(n, d_model, bias=False)
        nn.init.orthogonal_(self.A.weight)       # keeps the length of h, as far as tanh lets it

    def forward(self, x, state=None):
        """x (b, L, d), state h (b, n) -> y (b, L, d), the last h."""
        if x.shape[1] == 0:
            return x, state
        Bx = self.B(x)                                                   # (b, L, n)
        h = torch.zeros_like(Bx[:, 0]) if state is None else state.to(Bx.dtype)     # (b, n)
        hs = []
        for Bx_t in Bx.unbind(1):
            h = torch.tanh(self.A(h) + Bx_t)                             # (b, n)
            hs.append(h)
        return self.C(torch.stack(hs, dim=1)), h


class LTI(nn.Module):
    """A linear time-invariant state space model: S4D (Gu et al. 2022, arXiv 2206.11893), section 3.

    Each channel is a system h' = A h + B x, y = C h of N states, with A diagonal and a step dt of
    its own, during which x is constant (zero-order hold, equation 6):

        h_t = Abar h_{t-1} + Bbar x_t          Abar = exp(dt A)          Bbar = (Abar - 1) B / A
        y_t = out_proj(GELU(C h_t + D x_t))

    Nothing depends on the token, so C h is also the convolution of x with K_l = C Abar^l Bbar
    (equation 7): `recur` and `convolve` are the same function.

    Differs from S4D: A is real, not complex; no bilinear rule; no GLU after out_proj; the same
    learning rate for all parameters (S4D has a smaller one for A and dt).
    """

    def __init__(self, d_model, d_state=16):
        super().__init__()
        A = torch.arange(1.0, d_state + 1).repeat(d_model, 1)            # (d, N), S4D-Real
        self.A_log = nn.Parameter(torch.log(A))
        self.dt_log = nn.Parameter(torch.empty(d_model).uniform_(math.log(1e-3), math.log(1e-1)))
        self.B = nn.Parameter(torch.ones(d_model, d_state))
        self.C = nn.Parameter(torch.randn(d_model, d_state))
        self.D = nn.Parameter(torch.ones(d_model))
        self.out_proj = nn.Linear(d_model, d_model)      # the only place where channels meet

    def discretized(self):
        """-> dt A and Bbar, (d, N) each, at least float32."""
        A = -torch.exp(at_least_float32(self.A_log))
        dtA = torch.exp(at_least_float32(self.dt_log))[:, None] * A
        return dtA, torch.expm1(dtA) / A * self.B

    def recur(self, x, h):
        """One step at a time: x (b, L, d), h (b, d, N) -> y (b, L, d), the last h."""
        dtA, Bbar = self.discretized()
        Abar = torch.exp(dtA)                                            # (d, N)
        y = []
        for x_t in x.unbind(1):
            h = Abar * h + Bbar * x_t[..., None]                         # (b, d, N)
            y.append((self.C * h).sum(-1))                               # (b, d)
        return torch.stack(y, dim=1), h

    def convolve(self, x, h):
        """All steps at once, through the Fourier transform. Rounding errors are relative to the
        largest number of a channel, so a huge x_t also changes the last digits of earlier y."""
        (x,), nan = set_nan_aside(x)         # the transform spreads one NaN over all of a sequence
        dtA, Bbar = self.discretized()
        L, C = x.shape[1], self.C.to(dtA.dtype)
        l = torch.arange(L + 1, device=x.device)
        powers = torch.exp(dtA[..., None] * l)                           # (d, N, L+1), Abar^l
        K = torch.einsum("dn,dn,dnl->dl", C, Bbar, powers[..., :L])      # (d, L)
        # 2 L points, or the end of the convolution would wrap around to its beginning.
        product = torch.fft.rfft(x.mT, 2 * L) * torch.fft.rfft(K, 2 * L)     # (b, d, L+1)
        y = torch.fft.irfft(product, 2 * L)[..., :L]                     # (b, d, L)
        y = y + torch.einsum("dn,dnl,bdn->bdl", C, powers[..., 1:], h)   # the decayed first state
        # The write of step s = 0, 1, ... decays L - 1 - s times: the powers reversed.
        written = torch.einsum("dn,dnl,bld->bdn", Bbar, powers[..., :L].flip(-1), x)
        h = powers[..., L] * h + written                                 # (b, d, N)
        return y.mT + nan.cumsum(1)[..., None], h + nan.sum(1)[:, None, None]

    def forward(self, x, state=None):
        """x (b, L, d), state h (b, d, N) -> y (b, L, d), the last h, at least float32."""
        if x.shape[1] == 0:
            return x, state
        wide = at_least_float32(x)
        h = wide.new_zeros(len(x), *self.B.shape) if state is None else state.to(wide.dtype)
        empty = len(x) == 0                          # has no Fourier transform
        form = self.recur if x.shape[1] == 1 or empty else self.convolve
        with without_autocast(x.device):             # CUDA has no transform of bfloat16
            y, h = form(wide, h)
        y = y.to(x.dtype) + self.D * x
        return self.out_proj(F.gelu(y)), h


class Retention(nn.Module):
    """Linear attention with a fixed decay: RetNet (Sun et al. 2023, arXiv 2307.08621,
    sections 2.1 and 2.2).

        S_t = gamma S_{t-1} + v_t k_t^T          y_t = S_t q_t

    with a gamma per head, 1 - 2^-5, 1 - 2^-6, ... (equation 8), and k_t = (W_k x_t + bias) /
    sqrt(P). In parallel form y_t is the sum over s <= t of (q_t . k_s) gamma^(t-s) v_s: attention
    with a decay instead of a softmax. That is mamba2.ssd with x = v, B = k, C = q, dt = 1 and
    A = log gamma, whose chunks are the chunked form (equation 7). Then each head is normalized by
    itself and gated.

    Left out: xPos (the rotation of q and k), values twice as wide, and two normalizations of the
    scores, which the norm of each head cancels. Differs: q, k and v have biases; the norm is
    RMSNorm, as in the released code (GroupNorm in the paper), with eps 1e-5.
    """

    def __init__(self, d_model, n_heads=4):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"--d is {d_model}, but retention's {n_heads} heads must divide it")
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.gate = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, state=None):
        """x (b, L, d), state S (b, H, P, P) -> y (b, L, d), the last S."""
        if x.shape[1] == 0:
            return x, state
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)     # (b, L, H, P) each
        steps = torch.ones_like(v[..., 0])                               # (b, L, H)
        y, S = ssd(v, steps, log_gamma(self.n_heads, x), k / k.shape[-1]**0.5, q, state)
        y = F.rms_norm(y, y.shape[-1:], eps=1e-5).flatten(2)             # (b, L, d)
        return self.out_proj(F.silu(self.gate(x)) * y), S


def log_gamma(n_heads, x):
    """(H,): log gamma of each head (equation 8), on the device of x, at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    heads = torch.arange(n_heads, device=x.device, dtype=dtype)
    return torch.log1p(-2.0 ** (-5 - heads))


def retention_ref(layer, x):
    """The recurrence of a Retention layer, one step at a time: x (b, L, d) -> y (b, L, d)."""
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.n_heads, -1)).unbind(2)
    gamma = 1 - 2.0 ** (-5 - torch.arange(layer.n_heads))                # (H,)
    S, y = 0.0, []
    for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1)):     # (b, H, P) each
        written = v_t[..., None] * k_t[..., None, :] / k_t.shape[-1]**0.5
        S = gamma[:, None, None] * S + written                           # (b, H, P, P)
        y.append((S @ q_t[..., None])[..., 0])                           # (b, H, P)
    y = F.rms_norm(torch.stack(y, dim=1), q.shape[-1:], eps=1e-5).flatten(2)
    return layer.out_proj(F.silu(layer.gate(x)) * y)


class RGLRU(nn.Module):
    """Griffin's recurrent block (De et al. 2024, arXiv 2402.19427, sections 2.3 and 2.4):

        r_t = sigmoid(W_a x_t + b_a)         how strongly this token makes the state decay
        i_t = sigmoid(W_x x_t + b_x)         how much of this token is written
        a_t = a^(8 r_t)                      a = sigmoid(a_logit)
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t

    after a short convolution; then y = out_proj(GELU(z) * h), with z a second map of the input. The
    root keeps the variance of h the same for any a_t, if inputs are independent. The recurrence is
    selective_scan with N = 1, A = -1, B = C = 1, dt = -log a_t, and sqrt(1 - a_t^2) i_t x_t / dt
    for its x.

    Differs from the paper: as wide as the residual stream, not 4/3 of it; the gates' maps are full,
    not block-diagonal. Differs from the released code: there a starts in 0.9 to 0.999, here a^8
    does, as in the paper, so ours forgets eight times more slowly at first. There, GELU is the tanh
    form, the gates' biases start at 0, and the first token comes in without the root.
    """

    POWER = 8.0

    def __init__(self, d_model, d_conv=4):
        super().__init__()
        self.in_proj = nn.Linear(d_model, 2 * d_model)
        self.conv1d = CausalConv1d(d_model, d_conv)
        self.gates = nn.Linear(d_model, 2 * d_model)
        a_8 = torch.empty(d_model).uniform_(0.9, 0.999)  # where a^8 starts (paper, section 2.4)
        self.a_logit = nn.Parameter(torch.logit(a_8 ** (1 / self.POWER)))
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x, state=None):
        """x (b, L, d) -> y (b, L, d). State: the window (b, d, d_conv - 1), h (b, d, 1)."""
        if x.shape[1] == 0:
            return x, state
        window, h = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, dim=-1)                          # (b, L, d) each
        x, window = self.conv1d(x, window)
        r, i = torch.sigmoid(self.gates(x)).chunk(2, dim=-1)             # (b, L, d) each
        # selective_scan writes dt B x, so divide by dt first. The clamp avoids 0 / 0, and the
        # root's infinite slope at dt = 0; in float32, because float16 would round 1e-12 to 0.
        r, i = at_least_float32(r), at_least_float32(i)
        dt = -self.POWER * r * F.logsigmoid(at_least_float32(self.a_logit))
        dt = dt.clamp(min=1e-12)                                         # (b, L, d), -log a_t
        root = torch.sqrt(-torch.expm1(-2 * dt))                         # of 1 - a_t^2
        u = root * i * at_least_float32(x)                               # (b, L, d)
        A = -u.new_ones(u.shape[2], 1)
        ones = torch.ones_like(u[..., :1])                               # (b, L, 1), B and C
        y, h = mamba.selective_scan(u / dt, dt, A, ones, ones, h)        # (b, L, d)
        return self.out_proj(F.gelu(z) * y.to(x.dtype)), (window, h)


def rglru_ref(layer, x):
    """The recurrence of an RGLRU layer, one step at a time: x (b, L, d) -> y (b, L, d)."""
    x, z = layer.in_proj(x).chunk(2, dim=-1)
    x, _ = layer.conv1d(x)
    r, i = torch.sigmoid(layer.gates(x)).chunk(2, dim=-1)
    a = torch.sigmoid(layer.a_logit) ** (layer.POWER * r)                # (b, L, d)
    u = torch.sqrt(1 - a**2) * i * x                                     # (b, L, d)
    h, hs = 0.0, []
    for a_t, u_t in zip(a.unbind(1), u.unbind(1)):
        h = a_t * h + u_t                                                # (b, d)
        hs.append(h)
    return layer.out_proj(F.gelu(z) * torch.stack(hs, dim=1))


@torch.no_grad()
def main():
    """Compare one call, single steps and, for two layers, the recurrence; print times."""
    torch.manual_seed(0)
    x = torch.randn(4, 64, 32)
    for kind in (ShortConv, RNN, LTI, Retention, RGLRU):
        show_steps(kind(32), x)
    for kind, recurrence in ((Retention, retention_ref), (RGLRU, rglru_ref)):
        layer, wide = kind(32).double(), x.double()
        exact = recurrence(layer, wide)
        print(f"{kind.__name__:<17}one call and its recurrence, in float64    "
              f"{difference(layer(wide)[0], exact)}")


if __name__ == "__main__":
    main()
