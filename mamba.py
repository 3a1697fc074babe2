"""Mamba (Gu and Dao 2023, arXiv 2312.00752) in PyTorch: the recurrence, the layer, and a fast scan.

A Mamba layer reads a sequence with a state of fixed size. Each token decides for itself how much of the
state decays, what is written into it and what is read from it; that is what makes the state selective.
`python mamba.py` shows that all forms of the recurrence agree, and how long each takes.

    symbol   shape        meaning
    b, L                  sequences in the batch; tokens, or steps
    D, N                  channels, which do not interact; states per channel
    x        (b, L, D)    input of the recurrence
    dt       (b, L, D)    step size, positive: how long this token acts on the state
    A        (D, N)       decay rates, negative, the same for every token
    B        (b, L, N)    where the token is written, shared by all channels
    C        (b, L, N)    where the state is read, shared by all channels
    h        (b, D, N)    state
    y        (b, L, D)    output
    dx, ddt, dA, ...      gradient of the loss with respect to x, dt, A, ...

In the Mamba layer, as in the paper, the parameter called D is the skip connection from x to y.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fused_scan import parallel_scan


# ---- 1. The recurrence ---------------------------------------------------------------------------
#
# A linear state space model sends a signal x(t) through a state h(t), with A diagonal:
#
#     h'(t) = A h(t) + B x(t)         y(t) = C h(t)
#
# If x is constant over a step of length dt, the exact solution after that step is
#
#     h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A  B x_t
#
# The paper states this rule (equation 4), but the official code replaces its second factor by the
# first-order term dt, and so do we, so that weights are interchangeable:
#
#     h_t = exp(dt A) h_{t-1} + dt B x_t         y_t = C h_t
#
# The two agree for small dt |A|. For large dt |A| they part: at A = -1 and dt = 10 this one writes
# 10 B x, the exact one 1 B x. The layer loses nothing, because B and x are learned and can absorb
# the scale; it saves a division and an exp per state. The exact rule is in family/ladder.py, LTI.
#
# Mamba computes dt, B and C from the token (paper, section 3.2, algorithm 2). dt -> 0 skips a token
# and keeps the state; dt -> infinity erases the state.

def selective_scan_ref(x, dt, A, B, C, h=None):
    """The recurrence as in the paper (algorithm 2, lines 5 and 6); autograd finds the gradient.

    x, dt (b, L, D); A (D, N), negative; B, C (b, L, N); h (b, D, N), the state before the first
    step, None for zero. Any floating dtype, in which everything is computed.
    Returns y (b, L, D) and the state after the last step (b, D, N).

    This is also the streaming step: call it with L = 1 and hand the state on.
    The official counterpart is mamba_ssm's selective_scan_ref, without its D, z and softplus.
    """
    if h is None:
        h = x.new_zeros(x.shape[0], *A.shape)
    y = []
    # unbind, because the gradient of x[:, t] would be a whole tensor of zeros for every t.
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1)):
        decay = torch.exp(dt_t[..., None] * A)                           # (b, D, N)
        h = decay * h + (dt_t * x_t)[..., None] * B_t[:, None]           # (b, D, N)
        y.append((h * C_t[:, None]).sum(-1))                             # (b, D)
    return torch.stack(y, dim=1), h


# ---- 2. The layer --------------------------------------------------------------------------------

class MambaState(NamedTuple):
    """What a Mamba layer keeps of the tokens so far; its size does not depend on their number."""
    conv: Tensor   # (b, d_inner, d_conv - 1), the last inputs of the convolution
    h: Tensor      # (b, d_inner, d_state)


def causal_conv(x, conv1d, window=None):
    """A depthwise convolution over each token and those before it: one shifted product per tap.

    x (b, L, D); conv1d: a depthwise nn.Conv1d, whose weights are used; window (b, D, taps - 1): the
    inputs before x, None at the start. Returns y (b, L, D) and the next window.
    """
    L, before = x.shape[1], conv1d.kernel_size[0] - 1
    x = F.pad(x, (0, 0, before, 0)) if window is None else torch.cat([window.mT, x], dim=1)
    window = x[:, L:].mT.clone()                                         # a view would keep all of x
    taps = conv1d.weight[:, 0].unbind(1)                                 # (D,) each
    y = sum((x[:, k:k + L] * tap for k, tap in enumerate(taps)), conv1d.bias)
    return y, window


class Mamba(nn.Module):
    r"""The Mamba layer (paper, section 3.4 and figure 3), without a residual connection or a norm.

        x -> in_proj -> causal convolution -> SiLU -> selective scan -> * -> out_proj -> y
                    \-> z -> SiLU ------------------------------------/

    d_model: width of x and y; d_state: N; d_conv: taps of the convolution; expand: d_inner, the
    number of channels D, is expand * d_model; dt_rank: rank of the map from a token to its dt, None
    for ceil(d_model / 16). Parameters have the names, shapes and initial values of mamba_ssm.Mamba
    with its default arguments, so state dicts move between the two.

    As there, in_proj has no bias. On this task that hurts: tokens are fixed random vectors with no
    direction in common, so without a bias the gate z cannot be open for all of them. `takes_bias`
    asks the model for a norm with a bias before this layer (hybrid.RMSNorm).
    """

    takes_bias = True

    def __init__(self, d_model, d_state=16, d_conv=4, expand=2, dt_rank=None):
        super().__init__()
        self.d_inner = expand * d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        # A = -1, -2, ..., -N in every channel (S4D-Real, Gu et al. 2022, arXiv 2206.11893): each
        # channel starts with N time scales, from 1 / dt down to 1 / (N dt) steps. Its logarithm is
        # trained, so that A stays negative and the state cannot explode.
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

        # dt starts between 0.001 and 0.1 (paper, section 3.6), uniform on a log scale as in the
        # official code. log(exp(dt) - 1) is the inverse of softplus.
        nn.init.uniform_(self.dt_proj.weight, -self.dt_rank**-0.5, self.dt_rank**-0.5)
        dt = torch.exp(torch.empty(self.d_inner).uniform_(math.log(1e-3), math.log(1e-1)))
        with torch.no_grad():
            self.dt_proj.bias.copy_(torch.log(torch.expm1(dt)))

    def dt_B_C(self, x):
        """x (b, L, d_inner) -> dt (b, L, dt_rank), B, C (b, L, d_state): the token's own choice."""
        return self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)

    def forward(self, x, state=None):
        """Run a segment of a sequence, continuing from `state`.

        x (b, L, d_model); state: a MambaState, None at the start.
        Returns y (b, L, d_model) and the MambaState after the last token.
        """
        window, h = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, dim=-1)                          # (b, L, d_inner) each
        x, window = causal_conv(x, self.conv1d, window)                  # (b, L, d_inner)
        x = F.silu(x)

        dt, B, C = self.dt_B_C(x)
        dt = F.softplus(self.dt_proj(dt))                                # (b, L, d_inner), positive
        A = -torch.exp(self.A_log)                                       # (d_inner, d_state), negative
        y, h = selective_scan(x, dt, A, B, C, h)                         # (b, L, d_inner)
        y = (y + self.D * x) * F.silu(z)
        return self.out_proj(y), MambaState(window, h)


# ---- 3. The chunked scan and its gradient --------------------------------------------------------
#
# The loop above is slow: a dozen small calls per step, and autograd keeps every (b, D, N) it meets.
# But only h_t = a_t h_{t-1} + u_t B_t must be computed step by step. The decays a = exp(dt A), the
# inputs u = dt x and the sums over states can be computed for many steps in one call. So cut time
# into chunks of T steps that fit into the CPU's cache, and of each chunk keep only its first state.
#
# The gradient, with g_t for the gradient of the loss with respect to h_t:
#
# 1. h_t is used twice, in y_t = C_t h_t and in h_{t+1}, so
#        g_t = C_t dy_t + a_{t+1} g_{t+1}           the same recurrence, backwards in time
# 2. h_t is linear in u_t, which N states share, and in B_t, which D channels share:
#        du_t = sum over states of g_t B_t          dB_t = sum over channels of g_t u_t
# 3. Through the decay: da_t = g_t h_{t-1}, and exp is its own derivative, so
#        d(dt_t A) = a_t g_t h_{t-1}
# 4. C_t acts on y_t alone:
#        dC_t = sum over channels of h_t dy_t
# 5. dt_t is a factor of u_t = dt_t x_t and of dt_t A. The product rule gives
#        dx_t = dt_t du_t                           dA = sum over batch and time of dt_t d(dt_t A)
#        ddt_t = x_t du_t + sum over states of A d(dt_t A)
#
# The backward pass takes the chunks from last to first. In each it repeats the recurrence from the
# chunk's first state to get h, then runs backwards to get g. Nothing divides, and no exp has a
# positive argument, so nothing overflows, however long the sequence or strong the decay.
#
# Time comes first and batch and channels last, so that the values of one step are contiguous:
# x, dt, y (L, b, D); B, C (L, b, N); states (N, b, D).

CHUNK_ELEMENTS = 2**18   # of (T, N, b, D): 1 MiB in float32; 2^17 and 2^19 are equally fast


def _recur(a, b, h):
    """h_t = a_t h_{t-1} + b_t over lists of steps (N, b, D). Writes h_t over b_t; returns the last."""
    for a_t, b_t in zip(a, b):
        h = b_t.addcmul_(a_t, h)
    return h


def _broadcast(x, dt, A, B, C):
    """x, dt as (L, 1, b, D), A as (N, b, D) and B, C as (L, N, b, 1), for products (T, N, b, D)."""
    A = A.t()[:, None].expand(-1, x.shape[1], -1).contiguous()
    return x[:, None], dt[:, None], A, B.mT[..., None], C.mT[..., None]


@torch.library.custom_op("mamba::chunked_scan", mutates_args=())
def _chunked(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor,
             T: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, the last state, and for the gradient the first state of every chunk (chunks, N, b, D)."""
    x, dt, A, B, C = _broadcast(x, dt, A, B, C)
    u = dt * x
    y = torch.empty_like(x[:, 0])
    # exp below -87 gives denormal floats, which CPUs compute 10 to 50 times slower; clamping doubles
    # the inference speed of a trained model. A GPU has no such numbers, and would have to wait here.
    clamp = not x.is_cuda and bool(dt.max() * A.min() < -80)
    a, hs = x.new_empty(2, T, *A.shape)                  # used again by every chunk: no page faults
    a_t, h_t = a.unbind(), hs.unbind()                   # once: it is a tenth of a short scan
    starts = []
    for dt_k, u_k, B_k, C_k, y_k in zip(*(v.split(T) for v in (dt, u, B, C, y))):
        starts.append(h)
        steps = len(dt_k)                                                # T, or fewer in the last
        a_k, h_k = a[:steps], hs[:steps]                                 # (T, N, b, D) each
        torch.mul(dt_k, A, out=a_k)
        if clamp:
            a_k.clamp_(min=-80)
        a_k.exp_()
        torch.mul(u_k, B_k, out=h_k)                                     # u_t B_t, until _recur
        h = _recur(a_t, h_t[:steps], h).clone()                          # (N, b, D)
        torch.sum(torch.mul(h_k, C_k, out=a_k), 1, out=y_k)              # (T, b, D)
    return y, h, torch.stack(starts)


@torch.library.custom_op("mamba::chunked_scan_backward", mutates_args=())
def _chunked_backward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, T: int,
                      dy: Tensor, dh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of x, dt, A, B, C and h."""
    x, dt, A, B, C = _broadcast(x, dt, A, B, C)
    u = dt * x
    dy = dy.contiguous()[:, None]                                        # (L, 1, b, D)
    du, ddt = torch.empty_like(x[:, 0]), torch.empty_like(x[:, 0])       # (L, b, D)
    dB, dC = torch.empty_like(B[..., 0]), torch.empty_like(C[..., 0])    # (L, N, b)
    dA = x.new_zeros(T, *A.shape)                                        # (T, N, b, D)
    later = dh.contiguous()             # (N, b, D), a_{t+1} g_{t+1}: the gradient from later chunks
    a, g = x.new_empty(2, T, *A.shape)
    hs = x.new_empty(T + 1, *A.shape)                                    # h_{t-1} is needed as well
    a_t, g_t, h_t = a.unbind(), g.unbind(), hs[1:].unbind()
    chunks = list(zip(starts, *(v.split(T) for v in (dt, u, B, C, dy, du, ddt, dB, dC))))
    for start, dt_k, u_k, B_k, C_k, dy_k, du_k, ddt_k, dB_k, dC_k in reversed(chunks):
        steps = len(dt_k)
        a_k, g_k = a[:steps], g[:steps]                                  # (T, N, b, D) each
        h_k, h_before = hs[1:steps + 1], hs[:steps]                      # h_t, h_{t-1}
        # Not clamped: beside the true dA, exp(-80) may be large.
        torch.mul(dt_k, A, out=a_k).exp_()
        torch.mul(u_k, B_k, out=h_k)
        hs[0] = start
        _recur(a_t, h_t[:steps], start)
        torch.mul(C_k, dy_k, out=g_k)
        g_k[-1] += later
        _recur(a_t[1:steps][::-1], g_t[:steps - 1][::-1], g_k[-1])       # backwards in time
        later = a_k[0] * g_k[0]
        # From here on each buffer is overwritten after its last use.
        d_dtA = a_k.mul_(g_k).mul_(h_before)                             # a_t g_t h_{t-1}
        dA[:steps].addcmul_(d_dtA, dt_k)
        torch.sum(d_dtA.mul_(A), 1, out=ddt_k)
        torch.sum(h_k.mul_(dy_k), 3, out=dC_k)
        torch.sum(torch.mul(g_k, u_k, out=h_k), 3, out=dB_k)
        torch.sum(g_k.mul_(B_k), 1, out=du_k)
    ddt.addcmul_(du, x[:, 0])
    dx = du.mul_(dt[:, 0])
    return dx, ddt, dA.sum((0, 2)).t(), dB.mT, dC.mT, later


@_chunked.register_fake
def _(x, dt, A, B, C, h, T):
    return torch.empty_like(x), torch.empty_like(h), h.new_empty(-(-len(x) // T), *h.shape)


@_chunked_backward.register_fake
def _(x, dt, A, B, C, starts, T, dy, dh):
    dA, dB = A.new_empty(*A.mT.shape).t(), B.new_empty(*B.mT.shape).mT
    return torch.empty_like(x), torch.empty_like(dt), dA, dB, torch.empty_like(dB), torch.empty_like(dh)


def _save(ctx, inputs, output):
    *tensors, h, ctx.T = inputs
    ctx.save_for_backward(*tensors, output[2])


def _gradients(ctx, dy, dh, d_starts):
    if torch.is_grad_enabled():        # create_graph: what follows would be missing from the graph
        raise RuntimeError("the chunked scan has no second derivative; selective_scan_ref has one")
    return *_chunked_backward(*ctx.saved_tensors, ctx.T, dy, dh), None


_chunked.register_autograd(_gradients, setup_context=_save)


def chunked_scan(x, dt, A, B, C, h=None):
    """selective_scan_ref for a CPU: same arguments, same results, same gradients, to rounding.

    It keeps the arguments and L / T states for the backward pass; beyond them it needs a few chunks.
    """
    b, L, D = x.shape
    T = min(L, max(8, CHUNK_ELEMENTS // (b * A.numel())))                # steps in a chunk
    x, dt, B, C = (v.transpose(0, 1).contiguous() for v in (x, dt, B, C))
    h = x.new_zeros(A.shape[1], b, D) if h is None else h.permute(2, 0, 1).contiguous()
    y, h, _ = _chunked(x, dt, A, B, C, h, T)
    return y.transpose(0, 1).contiguous(), h.permute(1, 2, 0).contiguous()


# ---- 4. The choice -------------------------------------------------------------------------------

def selective_scan(x, dt, A, B, C, h=None):
    """selective_scan_ref made fast: same arguments, same results, same gradients, to rounding.

    x, dt, B and C may be bfloat16 with A and h float32: then sums are float32 and y is bfloat16.
    """
    if x.is_cuda and x.shape[1] > 1:       # a GPU has room for all chunks at once: fused_scan.py
        return parallel_scan(x, dt, A, B, C, h)
    scan = selective_scan_ref if x.shape[1] == 1 else chunked_scan
    y, h = scan(x.to(A.dtype), dt.to(A.dtype), A, B.to(A.dtype), C.to(A.dtype), h)
    return y.to(x.dtype), h
