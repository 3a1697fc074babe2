"""The selective scan for a GPU: all chunks at once, in kernels that torch.compile fuses.

The scan of mamba.py takes one chunk after another. A GPU has room for all, but each needs the last
state of the one before. `two_chunks` shows how all can run at once nevertheless. For many chunks:

    1. run every chunk from a zero state, which gives its end               all at once
    2. start of the next chunk = exp(A sum of dt) start + end               one after another
    3. run every chunk again, from its true start                           all at once

Step 2 is the recurrence again, with one step per chunk; only it is serial. Its loop is unrolled, so
more than 32 chunks are cut in the same way, into groups of 16. Blelloch's prefix sum (1990) has
groups of two and stores all L states; compiled, ours stores none within a chunk.

    symbol      shape            meaning
    c, T                         chunks; steps per chunk
    x, dt, y    (b, c, T, D)     as in mamba.py, cut into chunks; dy, dx and ddt likewise
    B, C        (b, c, T, N)
    start, end  (b, c, D, N)     state before a chunk's first step; its last state, from zero
    span        (b, c, D)        sum of dt over a chunk
    carry       (b, c, D, N)     backwards: a_{t+1} g_{t+1}, the gradient arriving from later steps
"""

import contextlib
import functools
import math

import torch
from torch import Tensor

CHUNK_STEPS = 8     # most steps in a chunk, if L < LONG
LONG = 1024         # sequences this long get chunks twice as long: fewer states, slower to compile
ONE_GROUP, GROUP_CHUNKS = 32, 16   # up to 32 chunks are one group, more are cut into groups of 16
_compiled = None    # True or False within compiled_scan; None: parallel_scan decides


def two_chunks(scan, x, dt, A, B, C, h):
    """The idea, for two chunks. scan: mamba.selective_scan_ref. h (b, D, N); the rest as there."""
    (x1, x2), (dt1, dt2), (B1, B2), (C1, C2) = (v.chunk(2, dim=1) for v in (x, dt, B, C))
    _, end1 = scan(x1, dt1, A, B1, C1)                                   # 1. from zero
    start2 = torch.exp(A * dt1.sum(1)[..., None]) * h + end1             # 2. decayed h + end1
    y1, _ = scan(x1, dt1, A, B1, C1, h)                                  # 3. now independent
    y2, last = scan(x2, dt2, A, B2, C2, start2)
    return torch.cat([y1, y2], dim=1), last


def check_shapes(x, dt, A, B, C, h):
    """Raise ValueError unless all shapes fit. Broadcast arguments would get wrong gradients."""
    (b, L, D), N = x.shape, A.shape[-1]
    right = {"dt": (b, L, D), "A": (D, N), "B": (b, L, N), "C": (b, L, N), "h": (b, D, N)}
    for (name, shape), v in zip(right.items(), (dt, A, B, C, h)):
        if v is not None and v.shape != shape:
            raise ValueError(f"{name} has shape {tuple(v.shape)}, but with x {tuple(x.shape)} "
                             f"and A {tuple(A.shape)} it must be {shape}")


def split(v, most):
    """(b, L, ...) -> (b, c, T, ...), T <= most, padded with zeros: dt = 0 keeps the state."""
    chunks = max(1, -(-v.shape[1] // most))
    missing = -v.shape[1] % chunks       # 17 steps are 3 chunks of 6, not 2 of 8 and one of 1
    if missing:
        v = torch.nn.functional.pad(v, (0, 0) * (v.dim() - 2) + (0, missing))
    return v.unflatten(1, (chunks, -1))


def _groups(v):        # (b, c, ...) -> (b, groups, chunks, ...)
    return split(v, ONE_GROUP if v.shape[1] <= ONE_GROUP else GROUP_CHUNKS)


def _stored(x, A):     # dtype of starts, carries and parts of dA in memory
    return x.dtype if x.dtype == torch.bfloat16 else A.dtype


# ---- Inside a chunk ------------------------------------------------------------------------------
# Compiled, each function from _spans on is a kernel, its loop over steps unrolled. Step 3 of the
# gradient takes three: one for dx, ddt and dA (from g and h_{t-1}), one for dB (from g, backwards)
# and one for dC (from h, forwards). Rules 1 to 5: mamba.py, section 3.

def _decay(dt, A):     # exp(dt A) for one step's dt (b, c, D): (b, c, D, N)
    return torch.exp2(dt[..., None] * (A * math.log2(math.e)))     # with exp, a fifth slower


def _next_state(h, t, x, dt, A, B):
    """Every chunk's h_t (b, c, D, N) from its h_{t-1}."""
    u = dt[:, :, t].to(A.dtype) * x[:, :, t]                             # (b, c, D)
    return _decay(dt[:, :, t], A) * h + u[..., None] * B[:, :, t, None]


def _step_back(carry, t, dt, A, C, dy):
    """From every chunk's carry a_{t+1} g_{t+1} -> g_t and the next carry a_t g_t: (b, c, D, N)."""
    g = carry + dy[:, :, t, :, None].to(A.dtype) * C[:, :, t, None]      # rule 1
    return g, _decay(dt[:, :, t], A) * g


def _spans(dt, A):     # (b, c, D); the kernel of dt.sum(2) takes four times as long
    return sum(dt_t.to(A.dtype) for dt_t in dt.unbind(2))


def _ends_forward(x, dt, A, B):
    """Every chunk's last state from zero (b, c, D, N)."""
    h = 0.0
    for t in range(x.shape[2]):
        h = _next_state(h, t, x, dt, A, B)
    return h


def _outputs(x, dt, A, B, C, start):
    """y (b, c, T, D), from every chunk's start."""
    h, y = start, []
    for t in range(x.shape[2]):
        h = _next_state(h, t, x, dt, A, B)
        y.append((h * C[:, :, t, None]).sum(-1).to(x.dtype))             # (b, c, D)
    return torch.stack(y, dim=2)


def _ends_backward(dt, A, C, dy):
    """The gradient of every chunk's start, from its own outputs alone: (b, c, D, N), as stored."""
    carry = 0.0
    for t in reversed(range(dt.shape[2])):
        _, carry = _step_back(carry, t, dt, A, C, dy)
    return carry.to(_stored(dy, A))


def _gradients_x_dt_A(x, dt, A, B, C, dy, start, carries):
    """dx and ddt (b, c, T, D). Each chunk's part of dA overwrites the argument `carries`."""
    h_before = [start]
    for t in range(x.shape[2] - 1):
        h_before.append(_next_state(h_before[t], t, x, dt, A, B))
    dx, ddt, dA, carry = [], [], 0.0, carries
    for t in reversed(range(x.shape[2])):
        g, carry = _step_back(carry, t, dt, A, C, dy)                    # g_t and a_t g_t
        du = (g * B[:, :, t, None]).sum(-1)                              # (b, c, D), rule 2
        d_dtA = carry * h_before[t]                                      # (b, c, D, N), rule 3
        dx.append((du * dt[:, :, t]).to(x.dtype))                        # rule 5
        ddt.append(((d_dtA * A).sum(-1) + du * x[:, :, t]).to(dt.dtype))     # rule 5
        dA = dA + d_dtA * dt[:, :, t, :, None]                           # rule 5
    carries.copy_(dA)
    return torch.stack(dx[::-1], dim=2), torch.stack(ddt[::-1], dim=2)


def _gradient_B(x, dt, A, B, C, dy, carry):
    """dB, summed over channels, (b, c, T, N), in the dtype of B."""
    u, dB = dt.to(A.dtype) * x, []
    for t in reversed(range(x.shape[2])):
        g, carry = _step_back(carry, t, dt, A, C, dy)                    # (b, c, D, N)
        dB.append((g * u[:, :, t, :, None]).sum(-2))                     # (b, c, N), rule 2
    return torch.stack(dB[::-1], dim=2).to(B.dtype)    # a cast in the loop would store states


def _gradient_C(x, dt, A, B, C, dy, start):
    """dC, summed over channels, (b, c, T, N), in the dtype of C."""
    h, dC = start, []
    for t in range(x.shape[2]):
        h = _next_state(h, t, x, dt, A, B)
        dC.append((h * dy[:, :, t, :, None]).sum(-2))                    # (b, c, N), rule 4
    return torch.stack(dC, dim=2).to(C.dtype)


def _sum_of_chunks(v, A):    # compiled, up to twice as fast as torch's own, and in less memory
    return v.sum((0, 1), dtype=A.dtype)


# ---- Across chunks -------------------------------------------------------------------------------
# The backward pass goes from last chunk to first. There, a chunk's "end" is the gradient of its
# start from its own outputs, a_1 g_1, and its "start" the carry that arrives at its last step.

def _chunk_starts(span, A, ends, h, dtype, backwards):
    """From the groups' starts h (b, groups, D, N), None for zero -> every chunk's start, in dtype,
    and every group's last state."""
    c = span.shape[1]
    span, ends = _groups(span), _groups(ends)                            # (b, groups, chunks, ...)
    if h is None:      # zeros: nothing exceeds inf. Constants would be stored by another kernel
        h = (ends[:, :, 0] > math.inf).to(A.dtype)
    n = span.shape[2]
    starts = [None] * n
    for k in reversed(range(n)) if backwards else range(n):
        starts[k] = h.to(dtype)                                          # (b, groups, D, N)
        h = _decay(span[:, :, k], A) * h + ends[:, :, k]
    if n == 8 and dtype != A.dtype:      # a 9th, dropped: torch 2.11 rounds 8 in another kernel
        starts.append(h.to(dtype))
    return torch.stack(starts, dim=2)[:, :, :n].flatten(1, 2)[:, :c], h


def _group_ends(span, A, ends, backwards):
    """Every group's last state from zero (b, groups, D, N), and its span (b, groups, D)."""
    return _chunk_starts(span, A, ends, None, A.dtype, backwards)[1], _spans(_groups(span), A)


def _across(span, A, ends, h, dtype, backwards, compiled):
    """Step 2, from h (b, D, N) or None -> every chunk's start in dtype, and the last state."""
    chunk_starts = _kernel(_chunk_starts, compiled)
    if span.shape[1] <= ONE_GROUP:
        h = None if h is None else h[:, None]                            # (b, 1, D, N)
        starts, last = chunk_starts(span, A, ends, h, dtype, backwards)
        return starts, last[:, 0]
    group_ends, group_span = _kernel(_group_ends, compiled)(span, A, ends, backwards)
    group_starts, last = _across(group_span, A, group_ends, h, A.dtype, backwards, compiled)
    return chunk_starts(span, A, ends, group_starts, dtype, backwards)[0], last


# ---- Compiled kernels, and the scan --------------------------------------------------------------

def compile_each_shape(function, options):
    """torch.compile, anew for each shape, up to 10^4: a limit set for the whole process."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10**4
    return torch.compile(function, dynamic=False, options=options)


@functools.cache
def _kernel(function, compiled, summands=math.inf):
    """The function, as a kernel if compiled. summands: how many numbers each of its sums adds."""
    return function if not compiled else compile_each_shape(function, {
        "max_fusion_size": 1000,               # all steps of a chunk in one kernel
        # Timing several block sizes for kernels without sums doubled compile time. But with a guess
        # _chunk_starts ran out of registers at 32 chunks in bfloat16: 98 us, not 8.
        "triton.autotune_pointwise": function is _chunk_starts,
        "triton.max_tiles": 1,                 # 2-d tiles grew too large for the registers
        "deterministic": summands <= 16})      # no timing of short sums: half the compile time


# torch.compile of a model does not look into a custom operator; register_fake gives it the shapes.
@torch.library.custom_op("mamba::scan", mutates_args=())
def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None,
          compiled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, the last state (b, D, N), and for the gradient every chunk's start."""
    ends, span = _kernel(_ends_forward, compiled)(x, dt, A, B), _kernel(_spans, compiled)(dt, A)
    starts, last = _across(span, A, ends, h, _stored(x, A), backwards=False, compiled=compiled)
    return _kernel(_outputs, compiled, A.shape[1])(x, dt, A, B, C, starts), last, starts


@torch.library.custom_op("mamba::scan_backward", mutates_args=())
def _scan_backward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor,
                   dy: Tensor, dh: Tensor | None, compiled: bool) -> list[Tensor]:
    """-> the gradients of x, dt, A, B, C, h. dB reads carries before parts of dA overwrite them."""
    ends, span = _kernel(_ends_backward, compiled)(dt, A, C, dy), _kernel(_spans, compiled)(dt, A)
    carries, dh0 = _across(span, A, ends, dh, ends.dtype, backwards=True, compiled=compiled)
    del ends, span                   # each del saves memory, and so does computing dC last
    dB = _kernel(_gradient_B, compiled, A.shape[0])(x, dt, A, B, C, dy, carries)
    dx, ddt = _kernel(_gradients_x_dt_A, compiled, A.shape[1])(x, dt, A, B, C, dy, starts, carries)
    dA = _kernel(_sum_of_chunks, compiled)(carries, A)     # carries have become the parts of dA
    del carries
    dC = _kernel(_gradient_C, compiled, A.shape[0])(x, dt, A, B, C, dy, starts)
    return [dx, ddt, dA, dB, dC, dh0]


@_scan.register_fake
def _(x, dt, A, B, C, h, compiled):
    ends = A.new_empty(*x.shape[:2], *A.shape)       # (b, c, D, N); starts can be a view of more
    starts, _ = _chunk_starts(ends[..., 0], A, ends, None, _stored(x, A), backwards=False)
    return x.new_empty(x.shape), A.new_empty(len(x), *A.shape), starts


@_scan_backward.register_fake
def _(x, dt, A, B, C, starts, dy, dh, compiled):
    return [v.new_empty(v.shape) for v in (x, dt, A, B, C)] + [A.new_empty(x.shape[0], *A.shape)]


def _setup_context(ctx, inputs, output):
    *arguments, _, ctx.compiled = inputs
    ctx.set_materialize_grads(False)       # no zeros for results that have no gradient
    ctx.save_for_backward(*arguments, output[2])     # the starts; other states are recomputed


def _backward(ctx, dy, dh, d_starts):
    if torch.is_grad_enabled():            # create_graph
        raise RuntimeError("the fused scan has no second derivative; selective_scan_ref has one")
    dy = torch.zeros_like(ctx.saved_tensors[0]) if dy is None else dy
    *gradients, dh0 = _scan_backward(*ctx.saved_tensors, dy, dh, ctx.compiled)
    return *gradients, (dh0 if ctx.needs_input_grad[5] else None), None


_scan.register_autograd(_backward, setup_context=_setup_context)


@contextlib.contextmanager
def compiled_scan(on):
    """`with compiled_scan(True):` every scan compiles its kernels; with False, none does."""
    global _compiled
    before, _compiled = _compiled, on
    try:
        yield
    finally:
        _compiled = before


def parallel_scan(x, dt, A, B, C, h=None):
    """mamba.selective_scan_ref, for A and h at least float32; y has the dtype of x, states that of
    A. Compiled as compiled_scan says; by default on CUDA, with gradients enabled."""
    if torch.autograd.forward_ad._current_level >= 0:        # it would find a derivative of zero
        raise RuntimeError("the fused scan has no forward derivative; selective_scan_ref has one")
    compiled = _compiled if _compiled is not None else x.is_cuda and torch.is_grad_enabled()
    check_shapes(x, dt, A, B, C, h)
    if x.numel() == 0:
        return x.clone(), A.new_zeros(len(x), *A.shape) if h is None else h
    # Cut outside the scan's kernels: padding inside them made their loads twice as slow.
    # Uncompiled, each step launches kernels: shorter chunks, if that makes at most 16 of them.
    steps = CHUNK_STEPS if x.shape[1] < LONG else 2 * CHUNK_STEPS
    steps = steps if compiled else min(steps, -(-x.shape[1] // GROUP_CHUNKS))
    x_k, dt_k, B_k, C_k = (split(v, steps) for v in (x, dt, B, C))       # (b, c, T, D or N)
    y, h, _ = _scan(x_k, dt_k, A.contiguous(), B_k, C_k, h, compiled)
    return y.flatten(1, 2)[:, :x.shape[1]], h
