"""All chunks of the selective scan at once: the third form of the recurrence in mamba.py, and the fast one on a GPU.

A GPU has room for every chunk, but a chunk needs the state that the one before it ends with. The recurrence is linear, so
run every chunk from a zero state first; what its true first state adds to its last is exp(A sum of dt) times it:

    h_end = exp(A (dt_1 + ... + dt_T)) h_start + (h_end from zero)

which is again the recurrence, with one step a chunk. So: (1) the end of every chunk from zero, (2) the recurrence over
chunks, which gives every chunk its first state, (3) every chunk from there. Backwards the same three steps, with g in
place of h (mamba.py derives the gradient); what a chunk hands to the one before it is a_1 g_1, here called carry.

Each of the nine functions between _states and FUSE that the two operators at the end call is one kernel under
torch.compile: the loop over the steps of a chunk is unrolled, its states live in registers, and what is written is y, a
gradient, or one state a chunk. Six of them take the same steps again on purpose: to compute a state costs less than to
store it and read it back. Sums over n and over channels are kernels of their own, for a kernel adds up along one direction.

Imports nothing of this repository. Letters as there, and c chunks of T steps.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_STEPS = 16    # most steps in a chunk: as many states as registers can hold
MOST_STEPS = 1024   # in a piece: longer sequences go through one piece after another


def _split(v):
    """(b, L, ...) -> (b, c, T, ...), filled up with zeros: dt = 0 leaves a state as it is."""
    chunks = -(-v.shape[1] // CHUNK_STEPS)
    missing = -v.shape[1] % chunks                             # 65 steps are 5 chunks of 13, not 4 of 16 and one of 1
    return (F.pad(v, (0, 0, 0, missing)) if missing else v).unflatten(1, (chunks, -1))


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
    """A chunk's last state from zero, and its whole decay: (b, c, D, N) each."""
    for h in _states(x, dt, A, B, 0.0):
        pass
    return h, torch.exp(dt.to(A.dtype).sum(2)[..., None] * A)


def _outputs(x, dt, A, B, C, h):
    y = []
    for t, h in enumerate(_states(x, dt, A, B, h)):
        y.append((h * C[:, :, t, None, :]).sum(-1).to(x.dtype))                        # (b, c, D)
    return torch.stack(y, dim=2)


def _first_carry(dt, A, C, dy):
    """What a chunk's own outputs say about its first state: (b, c, D, N)."""
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
    u, dB = dt.to(A.dtype) * x, []
    for t, g, _ in _adjoints(dt, A, C, dy, carry):
        dB.append((g * u[:, :, t, :, None]).sum(-2).to(B.dtype))                       # (b, c, N)
    return torch.stack(dB[::-1], dim=2)


def _gradient_C(x, dt, A, B, C, dy, h):
    dC = []
    for t, h in enumerate(_states(x, dt, A, B, h)):
        dC.append((h * dy[:, :, t, :, None]).sum(-2).to(C.dtype))                      # (b, c, N)
    return torch.stack(dC, dim=2)


def _total(dA):
    return dA.sum((0, 1))


def _across(ends, decay, h):
    """The recurrence over chunks: ends, decay (b, c, D, N), h (b, D, N) -> every chunk's first state, the last state."""
    starts = []
    for k in range(ends.shape[1]):
        starts.append(h)
        h = decay[:, k] * h + ends[:, k]
    return torch.stack(starts, dim=1), h


def _across_backwards(carries, decay, carry):
    """The same from the last chunk to the first -> the carry that arrives at every chunk's end, the one that leaves."""
    arriving = []
    for k in reversed(range(carries.shape[1])):
        arriving.append(carry)
        carry = decay[:, k] * carry + carries[:, k]
    return torch.stack(arriving[::-1], dim=1), carry


# Left to itself the compiler stores a value that is used twice and was not cheap, and ends a kernel that grows long. Here
# no value of a step may reach memory: with these limits the sums over n took 0.020 ms in place of 0.086 at (64, 64, 128, 16).
FUSE = {"realize_opcount_threshold": 10**6, "realize_reads_threshold": 10**6, "max_fusion_size": 1000}


@functools.cache
def _kernel(function, off):
    """function compiled for every shape that it meets, or, if off, function as it is."""
    return function if off else torch.compile(function, dynamic=False, options=FUSE)


def _pieces(*operands):
    """Cut (b, L, ...) into pieces of MOST_STEPS, and (b, c, D, N), states of all chunks, into those of a piece's chunks."""
    return list(zip(*(v.split(-(-MOST_STEPS // CHUNK_STEPS) if v.dim() == 4 else MOST_STEPS, dim=1) for v in operands)))


def _join(pieces):
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0].contiguous()


@torch.library.custom_op("mamba::scan", mutates_args=())
def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor,
          off: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y, the last state, and for the gradient every chunk's first state and decay.

    An operator of its own, so that a compiled model calls it as it stands and does not take it apart.
    """
    y, starts, decay = [], [], []
    for x_k, dt_k, B_k, C_k in _pieces(x, dt, B, C):
        L = x_k.shape[1]
        x_k, dt_k, B_k, C_k = map(_split, (x_k, dt_k, B_k, C_k))                       # (b, c, T, D or N)
        ends, decay_k = _kernel(_ends, off)(x_k, dt_k, A, B_k)
        starts_k, h = _kernel(_across, off)(ends, decay_k, h)
        y.append(_kernel(_outputs, off)(x_k, dt_k, A, B_k, C_k, starts_k).flatten(1, 2)[:, :L])
        starts.append(starts_k), decay.append(decay_k)
    return _join(y), h, _join(starts), _join(decay)


@torch.library.custom_op("mamba::scan_backward", mutates_args=())
def _scan_backward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, decay: Tensor, dy: Tensor,
                   dh: Tensor, off: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of x, dt, A, B, C and h."""
    gradients, dA = [], None
    for x_k, dt_k, B_k, C_k, dy_k, starts_k, decay_k in reversed(_pieces(x, dt, B, C, dy, starts, decay)):
        L = x_k.shape[1]
        x_k, dt_k, B_k, C_k, dy_k = map(_split, (x_k, dt_k, B_k, C_k, dy_k))
        carries = _kernel(_first_carry, off)(dt_k, A, C_k, dy_k)
        arriving, dh = _kernel(_across_backwards, off)(carries, decay_k, dh)
        dx, ddt, dA_k = _kernel(_gradients_x_dt_A, off)(x_k, dt_k, A, B_k, C_k, dy_k, starts_k, arriving)
        dB = _kernel(_gradient_B, off)(x_k, dt_k, A, B_k, C_k, dy_k, arriving)
        dC = _kernel(_gradient_C, off)(x_k, dt_k, A, B_k, C_k, dy_k, starts_k)
        dA_k = _kernel(_total, off)(dA_k)
        dA = dA_k if dA is None else dA + dA_k                 # most sequences are one piece, and need no sum
        gradients.append([v.flatten(1, 2)[:, :L] for v in (dx, ddt, dB, dC)])
    dx, ddt, dB, dC = map(_join, zip(*reversed(gradients)))
    return dx, ddt, dA, dB, dC, dh


@_scan.register_fake
def _(x, dt, A, B, C, h, off):
    chunks = sum(-(-x_k.shape[1] // CHUNK_STEPS) for x_k, in _pieces(x))
    states = h.new_empty(h.shape[0], chunks, *A.shape)
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(h), states, torch.empty_like(states)


@_scan_backward.register_fake
def _(x, dt, A, B, C, starts, decay, dy, dh, off):
    return tuple(torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt, A, B, C, dh))


def _keep(ctx, inputs, output):
    x, dt, A, B, C, _, ctx.off = inputs
    ctx.set_materialize_grads(False)                           # or there were zeros for starts and decay
    ctx.save_for_backward(x, dt, A, B, C, *output[2:])


def _gradients(ctx, dy, dh, *_):
    x, starts = ctx.saved_tensors[0], ctx.saved_tensors[5]
    dy = torch.zeros_like(x) if dy is None else dy
    dh = torch.zeros_like(starts[:, 0]) if dh is None else dh
    return *_scan_backward(*ctx.saved_tensors, dy.contiguous(), dh.contiguous(), ctx.off), None


_scan.register_autograd(_gradients, setup_context=_keep)


def parallel_scan(x, dt, A, B, C, h=None, off=False):
    """mamba.selective_scan_ref for any length: one piece after another, so that kernels and their scratch memory stop growing.

    Arguments and results as there; A and h may be float32 where the others are bfloat16. off: leave torch.compile out.
    """
    y, h, _, _ = _scan(x, dt, A, B, C, A.new_zeros(x.shape[0], *A.shape) if h is None else h, off)
    return y, h
