"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a state space model that is also attention.

The recurrence is Mamba's, but all channels and states of a head share one number A < 0 and one
step size dt_t. For one channel, with a number x_t and N numbers each in h_t, B_t and C_t:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t          y_t = C_t . h_t

    symbol   meaning                                  as attention
    x        inputs (b, L, H, P)                      values
    B        how a token is written (b, L, G, N)      keys
    C        how the state is read (b, L, G, N)       queries
    dt       step size (b, L, H), positive
    A        decay rate (H,), negative
    h        state (b, H, P, N)
    y        outputs (b, L, H, P)
    u        dt x: a step adds u B to h
    b, L     sequences in the batch, steps
    H, P     heads, and channels per head
    N        size of the state per channel            size of a key
    G        groups of heads that share B and C
    c, T     chunks, and steps per chunk

Unrolled from zero, with the decay a_ts = exp(A (dt_{s+1} + ... + dt_t)) between two steps,

    y_t = sum over s <= t of (C_t . B_s) a_ts dt_s x_s

This is attention with a decay instead of a softmax (the paper's "duality", its section 5). The sum
takes about L^2 / 2 dot products; the recurrence takes L steps, one after another. ssd combines
them, so that a GPU does most of the work in matmuls:

    ssd_ref     the recurrence, one step at a time
    Mamba2      the layer
    ssd         chunks of T steps: attention in a chunk, the recurrence from chunk to chunk

`python -m family.mamba2` shows that they agree, and their times.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from family.chunks import (AcrossChunks, check_steps, clamped_exp, difference, set_nan_aside,
                           show_agreement, show_steps, widest)
from fused_scan import split
from mamba import CausalConv1d, initial_dt_bias, is_transformed


def ssd_ref(x, dt, A, B, C, h=None):
    """The recurrence, in any dtype; autograd finds the gradient.

    x (b, L, H, P); dt (b, L, H); A (H,), negative, or a rate per step (b, L, H), at most 0; B, C
    (b, L, G, N), where G divides H; h (b, H, P, N), the state before the first step, None for zero.
    Returns y (b, L, H, P) and the state after the last step (b, H, P, N). The official counterpart
    is mamba_chunk_scan_combined, without D, z and softplus.
    """
    check_steps(x, dt, B, C)
    H = x.shape[2]
    B = B.repeat_interleave(H // B.shape[2], dim=2)                      # (b, L, H, N)
    C = C.repeat_interleave(H // C.shape[2], dim=2)
    if h is None:
        h = x.new_zeros(x.shape[0], H, x.shape[3], B.shape[3])           # (b, H, P, N)
    decay = torch.exp(dt * A)                                            # (b, L, H)
    u = dt[..., None] * x                                                # (b, L, H, P)
    y = []
    for decay_t, u_t, B_t, C_t in zip(*(v.unbind(1) for v in (decay, u, B, C))):
        h = decay_t[..., None, None] * h + u_t[..., None] * B_t[:, :, None]      # (b, H, P, N)
        y.append((h @ C_t[..., None])[..., 0])                           # (b, H, P)
    return torch.stack(y, dim=1), h


class Mamba2State(NamedTuple):
    """All that a Mamba-2 layer keeps of the tokens so far, however many there were."""
    conv: torch.Tensor   # (b, d_inner + 2 G N, d_conv - 1), the last inputs of the convolution
    h: torch.Tensor      # (b, H, P, N)


class Mamba2(nn.Module):
    r"""The Mamba-2 layer (paper, section 7.1 and figure 6), without residual and pre-norm.

        x -> in_proj -> x, B, C -> conv1d -> SiLU -> ssd -> + D x -> gated norm -> out_proj -> y
                    \-> dt -> softplus --------------/               /
                    \-> z ------------------------------------------/

    In Mamba, dt, B and C are computed from x after the convolution. Here one map of the input makes
    z, x, B, C and dt at once, and x, B and C pass through the convolution.

    d_inner = expand * d_model channels, in heads of headdim; d_state: N; ngroups: G. Names, shapes
    and initial values are those of mamba_ssm.Mamba2 with its default arguments, so state dicts move
    between the two.
    """

    takes_bias = True

    def __init__(self, d_model, d_state=128, d_conv=4, expand=2, headdim=64, ngroups=1):
        super().__init__()
        d_inner = expand * d_model
        self.d_inner, self.d_state = d_inner, d_state
        self.headdim, self.ngroups, self.nheads = headdim, ngroups, d_inner // headdim
        if self.nheads * headdim != d_inner or self.nheads % ngroups:
            raise ValueError(f"headdim {headdim} must divide {d_inner} channels "
                             f"into a multiple of {ngroups} heads")
        channels = d_inner + 2 * ngroups * d_state                       # x, B and C, convolved
        # z, then x, B and C, then dt
        self.in_proj = nn.Linear(d_model, d_inner + channels + self.nheads, bias=False)
        self.conv1d = CausalConv1d(channels, d_conv)
        self.dt_bias = nn.Parameter(initial_dt_bias(self.nheads))
        self.A_log = nn.Parameter(torch.log(torch.empty(self.nheads).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = GatedNorm(d_inner, ngroups)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x, state=None):
        """Run a segment of a sequence, continuing from `state`: a Mamba2State, None at the start.

        x (b, L, d_model) -> y (b, L, d_model), the Mamba2State after the last token.
        """
        if x.shape[1] == 0:
            return x, state
        window, h = (None, None) if state is None else state
        GN = self.ngroups * self.d_state
        z, x, dt = self.in_proj(x).split([self.d_inner, self.d_inner + 2 * GN, self.nheads], dim=-1)
        x, window = self.conv1d(x, window)
        x, B, C = F.silu(x).split([self.d_inner, GN, GN], dim=-1)
        x = x.unflatten(-1, (self.nheads, self.headdim))                 # (b, L, H, P)
        B = B.unflatten(-1, (self.ngroups, self.d_state))                # (b, L, G, N)
        C = C.unflatten(-1, (self.ngroups, self.d_state))                # (b, L, G, N)
        dt = F.softplus(dt + self.dt_bias)                               # (b, L, H), positive
        A = -torch.exp(self.A_log)                                       # (H,), negative
        y, h = ssd(x, dt, A, B, C, h)                                    # (b, L, H, P)
        y = (y + self.D[:, None] * x).flatten(2)                         # (b, L, d_inner)
        return self.out_proj(self.norm(y, z)), Mamba2State(window, h)


class GatedNorm(nn.Module):
    """RMSNorm of y * SiLU(z), each group of channels by itself; the official RMSNormGated."""

    def __init__(self, d, groups=1):
        super().__init__()
        self.groups, self.weight = groups, nn.Parameter(torch.ones(d))

    def forward(self, y, z):
        """y, z (b, L, d) -> (b, L, d)."""
        y = (y * F.silu(z)).unflatten(-1, (self.groups, -1))
        return F.rms_norm(y, y.shape[-1:], eps=1e-5).flatten(-2) * self.weight


# ---- Chunks --------------------------------------------------------------------------------------
#
# Let h_0 be the state before a chunk, and count its steps from 1 to T. Write sums_t for the sum of
# dt A over steps 1 to t. Unrolled inside the chunk,
#
#     h_t = exp(sums_t) h_0 + sum over s <= t of exp(sums_t - sums_s) u_s B_s
#     y_t = exp(sums_t) C_t h_0 + sum over s <= t of (C_t . B_s) exp(sums_t - sums_s) u_s
#
# Neither sum needs h_0, so all chunks are computed at once: the sum in y_t by attention (step 1),
# the sum in h_T by one more matmul (step 2). Step 3 carries the state from chunk to chunk and adds
# the first term of h_T, step 4 that of y.
#
# In the einsums, t and s are steps, g groups, h the heads of a group (not the state); p and n are P
# and N.

def ssd(x, dt, A, B, C, h=None, T=None):
    """ssd_ref in chunks of at most T steps, for L >= 1: the same results, gradients and second
    derivatives, if dt A is finite.

    States and sums are at least float32; y has the dtype of x. Inputs of matmuls are bfloat16 if x
    is, otherwise at least float32, because float16 ends at 65,504; under torch.autocast, they have
    its dtype. T: by default 16, because more would cost more arithmetic; on CUDA 128 if L <= 128 or
    P N >= 4,096, otherwise 64. The four steps are those of the paper's listing 1.
    """
    check_steps(x, dt, B, C)
    x_dtype = x.dtype
    dtype = torch.promote_types(x_dtype, torch.float32)
    matmul_dtype = x_dtype if x_dtype == torch.bfloat16 else dtype
    L, H, P = x.shape[1:]
    G, N = B.shape[2:]
    if L == 1 or is_transformed():                   # nothing to cut, or torch.func
        y, h = ssd_ref(*(v.to(dtype) for v in (x, dt, A, B, C)), None if h is None else h.to(dtype))
        return y.to(x_dtype), h
    if T is None:
        T = 16
        if x.is_cuda:
            T = 128 if L <= 128 or P * N >= 4096 else 64
    grouped = (G, H // G)                                                # groups, heads in each
    dt = dt.to(dtype)
    # Numbers that are not finite would reach earlier outputs.
    (u, log_decay, B), nan = set_nan_aside(dt[..., None] * x, dt * A.to(dtype), B.to(matmul_dtype))
    u = split(u, T).unflatten(3, grouped)                                  # (b, c, T, G, H/G, P)
    B, C = split(B, T), split(C.to(matmul_dtype), T)                     # (b, c, T, G, N)
    log_decay = split(log_decay, T).unflatten(3, grouped).movedim(2, -1)   # (b, c, G, H/G, T)
    sums = log_decay.to(widest(x.device)).cumsum(-1)                     # (b, c, G, H/G, T)

    # 1. In a chunk: attention. Its weights, (T, T) per head, are the largest tensors of all. On a
    # GPU, where T is large, the backward pass computes them again, to save a third of the memory.
    within = (sums, C, B, u.to(matmul_dtype), dtype)
    if x.is_cuda and sums.shape[1] > 1:
        y = checkpoint(within_chunks, *within, use_reentrant=False, preserve_rng_state=False)
    else:
        y = within_chunks(*within)                                       # (b, c, T, G, H/G, P)

    # 2. The state at the end of each chunk, had it started from zero.
    to_end = clamped_exp(sums[..., -1:] - sums, dtype).movedim(-1, 2)    # (b, c, T, G, H/G)
    ends = torch.einsum("bctghp, bctgn -> bcghpn", (to_end[..., None] * u).to(matmul_dtype), B)

    # 3. The recurrence from chunk to chunk.
    decay = clamped_exp(sums[..., -1], dtype)[..., None, None]           # (b, c, G, H/G, 1, 1)
    reads_start = sums.shape[1] > 1 or h is not None         # else: a single chunk, from zero
    if h is None:
        h = torch.zeros_like(ends[:, 0], dtype=dtype)
    else:
        h = h.to(dtype).unflatten(1, grouped)                              # (b, G, H/G, P, N)
    starts, h = AcrossChunks.apply(decay, ends.to(dtype), h)             # (b, c, G, H/G, P, N)

    # 4. The contribution of each chunk's first state to its outputs.
    if reads_start:
        from_start = clamped_exp(sums, dtype).movedim(-1, 2)[..., None]  # (b, c, T, G, H/G, 1)
        starts = starts.to(matmul_dtype)
        y = y + from_start * torch.einsum("bctgn, bcghpn -> bctghp", C, starts)
    y = y.flatten(3, 4).flatten(1, 2)[:, :L] + nan.cumsum(1)[..., None, None]
    return y.to(x_dtype), h.flatten(1, 2) + nan.sum(1)[:, None, None, None]


def within_chunks(sums, C, B, u, dtype):
    """Step 1 of ssd: y_t = sum over s <= t of (C_t . B_s) a_ts u_s, where a_ts, the decay from s to
    t, is the exp of a difference of sums."""
    a = clamped_exp(sums[..., :, None] - sums[..., None, :], dtype).tril()  # (b, c, G, H/G, T, T)
    scores = torch.einsum("bctgn, bcsgn -> bcgts", C, B)[:, :, :, None]
    return torch.einsum("bcghts, bcsghp -> bctghp", (scores * a).to(u.dtype), u)


@torch.no_grad()
def main():
    """Show that recurrence, chunks, attention and single steps of the layer agree, and times."""
    torch.manual_seed(0)
    b, L, H, P, N = 4, 256, 4, 32, 16
    x, dt, A = torch.randn(b, L, H, P), torch.rand(b, L, H), -torch.rand(H)
    B, C = torch.randn(2, b, L, 1, N)
    exact = show_agreement(ssd_ref, ssd, (x, dt, A, B, C))
    y, _ = ssd(x, dt, A, B, C, T=L)                  # a single chunk: attention over all tokens
    print(f"attention                {difference(y, exact)}")
    show_steps(Mamba2(32, d_state=N, headdim=16), torch.randn(2, 64, 32))


if __name__ == "__main__":
    main()
