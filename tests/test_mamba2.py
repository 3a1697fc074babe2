"""mamba2.py: the chunked form equals the recurrence, and the layer has the official parameters."""

import pytest
import torch
import torch.nn.functional as F

from conftest import in_pieces, relative
from mamba2 import Mamba2, ssd, ssd_ref


def operands(b=2, L=13, H=4, P=3, G=2, N=5, h=True):
    torch.manual_seed(0)
    x, dt, A = torch.randn(b, L, H, P), 2 * torch.rand(b, L, H), -3 * torch.rand(H)
    B, C = torch.randn(2, b, L, G, N).unbind()
    return [v.double() for v in (x, dt, A, B, C)] + [torch.randn(b, H, P, N).double() if h else None]


def everything(scan, inputs):
    """y, the last state, and the gradient of a random sum of both with respect to each input."""
    inputs = [None if v is None else v.clone().requires_grad_() for v in inputs]
    y, h = scan(*inputs)
    generator = torch.Generator().manual_seed(1)
    loss = sum((v * torch.randn(v.shape, generator=generator)).sum() for v in (y, h))
    return [y, h, *torch.autograd.grad(loss, [v for v in inputs if v is not None])]


@pytest.mark.parametrize("shape", [{}, dict(L=1), dict(L=16), dict(L=65), dict(G=1), dict(G=4), dict(H=1, G=1), dict(h=False)])
@pytest.mark.parametrize("T", [1, 4, 16, 100])
def test_chunks_equal_the_recurrence(shape, T):
    inputs = operands(**shape)
    for found, exact in zip(everything(lambda *v: ssd(*v, T=T), inputs), everything(ssd_ref, inputs), strict=True):
        assert found.shape == exact.shape and relative(found, exact) < 1e-12


@pytest.mark.parametrize("step", [1e-6, 30.0, 1e4])
def test_weak_and_strong_decay(step):
    x, dt, A, B, C, h = operands(L=70)
    inputs = [v.float() for v in (x, step * dt, A, B, C, h)]
    exact = everything(ssd_ref, [v.double() for v in inputs])
    for found, right in list(zip(everything(ssd, inputs), exact))[:2]:
        assert relative(found, right) < 1e-4
    assert all(v.isfinite().all() for v in everything(ssd, inputs))


def test_one_head_and_one_state_is_a_leaky_sum():
    L = 6
    ones = torch.ones(1, L, 1, 1).double()
    y, h = ssd(ones, ones[..., 0], torch.tensor([-0.5]).double(), ones, ones)
    kept = torch.exp(torch.tensor(-0.5).double())
    assert torch.allclose(y[0, :, 0, 0], sum(kept**k * (torch.arange(L) >= k) for k in range(L)).double())
    assert torch.allclose(h.flatten(), y[0, -1, 0])


def test_names_and_shapes_are_the_official_ones():
    layer = Mamba2(128)                                        # mamba_ssm.Mamba2(128): 256 channels in 4 heads of 64, 128 states
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "dt_bias": (4,), "A_log": (4,), "D": (4,), "in_proj.weight": (2 * 256 + 2 * 128 + 4, 128),
        "conv1d.weight": (256 + 2 * 128, 1, 4), "conv1d.bias": (512,), "norm.weight": (256,), "out_proj.weight": (128, 256)}
    A, dt = layer.A_log.exp(), torch.nn.functional.softplus(layer.dt_bias)
    assert (A >= 1).all() and (A <= 16).all() and (dt >= 0.99e-3).all() and (dt <= 0.101).all()


@pytest.mark.parametrize("sizes", [[], [5], [3, 1, 20], [64]])
def test_layer_in_pieces(sizes):
    torch.manual_seed(0)
    layer, x = Mamba2(16, d_state=8, headdim=8, ngroups=2).double(), torch.randn(2, 65, 16).double()
    (whole, state), (pieces, last) = layer(x), in_pieces(layer, x, sizes)
    assert relative(pieces, whole) < 1e-12 and relative(last.h, state.h) < 1e-12
    assert relative(last.conv, state.conv) < 1e-12


def test_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="headdim 10 must divide 32"):
        Mamba2(16, headdim=10)
    with pytest.raises(ValueError, match="3 heads"):
        Mamba2(16, headdim=8, ngroups=3)


def test_layer_is_its_figure():
    torch.manual_seed(0)
    layer, x = Mamba2(16, d_state=8, headdim=8, ngroups=2).double(), torch.randn(2, 9, 16).double()
    for p in layer.parameters():
        p.data = torch.randn_like(p) / 2
    z, xBC, dt = layer.in_proj(x).split([32, 64, 4], dim=-1)
    u, B, C = F.silu(layer.conv1d(xBC.mT)[..., :9].mT).split([32, 16, 16], dim=-1)
    u = u.view(2, 9, 4, 8)
    y, _ = ssd_ref(u, F.softplus(dt + layer.dt_bias), -layer.A_log.exp(), B.view(2, 9, 2, 8), C.view(2, 9, 2, 8))
    y = (y + layer.D[:, None] * u).flatten(2) * F.silu(z)
    y = torch.cat([F.rms_norm(half, (16,), eps=1e-5) for half in y.chunk(2, dim=-1)], dim=-1)          # each group by itself
    assert relative(layer(x)[0], layer.out_proj(y * layer.norm.weight)) < 1e-12


def test_one_step_that_forgets_leaves_its_neighbours_their_digits():
    x, dt, A, B, C, h = operands(L=64)
    dt = dt / 100
    dt[:, ::16] = 1e4
    exact = everything(ssd_ref, [x, dt, A, B, C, h])
    for found, right in zip(everything(ssd, [v.float() for v in (x, dt, A, B, C, h)])[:4], exact):         # of h nothing is left
        assert relative(found, right) < 1e-4
