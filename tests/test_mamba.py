"""The selective scan: all its forms agree with the recurrence, and the recurrence with numpy."""

import contextlib
import gc
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fused_scan
import mamba
from conftest import relative
from fused_scan import parallel_scan, two_chunks
from mamba import chunked_scan, decode, selective_scan, selective_scan_ref

CHUNK = 8  # steps in a chunk of either scan, under the fixture small_chunks
NAMES = ["y", "last state", "x", "dt", "A", "B", "C", "h"]

scans = pytest.mark.parametrize("scan", [chunked_scan, parallel_scan], ids=["chunked", "parallel"])
all_forms = pytest.mark.parametrize(
    "scan", [selective_scan_ref, chunked_scan, parallel_scan, selective_scan],
    ids=["recurrence", "chunked", "parallel", "selective_scan"])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("mamba.CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(fused_scan, "CHUNK_STEPS", CHUNK)
    monkeypatch.setattr(fused_scan, "ONE_GROUP", 8)
    monkeypatch.setattr(fused_scan, "GROUP_CHUNKS", 4)
    monkeypatch.setattr(fused_scan, "LONG", 16 * CHUNK)


def operands(L, b=2, D=3, N=4, h=True, dtype=torch.float64, seed=0):
    """x, dt, A, B, C, h with values as large as a trained layer's."""
    torch.manual_seed(seed)
    x, B, C = torch.randn(b, L, D), torch.randn(b, L, N), torch.randn(b, L, N)
    dt, A = 0.5 * F.softplus(torch.randn(b, L, D)), -4 * torch.rand(D, N) - 0.1
    return [v.to(dtype) for v in (x, dt, A, B, C)] + [torch.randn(b, D, N).to(dtype) if h else None]


def everything(scan, inputs, dtype=None, device=None):
    """y, the last state, and the gradients of a weighted sum of both for every input there is."""
    here = dict(device=device, dtype=dtype)
    leaves = [v if v is None else v.detach().to(**here).requires_grad_() for v in inputs]
    y, last = scan(*leaves)
    weights = torch.Generator().manual_seed(1)
    dy, dh = (torch.randn(v.shape, generator=weights, dtype=torch.float64).to(v) for v in (y, last))
    gradients = torch.autograd.grad([y, last], [v for v in leaves if v is not None], [dy, dh])
    return dict(zip(NAMES, [y, last, *gradients]))


def assert_close(found, expected, outputs=1e-5, gradients=1e-4):
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].shape == expected[name].shape, name
        assert found[name].isfinite().all(), name
        error = relative(found[name].cpu(), expected[name].cpu())
        assert error < (outputs if name in NAMES[:2] else gradients), f"{name} is off by {error}"


# ---- the recurrence ----

@pytest.mark.parametrize("with_h", [False, True])
def test_recurrence_equals_numpy_loop(with_h):
    x, dt, A, B, C, h = operands(9, h=with_h)
    y, last = selective_scan_ref(x, dt, A, B, C, h)
    expected = np.zeros(y.shape)
    for b in range(2):
        for d in range(3):
            for n in range(4):
                state = h[b, d, n].item() if with_h else 0.0
                for t in range(9):
                    step = dt[b, t, d].item()
                    decay = math.exp(step * A[d, n].item())
                    state = decay * state + step * B[b, t, n].item() * x[b, t, d].item()
                    expected[b, t, d] += C[b, t, n].item() * state
                assert np.isclose(last[b, d, n].item(), state, rtol=1e-12)
    assert np.allclose(y, expected, rtol=0, atol=1e-12)


def test_two_chunks_equal_the_recurrence():
    inputs = operands(10)
    found, expected = two_chunks(selective_scan_ref, *inputs), selective_scan_ref(*inputs)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found, expected))


# ---- the fast scans equal the recurrence ----

@scans
@pytest.mark.parametrize("with_h", [False, True])
@pytest.mark.parametrize("L", [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 13, 2 * CHUNK, 29, 5 * CHUNK,
                               5 * CHUNK + 3, 9 * CHUNK + 2, 65 * CHUNK + 3])
def test_equals_recurrence(scan, L, with_h, small_chunks):
    inputs = operands(L, h=with_h)
    assert_close(everything(scan, inputs), everything(selective_scan_ref, inputs), 1e-12, 1e-12)


@scans
@pytest.mark.parametrize("L", [1, 16, 100])
@pytest.mark.parametrize("b, D, N", [(3, 5, 2), (1, 1, 1)])
def test_equals_recurrence_with_the_real_chunks(scan, b, L, D, N):
    inputs = operands(L, b, D, N)
    assert_close(everything(scan, inputs), everything(selective_scan_ref, inputs), 1e-12, 1e-12)


@pytest.mark.parametrize("with_h", [False, True])
def test_decode_steps_equal_one_call(with_h):
    inputs = operands(20, h=with_h)
    assert_close(everything(decode, inputs), everything(selective_scan, inputs), 1e-12, 1e-12)


@scans
@pytest.mark.parametrize("used", [0, 1], ids=["y", "last state"])
def test_gradient_of_one_of_the_two_results(scan, used, small_chunks):
    """Of y alone, as in training, or of the last state alone."""
    gradients = []
    for function in scan, selective_scan_ref:
        inputs = [v.requires_grad_() for v in operands(2 * CHUNK + 1)]
        loss = function(*inputs)[used].square().sum()
        gradients.append(torch.autograd.grad(loss, inputs, materialize_grads=True))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*gradients))


@scans
@pytest.mark.parametrize("with_h", [False, True])
def test_gradcheck(scan, with_h, small_chunks):
    inputs = operands(CHUNK + 2, b=1, D=2, N=2, h=with_h)
    assert torch.autograd.gradcheck(scan, [v if v is None else v.requires_grad_() for v in inputs])


def test_selective_scan_is_the_chunked_one_on_the_cpu():
    inputs = operands(20, dtype=torch.float32)
    for arguments in inputs, inputs[:5]:
        for found, expected in zip(selective_scan(*arguments), chunked_scan(*arguments)):
            assert torch.equal(found, expected)


# ---- accuracy ----

@scans
def test_float32(scan):
    inputs = operands(300)
    found = everything(scan, inputs, torch.float32)
    assert all(v.dtype == torch.float32 for v in found.values())
    assert_close(found, everything(selective_scan_ref, inputs))


@scans
@pytest.mark.parametrize("low, high", [(1e-6, 1e-6), (1e-3, 1e-3), (0.1, 0.1), (1, 1), (1e3, 1e3),
                                       (1e-6, 1e3)])
def test_strong_and_weak_decay(scan, low, high, small_chunks):
    x, dt, A, B, C, h = operands(50, N=7)
    dt = torch.exp(math.log(low) + (math.log(high) - math.log(low)) * torch.rand_like(dt))
    A = -torch.logspace(-2, 6, 7, base=2, dtype=torch.float64).repeat(3, 1)      # -1/4 ... -64
    inputs = [v.float().double() for v in (x, dt, A, B, C, h)]                   # exact in float32
    assert_close(everything(scan, inputs, torch.float32), everything(selective_scan_ref, inputs))


@all_forms
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("t", [CHUNK - 1, CHUNK + 1, 10 * CHUNK])
def test_what_is_not_finite_reaches_only_later_outputs(scan, bad, t, small_chunks):
    x, *others = operands(12 * CHUNK, h=False)
    expected, _ = scan(x, *others)
    x[0, t] = bad
    y, last = scan(x, *others)
    assert torch.allclose(y[0, :t], expected[0, :t]) and torch.allclose(y[1], expected[1])
    assert not y[0, t:].isfinite().any() and not last[0].isfinite().any()


@pytest.fixture(scope="module")
def long_run():
    inputs = operands(2**16, b=1, D=2, N=2)
    inputs[1] = inputs[1] / 500                                 # a memory of thousands of steps
    inputs = [v.float().double() for v in inputs]
    return inputs, everything(chunked_scan, inputs)


@scans
def test_long(scan, long_run):
    inputs, expected = long_run
    assert_close(everything(scan, inputs, torch.float32), expected)


@pytest.mark.parametrize("scan", [selective_scan, parallel_scan], ids=["chosen", "parallel"])
@pytest.mark.parametrize("chunks", [2, 8])
def test_bfloat16_inputs_and_float32_state(scan, chunks, small_chunks):
    x, dt, A, B, C, h = (v.float() for v in operands(chunks * CHUNK))
    inputs = [x.bfloat16(), dt.bfloat16(), A, B.bfloat16(), C.bfloat16(), h]
    found = everything(scan, inputs)
    exact = everything(selective_scan_ref, [v.double() for v in inputs])
    assert {found[name].dtype for name in ("y", "x", "dt", "B", "C")} == {torch.bfloat16}
    assert {found[name].dtype for name in ("last state", "A", "h")} == {torch.float32}
    # The last state is stored in float32. What is stored in bfloat16 is off by up to 2^-9.
    assert_close({"last state": found["last state"]}, {"last state": exact["last state"]})
    assert_close(found, exact, outputs=1e-2, gradients=1e-2)


@pytest.mark.parametrize("dtype, stored", [
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),    # float16 could overflow
    (torch.float32, torch.float32)])
def test_states_of_chunks_take_half_the_memory_in_bfloat16(dtype, stored, monkeypatch):
    seen, across = [], fused_scan._across

    def watched(span, A, ends, h, *more, **options):
        starts, last = across(span, A, ends, h, *more, **options)
        seen.append((ends.dtype, starts.dtype, last.dtype))
        return starts, last
    monkeypatch.setattr(fused_scan, "_across", watched)
    x, dt, A, B, C, h = operands(3 * CHUNK, dtype=dtype)
    everything(parallel_scan, [x, dt, A.float(), B, C, h.float()])
    # The ends of the forward pass are not rounded, so that the last state is exact.
    forwards, backwards = seen
    assert forwards == (torch.float32, stored, torch.float32)
    assert backwards == (stored, stored, torch.float32)


def in_parallel(x, dt, A, B, C):
    return parallel_scan(x, dt, A.float(), B, C)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scan", [selective_scan, decode, in_parallel],
                         ids=["one call", "decode steps", "in parallel"])
def test_half_precision_adds_up_in_float32(scan, dtype):
    """4,096 small inputs that decay slowly add up to 1.0007, in a bfloat16 state to 0.26."""
    one = torch.ones(1, 4096, 1, dtype=dtype)
    y, last = scan(one, 0.002 * one, -torch.ones(1, 1, dtype=dtype), one, one)
    assert y.dtype == dtype and last.dtype == torch.float32
    assert last.item() == pytest.approx(1.0007, abs=2e-4)
    assert y[0, -1].item() == pytest.approx(1.0007, abs=torch.finfo(dtype).eps)


# ---- memory, layout, arguments ----

@scans
def test_any_memory_layout(scan, small_chunks):
    inputs = operands(CHUNK + 3)
    strided = [v.mT.contiguous().mT for v in inputs]
    assert not any(v.is_contiguous() for v in strided)
    expected = everything(selective_scan_ref, inputs)
    assert_close(everything(scan, strided), expected, 1e-12, 1e-12)

    def gradients(f):
        leaves = [v.clone().requires_grad_() for v in inputs]
        f(*leaves)[0].sum().backward()                          # dy has stride 0, dh does not exist
        return dict(zip(NAMES[2:], [v.grad for v in leaves]))
    assert_close(gradients(scan), gradients(selective_scan_ref), gradients=1e-12)


@scans
@pytest.mark.parametrize("b, D, N", [(1, 1, 1), (2, 3, 1), (1, 3, 4)])
def test_inputs_are_left_alone(scan, b, D, N, small_chunks):
    """At sizes of 1 a transposed copy would be a view of the input."""
    inputs = operands(CHUNK + 3, b=b, D=D, N=N)
    copies = [v.clone() for v in inputs]
    everything(scan, inputs)
    assert all(torch.equal(v, copy) for v, copy in zip(inputs, copies))


@scans
@pytest.mark.parametrize("b, D", [(1, 1), (2, 3)])
def test_an_initial_state_overwritten_before_the_backward_pass(scan, b, D):
    """The gradient is right, or torch says that it cannot be; it was wrong without a word."""
    x = torch.zeros(b, 2, D)
    dt = torch.full((b, 2, D), math.log(2.0), requires_grad=True)
    one, A, h = torch.ones(b, 2, 1), -torch.ones(D, 1), torch.full((b, D, 1), 8.0)
    y, _ = scan(x, dt, A, one, one, h)
    h.zero_()
    try:
        y.sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert torch.allclose(dt.grad, torch.tensor([-6.0, -2.0])[:, None].expand(b, 2, D))


@scans
def test_keeps_no_state_for_every_step(scan):
    L, D, N = 2048, 64, 32
    kept = {}

    def keep(v):
        kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        scan(*(v.requires_grad_() for v in operands(L, b=1, D=D, N=N, dtype=torch.float32)))
    assert 0 < sum(kept.values()) < 4 * L * D * N / 4


@scans
def test_states_are_freed_by_the_backward_pass(scan, small_chunks):
    """A loss that is kept, for a curve, must not keep the states of its scan."""
    def live_bytes():
        gc.collect()
        sizes = {}
        for v in gc.get_objects():
            if type(v) in (torch.Tensor, torch.nn.Parameter):
                storage = v.untyped_storage()
                with contextlib.suppress(RuntimeError):              # torch.compile's have no data
                    sizes[storage.data_ptr()] = storage.nbytes()
        return sum(sizes.values())

    before = live_bytes()
    loss = scan(*(v.requires_grad_() for v in operands(4 * CHUNK)))[0].sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="have already been freed"):
        loss.backward()
    arguments = sum(v.nbytes for v in operands(4 * CHUNK))
    assert live_bytes() - before <= arguments + loss.nbytes


@all_forms
@pytest.mark.parametrize("name, shape", [
    ("dt", (2, 5, 1)), ("dt", (2, 1, 3)), ("A", (1, 4)), ("B", (1, 5, 4)), ("C", (1, 5, 4)),
    ("C", (2, 5, 1)), ("B", (2, 6, 4)), ("h", (1, 3, 4)), ("h", (2, 3, 1))])
def test_refuses_shapes_that_would_broadcast(scan, name, shape):
    arguments = dict(zip(NAMES[2:], operands(5)))
    arguments[name] = torch.ones(shape).double()
    with pytest.raises(ValueError, match=f"^{name} has shape ") as error:
        scan(*arguments.values())
    assert "\n" not in str(error.value) and str(shape) in str(error.value)


@all_forms
@pytest.mark.parametrize("with_h", [False, True])
@pytest.mark.parametrize("b, L", [(2, 0), (0, 5), (0, 0), (0, 1)])
def test_nothing_to_read(scan, b, L, with_h):
    inputs = operands(L, b, h=with_h)
    y, last = scan(*inputs)
    assert y.shape == (b, L, 3)
    assert torch.equal(last, inputs[5] if with_h else torch.zeros(b, 3, 4, dtype=torch.float64))


@scans
def test_refuses_a_second_derivative(scan):
    """It would be wrong: the buffers in which a chunk is computed are no part of the graph."""
    x, *others = operands(5)
    y, _ = scan(x.requires_grad_(), *others)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@scans
def test_refuses_a_forward_derivative(scan):
    """It would be zero."""
    x, *others = operands(20)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda x: scan(x, *others)[0], (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("D, channels_guessed", [(16, True), (48, False)])
def test_block_sizes_are_timed_for_long_sums_alone(D, channels_guessed, monkeypatch):
    """A guess for sums of many numbers can be 20 times too slow; timing short ones decides by
    noise."""
    guessed = {}

    def compile_each_shape(function, options):
        guessed[function.__name__] = options["deterministic"]
        return function
    monkeypatch.setattr(fused_scan, "compile_each_shape", compile_each_shape)
    fused_scan._kernel.cache_clear()
    x, dt, A, B, C, h = operands(20, D=D, N=16)
    x.requires_grad_()
    with fused_scan.compiled_scan(True):
        fused_scan.parallel_scan(x, dt, A, B, C, h)[0].sum().backward()
    fused_scan._kernel.cache_clear()
    assert guessed.pop("_gradient_B") == guessed.pop("_gradient_C") == channels_guessed
    assert {name for name, guess in guessed.items() if guess} == {"_outputs", "_gradients_x_dt_A"}
    assert {"_ends_forward", "_ends_backward", "_chunk_starts", "_sum_of_chunks"} <= set(guessed)
