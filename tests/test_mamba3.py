"""family/mamba3.py: the chunks equal the recurrence, and the layer is a state that rotates."""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import in_segments, relative
from family.mamba3 import Mamba3, trapezoid, trapezoid_ref


def operands(b=2, L=37, R=1, H=2, P=3, N=4, first=True, decay=1.0, states=None):
    torch.manual_seed(0)
    x, B, C = (torch.randn(b, L, R, H, size).double() for size in (P, N, N))
    before, now = torch.rand(2, b, L, H).double()
    log_a = -decay * torch.rand(b, L, H).double()
    if not first:
        return [x, log_a, before, now, B, C]
    h, last_B = torch.randn(states or b, H, P, N).double(), torch.randn(b, R, H, N).double()
    return [x, log_a, before, now, B, C, h, last_B, torch.randn(b, R, H, P).double()]


def run(form, inputs, **options):
    """form with its last two inputs, B and x of the token before, as the pair that it takes."""
    if len(inputs) == 6:
        return form(*inputs, **options)
    return form(*inputs[:7], tuple(inputs[7:]), **options)


def everything(form, inputs, **options):
    """y, the last state, and the gradient of a random sum of both with respect to each input."""
    inputs = [v.clone().requires_grad_() for v in inputs]
    y, h = run(form, inputs, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((v * torch.randn(v.shape, generator=generator)).sum() for v in (y, h))
    return [y, h, *torch.autograd.grad(loss, inputs)]


def test_recurrence_is_the_formula_of_the_paper():
    """h_t = a (h_{t-1} + before_t B_{t-1} x_{t-1}) + now_t B_t x_t, in plain loops over
    everything."""
    inputs = operands(b=1, L=6, R=2, H=1)
    y, last = run(trapezoid_ref, inputs)
    x, log_a, before, now, B, C = (v[0] for v in inputs[:6])
    h, B_old, x_old = inputs[6][0, 0].clone(), inputs[7][0], inputs[8][0]
    for t in range(6):
        for p in range(3):
            for n in range(4):
                old = sum(B_old[r, 0, n] * x_old[r, 0, p] for r in range(2))
                new = sum(B[t, r, 0, n] * x[t, r, 0, p] for r in range(2))
                decay = math.exp(log_a[t, 0])
                h[p, n] = decay * (h[p, n] + before[t, 0] * old) + now[t, 0] * new
        for r in range(2):
            assert torch.allclose(y[0, t, r, 0], h @ C[t, r, 0], atol=1e-12)
        B_old, x_old = B[t], x[t]
    assert torch.allclose(last[0, 0], h, atol=1e-12)


def test_second_derivatives():
    inputs = [v.requires_grad_() for v in operands(b=1, L=5, R=1, H=1)]
    assert torch.autograd.gradgradcheck(lambda *v: run(trapezoid, v, T=2), inputs)


def test_operands_of_other_lengths_are_refused():
    inputs = operands()
    for k in range(6):
        for scan in (trapezoid_ref, trapezoid):
            with pytest.raises(ValueError):
                run(scan, [*inputs[:k], inputs[k][:, 1:], *inputs[k + 1:]])


@pytest.mark.parametrize("shape", [
    {}, dict(L=1), dict(L=16), dict(L=65), dict(H=1), dict(R=3), dict(R=2, first=False),
    dict(first=False), dict(states=1), dict(states=1, L=9)])
@pytest.mark.parametrize("T", [1, 4, 16, 100])
def test_chunks_equal_the_recurrence(shape, T):
    inputs = operands(**shape)
    exact = everything(trapezoid_ref, inputs)
    for found, right in zip(everything(trapezoid, inputs, T=T), exact, strict=True):
        assert found.shape == right.shape and relative(found, right) < 1e-10


@pytest.mark.parametrize("decay", [0.0, 1e-6, 30.0, 1e4])
def test_weak_and_strong_decay(decay):
    inputs = operands(L=70, decay=decay)
    exact = everything(trapezoid_ref, inputs)
    found = everything(trapezoid, [v.float() for v in inputs])
    assert relative(found[0], exact[0]) < 1e-4 and relative(found[1], exact[1]) < 1e-4
    assert all(v.isfinite().all() for v in found)


def test_gradients_where_strong_and_weak_steps_mix():
    inputs = operands(L=128)
    inputs[1] = torch.where(torch.rand(inputs[1].shape) < 0.5, -30.0, -3e-3).double()
    exact = everything(trapezoid_ref, inputs)
    found = everything(trapezoid, [v.float() for v in inputs])
    for v, right in list(zip(found, exact))[:8]:                     # of h nothing is left
        assert relative(v, right) < 2e-6


def test_gradients_against_differences():
    inputs = [v.requires_grad_() for v in operands(b=1, L=5, R=2, H=1, P=2, N=2)]
    assert torch.autograd.gradcheck(lambda *v: run(trapezoid, v, T=2), inputs)


def test_half_weights_are_of_second_order():
    """h' = -h + x with x = sin t: halving the step divides the error by 4, that of Mamba-2's rule
    by 2."""
    def error(steps, share):
        dt = 2.0 / steps
        t = dt * torch.arange(steps + 1).double()
        x, ones = torch.sin(t).view(1, -1, 1, 1, 1), torch.ones(1, steps + 1, 1).double()
        B = torch.ones(1, steps + 1, 1, 1, 1).double()
        _, h = trapezoid(x, -dt * ones, (1 - share) * dt * ones, share * dt * ones, B, B)
        return abs(h.item() - (math.sin(2) - math.cos(2) + math.exp(-2)) / 2)
    assert 3.8 < error(200, 0.5) / error(400, 0.5) < 4.2
    assert 1.8 < error(200, 1.0) / error(400, 1.0) < 2.2


KINDS = [{}, dict(rope_fraction=1.0), dict(is_mimo=True, mimo_rank=3),
         dict(is_mimo=True, mimo_rank=1)]


def random_layer(d_state=8, **kind):
    torch.manual_seed(0)
    layer = Mamba3(8, d_state, headdim=8, **kind).double()
    for p in layer.parameters():
        p.data = p + 0.5 * torch.randn_like(p)
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_a_complex_state_that_turns(kind):
    """The state of the docstring's formula, with complex numbers for the pairs that rotate."""
    layer, u = random_layer(**kind), torch.randn(2, 9, 8).double()
    R, H, S = layer.rank, 2, layer.n_angles
    z, x, B, C, dt, A, trap, angle = layer.in_proj(u).split(layer.sizes, dim=-1)
    dt, A = F.softplus(dt + layer.dt_bias), -F.softplus(A)
    share, angle = torch.sigmoid(trap), math.pi * torch.tanh(angle)
    x, z = x.view(2, 9, H, 8), z.view(2, 9, H, 8)
    if layer.mimo_x is not None:
        maps = [m.permute(1, 0, 2) for m in (layer.mimo_x, layer.mimo_z, layer.mimo_o)]
    else:
        maps = [torch.ones(1, H, 8).double()] * 3
    B, C = B.view(2, 9, R, 1, 8), C.view(2, 9, R, 1, 8)
    B = F.rms_norm(B, (8,), layer.B_norm.weight, 1e-5) + layer.B_bias.permute(1, 0, 2)
    C = F.rms_norm(C, (8,), layer.C_norm.weight, 1e-5) + layer.C_bias.permute(1, 0, 2)

    def numbers(v):
        """(..., 8): S pairs as complex numbers, and the rest as real ones."""
        pairs = torch.view_as_complex(v[..., :2 * S].unflatten(-1, (S, 2)).contiguous())
        return torch.cat([pairs, v[..., 2 * S:].to(pairs.dtype)], dim=-1)
    B, C = numbers(B), numbers(C)
    h = torch.zeros(2, H, 8, B.shape[-1], dtype=B.dtype)
    written, y = torch.zeros_like(h), []
    for t in range(9):
        turn = torch.zeros(2, H, B.shape[-1]).double()
        turn[..., :S] = angle[:, t, None] * dt[:, t, :, None]
        step = torch.exp(dt[:, t] * A[:, t])[..., None, None] * torch.exp(-1j * turn)[:, :, None]
        weight = dt[:, t, :, None, None] * share[:, t, :, None, None]
        h = step * (h + (dt[:, t, :, None, None] - weight) * written)
        xs = x[:, t, None] * maps[0]                             # (b, R, H, P)
        written = torch.einsum("brhp,brhn->bhpn", xs.to(B.dtype), B[:, t])
        h = h + weight * written
        out = torch.einsum("bhpn,brhn->brhp", h, C[:, t].conj()).real
        out = (out + layer.D[:, None] * xs) * F.silu(z[:, t, None] * maps[1]) * maps[2]
        y.append(out.sum(1).flatten(1))
    right = torch.stack(y, dim=1) @ layer.out_proj.weight.T
    assert relative(layer(u)[0], right) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[], [1], [5, 2, 11], [30]])
def test_layer_in_segments(kind, sizes):
    layer, x = random_layer(**kind), torch.randn(2, 37, 8).double()
    (whole, last), (y, state) = layer(x), in_segments(layer, x, sizes)
    assert relative(y, whole) < 1e-10
    for name in ("h", "B", "x"):
        assert relative(getattr(state, name), getattr(last, name)) < 1e-10
    assert (torch.sin((state.angle - last.angle) / 2).abs() < 1e-10).all()
    assert (last.angle >= 0).all() and (last.angle <= 2 * math.pi).all()


@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("R", [1, 2])
def test_nan_in_one_argument(R, which):
    """One head of x, log_a, before, now, B or C at step 21: the steps before are as without it."""
    torch.manual_seed(0)
    x, B, C = torch.randn(3, 2, 40, R, 2, 4).double()
    before, now, rate = torch.rand(3, 2, 40, 2).double()
    arguments = [x, -rate, before, now, B, C]
    right, _ = trapezoid(*arguments)
    at = (1, 21, 0) if which in (1, 2, 3) else (1, 21, slice(None), 0)
    arguments[which][at] = float("nan")
    y, h = trapezoid(*arguments)
    exact, last = trapezoid_ref(*arguments)
    assert torch.equal(y[0], right[0]) and torch.equal(y[1, :21], right[1, :21])
    assert exact[1, 21].isnan().any() and y[exact.isnan()].isnan().all()
    assert h[last.isnan()].isnan().all() and h[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_causal_and_differentiable(kind):
    layer, x = random_layer(4, **kind), torch.randn(1, 9, 8).double()
    changed = x.clone()
    changed[:, 5:] += 1
    difference = (layer(x)[0] - layer(changed)[0]).abs().amax((0, 2))
    assert (difference[:5] < 1e-12).all() and (difference[5:] > 1e-6).all()
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x[:, :5].clone().requires_grad_())
    layer(x)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_a_turning_state_knows_parity():
    """Weights set by hand: half a turn for a 1. The sign of y is the parity of the ones so far."""
    layer = Mamba3(3, d_state=4, expand=1, headdim=3).double()
    for p in layer.parameters():
        p.data.zero_()
    bit, constant, start = 0, 1, 2                               # the channels of a token
    rows = layer.in_proj.weight.data.split(layer.sizes)
    z, x, _, _, dt, A, trap, angle = rows
    x[:, start] = 1.0                                            # write once, at the start
    z[:, constant] = 1.0
    dt[:, constant] = math.log(math.e - 1)                       # dt = 1
    A[:, constant] = -50.0                                       # almost no decay
    trap[:, constant] = 50.0                                     # lambda = 1
    angle[:, bit] = 100.0                                        # pi tanh(100) for a 1
    layer.B_bias.data[..., 0], layer.C_bias.data[..., 0] = 1.0, 1.0
    layer.out_proj.weight.data.fill_(1.0)

    bits = torch.randint(2, (4, 200), generator=torch.Generator().manual_seed(0)).double()
    tokens = torch.stack([bits, torch.ones(4, 200), torch.zeros(4, 200)], dim=-1)
    tokens[:, 0, bit], tokens[:, 0, start] = 0.0, 1.0
    y, _ = layer(tokens)
    parity = tokens[..., bit].cumsum(1) % 2
    assert (parity == 1).any() and torch.equal((y[..., 0] < 0).double(), parity)


def test_names_and_shapes_are_the_official_ones():
    """mamba_ssm.Mamba3(128, is_mimo=True): 256 channels in 4 heads, 128 states, rank 4, 32
    angles."""
    shapes = {name: tuple(p.shape) for name, p in Mamba3(128, is_mimo=True).state_dict().items()}
    assert shapes == {
        "dt_bias": (4,), "B_bias": (4, 4, 128), "C_bias": (4, 4, 128), "B_norm.weight": (128,),
        "C_norm.weight": (128,), "mimo_x": (4, 4, 64), "mimo_z": (4, 4, 64), "mimo_o": (4, 4, 64),
        "D": (4,), "in_proj.weight": (2 * 256 + 2 * 4 * 128 + 3 * 4 + 32, 128),
        "out_proj.weight": (128, 256)}
    layer = Mamba3(128)
    dt = F.softplus(layer.dt_bias)
    assert (dt >= 0.99e-3).all() and (dt <= 0.101).all()
    assert (layer.B_bias == 1).all() and layer.B_bias.shape == (4, 1, 128)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
def test_half_precision_and_autocast(kind, dtype, tolerance):
    torch.manual_seed(0)
    layer, x = Mamba3(16, 8, headdim=8, **kind), torch.randn(2, 40, 16)
    exact, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
    assert relative(y, exact) < 6e-2 and state.h.dtype == state.angle.dtype == torch.float32
    y, state = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype and relative(y, exact) < tolerance
    assert state.h.dtype == state.angle.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_empty_segments_and_batches(kind):
    layer, x = random_layer(**kind), torch.randn(3, 5, 8).double()
    _, state = layer(x)
    y, same = layer(x[:, :0], state)
    assert y.shape == (3, 0, 8) and same is state
    assert layer(x[:, :0])[0].shape == (3, 0, 8) and layer(x[:0])[0].shape == (0, 5, 8)


@pytest.mark.parametrize("options, sentence", [
    (dict(headdim=10), "headdim is 10"), (dict(headdim=8, d_state=2), "rope_fraction is 0.5"),
    (dict(headdim=8, rope_fraction=2.0), "rope_fraction is 2.0")])
def test_wrong_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Mamba3(8, **options)
