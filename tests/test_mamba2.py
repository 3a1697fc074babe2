"""family/mamba2.py: the chunked form equals the recurrence, and the layer has the official
parameters."""

import pytest
import torch
import torch.nn.functional as F

from conftest import in_segments, relative
from family.mamba2 import GatedNorm, Mamba2, ssd, ssd_ref


def operands(b=2, L=13, H=4, P=3, G=2, N=5, h=True, states=None):
    torch.manual_seed(0)
    x, dt, A = torch.randn(b, L, H, P), 2 * torch.rand(b, L, H), -3 * torch.rand(H)
    B, C = torch.randn(2, b, L, G, N).unbind()
    first = torch.randn(states or b, H, P, N).double() if h else None
    return [*(v.double() for v in (x, dt, A, B, C)), first]


def everything(scan, inputs):
    """y, the last state, and the gradient of a random sum of both with respect to each input."""
    inputs = [None if v is None else v.clone().requires_grad_() for v in inputs]
    y, h = scan(*inputs)
    generator = torch.Generator().manual_seed(1)
    loss = sum((v * torch.randn(v.shape, generator=generator)).sum() for v in (y, h))
    return [y, h, *torch.autograd.grad(loss, [v for v in inputs if v is not None])]


@pytest.mark.parametrize("shape", [
    {}, dict(L=1), dict(L=16), dict(L=65), dict(G=1), dict(G=4), dict(H=1, G=1), dict(h=False),
    dict(states=1), dict(states=1, L=65)])
@pytest.mark.parametrize("T", [1, 4, 16, 100])
def test_chunks_equal_the_recurrence(shape, T):
    inputs = operands(**shape)
    chunks, reference = everything(lambda *v: ssd(*v, T=T), inputs), everything(ssd_ref, inputs)
    for found, exact in zip(chunks, reference, strict=True):
        assert found.shape == exact.shape and relative(found, exact) < 1e-12


def test_second_derivatives():
    inputs = [v.requires_grad_() for v in operands(b=1, L=5, H=2, P=2, G=1, N=2)]
    assert torch.autograd.gradgradcheck(lambda *v: ssd(*v, T=2), inputs)


def test_operands_of_other_lengths_are_refused():
    x, dt, A, B, C, h = operands()
    for wrong in ((B[:, 1:], C), (B, C[:, 1:])):
        for scan in (ssd_ref, ssd):
            with pytest.raises(ValueError):
                scan(x, dt, A, *wrong, h)


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
    right = torch.stack([sum(kept**k for k in range(t + 1)) for t in range(L)])
    assert torch.allclose(y[0, :, 0, 0], right)
    assert torch.allclose(h.flatten(), y[0, -1, 0])


def test_names_and_shapes_are_the_official_ones():
    """mamba_ssm.Mamba2(128) has 256 channels in 4 heads of 64, and 128 states."""
    layer = Mamba2(128)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "dt_bias": (4,), "A_log": (4,), "D": (4,), "in_proj.weight": (2 * 256 + 2 * 128 + 4, 128),
        "conv1d.weight": (256 + 2 * 128, 1, 4), "conv1d.bias": (512,), "norm.weight": (256,),
        "out_proj.weight": (128, 256)}
    A, dt = layer.A_log.exp(), torch.nn.functional.softplus(layer.dt_bias)
    assert (A >= 1).all() and (A <= 16).all() and (dt >= 0.99e-3).all() and (dt <= 0.101).all()
    many = Mamba2(512, headdim=8)                            # 128 heads
    assert many.A_log.exp().max() > 12 and many.A_log.exp().min() < 4


@pytest.mark.parametrize("sizes", [[], [5], [3, 1, 20], [64]])
def test_layer_in_segments(sizes):
    torch.manual_seed(0)
    layer, x = Mamba2(16, d_state=8, headdim=8, ngroups=2).double(), torch.randn(2, 65, 16).double()
    (whole, state), (segments, last) = layer(x), in_segments(layer, x, sizes)
    assert relative(segments, whole) < 1e-12 and relative(last.h, state.h) < 1e-12
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
    mixed = F.conv1d(F.pad(xBC.mT, (3, 0)), *layer.conv1d.parameters(), groups=64).mT
    u, B, C = F.silu(mixed).split([32, 16, 16], dim=-1)
    u = u.view(2, 9, 4, 8)
    dt, A = F.softplus(dt + layer.dt_bias), -layer.A_log.exp()
    y, _ = ssd_ref(u, dt, A, B.view(2, 9, 2, 8), C.view(2, 9, 2, 8))
    y = (y + layer.D[:, None] * u).flatten(2) * F.silu(z)
    groups = [F.rms_norm(half, (16,), eps=1e-5) for half in y.chunk(2, dim=-1)]
    y = torch.cat(groups, dim=-1)                            # each group by itself
    assert relative(layer(x)[0], layer.out_proj(y * layer.norm.weight)) < 1e-12


def test_gradients_where_strong_and_weak_steps_mix():
    """A -30 and steps of 1 or 1e-4: float32 sums would lose the weak ones, dA by 3e-4 and more."""
    x, dt, A, B, C, h = operands(L=128)
    dt = torch.where(torch.rand(dt.shape) < 0.5, 1.0, 1e-4).double()
    exact = everything(ssd_ref, [x, dt, torch.full_like(A, -30.0), B, C, h])
    inputs = [v.float() for v in (x, dt, torch.full_like(A, -30.0), B, C, h)]
    for T in (16, 64):
        found = everything(lambda *v: ssd(*v, T=T), inputs)
        for v, right in list(zip(found, exact))[:7]:                 # of h nothing is left
            assert relative(v, right) < 2e-6


def test_one_step_that_forgets_leaves_its_neighbours_their_digits():
    x, dt, A, B, C, h = operands(L=64)
    dt = dt / 100
    dt[:, ::16] = 1e4
    exact = everything(ssd_ref, [x, dt, A, B, C, h])
    # Nothing is left of h, so its gradient is not compared.
    for found, right in zip(everything(ssd, [v.float() for v in (x, dt, A, B, C, h)])[:4], exact):
        assert relative(found, right) < 1e-4


def test_sums_are_float32_for_half_types():
    x, dt = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1), 0.001)
    B = torch.full((1, 1, 1, 16), 100.0)
    y, h = ssd(*(v.half() for v in (x, dt, -torch.ones(1), B, B)))
    assert y.item() == pytest.approx(160, rel=2e-3) and h.dtype == torch.float32

    # A leaky sum of 4,096 terms: 0.26 in bfloat16.
    ones = torch.ones(1, 4096, 1, 1)
    for dtype in (torch.bfloat16, torch.float16):
        inputs = (ones, 0.002 * ones[..., 0], -torch.ones(1), ones, ones)
        y, _ = ssd(*(v.to(dtype) for v in inputs))
        assert y.dtype == dtype and y[0, -1].item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_squares_in_float32(dtype):
    v = torch.tensor([300.0, -300.0, 300.0, 300.0], dtype=dtype)
    right = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=dtype)
    assert torch.equal(GatedNorm(4).to(dtype)(v, torch.full_like(v, 20.0)), right)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_half_precision(dtype, tolerance):
    torch.manual_seed(0)
    layer, x = Mamba2(16, d_state=8, headdim=8), torch.randn(2, 40, 16)
    exact, _ = layer(x)
    y, state = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype and relative(y, exact) < tolerance and state.h.dtype == torch.float32


def test_autocast():
    torch.manual_seed(0)
    layer, x = Mamba2(16, d_state=8, headdim=8), torch.randn(2, 40, 16)
    exact, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
    assert relative(y, exact) < 3e-2 and state.h.dtype == torch.float32


def test_empty_segments_and_batches():
    layer, x = Mamba2(16, d_state=8, headdim=8), torch.randn(3, 5, 16)
    _, state = layer(x)
    y, same = layer(x[:, :0], state)
    assert y.shape == (3, 0, 16) and same is state
    assert layer(x[:, :0])[0].shape == (3, 0, 16) and layer(x[:0])[0].shape == (0, 5, 16)
