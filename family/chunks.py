"""Helpers for the chunked forms of recurrences.

Those of Mamba-2 and Mamba-3 have four steps: (1) in each chunk, attention over all pairs of its
steps, as if the chunk started from zero; (2) the state at its end, had it started from zero; (3) a
recurrence from chunk to chunk, which gives its true first state; (4) what that state adds to its
outputs. (For the delta rule, see deltanet.py.) The decay between two steps is the exp of a
difference of running sums of log decays. `fused_scan.split` cuts a sequence into equal chunks and
fills up the last one with zeros, which write nothing and do not decay: the state is kept. Last come
the checks that the files of family/ print.
"""

import contextlib
import time

import torch


def set_nan_aside(*inputs):
    """Replace NaN and infinity by 0: inputs (b, L, ...) -> the finite copies, and nan (b, L), which
    is NaN or infinite at tokens where an input was, otherwise 0.

    In a recurrence, a NaN reaches only its own output and later ones. A chunk's matmul multiplies
    later tokens by 0 instead of leaving them out, and 0 times NaN is NaN: earlier outputs would be
    spoiled, too. So a chunked form computes with finite inputs, and at the end adds nan.cumsum(1)
    to its outputs and nan.sum(1) to its last state, in all heads and channels, also in those that
    the recurrence would leave finite. C and q enter their own token's output only, so they can
    stay. (Products of finite numbers can still overflow, beyond 3e38, and spoil earlier outputs.)
    """
    finite, nan = [], 0.0
    for v in inputs:
        finite.append(v.clone())
        with torch.no_grad():          # the gradient of nan_to_num costs 10 times its forward pass
            finite[-1].nan_to_num_(0.0, 0.0, 0.0)
            # Not 0 * v, which a compiler may take for 0.
            nan = nan + (v - finite[-1]).flatten(2).sum(-1)              # (b, L)
    return finite, nan


def check_steps(*inputs):
    """Raise a ValueError unless all inputs (b, L, ...) have the same L."""
    steps = [v.shape[1] for v in inputs]
    if min(steps) < max(steps):
        raise ValueError(f"the inputs have {steps} steps, but need as many as each other")


def at_least_float32(v):
    """v in float32 if it is float16 or bfloat16, otherwise unchanged."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


def without_autocast(device):
    """A context in which torch.autocast is off. (The device "meta" has none.)"""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def widest(device):
    """float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def clamped_exp(exponent, dtype):
    """exp(exponent) for differences of running sums, clamped to -80 ... 0.

    Nothing overflows: sum_t - sum_s is positive only for s > t, and tril discards those. The sums
    are float64 where there is one (`widest`): after one strong decay, a float32 sum would lose the
    digits of the weak ones that follow. exp below -87 gives denormal floats, which CPUs compute 10
    to 50 times slower; at -80 it is effectively 0, and so is its gradient, unless a state exceeds
    1e30.
    """
    return exponent.to(dtype).clamp(-80, 0).exp()


class AcrossChunks(torch.autograd.Function):
    """The recurrence from chunk to chunk: h = decay_i h + end_i, with end_i the state at the end of
    chunk i, had it started from zero. Returns the state before each chunk, in the shape of ends,
    and the last state.

    decay (b, c, ..., 1, 1); ends (b, c, ..., P, N); h (b, ..., P, N). Autograd can do this too, but
    keeps every state twice and sums the gradient of each decay in a kernel of its own: with it,
    Mamba-2 takes 7 % longer on an H100.
    """

    @staticmethod
    def forward(ctx, decay, ends, h):
        starts, h = [], h.expand_as(ends[:, 0])      # one h may serve all sequences
        for decay_i, end_i in zip(decay.unbind(1), ends.unbind(1)):
            starts.append(h)
            h = decay_i * h + end_i
        starts = torch.stack(starts, dim=1)
        ctx.save_for_backward(decay, starts)
        return starts, h

    @staticmethod
    def backward(ctx, d_starts, dh):
        decay, starts = ctx.saved_tensors
        # dh is the gradient of the state after a chunk, decay_i h + end_i, and so that of end_i.
        # That of the state h before it is d_start + decay_i dh, that of decay_i a sum of dh h.
        d_ends = []
        for decay_i, d_start in zip(decay.unbind(1)[::-1], d_starts.unbind(1)[::-1]):
            d_ends.append(dh)
            dh = d_start + decay_i * dh
        d_ends = torch.stack(d_ends[::-1], dim=1)
        return (d_ends * starts).sum((-2, -1), keepdim=True), d_ends, dh


# ---- Demos ---------------------------------------------------------------------------------------

def difference(y, exact):
    """The relative difference between y and exact, as text."""
    return f"difference {(y - exact).norm() / exact.norm():.0e}"


def show_agreement(recurrence, chunked, inputs):
    """Print the times of both forms, (*inputs) -> y, state, and the difference of their y. Returns
    the y of the recurrence."""
    torch.set_num_threads(1)     # for operations this small, two threads can be far slower
    chunked(*inputs)                                                     # warms up
    times = [time.perf_counter()]
    exact, _ = recurrence(*inputs)
    times.append(time.perf_counter())
    y, _ = chunked(*inputs)
    times.append(time.perf_counter())
    print(f"recurrence  {1000 * (times[1] - times[0]):7.1f} ms")
    print(f"chunks      {1000 * (times[2] - times[1]):7.1f} ms   {difference(y, exact)}")
    return exact


def show_steps(layer, x, name=None):
    """Run a layer on x (b, L, d) in one call, then token by token. Print both times and the
    difference of the outputs. name: None for that of the layer's class."""
    torch.set_num_threads(1)     # for operations this small, two threads can be far slower
    layer(x)                                                             # warms up
    times = [time.perf_counter()]
    y, _ = layer(x)
    times.append(time.perf_counter())
    state, steps = None, []
    for x_t in x.split(1, dim=1):
        y_t, state = layer(x_t, state)
        steps.append(y_t)
    times.append(time.perf_counter())
    name = name or type(layer).__name__
    print(f"{name:<17}one call {1000 * (times[1] - times[0]):6.1f} ms   {x.shape[1]} steps "
          f"{1000 * (times[2] - times[1]):6.1f} ms   {difference(torch.cat(steps, dim=1), y)}")
