"""All chunks of the selective scan at once: the third form of the recurrence in mamba.py, and the fast one on a GPU.

A GPU has room for every chunk, but a chunk needs the state that the one before it ends with. The recurrence is linear, so
run every chunk from a zero state first; what its true first state adds to its last is exp(A sum of dt) times it:

    h_end = exp(A (dt_1 + ... + dt_T)) h_start + (h_end from zero)

which is again the recurrence, with one step a chunk. So: (1) the end of every chunk from zero, (2) the recurrence over
chunks, which gives every chunk its first state, (3) every chunk from there. If there are many chunks, (2) is done in the same
way: groups of chunks, all at once. Backwards the same three steps, with g in place of h (mamba.py derives the gradient);
what a chunk hands to the one before it is a_1 g_1, here called carry.

Each of the nine functions that go through _kernel is one kernel under torch.compile (_ends, _group_ends and _total may be
two): the loop over the steps of a chunk is unrolled, its states live in registers, and nothing of shape (b, L, D, N) is
written: y, gradients, and one state, one dA and one span a chunk. The six that use _states or _adjoints take the same steps
again on purpose: to compute a state costs less than to store it and read it back. A kernel adds up either over states or over
channels, so dB and dC cannot be had with dx and ddt; and one of them needs g where the other needs h.

Imports nothing of this repository; mamba calls it, and mamba2 and train use how it cuts time and compiles. Letters as in
mamba.py, and c chunks of T steps: but for parallel_scan, all functions here have x, dt, y (b, c, T, D) and B, C (b, c, T, N).
The span of a chunk is the sum of its dt.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_STEPS = 8     # most steps in a chunk; 16 took twice as long to compile. When this was chosen, 16 took 0.048 ms where 8
                    # took 0.032 at (64, 64, 16, 16), and 0.321 where 8 took 0.338 at (64, 256, 128, 16)
GROUP_CHUNKS = 16   # most chunks in a group


def split(v, most):
    """(b, L, ...) -> (b, c, T, ...) with T <= most, filled up with zeros: dt = 0 leaves a state as it is."""
    chunks = -(-v.shape[1] // most)
    missing = -v.shape[1] % chunks                             # 17 steps are 3 chunks of 6, not 2 of 8 and one of 1
    return (F.pad(v, (0, 0) * (v.dim() - 2) + (0, missing)) if missing else v).unflatten(1, (chunks, -1))


def _decay(dt, A):
    """exp(dt A) for the dt (b, c, D) of one step: (b, c, D, N).

    As a power of 2, for which a GPU has an instruction; torch's exp is eight more: with it _ends was 928 instructions, now 392,
    and the scan took 3.26 ms in place of 2.69 at (8, 2048, 1536, 16).
    """
    return torch.exp2(dt[..., None] * (A * math.log2(math.e)))


def _states(x, dt, A, B, h):
    """Every chunk's states after its first state h, (b, c, D, N) or 0.0, one after another: T of them."""
    x, dt, B = (v.to(A.dtype) for v in (x, dt, B))
    for t in range(x.shape[2]):
        u = (dt[:, :, t] * x[:, :, t])[..., None] * B[:, :, t, None]                   # (b, c, D, N)
        h = _decay(dt[:, :, t], A) * h + u
        yield h


def _adjoints(dt, A, C, dy, carry):
    """Every chunk's t, g_t and a_t g_t from the last t to the first; carry, (b, c, D, N) or 0.0, arrives at the chunk's end."""
    dt, C, dy = (v.to(A.dtype) for v in (dt, C, dy))
    for t in reversed(range(dt.shape[2])):
        g = carry + dy[:, :, t, :, None] * C[:, :, t, None]                            # (b, c, D, N)
        carry = _decay(dt[:, :, t], A) * g
        yield t, g, carry


def _ends(x, dt, A, B):
    """Every chunk's last state from zero (b, c, D, N), and its span (b, c, D)."""
    for h in _states(x, dt, A, B, 0.0):
        pass
    return h, dt.sum(2, dtype=A.dtype)


def _outputs(x, dt, A, B, C, h):
    """y (b, c, T, D), from every chunk's first state h."""
    y = []
    for t, h in enumerate(_states(x, dt, A, B, h)):
        y.append((h * C[:, :, t, None]).sum(-1).to(x.dtype))                           # (b, c, D)
    return torch.stack(y, dim=2)


def _first_carry(dt, A, C, dy):
    """What every chunk's own outputs say about its first state, with nothing from later chunks: (b, c, D, N)."""
    for _, _, carry in _adjoints(dt, A, C, dy, 0.0):
        pass
    return carry


def _gradients_x_dt_A(x, dt, A, B, C, dy, h, carry):
    """The sums over states (b, c, T, D), and every chunk's part of dA (b, c, D, N)."""
    before = [h, *_states(x, dt, A, B, h)]                                             # before[t] is h_{t-1}
    dx, ddt, dA = [], [], 0.0
    for t, g, carry in _adjoints(dt, A, C, dy, carry):
        du = (g * B[:, :, t, None]).sum(-1)                                            # (b, c, D)
        d_dtA = carry * before[t]                                                      # (b, c, D, N), g_t a_t h_{t-1}
        dx.append((du * dt[:, :, t]).to(x.dtype))
        ddt.append(((d_dtA * A).sum(-1) + du * x[:, :, t]).to(dt.dtype))
        dA = dA + d_dtA * dt[:, :, t, :, None]
    return torch.stack(dx[::-1], dim=2), torch.stack(ddt[::-1], dim=2), dA


def _gradient_B(x, dt, A, B, C, dy, carry):
    """A sum over channels: (b, c, T, N). B for its dtype alone."""
    u, dB = dt.to(A.dtype) * x.to(A.dtype), []
    for t, g, _ in _adjoints(dt, A, C, dy, carry):
        dB.append((g * u[:, :, t, :, None]).sum(-2).to(B.dtype))                       # (b, c, N)
    return torch.stack(dB[::-1], dim=2)


def _gradient_C(x, dt, A, B, C, dy, h):
    """A sum over channels: (b, c, T, N). C for its dtype alone."""
    dC = []
    for t, h in enumerate(_states(x, dt, A, B, h)):
        dC.append((h * dy[:, :, t, :, None]).sum(-2).to(C.dtype))                      # (b, c, N)
    return torch.stack(dC, dim=2)


def _total(dA):
    """The sum over sequences and chunks: (D, N)."""
    return dA.sum((0, 1))


def _chunks(span, A, ends, h, backwards):
    """The recurrence over the chunks of every group, from the group's first state h, (b, groups, D, N) or 0.0.

    Yields every chunk's number and the state that it starts from, and at the end None and the group's last state.
    backwards: from the last chunk to the first.
    """
    span, ends = (split(v, GROUP_CHUNKS) for v in (span, ends))                        # (b, groups, chunks, D), and (..., D, N)
    for k in reversed(range(span.shape[2])) if backwards else range(span.shape[2]):
        yield k, h
        h = _decay(span[:, :, k], A) * h + ends[:, :, k]
    yield None, h


def _group_ends(span, A, ends, backwards):
    """Every group's last state from zero (b, groups, D, N), and its span."""
    for _, h in _chunks(span, A, ends, 0.0, backwards):
        pass
    return h, split(span, GROUP_CHUNKS).sum(2)


def _group_starts(span, A, ends, h, backwards):
    """The state that every chunk starts from (b, c, D, N), and every group's last state. h None: one group, from zero."""
    h = torch.zeros_like(ends[:, :1]) if h is None else h
    starts = dict(_chunks(span, A, ends, h, backwards))
    last = starts.pop(None)
    return torch.stack([starts[k] for k in range(len(starts))], dim=2).flatten(1, 2)[:, :span.shape[1]], last


# max_fusion_size: all steps of a chunk in one kernel. autotune_pointwise: the compiler need not try two ways to share out the work
# of kernels whose threads need not add up; it compiles each twice for that, and often took the slower (_ends, _first_carry and
# _group_ends twice, at (64, 256, 128, 16) all four together when this was chosen: 0.087 ms, and 0.126 compiled again, in place of
# 0.060 and 0.072). max_tiles: their blocks have one dimension. With two, N and all the rest, the compiler makes a block the larger
# the more of the rest there is, at last 1,024 by 16 elements in 256 threads: of _ends 3 kB a thread did not fit in registers. The
# scan took 191 ms in place of 38 at (64, 2049, 2048, 16), and, with exp, 3.38 in place of 3.30 at (8, 2048, 1536, 16).
OPTIONS = {"max_fusion_size": 1000, "triton.autotune_pointwise": False, "triton.max_tiles": 1}


def compile_each_shape(function, options):
    """torch.compile, anew for every shape that function meets, as many as there are."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10**4
    return torch.compile(function, dynamic=False, options=options)


@functools.cache
def _kernel(function, off):
    return function if off else compile_each_shape(function, OPTIONS)


def _across(span, A, ends, h, backwards, off):
    """Step (2): span (b, c, D), ends (b, c, D, N), h (b, D, N) or None -> the state that every chunk starts from, the last state.

    Backwards "ends" are first carries, h is the carry that arrives at the sequence's end, and the results are the carries that
    arrive at each chunk's end and the one that leaves the sequence. Many chunks are split into groups as many steps were into
    chunks, and (1) to (3) come again, one level up.
    """
    if span.shape[1] <= GROUP_CHUNKS:
        starts, last = _kernel(_group_starts, off)(span, A, ends, None if h is None else h[:, None], backwards)
        return starts, last[:, 0]
    group_ends, group_span = _kernel(_group_ends, off)(span, A, ends, backwards)
    h, last = _across(group_span, A, group_ends, h, backwards, off)                    # h (b, groups, D, N)
    starts, _ = _kernel(_group_starts, off)(span, A, ends, h, backwards)
    return starts, last


@torch.library.custom_op("mamba::scan", mutates_args=())
def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None,
          off: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y, the last state, and for the gradient every chunk's first state (b, c, D, N) and span (b, c, D).

    An operator of its own, so that a compiled model calls it as it stands and does not take it apart.
    """
    ends, span = _kernel(_ends, off)(x, dt, A, B)
    starts, last = _across(span, A, ends, h, False, off)
    return _kernel(_outputs, off)(x, dt, A, B, C, starts), last, starts, span


@torch.library.custom_op("mamba::scan_backward", mutates_args=())
def _scan_backward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, span: Tensor, dy: Tensor,
                   dh: Tensor | None, off: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of x, dt, A, B, C and h."""
    carries, dh = _across(span, A, _kernel(_first_carry, off)(dt, A, C, dy), dh, True, off)
    dx, ddt, dA = _kernel(_gradients_x_dt_A, off)(x, dt, A, B, C, dy, starts, carries)
    dB = _kernel(_gradient_B, off)(x, dt, A, B, C, dy, carries)
    dC = _kernel(_gradient_C, off)(x, dt, A, B, C, dy, starts)
    return dx, ddt, _kernel(_total, off)(dA), dB, dC, dh


@_scan.register_fake
def _(x, dt, A, B, C, h, off):
    b, chunks, state = *x.shape[:2], A.shape
    starts = split(A.new_empty(b, chunks, *state), GROUP_CHUNKS).flatten(1, 2)[:, :chunks]     # a slice of whole groups
    return x.new_empty(x.shape), A.new_empty(b, *state), starts, A.new_empty(starts.shape[:3])


@_scan_backward.register_fake
def _(x, dt, A, B, C, starts, span, dy, dh, off):
    return *(v.new_empty(v.shape) for v in (x, dt, A, B, C)), A.new_empty(x.shape[0], *A.shape)


def _keep(ctx, inputs, output):
    x, dt, A, B, C, h, ctx.off = inputs
    ctx.from_zero = h is None
    ctx.set_materialize_grads(False)                           # or there were zeros for the last state, starts and span
    ctx.save_for_backward(x, dt, A, B, C, *output[2:])


def _backward(ctx, dy, dh, *_):
    dy = torch.zeros_like(ctx.saved_tensors[0]) if dy is None else dy
    *gradients, dh = _scan_backward(*ctx.saved_tensors, dy, dh, ctx.off)
    return *gradients, None if ctx.from_zero else dh, None


_scan.register_autograd(_backward, setup_context=_keep)


def parallel_scan(x, dt, A, B, C, h=None, off=False):
    """mamba.selective_scan_ref: arguments and results as there; A and h may be float32 where the others are bfloat16.

    off: leave torch.compile out.
    """
    # Filled up here, where it is part of the model's kernels, and not in the scan's own: loads that ask where the sequence ends
    # made those take 69 us in place of 36, forwards and backwards, for 65 steps of 16 channels.
    x_k, dt_k, B_k, C_k = (split(v, CHUNK_STEPS) for v in (x, dt, B, C))               # (b, c, T, D or N)
    y_k, h, _, _ = _scan(x_k, dt_k, A.contiguous(), B_k, C_k, h, off)                  # states are laid out as A is
    return y_k.flatten(1, 2)[:, :x.shape[1]], h
