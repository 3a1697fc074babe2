"""The rungs of linear attention: each against its recurrence, written out."""

import math

import pytest
import torch
from conftest import in_segments, relative

from family.linear_attention import LinearAttention, additive_rule
from hybrid import build_layer

RUNGS = ["linear-fixed", "linear-decay", "gated-deltanet", "linear-rotation"]
WORDS = RUNGS + [f"{word}-noconv" for word in RUNGS]


def by_hand(layer, x, rung):
    """The rung as the file's docstring has it, a token at a time."""
    qkv = layer.qkv(x)
    if layer.taps > 1:
        padded = torch.cat([x.new_zeros(len(x), 3, qkv.shape[2]), qkv], dim=1)
        w = layer.conv1d.weight[:, 0]
        qkv = sum(padded[:, k:k + x.shape[1]] * w[:, k] for k in range(4)) + layer.conv1d.bias
    q, k, v = torch.nn.functional.silu(qkv).split(layer.sizes, dim=-1)
    S, angle, y = x.new_zeros(len(x), v.shape[2], q.shape[2]), 0.0, []
    for t in range(x.shape[1]):
        q_t, k_t = (u[:, t] / u[:, t].norm(dim=-1, keepdim=True) for u in (q, k))
        if rung == "linear-rotation":
            dt = torch.nn.functional.softplus(layer.a_proj(x[:, t]) + layer.dt_bias)
            angle = angle + math.pi * torch.tanh(layer.angle_proj(x[:, t])) * dt
            turn = torch.complex(angle.cos(), angle.sin())
            q_t, k_t = (torch.view_as_real(torch.view_as_complex(u.unflatten(-1, (-1, 2))) * turn)
                        .flatten(-2) for u in (q_t, k_t))
        a = 1 - 2**-5
        if rung != "linear-fixed":
            dt = torch.nn.functional.softplus(layer.a_proj(x[:, t]) + layer.dt_bias)
            a = torch.exp(-torch.exp(layer.A_log) * dt)[..., None]
        S = a * S
        old = 0.0
        if rung in ("gated-deltanet", "linear-rotation"):
            old = (S @ k_t[..., None])[..., 0]
        u = torch.sigmoid(layer.b_proj(x[:, t])) * (v[:, t] - old)
        S = S + u[..., None] * k_t[:, None]
        y_t = (S @ q_t[..., None])[..., 0] / 4
        y_t = y_t / (y_t.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.o_norm
        y.append(layer.o_proj(y_t * torch.nn.functional.silu(layer.g_proj(x[:, t]))))
    return torch.stack(y, dim=1)


@pytest.mark.parametrize("word", WORDS)
def test_the_recurrence(word):
    torch.manual_seed(0)
    layer = build_layer(word, 8, 64).double()
    x = torch.randn(2, 40, 8, dtype=torch.float64)
    expected = by_hand(layer, x, word.removesuffix("-noconv"))
    assert relative(layer(x)[0], expected) < 1e-5            # the eps in the length of q and k


@pytest.mark.parametrize("word", WORDS)
def test_segments(word):
    torch.manual_seed(0)
    layer = build_layer(word, 8, 64).double()
    x = torch.randn(2, 40, 8, dtype=torch.float64)
    assert relative(in_segments(layer, x, [17, 20])[0], layer(x)[0]) < 1e-12


def test_the_additive_rule_is_a_sum_and_the_fixed_decay_is_the_same_for_every_token():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 20, 2, 4, dtype=torch.float64)
    beta, log_a = torch.rand(2, 1, 20, 2, dtype=torch.float64)
    y, S = additive_rule(q, k, v, beta, -log_a)
    expected = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    for t in range(20):
        written = beta[:, t, :, None, None] * v[:, t, ..., None] * k[:, t, :, None]
        expected = torch.exp(-log_a[:, t])[..., None, None] * expected + written
        assert relative(y[:, t], (expected @ q[:, t, ..., None])[..., 0]) < 1e-12
    assert relative(S, expected) < 1e-12
    layer = LinearAttention(8, n_heads=2, fixed_decay=True)
    decays = torch.exp(layer.log_decay(torch.randn(1, 3, 8)))
    assert torch.allclose(decays, torch.tensor([1 - 2**-5, 1 - 2**-6]).expand(1, 3, 2))


def test_rotation_needs_a_decay_per_token():
    with pytest.raises(ValueError, match="rotation needs a decay per token"):
        LinearAttention(8, fixed_decay=True, rotation=True)
    with pytest.raises(ValueError, match="--d-state is 1"):
        LinearAttention(8, d_state=1, rotation=True)


def test_a_fixed_decay_is_exact_in_float64():
    layer = LinearAttention(8, n_heads=2, fixed_decay=True).double()
    decay = layer.log_decay(torch.zeros(1, 1, 8).double()).exp()[0, 0]
    assert torch.allclose(decay, 1 - 2.0 ** -torch.tensor([5.0, 6.0]).double(), rtol=1e-15, atol=0)


def test_angles_are_not_rounded_to_bfloat16():
    """Near 2 pi, bfloat16 numbers are 0.03 apart."""
    torch.manual_seed(0)
    layer = LinearAttention(8, rotation=True)
    x, q, k = torch.randn(1, 40, 8), torch.randn(1, 40, 1, 16).bfloat16(), torch.randn(1, 40, 1, 16)
    found, _, _ = layer.rotated(q, k, x, None)
    exact, _, _ = layer.double().rotated(q.double(), k.double(), x.double(), None)
    assert (found - exact).abs().max() < 1e-5
