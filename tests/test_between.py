"""family/between.py: each layer against its formula, written one token at a time."""

import pytest
import torch
import torch.nn.functional as F

from family.between import Mamba2Shared, MambaOwn, main
from family.mamba2 import Mamba2
from mamba import Mamba


def filtered(layer, inputs):
    """The depthwise causal convolution and SiLU of inputs (L, channels), tap by tap."""
    taps = layer.conv1d.weight[:, 0]                                     # (channels, 4)
    y = layer.conv1d.bias + torch.zeros_like(inputs)
    for t in range(len(inputs)):
        for k in range(4):
            if t - k >= 0:
                y[t] += taps[:, 3 - k] * inputs[t - k]
    return F.silu(y)


def sequence(d=4, L=9):
    torch.manual_seed(0)
    return torch.randn(1, L, d).double()


def test_mamba_own():
    u, layer = sequence(), MambaOwn(4, d_state=3).double()
    xBC, z = layer.in_proj(u[0]).split([14, 8], dim=-1)                  # 8 channels, B and C of 3
    x, B, C = filtered(layer, xBC).split([8, 3, 3], dim=-1)
    h, y = torch.zeros(8, 3).double(), []
    for t in range(9):
        dt = F.softplus(layer.dt_proj(layer.x_proj(x[t])))               # (8,)
        h = torch.exp(-dt[:, None] * layer.A_log.exp()) * h + torch.outer(dt * x[t], B[t])
        y.append((h @ C[t] + layer.D * x[t]) * F.silu(z[t]))
    found, state = layer(u)
    assert torch.allclose(found[0], layer.out_proj(torch.stack(y)), atol=1e-12)
    assert torch.allclose(state.h[0], h, atol=1e-12) and state.conv.shape == (1, 14, 3)


def test_mamba2_shared():
    u, layer = sequence(), Mamba2Shared(4, d_state=3, headdim=4).double()
    z, x, dt = layer.in_proj(u[0]).split([8, 8, 2], dim=-1)
    x, dt = filtered(layer, x), F.softplus(dt + layer.dt_bias)           # (9, 8), (9, 2)
    B, C = layer.x_proj(x).split(3, dim=-1)
    h, y = torch.zeros(2, 4, 3).double(), []
    for t in range(9):
        x_t = x[t].view(2, 4)
        for head in range(2):
            decay = torch.exp(-dt[t, head] * layer.A_log[head].exp())
            h[head] = decay * h[head] + dt[t, head] * torch.outer(x_t[head], B[t])
        y_t = (h @ C[t] + layer.D[:, None] * x_t).flatten() * F.silu(z[t])
        y.append(y_t / torch.sqrt(y_t.square().mean() + 1e-5) * layer.norm.weight)
    found, state = layer(u)
    assert torch.allclose(found[0], layer.out_proj(torch.stack(y)), atol=1e-12)
    assert torch.allclose(state.h[0], h, atol=1e-12) and state.conv.shape == (1, 8, 3)


@pytest.mark.parametrize("layer, original", [
    (MambaOwn(8, 16), Mamba(8, 16)), (Mamba2Shared(8, 16, headdim=8), Mamba2(8, 16, headdim=8))])
def test_their_states_are_as_large_as_the_originals(layer, original):
    assert layer(sequence(8).float())[1].h.shape == original(sequence(8).float())[1].h.shape


def test_demo(capsys):
    main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(float(line.split()[-1]) < 1e-5 for line in lines)
