"""Mamba (Gu and Dao 2023, arXiv 2312.00752) in PyTorch: the recurrence, the layer, and a fast scan.

A Mamba layer carries a state of fixed size along the sequence. Each token decides how much of the
state decays, what is written and what is read: the state space model is selective.
`python mamba.py` shows that all forms of the recurrence agree, and how long each takes.

    symbol   shape        meaning
    b, L                  sequences in the batch; tokens, also called steps
    D, N                  channels (d_inner in the layer); numbers that a channel keeps, its states
    x        (b, L, D)    input of the recurrence
    dt       (b, L, D)    step size, positive: a large one forgets more of the past and writes more
    A        (D, N)       minus the decay rates, the same for all tokens
    B        (b, L, N)    how a token is written to the N states, a key; the same in all channels
    C        (b, L, N)    how the N states are read, a query; also the same in all channels
    h        (b, D, N)    all states together, "the state"
    y        (b, L, D)    output
"""

import math
import time
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad

from fused_scan import check_shapes, parallel_scan


# ---- 1. The recurrence ---------------------------------------------------------------------------
#
# A linear state space model maps a signal x(t), one number at each time, to a signal y(t), through
# a state h(t) of N numbers. A is diagonal: each number has an equation of its own:
#
#     h'(t) = A h(t) + B x(t)         y(t) = C h(t)
#
# If x is constant over a step of length dt, the exact solution is (paper, equation 4)
#
#     h_t = exp(dt A) h_{t-1} + [(exp(dt A) - 1) / A] B x_t
#
# The official code replaces (exp(dt A) - 1) / A by its first-order form dt, and so do we, so that
# trained weights mean the same in both:
#
#     h_t = exp(dt A) h_{t-1} + dt B x_t         y_t = C h_t
#
# They agree for small dt |A|: at 0.1 ours writes 5 % more, at 1.6 (dt = 0.1, A = -16) twice as
# much. The exact factor differs from state to state and never exceeds 1 / |A|; ours grows with dt
# (at A = -1 and dt = 10 it writes 10 B x, the exact rule B x), but one product, dt x, serves all N
# states. LTI in family/ladder.py has the exact rule.
#
# Mamba runs D such models side by side, one per channel, each with its own A and dt; B and C are
# shared. It computes dt, B and C from x_t (paper, section 3.2, algorithm 2). A is the same for
# all tokens: the decay exp(dt A) depends on the token through dt. For channel i and its state n:
#
#     h_t[i,n] = exp(dt_t[i] A[i,n]) h_{t-1}[i,n] + dt_t[i] B_t[n] x_t[i]
#     y_t[i]   = sum over n of C_t[n] h_t[i,n]
#
# Unrolled from a zero state, this is attention without a softmax: y_t[i] is a weighted sum of
# dt_s[i] x_s[i] over s <= t, with the weights
#
#     sum over n of C_t[n] B_s[n] exp(A[i,n] (dt_{s+1}[i] + ... + dt_t[i]))
#
# So dt x is a value, B a key, C a query, and what was written fades with time. Each channel has
# weights of its own, which can be negative and need not sum to 1.
#
# With dt near 0 a token leaves the state alone: nothing decays, nothing is written. With a large dt
# the past is erased, and h becomes dt B x of this token alone.

def selective_scan_ref(x, dt, A, B, C, h=None):
    """The recurrence of the paper (algorithm 2, lines 5 and 6), B discretized as dt B.

    x, dt (b, L, D); A (D, N), negative; B, C (b, L, N); h (b, D, N), the state before the first
    step, None for zero. It computes in the dtype of its arguments.
    Returns y (b, L, D) and the state after the last step (b, D, N).

    With L = 1 it is the decode step.
    """
    check_shapes(x, dt, A, B, C, h)
    if h is None:
        h = x.new_zeros(x.shape[0], *A.shape)                            # (b, D, N)
    y = []
    # Not x[:, t]: its backward pass would allocate a gradient as large as x at every step.
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1)):
        decay = torch.exp(dt_t[..., None] * A)                           # (b, D, N)
        h = decay * h + (dt_t * x_t)[..., None] * B_t[:, None]           # (b, D, N)
        y.append((h * C_t[:, None]).sum(-1))                             # (b, D)
    return (torch.stack(y, dim=1) if y else x.clone()), h                # L = 0 gives no y_t


# ---- 2. The layer --------------------------------------------------------------------------------

class CausalConv1d(nn.Conv1d):
    """A causal convolution: `taps` weights per channel, for the token itself and the taps - 1
    tokens before it.

    Without it, x, dt, B and C would depend on one token alone. In recall (data.py, tau = 1: which
    token came after q?), B must see q, one token earlier, while x is the value. Each channel has
    its own filter, so some can pass q on and others the token itself. It is written as a sum of
    shifted products, which a compiler can fuse with the layer around it.
    """

    def __init__(self, channels, taps):
        super().__init__(channels, channels, taps, groups=channels)

    def forward(self, x, window=None):
        """x (b, L, D); window (b, D, taps - 1), the inputs before x, None at the start ->
        y (b, L, D) and the next window."""
        L, before = x.shape[1], self.kernel_size[0] - 1
        if window is None:
            x = F.pad(x, (0, 0, before, 0))
        else:
            x = torch.cat([window.mT.to(x.dtype), x], dim=1)
        if L == 1:                               # a decode step: 3 operations, not 2 * taps
            y = ((x.mT * self.weight[:, 0]).sum(-1) + self.bias)[:, None]
        else:
            taps = self.weight[:, 0].unbind(1)                           # (D,) each
            y = sum((x[:, k:k + L] * tap for k, tap in enumerate(taps)), self.bias)
        return y, x[:, L:].mT.clone()            # the last taps - 1; a view would keep all of x


def initial_dt_bias(n):
    """(n,): a bias whose softplus is between 0.001 and 0.1 (paper, section 3.6), uniform on a log
    scale as in the official code."""
    dt = torch.exp(torch.empty(n).uniform_(math.log(1e-3), math.log(1e-1)))
    return torch.log(torch.expm1(dt))            # the inverse of softplus


class MambaState(NamedTuple):
    """All that a Mamba layer keeps of the tokens so far: d_inner * (d_conv - 1 + d_state) numbers
    for each sequence, where attention keeps all keys and values."""
    conv: torch.Tensor   # (b, d_inner, d_conv - 1), the last inputs of the convolution
    h: torch.Tensor      # (b, d_inner, d_state)


class Mamba(nn.Module):
    r"""The Mamba layer (paper, section 3.4 and figure 3), without a residual connection or norm.

                                                 /-> dt, B, C -\
        x -> in_proj -> causal convolution -> SiLU ------------> scan -> + D x -> * -> out_proj
                    \-> z -> SiLU -----------------------------------------------/

    x_proj gives B, C and, through dt_proj and softplus, dt. D here is a parameter, a weight per
    channel, not the number of channels.

    d_model: width of the layer's input and output; d_state: N; d_conv: taps of the convolution;
    expand: d_inner = expand * d_model is the number of channels; dt_rank: rank of the map from a
    token to its dt, None for ceil(d_model / 16). Parameters have the names, shapes and initial
    distributions of mamba_ssm.Mamba with its default arguments; state dicts fit both.

    in_proj has no bias, as in mamba_ssm. This can hurt a layer in front of attention, which has to
    tell each token what came before it. Without a bias every channel has z < 0 at some of our 16
    tokens (d_model = 8): the embeddings in data.py do not lie on one side of any plane through 0.
    There the gate, SiLU(z), is between -0.28 and 0: the channel passes on little, with its sign
    flipped. Mamba before attention learned 16 queries in 0 of 12 runs, and in 3 of 3 with a bias in
    the norm before it (report/README.md, appendix on defaults). `takes_bias` asks for that bias.
    """

    takes_bias = True

    def __init__(self, d_model, d_state=16, d_conv=4, expand=2, dt_rank=None):
        super().__init__()
        d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.d_inner, self.d_state, self.d_conv = d_inner, d_state, d_conv
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = CausalConv1d(d_inner, d_conv)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner)
        # At first, A = -1, ..., -N in each channel (S4D-Real, Gu et al. 2022, arXiv 2206.11893).
        # State n fades to 1/e in 1 / (n dt) steps: with dt from 0.001 to 0.1, state 1 in 10 to
        # 1,000, state 16 in 0.6 to 60. So a channel has N time scales. The logarithm is trained,
        # so that A stays negative and no state can grow by itself. (For one time scale per channel,
        # make A_log (d_inner, 1), and expand A to (d_inner, d_state).)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))       # weights of the skip connection
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

        # The bias sets the initial dt; the weights make it vary by token.
        nn.init.uniform_(self.dt_proj.weight, -self.dt_rank**-0.5, self.dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_dt_bias(d_inner))

    def low_rank_dt_B_C(self, x):
        """x (b, L, d_inner) -> low_rank_dt (b, L, dt_rank), not yet dt; B, C (b, L, d_state)."""
        return self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)

    def forward(self, x, state=None):
        """Run a segment of a sequence, continuing from `state`: a MambaState, None at the start.

        x (b, L, d_model) -> y (b, L, d_model) and the MambaState after the last token. However a
        sequence is cut into segments, the result is that of a single call, up to rounding. To
        decode, call `y, state = layer(x_t, state)` for each new token x_t (b, 1, d_model), under
        torch.no_grad(): the state is part of the gradient's graph.
        """
        window, h = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, dim=-1)                          # (b, L, d_inner) each
        x, window = self.conv1d(x, window)
        x = F.silu(x)                                                    # (b, L, d_inner)

        low_rank_dt, B, C = self.low_rank_dt_B_C(x)
        dt = F.softplus(self.dt_proj(low_rank_dt))                       # (b, L, d_inner), positive
        A = -torch.exp(self.A_log)                                       # (d_inner, d_state)
        y, h = selective_scan(x, dt, A, B, C, h)                         # (b, L, d_inner)
        y = (y + self.D * x) * F.silu(z)
        return self.out_proj(y), MambaState(window, h)


# ---- 3. Chunks of steps --------------------------------------------------------------------------
#
# The loop of selective_scan_ref is slow: it makes a dozen small calls per step, and autograd stores
# each step's decay and state. With the decays a = exp(dt A) and u = dt x, only
# h_t = a_t h_{t-1} + u_t B_t has to run step by step, with one call per step. All else is computed
# for a chunk of T steps at once; a small chunk fits in the CPU's cache. Kept for the backward
# pass: time-first copies of the arguments, and the state before each chunk, N / T times the memory
# of x.
#
# The gradient. dx is the gradient of the loss with respect to x, and so on (that of the step size
# dt is ddt); that of h is called g. Indices are left out: C_t dy_t is C_t[n] dy_t[i], for every
# state n and channel i. Sums are always written out.
#
# 1.  h_t is used twice, by y_t and by h_{t+1}. So g obeys the same recurrence, backwards in time:
#         g_t = C_t dy_t + a_{t+1} g_{t+1}         (dy_t, the gradient of y_t, is given)
#     At the last step, dh, the gradient of the final state, takes the place of a_{t+1} g_{t+1}:
#         g_L = C_L dy_L + dh
#     No y reads the initial state h_0, so its gradient has no first term: it is a_1 g_1.
# 2.  h_t is linear in u_t and in B_t. All states share u_t, all channels share B_t:
#         du_t = sum over states of g_t B_t           dB_t = sum over channels of g_t u_t
# 3.  The gradient of a_t is g_t h_{t-1}. exp is its own derivative:
#         d(dt_t A) = a_t g_t h_{t-1}
# 4.  C_t affects y_t alone:
#         dC_t = sum over channels of h_t dy_t
# 5.  u_t = dt_t x_t and dt_t A are products, and dt_t is a factor of both:
#         dx_t = dt_t du_t            dA = sum over sequences and steps of dt_t d(dt_t A)
#         ddt_t = x_t du_t + sum over states of A d(dt_t A)
#
# All h_t and a_t would take 2 N times the memory of x. So the backward pass visits the chunks from
# last to first, recomputes a and h of a chunk from the state before it, then runs backwards to get
# g. No exp has a positive argument, so none overflows, however long the sequence.
#
# In the code, _k is a chunk and _t a step. Inside both passes time comes first: x, dt, y (L, b, D);
# B, C (L, b, N). States are (N, b, D), so that torch's innermost loops, over b and D, are long.

CHUNK_ELEMENTS = 2**18   # numbers in a buffer (T, N, b, D), unless T < 8: 1 MiB in float32


def _broadcast(x, dt, A, B, C):
    """Shapes that broadcast to (L, N, b, D): x, dt (L, 1, b, D) and B, C (L, N, b, 1), which are
    views; A (N, b, D), contiguous."""
    A = A.t()[:, None].expand(-1, x.shape[1], -1).contiguous()
    return x[:, None], dt[:, None], A, B.mT[..., None], C.mT[..., None]


def _recur(a, w, h):
    """h_t = a_t h_{t-1} + w_t for lists of decays a_t and writes w_t, (N, b, D) each.

    h_t overwrites w_t, which saves memory; a may be longer than w. Returns the last h.
    """
    for a_t, w_t in zip(a, w):
        h = w_t.addcmul_(a_t, h)
    return h


class ChunkedScan(torch.autograd.Function):
    """Both passes of chunked_scan: x, dt (L, b, D); A (D, N); B, C (L, b, N); h (N, b, D); T steps
    per chunk."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h, T):
        """-> y (L, b, D) and the last state (N, b, D)."""
        ctx.T = T
        arguments = x, dt, A, B, C
        x, dt, A, B, C = _broadcast(*arguments)                          # A is now (N, b, D)
        u = dt * x
        y = torch.empty_like(x[:, 0])
        # All chunks share two buffers: fresh memory for each would cost time in page faults.
        a, hs = x.new_empty(2, T, *A.shape)                              # (T, N, b, D) each
        # Cut into single steps once: once per chunk took up to a third of a short scan.
        a_steps, h_steps = a.unbind(), hs.unbind()
        starts = []                                      # the state before each chunk (N, b, D)
        for dt_k, u_k, B_k, C_k, y_k in zip(*(v.split(T) for v in (dt, u, B, C, y))):
            starts.append(h)
            steps = len(dt_k)                                            # T, or fewer in the last
            a_k, h_k = a[:steps], hs[:steps]                             # (T, N, b, D) each
            # A CPU's float32 exp takes 10 to 50 times as long below -87 (say dt = 6, A = -16),
            # where it gives denormal numbers or 0. So both passes clamp at -80; the margin keeps
            # products of decay and state from being denormal. A decay of exp(-80) = 2e-35 instead
            # of 0 matters only for states above 1e30, and so it does in d(dt A), a multiple of it.
            # A trained model runs up to twice as fast. The other forms of the scan do not clamp.
            torch.mul(dt_k, A, out=a_k).clamp_(min=-80).exp_()
            torch.mul(u_k, B_k, out=h_k)         # h_k is u_t B_t, and after _recur h_t
            h = _recur(a_steps, h_steps[:steps], h).clone()      # the next chunk overwrites hs
            torch.mul(h_k, C_k, out=a_k)                                 # a is no longer needed
            torch.sum(a_k, 1, out=y_k)                                   # (T, b, D)
        ctx.set_materialize_grads(False)         # None, not zeros, where a result has no gradient
        ctx.save_for_backward(*arguments, torch.stack(starts))
        return y, h

    @staticmethod
    def backward(ctx, dy, dh):
        """-> the gradients of x, dt, A, B, C and h."""
        if torch.is_grad_enabled():              # create_graph=True
            raise RuntimeError("chunked_scan has no second derivative; selective_scan_ref has one")
        x, dt, A, B, C, starts = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        x, dt, A, B, C = _broadcast(x, dt, A, B, C)
        u, dy, T = dt * x, dy[:, None], ctx.T                            # (L, 1, b, D)
        du, ddt = torch.empty_like(x[:, 0]), torch.empty_like(x[:, 0])   # (L, b, D)
        dB, dC = torch.empty_like(B[..., 0]), torch.empty_like(C[..., 0])    # (L, N, b)
        dA = x.new_zeros(T, *A.shape)            # (T, N, b, D), summed over T and b at the end
        # What later chunks add to g at this chunk's last step (N, b, D): dh, then a_1 g_1 of the
        # chunk after it.
        later = torch.zeros_like(starts[0]) if dh is None else dh.contiguous()
        a, g = x.new_empty(2, T, *A.shape)
        hs = x.new_empty(T + 1, *A.shape)                # row 0: the state before the chunk
        a_steps, g_steps, h_steps = a.unbind(), g.unbind(), hs[1:].unbind()
        chunks = list(zip(starts, *(v.split(T) for v in (dt, u, B, C, dy, du, ddt, dB, dC))))
        for start, dt_k, u_k, B_k, C_k, dy_k, du_k, ddt_k, dB_k, dC_k in reversed(chunks):
            steps = len(dt_k)
            a_k, g_k = a[:steps], g[:steps]                              # (T, N, b, D) each
            h_k, h_before = hs[1:steps + 1], hs[:steps]                  # h_t, h_{t-1}
            torch.mul(dt_k, A, out=a_k).clamp_(min=-80).exp_()
            torch.mul(u_k, B_k, out=h_k)
            hs[0] = start
            _recur(a_steps, h_steps[:steps], start)
            torch.mul(C_k, dy_k, out=g_k)
            g_k[-1] += later
            # Rule 1, from the last step but one to the first: add a_{t+1} g_{t+1} to g_t, so far
            # C_t dy_t. With three steps: g_2 += a_3 g_3, g_1 += a_2 g_2.
            _recur(a_steps[1:steps][::-1], g_steps[:steps - 1][::-1], g_k[-1])
            later = a_k[0] * g_k[0]
            # The order matters: each product overwrites a buffer that was read for the last time,
            # and h_before shares memory with h_k.
            d_dtA = a_k.mul_(g_k).mul_(h_before)                         # rule 3
            dA[:steps].addcmul_(d_dtA, dt_k)                             # rule 5
            torch.sum(d_dtA.mul_(A), 1, out=ddt_k)                       # rule 5, its second term
            torch.sum(h_k.mul_(dy_k), 3, out=dC_k)                       # rule 4
            torch.sum(torch.mul(g_k, u_k, out=h_k), 3, out=dB_k)         # rule 2
            torch.sum(g_k.mul_(B_k), 1, out=du_k)                        # rule 2
        ddt.addcmul_(du, x[:, 0])                                        # rule 5, its first term
        dx = du.mul_(dt[:, 0])                                           # rule 5
        return dx, ddt, dA.sum((0, 2)).t(), dB.mT, dC.mT, later, None    # dh_0 = a_1 g_1


def chunked_scan(x, dt, A, B, C, h=None):
    """selective_scan_ref, but fast: same arguments, results and gradients, up to rounding. There is
    no second derivative."""
    check_shapes(x, dt, A, B, C, h)
    b, L, D = x.shape
    h = x.new_zeros(b, D, A.shape[1]) if h is None else h
    if x.numel() == 0:
        return x.clone(), h
    T = min(L, max(8, CHUNK_ELEMENTS // (b * A.numel())))
    x, dt, B, C = (v.transpose(0, 1).contiguous() for v in (x, dt, B, C))
    y, h = ChunkedScan.apply(x, dt, A, B, C, h.permute(2, 0, 1).contiguous(), T)
    return y.transpose(0, 1).contiguous(), h.permute(1, 2, 0).contiguous()


# ---- 4. Which form -------------------------------------------------------------------------------
#
# The first row that applies:
#
#     torch.func, forward AD    selective_scan_ref: a fast form may raise an error
#     one step or none          selective_scan_ref: there is nothing to cut into chunks
#     CUDA or torch.compile     parallel_scan (fused_scan.py): all chunks at once, to fill a GPU. A
#                               compiler takes it as one operator; it would unroll the other loops
#     CPU, MPS                  chunked_scan: one chunk after another, small enough for a cache
#
# The fast forms have no second derivative: backward with create_graph=True raises a RuntimeError.
# Nor do they take several gradients in one call (is_grads_batched). selective_scan_ref does both.
# For layers in float32 or float64, set mamba.selective_scan to it; it does not promote bfloat16.

def is_transformed():
    """Whether torch.func or forward AD is active; torch has no public way to ask. Then a custom
    autograd.Function may raise an error, so each layer runs its recurrence."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def selective_scan(x, dt, A, B, C, h=None):
    """The form of the table above: arguments and results of selective_scan_ref, up to rounding.

    States and sums have the dtype of A, or float32 if that is wider; y has the dtype of x. If x is
    bfloat16, parallel_scan also rounds what it stores for each chunk. Then y and all gradients
    differ from those in float64, of the same rounded arguments, by up to 3e-3 of their norm,
    however long the sequence.
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    A = A.to(dtype)
    h = None if h is None else h.to(dtype)
    if x.shape[1] == 1 or x.numel() == 0 or is_transformed():
        scan = selective_scan_ref
    elif x.is_cuda or torch.compiler.is_compiling():
        return parallel_scan(x, dt, A, B, C, h)      # its kernels convert to A's dtype themselves
    else:
        scan = chunked_scan
    y, h = scan(x.to(dtype), dt.to(dtype), A, B.to(dtype), C.to(dtype), h)
    return y.to(x.dtype), h


# ---- Demo ----------------------------------------------------------------------------------------

def decode(x, dt, A, B, C, h=None):
    """selective_scan one token at a time; each call passes its state to the next."""
    y = []
    for x_t, dt_t, B_t, C_t in zip(*(v.split(1, dim=1) for v in (x, dt, B, C))):
        y_t, h = selective_scan(x_t, dt_t, A, B_t, C_t, h)
        y.append(y_t)
    return torch.cat(y, dim=1), h


def compare_forms(b=8, L=256, D=32, N=16):
    """Print each form's times, and the largest difference of its results and gradients from those
    of the recurrence in float64."""
    torch.manual_seed(0)
    x, dt = torch.randn(b, L, D), 0.1 * F.softplus(torch.randn(b, L, D))
    B, C = torch.randn(b, L, N), torch.randn(b, L, N)
    A, dy = -torch.arange(1.0, N + 1).repeat(D, 1), torch.randn(b, L, D)

    print(f"Selective scan of b = {b} sequences, L = {L}, D = {D}, N = {N} on one CPU core\n")
    print(f"{'':<31}{'forward':>10}{'backward':>12}   difference from first")
    exact = None
    for name, scan, dtype in [("recurrence in float64", selective_scan_ref, torch.float64),
                              ("recurrence", selective_scan_ref, torch.float32),
                              ("chunks, one after another", chunked_scan, torch.float32),
                              ("chunks, all at once, for a GPU", parallel_scan, torch.float32),
                              ("single decode steps", decode, torch.float32)]:
        for _ in range(2):                                   # the first is a warm-up
            inputs = [v.to(dtype).requires_grad_() for v in (x, dt, A, B, C)]
            times = [time.perf_counter()]
            y, h = scan(*inputs)
            times.append(time.perf_counter())
            gradients = torch.autograd.grad(y, inputs, dy.to(dtype))
            times.append(time.perf_counter())
        found = [y, h, *gradients]
        exact = exact or found
        difference = max((v - w).abs().max().item() for v, w in zip(found, exact))
        print(f"{name:<31}{1e3 * (times[1] - times[0]):>7.1f} ms"
              f"{1e3 * (times[2] - times[1]):>9.1f} ms{difference:>24.1e}")


if __name__ == "__main__":
    torch.set_num_threads(1)      # operations are small: more threads are slower on a busy machine
    compare_forms()
