"""family/decay_attention.py: scores with a decay against their formula, and the cache."""

import numpy as np
import pytest
import torch

from conftest import in_segments, relative
from family.decay_attention import DecayAttention


BOTH = pytest.mark.parametrize("decay", ["alibi", "forgetting"])


def layer_and_input(decay, n_heads=2, L=13):
    torch.manual_seed(0)
    return DecayAttention(8, n_heads, decay).double(), 2 * torch.randn(3, L, 8).double()


@BOTH
@pytest.mark.parametrize("n_heads", [1, 2, 4])
def test_equals_the_formula(decay, n_heads):
    layer, x = layer_and_input(decay, n_heads)
    P = 8 // n_heads
    qkv = (x @ layer.qkv.weight.T + layer.qkv.bias).detach().numpy()
    if decay == "forgetting":
        gates = (x @ layer.f_proj.weight.T + layer.f_proj.bias).detach().numpy()
        f = 1 / (1 + np.exp(-gates))                             # (B, L, H)
    y = np.zeros((3, 13, 8))
    for b in range(3):
        for h in range(n_heads):
            part = slice(h * P, (h + 1) * P)
            q, k, v = qkv[b, :, :8][:, part], qkv[b, :, 8:16][:, part], qkv[b, :, 16:][:, part]
            for t in range(13):
                scores = k[:t + 1] @ q[t] / np.sqrt(P)
                for s in range(t + 1):
                    if decay == "forgetting":
                        scores[s] += np.log(np.prod(f[b, s + 1:t + 1, h]))
                    else:
                        scores[s] -= 2 ** (-8 * (h + 1) / n_heads) * (t - s)
                w = np.exp(scores - scores.max())
                y[b, t, part] = w / w.sum() @ v[:t + 1]
    right = torch.tensor(y) @ layer.out_proj.weight.T + layer.out_proj.bias
    assert relative(layer(x)[0], right) < 1e-12


@BOTH
@pytest.mark.parametrize("sizes", [[], [1, 4], [5], [3, 1, 2], [12]])
def test_segments_equal_one_call(decay, sizes):
    layer, x = layer_and_input(decay)
    (whole, last), (y, state) = layer(x), in_segments(layer, x, sizes)
    assert relative(y, whole) < 1e-12
    for a, b in zip(state, last):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-12)
    assert last.decay.shape == (3, 2, 13) and (last.decay[..., -1] == 0).all()


@BOTH
@pytest.mark.parametrize("seen", [0, 4])
def test_last_token_alone(decay, seen):
    layer, x = layer_and_input(decay)
    state = layer(x[:, :seen])[1] if seen else None
    y, _ = layer(x[:, seen:], state)
    last, _ = layer(x[:, seen:], state, last_only=True)
    assert last.shape == (3, 1, 8) and relative(last, y[:, -1:]) < 1e-12


@BOTH
def test_causal_and_differentiable(decay):
    layer, x = layer_and_input(decay, L=9)
    changed = x.clone()
    changed[:, 5:] += 1
    difference = (layer(x)[0] - layer(changed)[0]).abs().amax((0, 2))
    assert (difference[:5] == 0).all() and (difference[5:] > 1e-6).all()
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x[:1, :5].clone().requires_grad_())
    layer(x)[0].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def test_a_shut_gate_hides_everything_before():
    layer, x = layer_and_input("forgetting")
    layer.f_proj.weight.data.zero_()
    layer.f_proj.bias.data.fill_(-1000.0)
    _, _, v = layer.qkv(x).chunk(3, dim=-1)
    assert relative(layer(x)[0], layer.out_proj(v)) < 1e-12


@BOTH
def test_decay_after_a_long_context_keeps_its_digits(decay):
    """The decay between two neighbours in float32, 200 segments of 500 tokens on."""
    torch.manual_seed(0)
    layer, x = DecayAttention(4, 1, decay), torch.randn(1, 500, 4)
    state = None
    for _ in range(200):
        _, state = layer(x, state, last_only=True)
    exact = layer.log_f(x)[0, 0, -1]
    assert state.decay[0, 0, -1] == 0 and torch.allclose(state.decay[0, 0, -2], exact, rtol=1e-3)


@BOTH
def test_cache_holds_only_what_it_shows(decay):
    layer, state = DecayAttention(64, 4, decay), None
    for L in (100, 1, 5):
        _, state = layer(torch.randn(1, L, 64), state)
        held = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in state}
        assert sum(held.values()) == sum(v.numel() * v.element_size() for v in state)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(decay, dtype):
    torch.manual_seed(0)
    layer, x = DecayAttention(16, 2, decay), torch.randn(2, 40, 16)
    exact, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
    assert relative(y, exact) < 3e-2 and state.decay.dtype == torch.float32
    y, state = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype and relative(y, exact) < 3e-2 and state.decay.dtype == torch.float32


@BOTH
def test_empty_segments_and_batches(decay):
    layer, x = layer_and_input(decay)
    _, state = layer(x)
    y, same = layer(x[:, :0], state)
    assert y.shape == (3, 0, 8) and same is state
    assert layer(x[:, :0])[0].shape == (3, 0, 8) and layer(x[:0])[0].shape == (0, 13, 8)


@pytest.mark.parametrize("arguments, sentence", [
    ((8, 3), "n-heads is 3"), ((8, 0), "n-heads is 0"), ((8, 1, "rope"), "decay is 'rope'")])
def test_wrong_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        DecayAttention(*arguments)


@BOTH
def test_long_sums_of_decays_keep_their_digits(decay):
    """Summed in float32, scores of 1,500 tokens were off by 1e-5."""
    layer, x = layer_and_input(decay, L=1500)
    exact, _ = layer(x)
    y, cache = layer.float()(x.float())
    assert relative(y, exact) < 1e-6 and cache.decay.dtype == torch.float32
