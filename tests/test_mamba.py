"""The scan in all its forms against each other and against numpy, and the Mamba layer."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fused_scan
import mamba
from conftest import in_pieces, relative
from fused_scan import parallel_scan
from mamba import Mamba, chunked_scan, selective_scan, selective_scan_ref

CHUNK = 8  # steps in a chunk of either scan, once small_chunks has set it
NAMES = ["y", "last state", "x", "dt", "A", "B", "C", "h"]


def parallel(x, dt, A, B, C, h=None):
    return parallel_scan(x, dt, A, B, C, h, compiled=False)


scans = pytest.mark.parametrize("scan", [chunked_scan, parallel], ids=["chunked", "parallel"])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(mamba, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(fused_scan, "CHUNK_STEPS", CHUNK)
    monkeypatch.setattr(fused_scan, "GROUP_CHUNKS", 4)


def operands(L, b=2, D=3, N=4, h=True, dtype=torch.float64, seed=0):
    """x, dt, A, B, C, h with the sizes of values that a trained layer has."""
    torch.manual_seed(seed)
    x, B, C = torch.randn(b, L, D), torch.randn(b, L, N), torch.randn(b, L, N)
    dt, A = 0.5 * F.softplus(torch.randn(b, L, D)), -4 * torch.rand(D, N) - 0.1
    return [v.to(dtype) for v in (x, dt, A, B, C)] + [torch.randn(b, D, N).to(dtype) if h else None]


def everything(scan, inputs, dtype=None, device=None):
    """y, the last state, and the gradients of a weighted sum of both, for every input that is there."""
    inputs = [None if v is None else v.detach().to(device=device, dtype=dtype).requires_grad_() for v in inputs]
    y, last = scan(*inputs)
    weights = torch.Generator().manual_seed(1)
    dy, dh = (torch.randn(v.shape, generator=weights, dtype=torch.float64).to(v) for v in (y, last))
    gradients = torch.autograd.grad([y, last], [v for v in inputs if v is not None], [dy, dh])
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
def test_reference_equals_numpy_loop(with_h):
    x, dt, A, B, C, h = operands(9, h=with_h)
    y, last = selective_scan_ref(x, dt, A, B, C, h)
    for b in range(2):
        for d in range(3):
            for n in range(4):
                state = h[b, d, n].item() if with_h else 0.0
                for t in range(9):
                    step = dt[b, t, d].item()
                    state = math.exp(step * A[d, n].item()) * state + step * B[b, t, n].item() * x[b, t, d].item()
                    y[b, t, d] -= C[b, t, n].item() * state         # what is left in the end is nothing
                assert np.isclose(last[b, d, n].item(), state, rtol=1e-12)
    assert y.abs().max() < 1e-12


# ---- the fast scans ----

@scans
@pytest.mark.parametrize("with_h", [False, True])
@pytest.mark.parametrize("L", [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 13, 2 * CHUNK, 29, 5 * CHUNK, 5 * CHUNK + 3, 9 * CHUNK + 2,
                               65 * CHUNK + 3])
def test_equals_reference(scan, L, with_h, small_chunks):
    inputs = operands(L, h=with_h)
    assert_close(everything(scan, inputs), everything(selective_scan_ref, inputs), 1e-12, 1e-12)


@pytest.mark.parametrize("b, L, transposed", [(1, 1, False), (2, CHUNK, True), (1, CHUNK * CHUNK + 1, False), (2, 37, True)])
def test_the_fused_operators_are_what_they_are_declared_to_be(b, L, transposed, small_chunks):
    x, dt, A, B, C, h = operands(L, b=b)
    if transposed:
        x, h = x.mT.contiguous().mT, h.mT.contiguous().mT
    x_k, dt_k, B_k, C_k = (fused_scan.split(v, CHUNK) for v in (x, dt, B, C))
    torch.library.opcheck(fused_scan._scan, (x_k, dt_k, A, B_k, C_k, h, False))
    y, last, starts, span = fused_scan._scan(x_k, dt_k, A, B_k, C_k, h, False)
    torch.library.opcheck(fused_scan._scan_backward, (x_k, dt_k, A, B_k, C_k, starts, span, y, last, False))
    assert last.untyped_storage().nbytes() == 8 * last.numel(), "the last state keeps others alive"
    assert parallel(x, dt, A.mT.contiguous().mT, B, C, h)[1].is_contiguous()


@scans
def test_refuses_a_second_derivative(scan):
    """It would be wrong, and nothing would say so: the buffers that a chunk is computed in are no part of the graph."""
    x, dt, A, B, C, h = operands(5)
    x.requires_grad_(), A.requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative|register_autograd"):
        y, _ = scan(x, dt, A, B, C, h)
        gradient, = torch.autograd.grad(y.sum(), x, create_graph=True)
        torch.autograd.grad(y.square().sum() + gradient.square().sum(), A)


@scans
@pytest.mark.parametrize("L", [1, 16, 100])
def test_equals_reference_with_the_real_chunks(scan, L):
    inputs = operands(L, b=3, D=5, N=2)
    assert_close(everything(scan, inputs), everything(selective_scan_ref, inputs), 1e-12, 1e-12)


@scans
@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_of_the_two_results(scan, used, small_chunks):
    """Of y alone, as in training, or of the last state alone."""
    gradients = []
    for function in scan, selective_scan_ref:
        inputs = [v.requires_grad_() for v in operands(2 * CHUNK + 1)]
        gradients.append(torch.autograd.grad(function(*inputs)[used].square().sum(), inputs, allow_unused=True,
                                             materialize_grads=True))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*gradients))


@pytest.mark.parametrize("scan", [selective_scan, parallel], ids=["selective_scan", "parallel"])
def test_bfloat16_inputs_and_float32_state(scan, small_chunks):
    x, dt, A, B, C, h = (v.float() for v in operands(2 * CHUNK))
    inputs = [x.bfloat16(), dt.bfloat16(), A, B.bfloat16(), C.bfloat16(), h]
    found, exact = everything(scan, inputs), everything(selective_scan_ref, [v.double() for v in inputs])
    assert found["y"].dtype == found["x"].dtype == found["dt"].dtype == found["C"].dtype == torch.bfloat16
    assert found["last state"].dtype == found["A"].dtype == torch.float32
    # What is stored in bfloat16 is off by up to 2^-9 of itself; the last state, which is not, only by float32's rounding.
    assert_close({"last state": found["last state"]}, {"last state": exact["last state"]})
    assert_close(found, exact, outputs=1e-2, gradients=1e-2)


@scans
def test_sizes_of_one(scan, small_chunks):
    inputs = operands(CHUNK + 2, b=1, D=1, N=1)
    assert_close(everything(scan, inputs), everything(selective_scan_ref, inputs), 1e-12, 1e-12)


@scans
@pytest.mark.parametrize("with_h", [False, True])
def test_gradcheck(scan, with_h, small_chunks):
    inputs = operands(CHUNK + 2, b=1, D=2, N=2, h=with_h)
    assert torch.autograd.gradcheck(scan, [v if v is None else v.requires_grad_() for v in inputs])


@scans
def test_float32(scan):
    inputs = operands(300)
    found = everything(scan, inputs, torch.float32)
    assert all(v.dtype == torch.float32 for v in found.values())
    assert_close(found, everything(selective_scan_ref, inputs))


@scans
@pytest.mark.parametrize("low, high", [(1e-6, 1e-6), (1e-3, 1e-3), (0.1, 0.1), (1, 1), (1e3, 1e3), (1e-6, 1e3)])
def test_strong_and_weak_decay(scan, low, high, small_chunks):
    x, dt, A, B, C, h = operands(50, N=7)
    dt = torch.exp(math.log(low) + (math.log(high) - math.log(low)) * torch.rand_like(dt))
    A = -torch.logspace(-2, 6, 7, base=2, dtype=torch.float64).repeat(3, 1)        # -1/4 ... -64
    inputs = x, dt, A, B, C, h
    inputs = [v.float().double() for v in inputs]                                  # what float32 can hold
    assert_close(everything(scan, inputs, torch.float32), everything(selective_scan_ref, inputs))


@pytest.fixture(scope="module")
def long_run():
    inputs = operands(2**16, b=1, D=2, N=2)
    inputs[1] = inputs[1] / 500                                                    # memory of thousands of steps
    inputs = [v.float().double() for v in inputs]
    return inputs, everything(chunked_scan, inputs)


@scans
def test_long(scan, long_run):
    inputs, expected = long_run
    assert_close(everything(scan, inputs, torch.float32), expected)


@scans
def test_any_memory_layout(scan, small_chunks):
    inputs = operands(CHUNK + 3)
    strided = [v.mT.contiguous().mT for v in inputs]
    assert not any(v.is_contiguous() for v in strided)
    assert_close(everything(scan, strided), everything(selective_scan_ref, inputs), 1e-12, 1e-12)

    def gradients(f):
        leaves = [v.clone().requires_grad_() for v in inputs]
        f(*leaves)[0].sum().backward()                                             # dy has stride 0, dh is not there
        return dict(zip(NAMES[2:], [v.grad for v in leaves]))
    assert_close(gradients(scan), gradients(selective_scan_ref), gradients=1e-12)


@scans
def test_inputs_are_left_alone(scan, small_chunks):
    inputs = operands(CHUNK + 3, b=1, D=1, N=1)    # sizes at which a transposed copy would be no copy
    copies = [v.clone() for v in inputs]
    everything(scan, inputs)
    assert all(torch.equal(v, copy) for v, copy in zip(inputs, copies))


@scans
def test_keeps_no_state_for_every_step(scan):
    L, D, N = 2048, 64, 32
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        y, _ = scan(*(v.requires_grad_() for v in operands(L, b=1, D=D, N=N, dtype=torch.float32)))
    kept += getattr(y.grad_fn, "starts", [])
    assert kept
    assert sum({v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in kept}.values()) < 4 * L * D * N / 4


def test_selective_scan_is_the_chunked_one_on_the_cpu():
    inputs = operands(20, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(selective_scan(*inputs), chunked_scan(*inputs)))
    assert all(torch.equal(a, b) for a, b in zip(selective_scan(*inputs[:5]), chunked_scan(*inputs[:5], None)))


# ---- the layer ----

@pytest.mark.parametrize("d_model, d_inner, dt_rank", [(8, 16, 1), (64, 128, 4), (20, 40, 2)])
def test_state_dict_is_the_official_one(d_model, d_inner, dt_rank):
    official = {
        "A_log": (d_inner, 16), "D": (d_inner,), "in_proj.weight": (2 * d_inner, d_model),
        "conv1d.weight": (d_inner, 1, 4), "conv1d.bias": (d_inner,), "x_proj.weight": (dt_rank + 32, d_inner),
        "dt_proj.weight": (d_inner, dt_rank), "dt_proj.bias": (d_inner,), "out_proj.weight": (d_model, d_inner)}
    assert {name: tuple(v.shape) for name, v in Mamba(d_model).state_dict().items()} == official


def test_initial_values():
    torch.manual_seed(0)
    layer = Mamba(64)
    assert torch.allclose(-torch.exp(layer.A_log), -torch.arange(1.0, 17).expand(128, 16))
    assert (layer.D == 1).all()
    dt = F.softplus(layer.dt_proj.bias)
    assert 0.999e-3 < dt.min() < 2e-3 and 5e-2 < dt.max() < 1.001e-1
    assert 5e-3 < dt.median() < 2e-2                                               # even on a log scale
    assert 0.4 < layer.dt_proj.weight.abs().max() <= 0.5                           # dt_rank^-1/2


def plain_mamba(layer, x):
    """The layer as the paper's figure 3 and the official module have it, from PyTorch's own convolution."""
    L = x.shape[1]
    x, z = layer.in_proj(x).chunk(2, dim=-1)
    weight, bias = layer.conv1d.weight, layer.conv1d.bias
    x = F.conv1d(x.mT, weight, bias, padding=weight.shape[2] - 1, groups=len(weight))[:, :, :L].mT
    x = F.silu(x)
    dt, B, C = (x @ layer.x_proj.weight.T).split([layer.dt_rank, layer.d_state, layer.d_state], dim=-1)
    dt = F.softplus(dt @ layer.dt_proj.weight.T + layer.dt_proj.bias)
    y, _ = selective_scan_ref(x, dt, -layer.A_log.exp(), B, C)
    return ((y + layer.D * x) * F.silu(z)) @ layer.out_proj.weight.T


def layer_and_input(L, **options):
    torch.manual_seed(0)
    layer = Mamba(6, **options).double()
    torch.nn.init.normal_(layer.D)
    return layer, torch.randn(2, L, 6, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, dict(d_state=3, d_conv=2, expand=3, dt_rank=2), dict(d_conv=7)])
@pytest.mark.parametrize("L", [1, 2, 20])
def test_layer_equals_plain_mamba(L, options):
    layer, x = layer_and_input(L, **options)
    y, expected = layer(x)[0], plain_mamba(layer, x)
    assert torch.allclose(y, expected, atol=1e-12)
    dy = torch.randn_like(y)
    for p, a, b in zip(layer.parameters(), *(torch.autograd.grad(v, list(layer.parameters()), dy) for v in (y, expected))):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("d_conv", [2, 4])
@pytest.mark.parametrize("sizes", [[], [1, 2, 5], [2, 2], [9], [16, 3]])
def test_pieces_equal_one_call(sizes, d_conv):
    layer, x = layer_and_input(20, d_conv=d_conv)
    y, state = layer(x)
    y_pieces, state_pieces = in_pieces(layer, x, sizes)
    assert torch.allclose(y, y_pieces, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(state, state_pieces))


def test_gradient_through_pieces():
    layer, x = layer_and_input(20)
    whole = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    pieces = torch.autograd.grad(in_pieces(layer, x, [7, 9])[0].square().sum(), list(layer.parameters()))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(whole, pieces))


def test_causal():
    layer, x = layer_and_input(12)
    changed = x.clone()
    changed[:, 5:] += 1
    difference = (layer(x)[0] - layer(changed)[0]).abs().amax((0, 2))
    assert (difference[:5] == 0).all() and (difference[5:] > 1e-6).all()


@torch.no_grad()
def test_state_does_not_grow():
    layer, x = layer_and_input(100)
    for L in (1, 2, 100):
        state = layer(x[:, :L])[1]
        assert state.conv.shape == (2, 12, 3) and state.h.shape == (2, 12, 16)
        # Nor may it hold on to more memory than it shows.
        assert all(v.untyped_storage().nbytes() <= 8 * 2 * 12 * 16 for v in state), f"after {L} tokens"
