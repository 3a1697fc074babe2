"""All chunks of the selective scan at once: the third form of the recurrence in mamba.py, and the fast one on a GPU.

A GPU has room for every chunk, but a chunk needs the state that the one before it ends with. The recurrence is linear, so
run every chunk from a zero state first; what its true first state adds to its last is exp(A sum of dt) times it:

    h_end = exp(A (dt_1 + ... + dt_T)) h_start + (h_end from zero)

which is again the recurrence, with one step a chunk. So: (1) the end of every chunk from zero, (2) the recurrence over
chunks, which gives every chunk its first state, (3) every chunk from there. If there are many chunks, (2) is done in the same
way: groups of chunks, all at once. Backwards the same three steps, with g in place of h (mamba.py derives the gradient);
what a chunk hands to the one before it is a_1 g_1, here called carry.

Each of the nine functions between _states and FUSE that the two operators at the end call is one kernel under
torch.compile (_ends and _total may be two): the loop over the steps of a chunk is unrolled, its states live in registers,
and what is written is y, a gradient, or one state a chunk. Six of them take the same steps again on purpose: to compute a
state costs less than to store it and read it back. Sums over n and over channels are kernels of their own, for a kernel adds
up along one direction.

Imports nothing of this repository. Letters as there, and c chunks of T steps; span (b, c, D) is the sum of a chunk's dt.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_STEPS = 16    # most steps in a chunk, as many states as registers can hold, and most chunks in a group


def split(v, most):
    """(b, L, ...) -> (b, c, T, ...) with T <= most, filled up with zeros: dt = 0 leaves a state as it is."""
    chunks = -(-v.shape[1] // most)
    missing = -v.shape[1] % chunks                             # 65 steps are 5 chunks of 13, not 4 of 16 and one of 1
    return (F.pad(v, (0, 0) * (v.dim() - 2) + (0, missing)) if missing else v).unflatten(1, (chunks, -1))


def _states(x, dt, A, B, h):
    """Every chunk's states after its first state h (b, c, D, N), one after another: T of them."""
    x, dt, B = x.to(A.dtype), dt.to(A.dtype), B.to(A.dtype)                            # (b, c, T, D or N)
    for t in range(x.shape[2]):
        u = (dt[:, :, t] * x[:, :, t])[..., None] * B[:, :, t, None, :]                # (b, c, D, N)
        h = torch.exp(dt[:, :, t, :, None] * A) * h + u
        yield h


def _adjoints(dt, A, C, dy, carry):
    """Every chunk's t, g_t and a_t g_t, from the carry (b, c, D, N) that arrives at its end, from the last t to the first."""
    dt, C, dy = dt.to(A.dtype), C.to(A.dtype), dy.to(A.dtype)
    for t in reversed(range(dt.shape[2])):
        g = carry + dy[:, :, t, :, None] * C[:, :, t, None, :]                         # (b, c, D, N)
        carry = torch.exp(dt[:, :, t, :, None] * A) * g
        yield t, g, carry


def _ends(x, dt, A, B):
    """Every chunk's last state from zero (b, c, D, N), and its span."""
    for h in _states(x, dt, A, B, 0.0):
        pass
    return h, dt.sum(2, dtype=A.dtype)


def _outputs(x, dt, A, B, C, h):
    """y (b, c, T, D), from every chunk's first state h."""
    y = []
    for t, h in enumerate(_states(x, dt, A, B, h)):
        y.append((h * C[:, :, t, None, :]).sum(-1).to(x.dtype))                        # (b, c, D)
    return torch.stack(y, dim=2)


def _first_carry(dt, A, C, dy):
    """What every chunk's own outputs say about its first state, with nothing from later chunks: (b, c, D, N)."""
    for _, _, carry in _adjoints(dt, A, C, dy, 0.0):
        pass
    return carry


def _gradients_x_dt_A(x, dt, A, B, C, dy, h, carry):
    """The sums over n, and dA for every chunk by itself."""
    before = [h, *_states(x, dt, A, B, h)]                                             # before[t] is h_{t-1}
    dx, ddt, dA = [], [], 0.0
    for t, g, carry in _adjoints(dt, A, C, dy, carry):
        du = (g * B[:, :, t, None, :]).sum(-1)                                         # (b, c, D)
        d_dtA = carry * before[t]                                                      # (b, c, D, N), g_t a_t h_{t-1}
        dx.append((du * dt[:, :, t]).to(x.dtype))
        ddt.append(((d_dtA * A).sum(-1) + du * x[:, :, t]).to(dt.dtype))
        dA = dA + d_dtA * dt[:, :, t, :, None]
    return torch.stack(dx[::-1], dim=2), torch.stack(ddt[::-1], dim=2), dA


def _gradient_B(x, dt, A, B, C, dy, carry):
    """A sum over channels: (b, c, T, N)."""
    u, dB = dt.to(A.dtype) * x, []
    for t, g, _ in _adjoints(dt, A, C, dy, carry):
        dB.append((g * u[:, :, t, :, None]).sum(-2).to(B.dtype))                       # (b, c, N)
    return torch.stack(dB[::-1], dim=2)


def _gradient_C(x, dt, A, B, C, dy, h):
    """A sum over channels: (b, c, T, N)."""
    dC = []
    for t, h in enumerate(_states(x, dt, A, B, h)):
        dC.append((h * dy[:, :, t, :, None]).sum(-2).to(C.dtype))                      # (b, c, N)
    return torch.stack(dC, dim=2)


def _total(dA):
    """The sum over sequences and chunks: (D, N)."""
    return dA.sum((0, 1))


def _chunks(span, A, ends, h, backwards):
    """The recurrence over the k chunks of every group: span (b, c, k, D), ends (b, c, k, D, N), h (b, c, D, N).

    Yields every chunk's number and the state that it starts from, and at the end None and the group's last state.
    backwards: from the last chunk to the first.
    """
    for k in reversed(range(span.shape[2])) if backwards else range(span.shape[2]):
        yield k, h
        h = torch.exp(span[:, :, k, :, None] * A) * h + ends[:, :, k]
    yield None, h


def _group_ends(span, A, ends, backwards):
    """Every group's last state from zero: (b, c, D, N)."""
    for _, h in _chunks(span, A, ends, 0.0, backwards):
        pass
    return h


def _group_starts(span, A, ends, h, backwards):
    """The state that every chunk starts from (b, c, k, D, N), and every group's last state (b, c, D, N)."""
    starts = dict(_chunks(span, A, ends, h, backwards))
    last = starts.pop(None)
    return torch.stack([starts[k] for k in range(len(starts))], dim=2), last


# Left to itself the compiler stores a value that is used twice and was not cheap, and ends a kernel that grows long. Here
# no value of a step may reach memory: with these limits the sums over n took 0.020 ms in place of 0.086 at (64, 64, 128, 16).
FUSE = {"realize_opcount_threshold": 10**6, "realize_reads_threshold": 10**6, "max_fusion_size": 1000}


def compile_each_shape(function, options):
    """torch.compile, anew for every shape that function meets, as many as there are."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10**4
    return torch.compile(function, dynamic=False, options=options)


@functools.cache
def _kernel(function, off):
    return function if off else compile_each_shape(function, FUSE)


def _across(span, A, ends, h, backwards, off):
    """Step (2): span (b, c, D), ends (b, c, D, N), h (b, D, N) -> the state that every chunk starts from, the last state.

    Backwards "ends" are first carries, h is the carry that arrives at the sequence's end, and the results are the carries that
    arrive at each chunk's end and the one that leaves the sequence. Many chunks are split into groups as many steps were into
    chunks, and (1) to (3) come again, one level up.
    """
    chunks = span.shape[1]
    span, ends = (split(v, CHUNK_STEPS) for v in (span, ends))                         # (b, groups, k, D), (b, groups, k, D, N)
    if span.shape[1] > 1:
        h, last = _across(span.sum(2), A, _kernel(_group_ends, off)(span, A, ends, backwards), h, backwards, off)
        starts, _ = _kernel(_group_starts, off)(span, A, ends, h, backwards)
    else:
        starts, last = (v.squeeze(1) for v in _kernel(_group_starts, off)(span, A, ends, h[:, None], backwards))
    return starts.flatten(1, -3)[:, :chunks], last


def _join(v, L):
    """The chunks of (b, c, T, ...) in one: (b, L, ...)."""
    return v.flatten(1, 2)[:, :L].contiguous()


@torch.library.custom_op("mamba::scan", mutates_args=())
def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor,
          off: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y, the last state, and for the gradient every chunk's first state and span.

    An operator of its own, so that a compiled model calls it as it stands and does not take it apart.
    """
    L = x.shape[1]
    x, dt, B, C = (split(v, CHUNK_STEPS) for v in (x, dt, B, C))                       # (b, c, T, D or N)
    ends, span = _kernel(_ends, off)(x, dt, A, B)
    starts, last = _across(span, A, ends, h, False, off)
    y = _kernel(_outputs, off)(x, dt, A, B, C, starts)
    return _join(y, L), last, starts.contiguous(), span


@torch.library.custom_op("mamba::scan_backward", mutates_args=())
def _scan_backward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, span: Tensor, dy: Tensor, dh: Tensor,
                   off: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of x, dt, A, B, C and h."""
    L = x.shape[1]
    x, dt, B, C, dy = (split(v, CHUNK_STEPS) for v in (x, dt, B, C, dy))
    carries = _kernel(_first_carry, off)(dt, A, C, dy)
    carries, dh = _across(span, A, carries, dh, True, off)
    dx, ddt, dA = _kernel(_gradients_x_dt_A, off)(x, dt, A, B, C, dy, starts, carries)
    dB = _kernel(_gradient_B, off)(x, dt, A, B, C, dy, carries)
    dC = _kernel(_gradient_C, off)(x, dt, A, B, C, dy, starts)
    return _join(dx, L), _join(ddt, L), _kernel(_total, off)(dA), _join(dB, L), _join(dC, L), dh


@_scan.register_fake
def _(x, dt, A, B, C, h, off):
    starts = h.new_empty(h.shape[0], -(-x.shape[1] // CHUNK_STEPS), *A.shape)
    y, last = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, h))
    return y, last, starts, starts.new_empty(starts.shape[:3])


@_scan_backward.register_fake
def _(x, dt, A, B, C, starts, span, dy, dh, off):
    return tuple(torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt, A, B, C, dh))


def _keep(ctx, inputs, output):
    x, dt, A, B, C, _, ctx.off = inputs
    ctx.set_materialize_grads(False)                           # or there were zeros for starts and span
    ctx.save_for_backward(x, dt, A, B, C, *output[2:])


def _gradients(ctx, dy, dh, *_):
    x, starts = ctx.saved_tensors[0], ctx.saved_tensors[5]
    dy = torch.zeros_like(x) if dy is None else dy
    dh = torch.zeros_like(starts[:, 0]) if dh is None else dh
    return *_scan_backward(*ctx.saved_tensors, dy.contiguous(), dh.contiguous(), ctx.off), None


_scan.register_autograd(_gradients, setup_context=_keep)


def parallel_scan(x, dt, A, B, C, h=None, off=False):
    """mamba.selective_scan_ref: arguments and results as there; A and h may be float32 where the others are bfloat16.

    off: leave torch.compile out.
    """
    y, h, _, _ = _scan(x, dt, A, B, C, A.new_zeros(x.shape[0], *A.shape) if h is None else h, off)
    return y, h
