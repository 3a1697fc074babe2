"""Mamba (Gu and Dao 2023, arXiv 2312.00752) in pure PyTorch, from the differential equation to the fast scan.

A state space model sends a signal x(t) through a hidden state h(t):

    h'(t) = A h(t) + B x(t)         y(t) = C h(t)

Over a step of length dt in which x does not change, and with A diagonal, the state decays by exp(dt A) and takes in
about dt B x (section 2; the paper's equation 4 has the exact factor for B, its code this simpler one, and so do we):

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t         y_t = C_t h_t

Mamba lets dt, B and C depend on the token (section 3, algorithm 2). That makes the state selective: dt -> 0
passes a token by and leaves the state alone, dt -> infinity forgets everything before it.

The recurrence has four forms, each tested to equal the first:

    selective_scan_ref      the two equations above, one step at a time
    ChunkedScan             chunks of steps, one chunk after another, with its gradient written by hand: for CPUs
    parallel_scan           all chunks at once: for GPUs, in a file of its own
    Mamba.forward(x, state) the layer, which goes on from where an earlier piece of the sequence ended

selective_scan picks one of the first three by the device and the length.

Imports fused_scan.

Letters, as in the paper: b batch, L steps, D channels, N states per channel. Each channel is a system of its own with its
own row of A; all channels share B_t and C_t. In the Mamba layer the parameter D is also the skip connection from x to y.
T is the number of steps in a chunk.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from fused_scan import parallel_scan


# ---- 1. The recurrence -----------------------------------------------------------------------------------------------

def selective_scan_ref(x, dt, A, B, C, h=None):
    """The recurrence as the paper writes it (algorithm 2, lines 5 and 6), in any dtype; autograd finds the gradient.

    x, dt (b, L, D); A (D, N), negative; B, C (b, L, N); h (b, D, N), the state before the first step, or None for zero.
    Returns y (b, L, D) and the state after the last step (b, D, N).
    The official counterpart is selective_scan_ref in mamba_ssm, less its D, z and softplus, which are in Mamba below.
    """
    if h is None:
        h = x.new_zeros(x.shape[0], *A.shape)                                          # (b, D, N)
    y = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)                                       # (b, D, N)
        h = decay * h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]            # (b, D, N)
        y.append((h * C[:, t, None, :]).sum(-1))                                       # (b, D)
    return torch.stack(y, dim=1), h


# ---- 2. Chunks, one after another ------------------------------------------------------------------------------------
#
# The loop above is slow because it makes a dozen small calls at every step, and autograd keeps every (b, D, N) it meets.
# But only h_t = a_t h_{t-1} + b_t has to go step by step: the decays a = exp(dt A), the inputs b = dt x B and the sums that
# make y can be taken for many steps in one call. So cut time into chunks of T steps, small enough to stay in the
# processor's cache, and keep nothing of a chunk but its first state.
#
# The gradient. Write g_t for dLoss/dh_t. The state h_t is used twice, by y_t and by h_{t+1}, so
#
#     g_t = C_t dy_t + a_{t+1} g_{t+1}             the same recurrence, run backwards
#
# and every input's gradient is g_t times the factor that it meets in h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t:
#
#     d(dt_t x_t) = sum over n of g_t B_t          d(dt_t A) = g_t a_t h_{t-1}
#     dB_t = sum over channels of g_t dt_t x_t     dC_t = sum over channels of h_t dy_t
#
# where dv is dLoss/dv for every v, but dt alone is the step, whose gradient is ddt. With u = dt x that leaves
#
#     dx = dt du         ddt = x du + sum over n of A d(dt A)         dA = sum over b and t of dt d(dt A)
#
# The backward pass walks the chunks from the last to the first; in each it runs the recurrence forwards again from the
# first state to have h, then backwards to have g. There is no division and no exp of a positive number anywhere, so
# nothing can overflow, however long the sequence or strong the decay.

CHUNK_ELEMENTS = 2**18  # of a (T, N, b, D) tensor: 1 MiB in float32; 2^17 to 2^19 were equally fast on a 2 MiB L2 cache


def _time_first(x, dt, A, B, C):
    """Lay the operands out so that they broadcast to (T, N, b, D): a step is one piece of memory."""
    x, dt, B, C = (v.transpose(0, 1).contiguous() for v in (x, dt, B, C))              # (L, b, D or N)
    A = A.t()[:, None].expand(-1, x.shape[1], -1).contiguous()                         # (N, b, D)
    return x[:, None], dt[:, None], A, B.mT[..., None], C.mT[..., None]                # (L, 1, b, D), (L, N, b, 1)


def _run(a, b, h):
    """h_t = a_t h_{t-1} + b_t over lists of steps, each (N, b, D). Writes h_t over b_t and returns the last."""
    for a_t, b_t in zip(a, b):
        h = b_t.addcmul_(a_t, h)
    return h


class ChunkedScan(torch.autograd.Function):
    """selective_scan_ref for a processor with a cache. Memory: copies of the arguments, a few chunks, and L / T states."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h):
        (b, L, D), N = x.shape, A.shape[1]
        T = min(L, max(8, CHUNK_ELEMENTS // (b * D * N)))                              # steps in a chunk
        x, dt, A, B, C = _time_first(x, dt, A, B, C)
        ctx.save_for_backward(x, dt, A, B, C)
        u, y = dt * x, x.new_empty(L, b, D)
        # exp(-80) is as good as 0, and below it a CPU's exp is 50 times slower: a trained model reads twice as fast when clamped.
        # Not on a GPU: this asks it for an answer, for which the host would wait, and which a CUDA graph cannot record.
        forgets = not x.is_cuda and bool(dt.max() * A.min() < -80)
        ctx.T, ctx.starts, ctx.from_zero = T, [], h is None
        h = x.new_zeros(N, b, D) if h is None else h.permute(2, 0, 1).contiguous()
        space = x.new_empty(2, T, N, b, D)                     # used for every chunk again: fresh memory costs page faults
        a_t, h_t = (v.unbind() for v in space)                 # T steps each, taken apart once: it is a tenth of a short scan
        for dt_k, u_k, B_k, C_k, y_k in zip(*(v.split(T) for v in (dt, u, B, C, y))):
            ctx.starts.append(h)
            a, hs = space[:, :len(dt_k)]                                               # (T, N, b, D) each
            torch.mul(dt_k, A, out=a)
            (a.clamp_(min=-80) if forgets else a).exp_()
            torch.mul(u_k, B_k, out=hs)                                                # b_t until _run
            h = _run(a_t, h_t[:len(dt_k)], h).clone()          # a view would not survive the chunk
            torch.sum(torch.mul(hs, C_k, out=a), 1, out=y_k)                           # (T, b, D); a is free by now
        return y.transpose(0, 1).contiguous(), h.permute(1, 2, 0).contiguous()

    @staticmethod
    def backward(ctx, dy, dh):
        if torch.is_grad_enabled():                            # create_graph: what follows would be left out of the graph
            raise RuntimeError("ChunkedScan has no second derivative; selective_scan_ref has")
        x, dt, A, B, C = ctx.saved_tensors
        L, T, u = len(x), ctx.T, dt * x
        dy = dy.transpose(0, 1).contiguous()[:, None]                                  # (L, 1, b, D)
        du, ddt = torch.empty_like(x[:, 0]), torch.empty_like(x[:, 0])                 # (L, b, D)
        dB, dC = torch.empty_like(B[..., 0]), torch.empty_like(C[..., 0])              # (L, N, b)
        dA = x.new_zeros(T, *A.shape)                                                  # (T, N, b, D), summed at the end
        carry = dh.permute(2, 0, 1).contiguous()               # (N, b, D), what later steps say of h: a_{t+1} g_{t+1}
        space = x.new_empty(3, T + 1, *A.shape)
        a_t, g_t, h_t = (v[1:].unbind() for v in space)
        chunks = list(zip(ctx.starts, *(v.split(T) for v in (dt, u, B, C, dy, du, ddt, dB, dC))))
        for start, dt_k, u_k, B_k, C_k, dy_k, du_k, ddt_k, dB_k, dC_k in reversed(chunks):
            a, g, hs = space[:, :len(dt_k) + 1]
            a, g, h, h_before = a[1:], g[1:], hs[1:], hs[:-1]                          # (T, N, b, D) each
            torch.mul(dt_k, A, out=a).exp_()                   # not clamped: exp(-80) may be much, compared with the true dA
            torch.mul(u_k, B_k, out=h)
            hs[0] = start
            _run(a_t, h_t[:len(a)], start)
            torch.mul(C_k, dy_k, out=g)
            g[-1] += carry
            _run(a_t[1:len(a)][::-1], g_t[:len(a) - 1][::-1], g[-1])                   # g_t += a_{t+1} g_{t+1}, t falling
            carry = a[0] * g[0]
            # From here on each buffer is overwritten after its last use.
            d_dtA = a.mul_(g).mul_(h_before)                                           # g_t a_t h_{t-1}
            dA[:len(a)].addcmul_(d_dtA, dt_k)
            torch.sum(d_dtA.mul_(A), 1, out=ddt_k)
            torch.sum(h.mul_(dy_k), 3, out=dC_k)
            torch.sum(torch.mul(g, u_k, out=h), 3, out=dB_k)
            torch.sum(g.mul_(B_k), 1, out=du_k)
        ddt.addcmul_(du, x[:, 0])                                                      # ddt = x du + ...
        du.mul_(dt[:, 0])                                                              # dx = dt du
        return (du.transpose(0, 1), ddt.transpose(0, 1), dA.sum((0, 2)).t(), dB.permute(2, 0, 1), dC.permute(2, 0, 1),
                None if ctx.from_zero else carry.permute(1, 2, 0))


# ---- 3. Which scan ---------------------------------------------------------------------------------------------------
#
# On a GPU the chunks need not wait for each other: fused_scan.py.

compile_scan = True  # train.py --no-compile turns it off


def selective_scan(x, dt, A, B, C, h=None):
    """selective_scan_ref made fast: same arguments, same results, same gradients, to rounding.

    x, dt, B and C may be bfloat16 with A and h float32: all that is added up is float32 then, and y is bfloat16.
    """
    if x.is_cuda and x.shape[1] > 1:
        # Tests and streaming meet many shapes, few times each, and each shape would be compiled anew: that is for training.
        return parallel_scan(x, dt, A, B, C, h, off=not (compile_scan and torch.is_grad_enabled()))
    scan = selective_scan_ref if x.shape[1] == 1 else ChunkedScan.apply
    y, h = scan(x.to(A.dtype), dt.to(A.dtype), A, B.to(A.dtype), C.to(A.dtype), h)
    return y.to(x.dtype), h


# ---- 4. The layer ----------------------------------------------------------------------------------------------------

def causal_conv(x, conv1d, window=None):
    """The convolution sees a token and the few before it, in each channel by itself: as many shifted products as it has taps.

    x (b, L, D); conv1d: a depthwise nn.Conv1d, for its weights; window (b, D, taps - 1): the inputs before x, None at the start.
    Returns y (b, L, D) and the next window.
    """
    L, before = x.shape[1], conv1d.kernel_size[0] - 1
    x = F.pad(x, (0, 0, before, 0)) if window is None else torch.cat([window.mT, x], dim=1)
    window = x[:, L:].mT.clone()                               # a view would keep all of x alive
    taps = conv1d.weight[:, 0].unbind(1)                                               # (D,) each
    return sum((x[:, k:k + L] * tap for k, tap in enumerate(taps)), conv1d.bias), window


class MambaState(NamedTuple):
    """All that a Mamba layer remembers of the tokens so far. Its size does not depend on how many they were."""
    conv: torch.Tensor  # (b, d_inner, d_conv - 1), the convolution's window
    h: torch.Tensor     # (b, d_inner, d_state)


class Mamba(nn.Module):
    r"""The Mamba layer (section 3.4, figure 3), without a residual or a norm.

            x -> in_proj -> causal convolution -> SiLU -> selective scan -> * -> out_proj -> y
                        \-> z -> SiLU ------------------------------------/

    d_model: width of the stream; d_inner = expand * d_model channels D; d_state: N; d_conv: the convolution's width;
    dt_rank: rank of the map from a token to its dt, None for ceil(d_model / 16); inner_norms: RMSNorm on dt, B and C, which
    Jamba adds (Lieber et al. 2024, arXiv 2403.19887, section 6.4).
    Names, shapes and initial values are those of mamba_ssm.Mamba with its default arguments: state dicts move between the two.
    """

    takes_bias = True

    def __init__(self, d_model, d_state=16, d_conv=4, expand=2, dt_rank=None):
        super().__init__()
        self.d_inner, self.d_state, self.d_conv = expand * d_model, d_state, d_conv
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner,
                                padding=d_conv - 1)            # holds the weights; forward takes the products itself
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(self.d_inner, 1))   # A = -1 ... -N
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

        # dt starts between 0.001 and 0.1 (section 3.6), evenly on a log scale as in the official code: the bias is the
        # inverse of softplus there.
        nn.init.uniform_(self.dt_proj.weight, -self.dt_rank**-0.5, self.dt_rank**-0.5)
        dt = torch.exp(torch.empty(self.d_inner).uniform_(math.log(1e-3), math.log(1e-1)))
        with torch.no_grad():
            self.dt_proj.bias.copy_(torch.log(torch.expm1(dt)))

    def dt_B_C(self, x):
        return self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)

    def forward(self, x, state=None):
        """x (b, L, d_model), state a MambaState or None at the start -> y (b, L, d_model), the state after the last token."""
        x, z = self.in_proj(x).chunk(2, dim=-1)                                        # (b, L, d_inner) each
        x, window = causal_conv(x, self.conv1d, None if state is None else state.conv)
        x = F.silu(x)

        dt, B, C = self.dt_B_C(x)
        dt = F.softplus(self.dt_proj(dt))                                              # (b, L, d_inner), positive
        A = -torch.exp(self.A_log)                                                     # (d_inner, d_state), negative
        y, h = selective_scan(x, dt, A, B, C, None if state is None else state.h)
        y = (y + self.D * x) * F.silu(z)
        return self.out_proj(y), MambaState(window, h)
