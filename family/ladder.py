"""From a filter and the simplest recurrent network to gated linear recurrences, one idea at a time.

    ShortConv    y_t = w_0 x_t + w_1 x_{t-1} + ...      a memory of the last few tokens only
    RNN          h_t = tanh(A h_{t-1} + B x_t)          a state; a loop that nothing can shorten
    LTI          h_t = A h_{t-1} + B x_t, A diagonal    linear: it is also one long convolution
    Retention    S_t = gamma S_{t-1} + v_t k_t^T        the state is a matrix, to look things up in
    RGLRU        h_t = a_t h_{t-1} + ..., a_t of x_t    the decay depends on the token: gates

Then mamba.py: the decay, what is written and what is read all depend on the token. Each layer maps
x (b, L, d) and a state, None at the start, to y (b, L, d) and the next state.

    symbol   meaning
    b, L     sequences in the batch, tokens in this call
    d        channels, the width of x and y
    n, N     size of the RNN's state, size of the state per channel
    H, P     heads, and channels per head

`python -m family.ladder` shows that a whole sequence and single steps agree, and the times of both.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from family.chunks import at_least_float32, set_nan_aside, show_steps
from family.mamba2 import ssd
from mamba import CausalConv1d, selective_scan


class ShortConv(nn.Module):
    """A causal convolution of d_conv taps in each channel, nothing else.

        y_t = bias + w_0 x_t + w_1 x_{t-1} + ... + w_{d_conv - 1} x_{t - d_conv + 1}

    Mamba and most of its successors have one inside. Alone, in front of attention, it shows what
    the state adds: it reaches d_conv - 1 tokens back, so a value that comes later than that after
    its query is out of reach. As a layer of its own: "Canon" (Allen-Zhu 2025, arXiv 2512.17351).
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
    """Elman's network (1990): h_t = tanh(A h_{t-1} + B x_t + bias), y_t = C h_t.

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
        h = torch.zeros_like(Bx[:, 0]) if state is None else state       # (b, n)
        hs = []
        for Bx_t in Bx.unbind(1):
            h = torch.tanh(self.A(h) + Bx_t)                             # (b, n)
            hs.append(h)
        return self.C(torch.stack(hs, dim=1)), h


class LTI(nn.Module):
    """A linear time-invariant state space model: S4D (Gu et al. 2022, arXiv 2206.11893), section 3.

    Each channel is a system h' = A h + B x, y = C h with N states and A diagonal, over a step dt of
    its own in which x does not change (zero-order hold, equation 6):

        h_t = Abar h_{t-1} + Bbar x_t          Abar = exp(dt A)          Bbar = (Abar - 1) B / A

    Nothing depends on the token, so y is also the convolution of x with K_l = C Abar^l Bbar
    (equation 7): `recur` and `convolve` are the same function.

    Differs from S4D: A is real, not complex; no bilinear rule; no gate after the output's map; one
    learning rate for all parameters, where S4D has a smaller one for A and dt.
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

    def discretised(self):
        """-> dt A and Bbar, (d, N) each, at least float32."""
        A = -torch.exp(at_least_float32(self.A_log))
        dtA = torch.exp(at_least_float32(self.dt_log))[:, None] * A
        return dtA, torch.expm1(dtA) / A * self.B

    def recur(self, x, h):
        """One step at a time: x (b, L, d), h (b, d, N) -> y (b, L, d), the last h."""
        dtA, Bbar = self.discretised()
        y = []
        for x_t in x.unbind(1):
            h = torch.exp(dtA) * h + Bbar * x_t[..., None]               # (b, d, N)
            y.append((self.C * h).sum(-1))                               # (b, d)
        return torch.stack(y, dim=1), h

    def convolve(self, x, h):
        """All steps at once, through the Fourier transform; the same results."""
        (x,), nan = set_nan_aside(x)         # the transform spreads one NaN over all of a sequence
        dtA, Bbar = self.discretised()
        L, C = x.shape[1], self.C.to(dtA.dtype)
        powers = dtA[..., None] * torch.arange(L + 1, device=x.device)
        powers = torch.exp(powers)                                       # (d, N, L+1), Abar^l
        K = torch.einsum("dn,dn,dnl->dl", C, Bbar, powers[..., :L])      # (d, L)
        # 2 L points, or the end of the convolution would wrap around to its beginning.
        y = torch.fft.irfft(torch.fft.rfft(x.mT, 2 * L) * torch.fft.rfft(K, 2 * L), 2 * L)[..., :L]
        y = y + torch.einsum("dn,dnl,bdn->bdl", C, powers[..., 1:], h)   # the decayed first state
        inputs = torch.einsum("dn,dnl,bld->bdn", Bbar, powers[..., :L].flip(-1), x)
        y = y.mT + nan.cumsum(1)[..., None]                              # (b, L, d)
        return y, powers[..., L] * h + inputs + nan.sum(1)[:, None, None]    # h (b, d, N)

    def forward(self, x, state=None):
        """x (b, L, d), state h (b, d, N) -> y (b, L, d), the last h, at least float32."""
        if x.shape[1] == 0:
            return x, state
        wide = at_least_float32(x)
        h = wide.new_zeros(len(x), *self.B.shape) if state is None else state
        one_step = x.shape[1] == 1 or len(x) == 0    # a batch of 0 has no Fourier transform
        form = self.recur if one_step else self.convolve
        y, h = form(wide, h)
        y = y.to(x.dtype) + self.D * x
        return self.out_proj(F.gelu(y)), h


class Retention(nn.Module):
    """Linear attention with a fixed decay: RetNet (Sun et al. 2023, arXiv 2307.08621,
    sections 2.1 and 2.2).

        S_t = gamma S_{t-1} + v_t k_t^T          y_t = S_t q_t

    with a gamma per head, 1 - 2^-5, 1 - 2^-6, ... (equation 8). In parallel form y_t is the sum
    over s <= t of (q_t . k_s) gamma^(t-s) v_s: attention whose softmax has become a decay. That is
    mamba2.ssd with x = v, B = k, C = q and the same step for every token, and so is the chunked
    form (equation 7). Then each head is normed by itself and gated.

    Left out: xPos, the rotation of q and k; values twice as wide; the two normalisations of the
    scores, which cancel in the norm of the head. Differs: q, k and v have biases; the norm's eps is
    1e-5.
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
        dtype = torch.promote_types(x.dtype, torch.float32)
        heads = torch.arange(self.n_heads, device=x.device, dtype=dtype)
        log_gamma = torch.log1p(-2.0 ** (-5 - heads))                    # (H,)
        steps = torch.ones_like(v[..., 0])                               # (b, L, H)
        y, S = ssd(v, steps, log_gamma, k / k.shape[-1]**0.5, q, state)
        y = F.rms_norm(y, y.shape[-1:], eps=1e-5).flatten(2)             # (b, L, d)
        return self.out_proj(F.silu(self.gate(x)) * y), S


class RGLRU(nn.Module):
    """Griffin's recurrent block (De et al. 2024, arXiv 2402.19427, sections 2.3 and 2.4):

        r_t = sigmoid(W_a x_t + b_a)         how much of the state this token lets decay
        i_t = sigmoid(W_x x_t + b_x)         how much of this token comes in
        a_t = a^(8 r_t)                      a = sigmoid(a_logit)
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t

    in each channel by itself, after a short convolution, and then y = out_proj(GELU(z) * h). The
    root keeps the size of h the same whatever a_t is. It is selective_scan with one state per
    channel and dt = -log a_t.

    Differs from the paper: as wide as the residual stream, not 4/3 of it; the gates' maps are full,
    not block-diagonal. Differs from the released code: there a starts in 0.9 to 0.999, here a^8
    does (as the paper says), so that memory is eight times longer at the start; there GELU is the
    tanh form, the gates' biases start at 0, and the first token comes in without the root.
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
        # selective_scan takes in dt B x, so divide by dt first. At dt = 0 that would be 0 / 0, and
        # the root would have no derivative. In half precision 1e-12 would be 0.
        r, i, u = at_least_float32(r), at_least_float32(i), at_least_float32(x)
        dt = -self.POWER * r * F.logsigmoid(at_least_float32(self.a_logit))
        dt = dt.clamp(min=1e-12)                                         # (b, L, d), -log a_t
        u = torch.sqrt(-torch.expm1(-2 * dt)) * i * u                    # the root of 1 - a_t^2
        A = -u.new_ones(u.shape[2], 1)
        ones = torch.ones_like(u[..., :1])                               # (b, L, 1), B and C
        y, h = selective_scan(u / dt, dt, A, ones, ones, h)              # (b, L, d)
        return self.out_proj(F.gelu(z) * y.to(x.dtype)), (window, h)


@torch.no_grad()
def main():
    """Show that a whole sequence and single steps agree, and their times."""
    torch.manual_seed(0)
    torch.set_num_threads(1)     # for operations this small; two may be far slower
    x = torch.randn(4, 64, 32)
    for kind in (ShortConv, RNN, LTI, Retention, RGLRU):
        show_steps(kind(32), x)


if __name__ == "__main__":
    main()
