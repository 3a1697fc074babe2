"""family/ladder.py: each layer against its definition, written out another way."""

import pytest
import torch
import torch.nn.functional as F

from conftest import relative
from family.ladder import LTI, RGLRU, RNN, Retention, ShortConv

LAYERS = [ShortConv, RNN, LTI, Retention, RGLRU]


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def test_rnn_is_torchs():
    layer, x, h = RNN(6, n=5), torch.randn(2, 9, 6), torch.randn(2, 5)
    same = torch.nn.RNN(6, 5, batch_first=True)
    same.weight_ih_l0.data, same.bias_ih_l0.data = layer.B.weight.detach(), layer.B.bias.detach()
    same.weight_hh_l0.data, same.bias_hh_l0.data = layer.A.weight.detach(), torch.zeros(5)
    y, last = layer(x, h)
    hs, end = same(x, h[None])
    assert relative(y, layer.C(hs)) < 1e-6 and relative(last, end[0]) < 1e-6


@pytest.mark.parametrize("L", [1, 2, 50])
def test_lti_convolution_is_its_recurrence(L):
    layer = LTI(6, d_state=4).double()
    x = torch.randn(2, L, 6).double().requires_grad_()
    h = torch.randn(2, 6, 4).double().requires_grad_()
    found = []
    for form in layer.recur, layer.convolve:
        y, last = form(x, h)
        loss = (y * torch.arange(y.numel()).view_as(y)).sum() + last.square().sum()
        inputs = (x, h, layer.A_log, layer.dt_log, layer.B, layer.C)
        found.append([y, last, *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*found):
        assert relative(a, b) < 1e-9


def test_lti_step_solves_the_differential_equation():
    layer, x = LTI(1, d_state=3).double(), torch.tensor([[[0.7]]]).double()
    h, steps = torch.randn(1, 1, 3).double(), 20000
    dt = float(layer.dt_log.detach().exp())
    by_hand = h.clone()
    for _ in range(steps):                                     # Euler's rule on h' = A h + B x
        by_hand += dt / steps * (-layer.A_log.exp() * by_hand + layer.B * x[0, 0, 0])
    assert relative(layer.recur(x, h)[1], by_hand) < 1e-5


def test_retention_is_attention_with_a_decay():
    layer, x = Retention(8, n_heads=2).double(), torch.randn(2, 37, 8).double()
    y, S = layer(x)
    qkv = layer.qkv(x).chunk(3, dim=-1)
    q, k, v = (u.view(2, 37, 2, 4).transpose(1, 2) for u in qkv)         # (b, H, L, P)
    t = torch.arange(37)
    gamma = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6]).double()
    D = (gamma[:, None, None] ** (t[:, None] - t)).tril()                # equation 5
    r = (q @ k.mT / 2 * D) @ v
    r = F.rms_norm(r, (4,), eps=1e-5).transpose(1, 2).flatten(2)
    assert relative(y, layer.out_proj(F.silu(layer.gate(x)) * r)) < 1e-12
    last = torch.einsum("bhlp,bhln->bhpn", v * D[:, -1][..., None], k / 2)
    assert relative(S, last) < 1e-12


def test_rglru_is_its_three_equations():
    layer, x = RGLRU(6).double(), torch.randn(2, 11, 6).double()
    y, (window, last) = layer(x)
    u, z = layer.in_proj(x).chunk(2, dim=-1)
    assert torch.equal(window, u[:, -3:].mT)
    u = F.conv1d(F.pad(u.mT, (3, 0)), *layer.conv1d.parameters(), groups=u.shape[2]).mT
    r, i = torch.sigmoid(layer.gates(u)).chunk(2, dim=-1)
    h, hs = torch.zeros(2, 6).double(), []
    for t in range(11):
        a = torch.sigmoid(layer.a_logit) ** (8 * r[:, t])
        h = a * h + torch.sqrt(1 - a**2) * i[:, t] * u[:, t]
        hs.append(h)
    assert relative(y, layer.out_proj(F.gelu(z) * torch.stack(hs, dim=1))) < 1e-9
    assert relative(last[..., 0], h) < 1e-9
    decay = torch.sigmoid(layer.a_logit) ** 8
    assert (decay > 0.89).all() and (decay < 0.9991).all()


def test_rglru_with_gates_that_are_shut():
    layer, x = RGLRU(6), torch.randn(2, 11, 6, requires_grad=True)
    torch.nn.init.constant_(layer.gates.bias, -200.0)    # r = 0: nothing decays or comes in
    y, (_, h) = layer(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and (h.abs() < 1e-5).all()


def test_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="d is 6"):
        Retention(6)


def test_short_conv_is_a_weighted_sum_of_the_last_tokens():
    layer, x = ShortConv(3).double(), torch.randn(2, 7, 3).double()
    w, y = layer.conv1d.weight, torch.zeros(2, 7, 3).double()
    for t in range(7):
        for back in range(min(4, t + 1)):
            y[:, t] += w[:, 0, 3 - back] * x[:, t - back]
    found, state = layer(x)
    assert relative(found, y + layer.conv1d.bias) < 1e-12
    assert torch.equal(state, x[:, -3:].mT)
    assert sum(p.numel() for p in layer.parameters()) == 3 * 4 + 3


def test_rnn_starts_orthogonal():
    A = RNN(6, n=5).A.weight
    assert torch.allclose(A @ A.T, torch.eye(5), atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sizes", [[], [1], [5, 2, 11], [30]])
def test_segments_equal_one_call(kind, sizes):
    layer, x = kind(8).double(), torch.randn(2, 37, 8).double()
    whole, last = layer(x)
    y, state = [], None
    for segment in x.split([*sizes, *[1] * (37 - sum(sizes))], dim=1):
        out, state = layer(segment, state)
        y.append(out)
    assert relative(torch.cat(y, dim=1), whole) < 1e-10
    flat = lambda s: torch.cat([v.flatten() for v in s]) if isinstance(s, tuple) else s
    assert relative(flat(state), flat(last)) < 1e-10


@pytest.mark.parametrize("kind", LAYERS)
def test_a_state_of_another_dtype(kind):
    """A context in bfloat16 or float32, then decoding in float64: the state is converted."""
    layer, x = kind(8), torch.randn(2, 9, 8)
    state = layer(x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(x)[1]
    y, _ = layer(x[:, :1], narrow)
    assert y.dtype == torch.float32 and relative(y, layer(x[:, :1], state)[0]) < 0.05
    y, _ = layer.double()(x[:, :2].double(), state)
    assert y.dtype == torch.float64


def test_the_transform_gets_float32_under_autocast(monkeypatch):
    """CUDA has none of bfloat16, and there autocast does not convert its arguments."""
    seen, rfft = [], torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda v, n: seen.append(v.dtype) or rfft(v, n))
    with torch.autocast("cpu", torch.bfloat16):
        LTI(8)(torch.randn(2, 9, 8))
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("kind", LAYERS)
def test_causal_and_differentiable(kind):
    layer, x = kind(4).double(), torch.randn(1, 9, 4).double()
    changed = x.clone()
    changed[:, 5:] += 1
    difference = (layer(x)[0] - layer(changed)[0]).abs().amax((0, 2))
    assert (difference[:5] < 1e-12).all() and (difference[5:] > 1e-6).all()
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x.requires_grad_())


@pytest.mark.parametrize("kind", LAYERS)
def test_empty_segments(kind):
    layer, x = kind(8), torch.randn(3, 5, 8)
    assert layer(x[:, :0])[0].shape == (3, 0, 8)
    y, state = layer(x)
    empty, same = layer(x[:, :0], state)
    assert empty.shape == (3, 0, 8) and same is state


@pytest.mark.parametrize("kind", [ShortConv, RNN, LTI, Retention])
def test_empty_batches(kind):
    layer, x = kind(8), torch.randn(0, 5, 8)
    y, state = layer(x)
    assert y.shape == (0, 5, 8) and layer(x, state)[0].shape == (0, 5, 8)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("kind", LAYERS)
def test_half_precision(kind, dtype, tolerance):
    layer, x = kind(8), torch.randn(2, 20, 8)
    exact, _ = layer(x)
    half = layer.to(dtype)
    y, _ = half(x.to(dtype))
    assert y.dtype == dtype and relative(y, exact) < tolerance


def test_rglru_in_float16_with_gates_almost_shut():
    layer = RGLRU(6).half()
    torch.nn.init.constant_(layer.gates.bias, -20.0)
    y, (_, h) = layer(torch.randn(2, 11, 6).half())
    assert y.isfinite().all() and h.isfinite().all()


def test_a_module_built_without_memory_has_its_decays():
    """Retention computes them; a buffer would hold what memory held after to_empty."""
    layer, x = Retention(8), torch.randn(2, 20, 8)
    with torch.device("meta"):
        empty = Retention(8)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x)[0], layer(x)[0])
