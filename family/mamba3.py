"""Mamba-3 (Lahoti et al. 2026, arXiv 2603.15569): a better discretization, a state that rotates.

The differential equation is that of Mamba-2, h' = A h + B x, y = C h. Two changes are small: the
token sets A, too, and B and C get a norm and a bias. Three are large:

1. The trapezoidal rule. What enters the state in a step is an integral over the step. Mamba takes
   dt times its integrand at the end, dt_t B_t x_t. Mamba-3 takes a weighted mean of both ends, with
   a weight lambda_t in 0 ... 1 for the end, which the token chooses. lambda = 1 is Mamba-2's rule;
   with 1/2 the error over a sequence is of order dt^2, not dt. x_{t-1} enters step t, too, and B
   and C have biases; so the paper drops the short convolution.
2. A complex state. Pairs of states turn by angles that the token chooses, of at most pi dt. A state
   that turns by pi for a 1 (dt has to grow above 1) and stays for a 0 knows the parity of a
   sequence; one that only decays cannot.
3. More inputs and outputs (MIMO). With rank R, a token writes R outer products and reads R times;
   B_t x_t below is their sum. Decoding is limited by moving the state through memory, so this
   arithmetic costs little time.

    h_t = exp(dt_t A_t) Q_t (h_{t-1} + before_t B_{t-1} x_{t-1}) + now_t B_t x_t
    y_t = C_t h_t               before_t = (1 - lambda_t) dt_t          now_t = lambda_t dt_t

where Q_t rotates pairs of states back by the token's angles. Rotations of a pair add up. Let
Phi_t rotate by the sum of all angles up to t, so that Phi_t Q_t = Phi_{t-1}. Then Phi_t h_t obeys
the recurrence without Q_t, with Phi_t B_t for B_t, and C_t . h_t = (Phi_t C_t) . (Phi_t h_t). So
`forward` rotates B_t and C_t instead of the state (the paper's "RoPE trick"; in attention.rotary
the angles do not depend on the token).

    symbol   meaning
    x        inputs (b, L, R, H, P)
    B, C     how a token is written, how the state is read (b, L, R, H, N)
    dt, A    step size; decay rate, negative (b, L, H)
    log_a    dt A, the logarithm of the decay (b, L, H)
    lam      lambda (b, L, H)
    before   the weight of the token before (b, L, H)
    now      the weight of the token itself (b, L, H)
    angle    the sum of all angles up to a token (b, L, H, S)
    h        state (b, H, P, N)
    y        outputs (b, L, R, H, P)
    b, L     sequences in the batch, steps
    H, P     heads, and channels per head
    N, R     size of the state per channel, rank
    S        pairs of states that rotate, at most N / 2
    c, T     chunks, and steps per chunk

`python -m family.mamba3` shows that recurrence, chunks and single steps agree, and their times.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from family.chunks import (AcrossChunks, at_least_float32, check_steps, clamped_exp,
                           set_nan_aside, show_agreement, show_steps, widest)
from fused_scan import split
from mamba import initial_dt_bias, is_transformed


def trapezoid_ref(x, log_a, before, now, B, C, h=None, last=None):
    """The recurrence, one step at a time, in any dtype; autograd finds the gradient.

    B and C are rotated already. h (b, H, P, N), the state before the first step, None for zero;
    last: B (b, R, H, N) and x (b, R, H, P) of the token before, None for no token. Returns y (b, L,
    R, H, P) and the state after the last step.
    """
    check_steps(x, log_a, before, now, B, C)
    if h is None:
        h = x.new_zeros(x.shape[0], *x.shape[3:], B.shape[-1])           # (b, H, P, N)
    if last is None:
        written = torch.zeros_like(h)
    else:
        B_last, x_last = last
        written = outer(x_last, B_last)                                  # (b, H, P, N)
    y = []
    log_a, before, now = (v[..., None, None] for v in (log_a, before, now))      # (b, L, H, 1, 1)
    for x_t, log_a_t, before_t, now_t, B_t, C_t in zip(
            *(v.unbind(1) for v in (x, log_a, before, now, B, C))):
        h = h + before_t * written
        written = outer(x_t, B_t)                                        # (b, H, P, N)
        h = torch.exp(log_a_t) * h + now_t * written
        y.append(torch.einsum("bhpn,brhn->brhp", h, C_t))                # (b, R, H, P)
    return torch.stack(y, dim=1), h


def outer(x, B):
    """x (b, R, H, P), B (b, R, H, N) -> the sum over R of their outer products (b, H, P, N)."""
    return torch.einsum("brhp,brhn->bhpn", x, B)


def rotate(v, angle):
    """Rotate pairs of neighbouring channels. v (..., N), angle (..., S): the first 2 S channels."""
    S = angle.shape[-1]
    cos, sin = angle.cos(), angle.sin()
    v1, v2 = v[..., :2 * S].unflatten(-1, (S, 2)).unbind(-1)             # (..., S) each
    pairs = torch.stack([v1 * cos - v2 * sin, v1 * sin + v2 * cos], dim=-1)      # (..., S, 2)
    return torch.cat([pairs.flatten(-2), v[..., 2 * S:]], dim=-1)


def summed_angles(rate, dt, start):
    """The sum of all angles up to each token, modulo 2 pi: (b, L, H, S), in float64 if there is
    one. A pair turns by pi tanh(rate) dt per token. rate (b, L, H or 1, S), dt (b, L, H); start (b,
    H, S), the sum before the first token, None for 0."""
    wide = widest(dt.device)
    turn = math.pi * torch.tanh(rate.to(wide)) * dt[..., None].to(wide)  # (b, L, H, S)
    angles = turn.cumsum(1)
    if start is not None:
        angles = angles + start[:, None]
    return angles.remainder(2 * math.pi)


class Mamba3State(NamedTuple):
    """All that a Mamba-3 layer keeps of the tokens so far, however many there were."""
    h: torch.Tensor      # (b, H, P, N)
    angle: torch.Tensor  # (b, H, S), the sum of all angles modulo 2 pi
    B: torch.Tensor      # (b, R, H, N), of the last token, rotated
    x: torch.Tensor      # (b, H, P), of the last token


class Mamba3(nn.Module):
    r"""The Mamba-3 layer (paper, section 3.4), without residual and pre-norm.

        x -> in_proj -> x ------------------------------> recurrence -> + D x -> * -> out_proj -> y
                    \-> B, C -> norm, bias, rotation ---/                       /
                    \-> dt, A, lambda, angle -----------/                       /
                    \-> z -> SiLU ---------------------------------------------/

    d_inner = expand * d_model channels, in heads of headdim; d_state: N. rope_fraction: the share
    of the N states that rotate, at most 1; officially 0.5 or 1. R is mimo_rank if is_mimo,
    otherwise 1.

    Names, shapes and initial values are those of mamba_ssm.Mamba3 with one group. Left out: several
    groups, and the norm before out_proj (is_outproj_norm). Differs: the official MIMO kernel pairs
    state i with state i + N / 2; here, as in its SISO kernel, neighbours are pairs. A is -softplus,
    as in the first release; since June 2026 the official one has a heavier tail.
    """

    takes_bias = True

    def __init__(self, d_model, d_state=128, expand=2, headdim=64, rope_fraction=0.5, is_mimo=False,
                 mimo_rank=4):
        super().__init__()
        self.d_inner, self.d_state, self.headdim = expand * d_model, d_state, headdim
        self.nheads, self.rank = self.d_inner // headdim, mimo_rank if is_mimo else 1
        self.n_angles = int(d_state * rope_fraction) // 2                  # S
        if self.nheads * headdim != self.d_inner:
            raise ValueError(f"headdim is {headdim}, but it must divide {self.d_inner} channels")
        if self.n_angles < 1 or rope_fraction > 1:
            raise ValueError(f"rope_fraction is {rope_fraction}, but it must be at most 1 and make "
                             f"a pair of the {d_state} states rotate")
        H, RN = self.nheads, self.rank * d_state
        # z, x, B, C, dt, A, lambda and the rates of the angles
        self.sizes = [self.d_inner, self.d_inner, RN, RN, H, H, H, self.n_angles]
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.dt_bias = nn.Parameter(initial_dt_bias(H))
        self.B_bias = nn.Parameter(torch.ones(H, self.rank, d_state))
        self.C_bias = nn.Parameter(torch.ones(H, self.rank, d_state))
        self.B_norm = nn.RMSNorm(d_state, eps=1e-5)
        self.C_norm = nn.RMSNorm(d_state, eps=1e-5)
        self.mimo_x = self.mimo_z = self.mimo_o = None
        if is_mimo:
            # Per channel: weights that make R copies of x and z, and one output of R.
            self.mimo_x = nn.Parameter(torch.ones(H, self.rank, headdim) / self.rank)
            self.mimo_z = nn.Parameter(torch.ones(H, self.rank, headdim))
            self.mimo_o = nn.Parameter(torch.ones(H, self.rank, headdim) / self.rank)
        self.D = nn.Parameter(torch.ones(H))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, x, state=None):
        """Run a segment of a sequence, continuing from `state`: a Mamba3State, None at the start.

        x (b, L, d_model) -> y (b, L, d_model), the Mamba3State after the last token.
        """
        if x.shape[1] == 0:
            return x, state
        z, x, B, C, dt, A, lam, rate = self.in_proj(x).split(self.sizes, dim=-1)
        z = z.unflatten(-1, (self.nheads, self.headdim))                 # (b, L, H, P)
        x = x.unflatten(-1, (self.nheads, self.headdim))                 # (b, L, H, P)

        dt = F.softplus(at_least_float32(dt + self.dt_bias))             # (b, L, H), positive
        # At most -1e-4, the official A_floor: no head remembers forever.
        A = -F.softplus(at_least_float32(A)).clamp(min=1e-4)             # (b, L, H), negative
        lam = torch.sigmoid(at_least_float32(lam))                       # (b, L, H)

        # The token sets S rates for all heads, (b, L, 1, S).
        start = None if state is None else state.angle
        angle = summed_angles(rate[:, :, None], dt, start).to(dt.dtype)  # (b, L, H, S)

        B = self.B_norm(B.unflatten(-1, (self.rank, 1, self.d_state)))   # (b, L, R, 1, N)
        C = self.C_norm(C.unflatten(-1, (self.rank, 1, self.d_state)))
        B = rotate(B + self.B_bias.transpose(0, 1), angle[:, :, None])   # (b, L, R, H, N)
        C = rotate(C + self.C_bias.transpose(0, 1), angle[:, :, None])

        h, last = None, None
        if state is not None:
            h, last = state.h, (state.B, per_rank(state.x, self.mimo_x))
        xs = per_rank(x, self.mimo_x)                                    # (b, L, R, H, P)
        y, h = trapezoid(xs, dt * A, (1 - lam) * dt, lam * dt, B, C, h, last)
        y = y + self.D[:, None] * xs
        y = y * F.silu(per_rank(z, self.mimo_z))                         # (b, L, R, H, P)
        if self.mimo_o is not None:
            y = y * self.mimo_o.transpose(0, 1)
        state = Mamba3State(h, angle[:, -1].clone(), B[:, -1].clone(), x[:, -1].clone())
        return self.out_proj(y.sum(2).flatten(2)), state


def per_rank(v, weight):
    """v (..., H, P) -> R copies (..., R, H, P), each times its weight of (H, R, P). Without weight:
    one copy."""
    v = v[..., None, :, :]
    return v if weight is None else v * weight.transpose(0, 1)


# ---- Chunks --------------------------------------------------------------------------------------
#
# What token t writes enters twice: now_t at step t, and before_{t+1} at the next. Add both at once:
#
#     g_t = h_t + before_{t+1} B_t x_t = exp(log_a_t) g_{t-1} + (now_t + before_{t+1}) B_t x_t
#
# which is the recurrence of Mamba-2. But C_t reads h_t, not g_t, so its own token keeps the weight
# now_t. With a_ts, the decay between two steps,
#
#     y_t = sum over s < t of (C_t . B_s) a_ts (now_s + before_{s+1}) x_s + (C_t . B_t) now_t x_t
#
# So g goes from chunk to chunk. The first is h plus before_1 times what the last call's token wrote
# (`last`). After the last token, before_{L+1} is set to 0, so that the last g is h.

def trapezoid(x, log_a, before, now, B, C, h=None, last=None, T=None):
    """trapezoid_ref in chunks of at most T steps, for L >= 1: same arguments, results, gradients
    and second derivatives.

    States and sums are at least float32, and so are inputs of matmuls, except under torch.autocast;
    y has the dtype of x. T: by default 64 / R on CUDA, 16 / R elsewhere: a chunk's matrices have
    T R rows.
    """
    check_steps(x, log_a, before, now, B, C)
    x_dtype = x.dtype
    b, L, R, H, P = x.shape
    N = B.shape[-1]
    x, log_a, before, now, B, C = (at_least_float32(v) for v in (x, log_a, before, now, B, C))
    h = x.new_zeros(b, H, P, N) if h is None else h.to(x.dtype)
    last = None if last is None else [v.to(x.dtype) for v in last]
    if L == 1 or is_transformed():                   # nothing to cut, or torch.func
        y, h = trapezoid_ref(x, log_a.to(x.dtype), before, now, B, C, h, last)
        return y.to(x_dtype), h
    (x, log_a, before, now, B), nan = set_nan_aside(x, log_a, before, now, B)    # nan (b, L)
    if T is None:
        T = max(1, (64 if x.is_cuda else 16) // R)
    if last is not None:
        B_last, x_last = last
        h = h + before[:, 0, :, None, None] * outer(x_last, B_last)      # (b, H, P, N)
    before_next = F.pad(before[:, 1:], (0, 0, 0, 1))                     # (b, L, H), before_{t+1}

    log_a, now, before_next = (split(v, T).transpose(2, 3) for v in (log_a, now, before_next))
    x, B, C = (split(v, T).movedim(4, 2).flatten(3, 4) for v in (x, B, C))
    # log_a, now, before_next (b, c, H, T); x (b, c, H, T R, P); B, C (b, c, H, T R, N)

    # 1. In a chunk: attention. Each step has R rows, one per rank, with the same decay.
    sums = log_a.to(widest(x.device)).cumsum(-1)                         # (b, c, H, T)
    a = clamped_exp(sums[..., :, None] - sums[..., None, :], x.dtype).tril(-1)  # (b, c, H, T, T)
    weight = a * (now + before_next)[..., None, :] + torch.diag_embed(now)
    weight = weight.repeat_interleave(R, -1).repeat_interleave(R, -2)    # (b, c, H, T R, T R)
    y = (weight * (C @ B.mT)) @ x                                        # (b, c, H, T R, P)

    # 2. The state at the end of each chunk, had it started from zero.
    to_end = clamped_exp(sums[..., -1:] - sums, x.dtype) * (now + before_next)  # (b, c, H, T)
    to_end = to_end.repeat_interleave(R, -1)[..., None]                  # (b, c, H, T R, 1)
    ends = (to_end * x).mT @ B                                           # (b, c, H, P, N)

    # 3. The recurrence from chunk to chunk.
    decay = clamped_exp(sums[..., -1], x.dtype)[..., None, None]         # (b, c, H, 1, 1)
    starts, h = AcrossChunks.apply(decay, ends, h)                       # (b, c, H, P, N)

    # 4. The contribution of each chunk's first state to its outputs.
    from_start = clamped_exp(sums, x.dtype).repeat_interleave(R, -1)[..., None]
    y = y + from_start * (C @ starts.mT)                                 # (b, c, H, T R, P)
    y = y.unflatten(3, (-1, R)).movedim(2, 4).flatten(1, 2)[:, :L]       # (b, L, R, H, P)
    y = y + nan.cumsum(1)[..., None, None, None]
    return y.to(x_dtype), h + nan.sum(1)[:, None, None, None]


@torch.no_grad()
def main():
    """Show that recurrence, chunks and single steps of the layer agree, and their times."""
    torch.manual_seed(0)
    b, L, H, P, N = 4, 256, 4, 16, 16
    for R in (1, 2):
        x, B, C = (torch.randn(b, L, R, H, size) for size in (P, N, N))
        log_a, before, now = -torch.rand(b, L, H), torch.rand(b, L, H), torch.rand(b, L, H)
        print(f"rank {R}")
        show_agreement(trapezoid_ref, trapezoid, (x, log_a, before, now, B, C))
    show_steps(Mamba3(32, N, headdim=16), torch.randn(2, 64, 32))


if __name__ == "__main__":
    main()
