"""Mamba (Gu and Dao 2023, arXiv 2312.00752) in PyTorch: the recurrence, the layer, and a fast scan.

A Mamba layer reads a sequence with a state of fixed size. Each token decides how much of the state
decays, what is written into it and what is read from it: the state space model is selective.
`python mamba.py` shows that all forms of the recurrence agree, and how long each takes.

    symbol   shape        meaning
    b, L                  sequences in the batch; tokens, which are also called steps
    D, N                  channels, each a system of its own; states per channel
    x        (b, L, D)    input of the recurrence
    dt       (b, L, D)    step size, positive: how long a token acts on the state
    A        (D, N)       decay rates, negative, the same for every token
    B        (b, L, N)    how a token is written to the N states, the same in all channels
    C        (b, L, N)    how the N states are read
    h        (b, D, N)    state
    y        (b, L, D)    output
    dx, ddt, dA, ...      gradient of the loss with respect to x, dt, A, ...

In the Mamba layer, as in the paper, the parameter called D is the skip connection from x to y.
"""

import math
import time
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad

from chunked_scan import check_shapes, chunked_scan
from fused_scan import parallel_scan


# ---- 1. The recurrence ---------------------------------------------------------------------------
#
# A linear state space model sends a signal x(t) through a state h(t), with A diagonal:
#
#     h'(t) = A h(t) + B x(t)         y(t) = C h(t)
#
# If x is constant over a step of length dt, the exact solution is (paper, equation 4)
#
#     h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A  B x_t
#
# The official code replaces the second factor by its first-order form dt, and so do we, so that
# trained weights mean the same in both:
#
#     h_t = exp(dt A) h_{t-1} + dt B x_t         y_t = C h_t
#
# They agree for small dt |A| and part for large: at A = -1 and dt = 10 this one writes 10 B x, the
# exact one 1 B x. It is simpler, saves a division per state, and B and x are learned and can adapt
# their scale. The exact rule is in family/ladder.py, LTI.
#
# Mamba computes dt, B and C from the token (paper, section 3.2, algorithm 2). dt -> 0 skips a token
# and keeps the state; dt -> infinity erases the state.

def selective_scan_ref(x, dt, A, B, C, h=None):
    """The recurrence as in the paper (algorithm 2, lines 5 and 6); autograd finds the gradient.

    x, dt (b, L, D); A (D, N), negative; B, C (b, L, N); h (b, D, N), the state before the first
    step, None for zero. It computes in the dtype of its arguments.
    Returns y (b, L, D) and the state after the last step (b, D, N).

    It is also the streaming step: call it with L = 1 and hand the state on.
    The official counterpart is mamba_ssm's selective_scan_ref, without its D, z and softplus.
    """
    check_shapes(x, dt, A, B, C, h)
    if h is None:
        h = x.new_zeros(x.shape[0], *A.shape)                            # (b, D, N)
    y = []
    # unbind, because the gradient of x[:, t] is as large as that of x, for every t.
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1)):
        decay = torch.exp(dt_t[..., None] * A)                           # (b, D, N)
        h = decay * h + (dt_t * x_t)[..., None] * B_t[:, None]           # (b, D, N)
        y.append((h * C_t[:, None]).sum(-1))                             # (b, D)
    return torch.stack(y, dim=1) if y else x.clone(), h


# ---- 2. The layer --------------------------------------------------------------------------------

class DepthwiseConv1d(nn.Conv1d):
    """nn.Conv1d with a filter per channel and no padding, as one shifted product per tap.

    The same numbers, but a compiler can fuse them with what comes before and after.
    """

    def __init__(self, channels, taps):
        super().__init__(channels, channels, taps, groups=channels)

    def forward(self, x):
        """x (b, channels, L + taps - 1) -> (b, channels, L)."""
        x = x.mT                                                         # as causal_conv has it
        L = x.shape[1] - self.kernel_size[0] + 1
        taps = self.weight[:, 0].unbind(1)                               # (channels,) each
        products = (x[:, k:k + L] * tap for k, tap in enumerate(taps))
        return sum(products, self.bias).mT


def causal_conv(x, conv1d, window=None):
    """Apply a depthwise convolution so that each token sees itself and the taps - 1 before it.

    x (b, L, D); conv1d: an nn.Conv1d of D channels; window (b, D, taps - 1): the inputs before x,
    None at the start. Returns y (b, L, D) and the next window.
    """
    L, before = x.shape[1], conv1d.kernel_size[0] - 1
    x = F.pad(x, (0, 0, before, 0)) if window is None else torch.cat([window.mT, x], dim=1)
    start = conv1d.padding[0]                                            # the module's own padding
    y = conv1d(x.mT)[:, :, start:start + L].mT.contiguous()              # (b, L, D)
    return y, x[:, L:].mT.clone()                                        # a view would keep all x


class MambaState(NamedTuple):
    """All that a Mamba layer keeps of the tokens so far, however many they were."""
    conv: torch.Tensor   # (b, d_inner, d_conv - 1), the last inputs of the convolution
    h: torch.Tensor      # (b, d_inner, d_state)


class Mamba(nn.Module):
    r"""The Mamba layer (paper, section 3.4 and figure 3), without a residual connection or a norm.

        x -> in_proj -> causal convolution -> SiLU -> selective scan -> * -> out_proj -> y
                    \-> z -> SiLU ------------------------------------/

    d_model: width of x and y; d_state: N; d_conv: taps of the convolution; expand: there are
    d_inner = expand * d_model channels; dt_rank: rank of the map from a token to its dt, None for
    ceil(d_model / 16). Parameters have the names, shapes and initial values of mamba_ssm.Mamba with
    its default arguments, so state dicts move between the two.

    As there, in_proj has no bias. On this task that hurts: embeddings are fixed random vectors with
    no direction in common, so no gate z could be open for every token. `takes_bias` asks the model
    for a norm with a bias in front of the layer (hybrid.RMSNorm).
    """

    takes_bias = True

    def __init__(self, d_model, d_state=16, d_conv=4, expand=2, dt_rank=None):
        super().__init__()
        d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.d_inner, self.d_state, self.d_conv = d_inner, d_state, d_conv
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = DepthwiseConv1d(d_inner, d_conv)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner)
        # A = -1, ..., -N in each channel (S4D-Real, Gu et al. 2022, arXiv 2206.11893): its N time
        # scales are 1 / dt down to 1 / (N dt) steps. The logarithm is trained, so that A stays
        # negative and the state cannot explode.
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

        # dt starts between 0.001 and 0.1 (paper, section 3.6), uniform on a log scale as in the
        # official code. The bias is the inverse of softplus there, log(exp(dt) - 1).
        nn.init.uniform_(self.dt_proj.weight, -self.dt_rank**-0.5, self.dt_rank**-0.5)
        dt = torch.exp(torch.empty(d_inner).uniform_(math.log(1e-3), math.log(1e-1)))
        with torch.no_grad():
            self.dt_proj.bias.copy_(torch.log(torch.expm1(dt)))

    def dt_B_C(self, x):
        """x (b, L, d_inner) -> dt (b, L, dt_rank), which dt_proj maps on; B, C (b, L, d_state)."""
        return self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)

    def forward(self, x, state=None):
        """Run a segment of a sequence, continuing from `state`: a MambaState, None at the start.

        x (b, L, d_model) -> y (b, L, d_model), the MambaState after the last token.
        """
        window, h = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, dim=-1)                          # (b, L, d_inner) each
        x, window = causal_conv(x, self.conv1d, window)
        x = F.silu(x)                                                    # (b, L, d_inner)

        dt, B, C = self.dt_B_C(x)
        dt = F.softplus(self.dt_proj(dt))                                # (b, L, d_inner), positive
        A = -torch.exp(self.A_log)                                       # (d_inner, d_state)
        y, h = selective_scan(x, dt, A, B, C, h)                         # (b, L, d_inner)
        y = (y + self.D * x) * F.silu(z)
        return self.out_proj(y), MambaState(window, h)


# ---- 3. The fast forms ---------------------------------------------------------------------------
#
# The loop makes a dozen small calls per step, and autograd keeps every state. Both fast forms cut
# time into chunks, keep one state per chunk, and compute the others again in the backward pass:
#
#     chunked_scan.py    one chunk after another, in a CPU's cache; there the gradient is derived
#     fused_scan.py      all chunks at once, for a GPU, in kernels made by torch.compile

def selective_scan(x, dt, A, B, C, h=None):
    """selective_scan_ref made fast: same arguments, same results, same gradients, to rounding.

    States and sums are float32 or wider, whatever the arguments are; y has the dtype of x.
    Under torch.func (vmap, grad, jvp) and forward-mode AD it is selective_scan_ref itself, the only
    form that supports them. The fast forms have no second derivative.
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    A = A.to(dtype)
    h = None if h is None else h.to(dtype)
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if x.shape[1] == 1 or x.numel() == 0 or transformed:
        scan = selective_scan_ref
    elif x.is_cuda:
        return parallel_scan(x, dt, A, B, C, h)      # its kernels convert to A's dtype themselves
    else:
        scan = chunked_scan
    y, h = scan(x.to(dtype), dt.to(dtype), A, B.to(dtype), C.to(dtype), h)
    return y.to(x.dtype), h


# ---- Demo ----------------------------------------------------------------------------------------

def decode(x, dt, A, B, C, h=None):
    """selective_scan one token at a time, each call handing its state to the next."""
    y = []
    for x_t, dt_t, B_t, C_t in zip(*(v.split(1, dim=1) for v in (x, dt, B, C))):
        y_t, h = selective_scan(x_t, dt_t, A, B_t, C_t, h)
        y.append(y_t)
    return torch.cat(y, dim=1), h


def compare_forms(b=8, L=256, D=32, N=16):
    """Print each form's times, and its largest differences from the recurrence in float64."""
    torch.manual_seed(0)
    x, dt = torch.randn(b, L, D), 0.1 * F.softplus(torch.randn(b, L, D))
    B, C = torch.randn(b, L, N), torch.randn(b, L, N)
    A = -torch.arange(1.0, N + 1).repeat(D, 1)
    dy = torch.randn(b, L, D)

    def run(scan, dtype=torch.float32):
        """-> y and the last state, the gradients of x, dt, A, B and C, and both times in ms."""
        inputs = [v.detach().to(dtype).requires_grad_() for v in (x, dt, A, B, C)]
        began = time.perf_counter()
        y, h = scan(*inputs)
        middle = time.perf_counter()
        gradients = torch.autograd.grad(y, inputs, dy.to(dtype))
        return [y, h], gradients, 1e3 * (middle - began), 1e3 * (time.perf_counter() - middle)

    def largest_difference(found, exact):
        return max((v - w).abs().max().item() for v, w in zip(found, exact))

    exact_outputs, exact_gradients, _, _ = run(selective_scan_ref, torch.float64)
    print(f"Selective scan of b = {b} sequences, L = {L}, D = {D}, N = {N}, in float32 on the CPU:")
    print("times, and the largest differences from the recurrence in float64\n")
    print(f"{'form':<28}{'forward':>10}{'backward':>11}{'outputs':>13}{'gradients':>13}")
    forms = {"recurrence": selective_scan_ref, "chunks, one after another": chunked_scan,
             "chunks, all at once": parallel_scan, "single decode steps": decode}
    for name, scan in forms.items():
        runs = [run(scan) for _ in range(5)]
        outputs, gradients, _, _ = runs[0]
        forward, backward = (min(times) for times in zip(*(r[2:] for r in runs)))
        print(f"{name:<28}{forward:>7.1f} ms{backward:>8.1f} ms"
              f"{largest_difference(outputs, exact_outputs):>13.1e}"
              f"{largest_difference(gradients, exact_gradients):>13.1e}")

    layer, tokens = Mamba(D // 2), torch.randn(b, L, D // 2)
    whole, _ = layer(tokens)
    state, outputs = None, []
    for token in tokens.split(1, dim=1):
        y, state = layer(token, state)
        outputs.append(y)
    difference = largest_difference([torch.cat(outputs, dim=1)], [whole])
    print(f"\nA Mamba layer: one call and {L} calls of one token differ by {difference:.1e}.")


if __name__ == "__main__":
    torch.set_num_threads(1)      # operations are small: more threads are slower on a busy machine
    compare_forms()
