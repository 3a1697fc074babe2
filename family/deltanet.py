"""DeltaNet and Gated DeltaNet: a state that is corrected, not only added to.

Linear attention keeps a matrix S that maps keys to values, and adds v_t k_t^T to it for each token.
If two values are written under one key, a read returns their sum. The delta rule first looks up the
value that S has under k_t, and moves it a fraction beta_t of the way to v_t (Schlag et al. 2021,
arXiv 2102.11174; in chunks, Yang et al. 2024, arXiv 2406.06484). The gate a_t lets all of S decay
(Gated DeltaNet, Yang et al. 2024, arXiv 2412.06464, equation 10):

    S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T          y_t = S_t q_t

    symbol   meaning
    q, k     queries and keys (b, L, H, N); the layer makes k of length 1, q of length 1 / sqrt(N)
    v        values (b, L, H, P)
    beta     how much of the old value is replaced (b, L, H), in 0 ... 1; up to 2 works, too
    log_a    the logarithm of the decay a (b, L, H), finite, at most 0; DeltaNet has 0
    S        state (b, H, P, N)
    u        correction (b, L, H, P): what a step adds under its key
    y        outputs (b, L, H, P)
    b, L     sequences in the batch, steps
    H        heads
    N, P     size of a key, size of a value
    c, T     chunks, and steps per chunk

In code: S <- a_t S, u_t = beta_t (v_t - S k_t), S <- S + u_t k_t^T, y_t = S q_t.

With beta_t = 1 and |k_t| = 1, S_t k_t = v_t exactly, whatever the decay: the rule overwrites,
which is what associative recall needs. (The layer's beta is a sigmoid, below 1.)

`python -m family.deltanet` shows that recurrence, chunks and single steps agree, and their times;
`python -m family.linear_attention` shows the rule overwrite a value.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from family.chunks import (at_least_float32, check_steps, clamped_exp, set_nan_aside,
                           show_agreement, show_steps, widest)
from family.triangular import UnitTriangularSolve
from fused_scan import split
from mamba import CausalConv1d, initial_dt_bias, is_transformed


def delta_rule_ref(q, k, v, beta, log_a, S=None):
    """The recurrence, one step at a time, in any dtype; autograd finds the gradient.

    S (b, H, P, N), the state before the first step, None for zero. Returns y (b, L, H, P) and the
    state after the last step (b, H, P, N).
    """
    check_steps(q, k, v, beta, log_a)
    if S is None:
        S = v.new_zeros(v.shape[0], *v.shape[2:], k.shape[-1])           # (b, H, P, N)
    y = []
    for q_t, k_t, v_t, beta_t, log_a_t in zip(*(w.unbind(1) for w in (q, k, v, beta, log_a))):
        S = torch.exp(log_a_t)[..., None, None] * S
        old = (S @ k_t[..., None])[..., 0]                               # (b, H, P), under k_t
        u = beta_t[..., None] * (v_t - old)                              # (b, H, P)
        S = S + u[..., None] * k_t[:, :, None]                           # (b, H, P, N)
        y.append((S @ q_t[..., None])[..., 0])                           # (b, H, P)
    return torch.stack(y, dim=1), S


class DeltaState(NamedTuple):
    """All that a GatedDeltaNet layer keeps of the tokens so far, however many there were."""
    conv: torch.Tensor   # (b, H (2 N + P), d_conv - 1), the last inputs of the convolution
    S: torch.Tensor      # (b, H, P, N)


class GatedDeltaNet(nn.Module):
    r"""The Gated DeltaNet layer (arXiv 2412.06464, figure 1), without residual and pre-norm.

        x -> qkv -> convolution -> SiLU -> q, k of length 1, v -> delta rule -> norm -> * -> o_proj
         \-> a_proj -> log_a, b_proj -> sigmoid -> beta --------/                      /
         \-> g_proj -> SiLU ----------------------------------------------------------/

    n_heads: H; d_state: N; the H heads share expand * d_model channels of values.
    gated: False for DeltaNet, without the decay a and without the gate after the norm.
    d_conv: taps of the convolution, None for no convolution.

    Names, and the initial values of dt_bias, follow the published code, except: q, k and v share
    one map and one convolution, which has a bias; A starts in 1 ... 16, there in 0 ... 16; o_norm
    is the weight of the norm itself.
    """

    takes_bias = True

    def __init__(self, d_model, n_heads=1, d_state=16, expand=2, gated=True, d_conv=4):
        super().__init__()
        channels = expand * d_model
        if n_heads < 1 or channels % n_heads:
            raise ValueError(f"--n-heads is {n_heads}, but it must divide {channels} channels")
        self.n_heads, self.d_state, self.headdim = n_heads, d_state, channels // n_heads
        self.gated, self.taps = gated, d_conv or 1
        self.sizes = [n_heads * d_state, n_heads * d_state, channels]    # of q, k and v
        self.qkv = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.b_proj = nn.Linear(d_model, n_heads, bias=False)
        if self.taps > 1:
            self.conv1d = CausalConv1d(sum(self.sizes), d_conv)
        if gated:
            self.a_proj = nn.Linear(d_model, n_heads, bias=False)
            self.g_proj = nn.Linear(d_model, channels, bias=False)
            self.A_log = nn.Parameter(torch.log(torch.empty(n_heads).uniform_(1, 16)))
            self.dt_bias = nn.Parameter(initial_dt_bias(n_heads))
        self.o_norm = nn.Parameter(torch.ones(self.headdim))
        self.o_proj = nn.Linear(channels, d_model, bias=False)

    def forward(self, x, state=None):
        """Run a segment of a sequence, continuing from `state`: a DeltaState, None at the start.

        x (b, L, d_model) -> y (b, L, d_model), the DeltaState after the last token.
        """
        if x.shape[1] == 0:
            return x, state
        window, S = (None, None) if state is None else state
        q, k, v, window = self.qkv_of(x, window)
        beta = torch.sigmoid(self.b_proj(x))                             # (b, L, H)
        log_a = self.log_decay(x) if self.gated else torch.zeros_like(beta)
        y, S = delta_rule(q / self.d_state**0.5, k, v, beta, log_a, S)   # (b, L, H, P)
        return self.output(y, x), DeltaState(window, S)

    # LinearAttention (family/linear_attention.py) replaces log_decay and forward.

    def qkv_of(self, x, window):
        """x (b, L, d) -> q, k (b, L, H, N) of length 1, v (b, L, H, P), the next window."""
        qkv = self.qkv(x)                                                # (b, L, H (2 N + P))
        if self.taps > 1:
            qkv, window = self.conv1d(qkv, window)
        else:
            window = qkv.new_zeros(len(x), qkv.shape[2], 0)              # nothing to keep
        q, k, v = F.silu(qkv).split(self.sizes, dim=-1)
        q = unit(q.unflatten(-1, (self.n_heads, -1)))                    # (b, L, H, N)
        k = unit(k.unflatten(-1, (self.n_heads, -1)))                    # (b, L, H, N)
        return q, k, v.unflatten(-1, (self.n_heads, -1)), window

    def step_size(self, x):
        """x (b, L, d) -> dt (b, L, H), positive, as in Mamba-2."""
        return F.softplus(self.a_proj(x) + self.dt_bias)

    def log_decay(self, x):
        """x (b, L, d) -> log a (b, L, H), as in Mamba-2: A times the step size."""
        return -torch.exp(self.A_log) * self.step_size(x)

    def output(self, y, x):
        """Norm, gate and last map: y (b, L, H, P) and the layer's x -> (b, L, d)."""
        y = F.rms_norm(y, (self.headdim,), self.o_norm, eps=1e-5)
        if self.gated:
            y = y * F.silu(self.g_proj(x)).unflatten(-1, (self.n_heads, -1))
        return self.o_proj(y.flatten(2))


def unit(v, eps=1e-6):
    """v / sqrt(|v|^2 + eps) over the last dimension: of length 1, or 0 if v is. Sums are at least
    float32."""
    wide = at_least_float32(v)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(v.dtype)


# ---- Chunks --------------------------------------------------------------------------------------
#
# Let S_0 be the state before a chunk, and count its steps from 1 to T. Write u_t for the correction
# at step t, beta_t (v_t - a_t S_{t-1} k_t), and sums_t for the sum of log a over steps 1 to t.
# Then S_t = a_t S_{t-1} + u_t k_t^T is a decayed sum of corrections,
#
#     S_t = exp(sums_t) S_0 + sum over s <= t of exp(sums_t - sums_s) u_s k_s^T
#
# Insert this sum for S_{t-1} into the definition of u_t. The corrections of a chunk then solve a
# triangular system:
#
#     u_t + sum over s < t of beta_t exp(sums_t - sums_s) (k_t . k_s) u_s
#         = beta_t v_t - beta_t exp(sums_t) S_0 k_t
#
# Its solution is linear in the right side, so solve it twice: for beta_t v_t, which gives U, and
# for beta_t exp(sums_t) k_t, which gives W. Then u = U - W S_0^T, with a row per step. (The papers
# call this the WY representation.) Neither needs S_0, so all chunks are solved at once; only S_0
# goes from chunk to chunk.

def delta_rule(q, k, v, beta, log_a, S=None, T=None):
    """delta_rule_ref in chunks of at most T steps, for L >= 1: same arguments, results, gradients.

    States have the dtype of v, or float32 if that is wider; y has that of v. Inputs of matmuls are
    bfloat16 if v is, otherwise at least float32, except under torch.autocast. T: by default 64 on
    CUDA, 16 elsewhere. It has no second derivative; delta_rule_ref has one.
    """
    check_steps(q, k, v, beta, log_a)
    y_dtype, L = v.dtype, v.shape[1]
    dtype = torch.promote_types(y_dtype, torch.float32)
    matmul_dtype = y_dtype if y_dtype == torch.bfloat16 else dtype
    if T is None:
        T = 64 if v.is_cuda else 16
    S = None if S is None else S.to(dtype)
    if L == 1 or is_transformed():                   # nothing to cut, or torch.func
        y, S = delta_rule_ref(*(w.to(dtype) for w in (q, k, v, beta, log_a)), S)
        return y.to(y_dtype), S
    q, k, v = (w.to(matmul_dtype) for w in (q, k, v))
    beta, log_a = beta.to(dtype), log_a.to(dtype)
    (k, v, beta, log_a), nan = set_nan_aside(k, v, beta, log_a)          # nan (b, L)
    q, k, v, beta, log_a = (split(w, T).transpose(0, 1).transpose(2, 3)
                            for w in (q, k, v, beta, log_a))
    # q, k (c, b, H, T, N); v (c, b, H, T, P); beta, log_a (c, b, H, T). The steps that fill up the
    # last chunk have beta = 0 and log_a = 0 and leave the state alone.
    c, b, H, T, P = v.shape
    beta = beta[..., None]                                               # (c, b, H, T, 1)

    # 1. The decays in a chunk.
    sums = log_a.to(widest(v.device)).cumsum(-1)                         # (c, b, H, T)
    decay = clamped_exp(sums[..., :, None] - sums[..., None, :], dtype).tril()  # (c, b, H, T, T)
    from_start = clamped_exp(sums, dtype)[..., None]                     # (c, b, H, T, 1)
    to_end = clamped_exp(sums[..., -1:] - sums, dtype)[..., None]        # (c, b, H, T, 1)
    k_to_end = (to_end * k).to(matmul_dtype)                             # (c, b, H, T, N)

    # 2. The triangular system. The solver reads what is below the diagonal, and takes that as 1.
    kk, qk = (torch.cat([k, q], dim=-2) @ k.mT).split(T, dim=-2)         # (c, b, H, T, T) each
    system = beta * decay * kk                                           # (c, b, H, T, T)
    if c == 1 and S is None:                         # one chunk, from zero: W is not needed
        corrections = UnitTriangularSolve.apply(system, (beta * v).to(matmul_dtype))
        S = (corrections.mT @ k_to_end)[0].to(dtype)                     # (b, H, P, N)
        y = 0.0                                                          # no S_0 to read
    else:
        right = torch.cat([beta * v, beta * from_start * k], dim=-1).to(matmul_dtype)
        U, W = UnitTriangularSolve.apply(system, right).split([P, k.shape[-1]], dim=-1)

        # 3. From chunk to chunk: the state before each, its corrections, and the last state.
        starts, corrections, S = DeltaAcrossChunks.apply(
            U, W, from_start[:, :, :, -1:], k_to_end, S)
        y = from_start * (q @ starts.mT)                                 # (c, b, H, T, P)

    # 4. The outputs: from each chunk's first state, and from its corrections, by attention.
    y = y + (decay * qk).to(matmul_dtype) @ corrections                  # (c, b, H, T, P)
    y = y.transpose(2, 3).transpose(0, 1).flatten(1, 2)[:, :L] + nan.cumsum(1)[..., None, None]
    return y.to(y_dtype), S + nan.sum(1)[:, None, None, None]


class DeltaAcrossChunks(torch.autograd.Function):
    """Step 3 of delta_rule: in each chunk

        u = U - W S^T          S <- decay S + u^T keys

    Its gradient is a recurrence, too. With d_end, the gradient of the state after the chunk,

        du = d_correction + keys d_end^T        dS = d_start + decay d_end - du^T W
        dW = -du S                              d_keys = u d_end
        dU = du                                 d_decay = the sum of d_end * S

    U (c, b, H, T, P); W (c, b, H, T, N); decay of a whole chunk (c, b, H, 1, 1); keys,
    k_to_end (c, b, H, T, N); S (b, H, P, N), None for zero -> starts (c, b, H, P, N), corrections u
    (c, b, H, T, P), the last state (b, H, P, N). S has the dtype of decay, starts that of keys.
    """

    @staticmethod
    def forward(ctx, U, W, decay, keys, S):
        starts, corrections = [], []
        P, N = U.shape[-1], keys.shape[-1]
        if S is None:
            S = decay.new_zeros(1, 1, P, N)
        S = S.expand(*U.shape[1:3], P, N)            # (b, H, P, N); one S may serve all sequences
        for U_i, W_i, decay_i, keys_i in zip(U, W, decay, keys):
            starts.append(S.to(keys.dtype))
            corrections.append(U_i - W_i @ starts[-1].mT)                # (b, H, T, P)
            S = decay_i * S + corrections[-1].mT @ keys_i                # (b, H, P, N)
        starts, corrections = torch.stack(starts), torch.stack(corrections)
        ctx.save_for_backward(W, decay, keys, starts, corrections)
        return starts, corrections, S

    @staticmethod
    def backward(ctx, d_starts, d_corrections, dS):
        if torch.is_grad_enabled():                                      # create_graph
            raise RuntimeError("delta_rule has no second derivative; delta_rule_ref has one")
        W, decay, keys, starts, corrections = ctx.saved_tensors
        d_ends, du = [], []
        for i in reversed(range(len(keys))):
            d_ends.append(dS.to(keys.dtype))         # the gradient of the state after chunk i
            du.append(d_corrections[i] + keys[i] @ d_ends[-1].mT)
            dS = d_starts[i] + decay[i] * dS - du[-1].mT @ W[i]
        d_ends, du = torch.stack(d_ends[::-1]), torch.stack(du[::-1])
        d_decay = (d_ends * starts).sum((-2, -1), keepdim=True, dtype=decay.dtype)
        dS = dS if ctx.needs_input_grad[4] else None
        return du, -du @ starts, d_decay, corrections @ d_ends, dS


@torch.no_grad()
def main():
    """Show that recurrence, chunks and single steps of the layer agree, and their times."""
    torch.manual_seed(0)
    b, L, H, N, P = 4, 256, 4, 16, 16
    q, k = unit(torch.randn(2, b, L, H, N))
    v, beta, log_a = torch.randn(b, L, H, P), torch.rand(b, L, H), -torch.rand(b, L, H)
    show_agreement(delta_rule_ref, delta_rule, (q, k, v, beta, log_a))
    show_steps(GatedDeltaNet(32), torch.randn(2, 64, 32))


if __name__ == "__main__":
    main()
