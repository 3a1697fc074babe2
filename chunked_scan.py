"""The selective scan for a CPU: one chunk of steps after another, with a gradient derived by hand.

The loop of mamba.selective_scan_ref is slow: a dozen small calls per step, and autograd keeps every
state that it meets. But only h_t = a_t h_{t-1} + u_t B_t has to be taken step by step. The decays
a = exp(dt A), the inputs u = dt x and the sums over states can be computed for many steps in one
call. So cut time into chunks of T steps that fit into the cache, and keep only each chunk's first
state.

The gradient. dx is the gradient of the loss with respect to x, and so on; g_t is that of h_t.

1.  h_t is used twice, by y_t and by h_{t+1}. So g obeys the same recurrence, backwards in time:
        g_t = C_t dy_t + a_{t+1} g_{t+1}
2.  h_t is linear in u_t, which N states share, and in B_t, which D channels share:
        du_t = sum over states of g_t B_t           dB_t = sum over channels of g_t u_t
3.  The decay a_t has the gradient g_t h_{t-1}, and exp is its own derivative:
        d(dt_t A) = a_t g_t h_{t-1}
4.  C_t acts on y_t alone:
        dC_t = sum over channels of h_t dy_t
5.  u_t = dt_t x_t and dt_t A are products, and dt_t is a factor of both:
        dx_t = dt_t du_t                            dA = sum over b and t of dt_t d(dt_t A)
        ddt_t = x_t du_t + sum over states of A d(dt_t A)

The backward pass takes the chunks from last to first. In each it repeats the recurrence from the
chunk's first state to get h, then runs backwards to get g. Nothing divides, and no exp has a
positive argument, so nothing overflows, however long the sequence or strong the decay.

Symbols as in mamba.py, but time comes first and b and D last, so that the values of one step are
contiguous: x, dt, y (L, b, D); B, C (L, b, N); states (N, b, D).
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**18   # of (T, N, b, D): 1 MiB in float32; 2^17 and 2^19 are equally fast


def check_shapes(x, dt, A, B, C, h):
    """Raise ValueError unless all shapes fit. Broadcast arguments would get wrong gradients."""
    (b, L, D), N = x.shape, A.shape[-1]
    right = {"dt": (b, L, D), "A": (D, N), "B": (b, L, N), "C": (b, L, N), "h": (b, D, N)}
    for (name, shape), v in zip(right.items(), (dt, A, B, C, h)):
        if v is not None and v.shape != shape:
            raise ValueError(f"{name} has shape {tuple(v.shape)}, but beside x {tuple(x.shape)} "
                             f"and A {tuple(A.shape)} it must be {shape}")


def _broadcast(x, dt, A, B, C):
    """x, dt as (L, 1, b, D), A as (N, b, D) and B, C as (L, N, b, 1), for products (T, N, b, D)."""
    A = A.t()[:, None].expand(-1, x.shape[1], -1).contiguous()
    return x[:, None], dt[:, None], A, B.mT[..., None], C.mT[..., None]


def _recur(a, b, h):
    """h_t = a_t h_{t-1} + b_t over lists of (N, b, D). Writes h_t over b_t; returns the last."""
    for a_t, b_t in zip(a, b):
        h = b_t.addcmul_(a_t, h)
    return h


# Both passes are operators: torch.compile and torch.export call them and do not unroll their loops.

@torch.library.custom_op("mamba::chunked_scan", mutates_args=())
def _forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor,
             T: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, the last state, and for the gradient each chunk's first state (chunks, N, b, D)."""
    x, dt, A, B, C = _broadcast(x, dt, A, B, C)
    u = dt * x
    y = torch.empty_like(x[:, 0])
    # exp below -87 gives denormal floats, which CPUs compute 10 to 50 times slower: clamped, a
    # trained model runs twice as fast. A GPU does not need it, and its host would have to wait.
    clamp = not x.is_cuda and bool(dt.max() * A.min() < -80)
    a, hs = x.new_empty(2, T, *A.shape)                  # used by every chunk: saves page faults
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
def _backward(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, T: int,
        dy: Tensor, dh: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of x, dt, A, B, C and h."""
    x, dt, A, B, C = _broadcast(x, dt, A, B, C)
    u = dt * x
    dy = dy.contiguous()[:, None]                                        # (L, 1, b, D)
    du, ddt = torch.empty_like(x[:, 0]), torch.empty_like(x[:, 0])       # (L, b, D)
    dB, dC = torch.empty_like(B[..., 0]), torch.empty_like(C[..., 0])    # (L, N, b)
    dA = x.new_zeros(T, *A.shape)                                        # (T, N, b, D)
    # a_{t+1} g_{t+1} (N, b, D), the gradient from later chunks:
    later = torch.zeros_like(starts[0]) if dh is None else dh.contiguous()
    a, g = x.new_empty(2, T, *A.shape)
    hs = x.new_empty(T + 1, *A.shape)                                    # a row more, for h_{t-1}
    a_t, g_t, h_t = a.unbind(), g.unbind(), hs[1:].unbind()
    chunks = list(zip(starts, *(v.split(T) for v in (dt, u, B, C, dy, du, ddt, dB, dC))))
    for start, dt_k, u_k, B_k, C_k, dy_k, du_k, ddt_k, dB_k, dC_k in reversed(chunks):
        steps = len(dt_k)
        a_k, g_k = a[:steps], g[:steps]                                  # (T, N, b, D) each
        h_k, h_before = hs[1:steps + 1], hs[:steps]                      # h_t, h_{t-1}
        torch.mul(dt_k, A, out=a_k).exp_()     # not clamped: exp(-80) may be large beside dA
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


@_forward.register_fake
def _(x, dt, A, B, C, h, T):
    chunks = -(-x.shape[0] // T)
    return x.new_empty(x.shape), h.new_empty(h.shape), h.new_empty(chunks, *h.shape)


@_backward.register_fake
def _(x, dt, A, B, C, starts, T, dy, dh):
    dA, dh = A.new_empty(A.mT.shape).mT, starts.new_empty(starts.shape[1:])
    return *(v.new_empty(v.shape) for v in (x, dt)), dA, *(v.new_empty(v.shape) for v in (B, C)), dh


def _save(ctx, inputs, output):
    x, dt, A, B, C, h, ctx.T = inputs
    ctx.set_materialize_grads(False)           # no zeros for results that have no gradient
    ctx.save_for_backward(x, dt, A, B, C, output[2])


def _gradients(ctx, dy, dh, d_starts):
    if torch.is_grad_enabled():      # create_graph: what follows would be missing from the graph
        raise RuntimeError("the chunked scan has no second derivative; selective_scan_ref has one")
    dy = torch.zeros_like(ctx.saved_tensors[0]) if dy is None else dy
    return *_backward(*ctx.saved_tensors, ctx.T, dy, dh), None


_forward.register_autograd(_gradients, setup_context=_save)


def chunked_scan(x, dt, A, B, C, h=None):
    """mamba.selective_scan_ref made fast: same arguments, results and gradients, to rounding.

    For the backward pass it keeps its arguments and L / T states.
    """
    check_shapes(x, dt, A, B, C, h)
    b, L, D = x.shape
    h = x.new_zeros(b, D, A.shape[1]) if h is None else h
    if x.numel() == 0:
        return x.clone(), h
    T = min(L, max(8, CHUNK_ELEMENTS // (b * A.numel())))                # steps in a chunk
    x, dt, B, C = (v.transpose(0, 1).contiguous() for v in (x, dt, B, C))
    y, h, _ = _forward(x, dt, A, B, C, h.permute(2, 0, 1).contiguous(), T)
    return y.transpose(0, 1).contiguous(), h.permute(1, 2, 0).contiguous()
