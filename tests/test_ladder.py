"""ladder.py: each layer against its definition, written out another way."""

import pytest
import torch
import torch.nn.functional as F

from conftest import relative
from ladder import LTI, RGLRU, RNN, Retention


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def test_rnn_is_torchs():
    layer, x, h = RNN(6, n=5), torch.randn(2, 9, 6), torch.randn(2, 5)
    same = torch.nn.RNN(6, 5, batch_first=True)
    for name, value in [("weight_ih_l0", layer.B.weight), ("bias_ih_l0", layer.B.bias), ("weight_hh_l0", layer.A.weight),
                        ("bias_hh_l0", torch.zeros(5))]:
        getattr(same, name).data = value.detach()
    y, last = layer(x, h)
    hs, end = same(x, h[None])
    assert relative(y, layer.C(hs)) < 1e-6 and relative(last, end[0]) < 1e-6


@pytest.mark.parametrize("L", [1, 2, 50])
def test_lti_convolution_is_its_recurrence(L):
    layer, x, h = LTI(6, d_state=4).double(), torch.randn(2, L, 6).double(), torch.randn(2, 6, 4).double()
    x.requires_grad_(), h.requires_grad_()
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
    q, k, v = (u.view(2, 37, 2, 4).transpose(1, 2) for u in layer.qkv(x).chunk(3, dim=-1))            # (b, H, L, P)
    t = torch.arange(37)
    gamma = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6]).double()
    D = (gamma[:, None, None] ** (t[:, None] - t)).tril()                                             # equation 5
    r = (q @ k.mT / 2 * D) @ v
    r = F.rms_norm(r, (4,), eps=1e-5).transpose(1, 2).flatten(2)
    assert relative(y, layer.out_proj(F.silu(layer.gate(x)) * r)) < 1e-6                               # log_gamma is float32
    last = torch.einsum("bhlp,bhln->bhpn", v * D[:, -1][..., None], k / 2)
    assert relative(S, last) < 1e-6


def test_rglru_is_its_three_equations():
    layer, x = RGLRU(6).double(), torch.randn(2, 11, 6).double()
    y, (window, last) = layer(x)
    u, z = layer.in_proj(x).chunk(2, dim=-1)
    assert torch.equal(window, u[:, -3:].mT)
    u = layer.conv1d(F.pad(u.mT, (3, 0))).mT
    r, i = torch.sigmoid(layer.gates(u)).chunk(2, dim=-1)
    h, hs = torch.zeros(2, 6).double(), []
    for t in range(11):
        a = torch.sigmoid(layer.a_logit) ** (8 * r[:, t])
        h = a * h + torch.sqrt(1 - a**2) * i[:, t] * u[:, t]
        hs.append(h)
    assert relative(y, layer.out_proj(F.gelu(z) * torch.stack(hs, dim=1))) < 1e-9 and relative(last[..., 0], h) < 1e-9
    decay = torch.sigmoid(layer.a_logit) ** 8
    assert (decay > 0.89).all() and (decay < 0.9991).all()


def test_rglru_with_gates_that_are_shut():
    layer, x = RGLRU(6), torch.randn(2, 11, 6, requires_grad=True)
    torch.nn.init.constant_(layer.gates.bias, -200.0)          # r = 0: nothing decays, and nothing comes in
    y, (_, h) = layer(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and (h.abs() < 1e-5).all()


def test_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="d is 6"):
        Retention(6)
