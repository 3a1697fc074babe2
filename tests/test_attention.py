"""Attention against a plain softmax, its cache, and the ways of telling it positions."""

import math

import pytest
import torch

from attention import Attention, LearnedPosition, rotary
from conftest import in_pieces

PIECES = [[], [1, 4], [5], [3, 1, 2], [2, 2, 2, 2]]  # the rest goes one token at a time


def layer_and_input(n_heads, position, L=11, d=8):
    torch.manual_seed(0)
    layer = Attention(d, n_heads, position).double()
    torch.nn.init.normal_(layer.qkv.bias)
    return layer, 2 * torch.randn(3, L, d, dtype=torch.float64)


def turn(v, t):
    """Rotary embedding of one vector at position t, by complex numbers."""
    P = len(v)
    angle = torch.tensor([t * 10000 ** (-2 * j / P) for j in range(P // 2)], dtype=torch.float64)
    z = torch.complex(v[:P // 2], v[P // 2:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag])


def plain_attention(layer, x, position):
    """The definition, one query at a time."""
    y = torch.zeros_like(x)
    P = x.shape[2] // layer.n_heads
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, dim=-1)
    for b in range(x.shape[0]):
        for head in range(layer.n_heads):
            part = slice(head * P, (head + 1) * P)
            for t in range(x.shape[1]):
                place = turn if position == "rope" else lambda vector, _: vector
                scores = torch.stack([place(q[b, t, part], t) @ place(k[b, s, part], s) for s in range(t + 1)])
                y[b, t, part] = torch.softmax(scores / math.sqrt(P), dim=0) @ v[b, :t + 1, part]
    return y @ layer.out_proj.weight.T + layer.out_proj.bias


@pytest.mark.parametrize("position", ["none", "rope"])
@pytest.mark.parametrize("n_heads", [1, 2, 4])
def test_equals_plain_softmax(n_heads, position):
    layer, x = layer_and_input(n_heads, position)
    y, cache = layer(x)
    tolerance = 1e-6 if position == "rope" else 1e-12      # angles are float32
    assert torch.allclose(y, plain_attention(layer, x, position), atol=tolerance, rtol=0)
    assert cache.k.shape == cache.v.shape == (3, n_heads, 11, 8 // n_heads)


def test_rope_scores_depend_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(t, s):
        return (rotary(q, t) * rotary(k, s)).sum().item()
    for distance in (0, 1, 5, 40):
        assert all(math.isclose(score(s + distance, s), score(distance, 0), abs_tol=1e-4) for s in (1, 2, 17, 300))
    assert abs(score(1, 0) - score(0, 0)) > 1e-2 and abs(score(0, 1) - score(1, 0)) > 1e-2


def test_rope_sees_order_and_none_does_not():
    for position, differs in (("rope", True), ("none", False)):
        layer, x = layer_and_input(1, position)
        swapped = x[:, [1, 0, *range(2, 11)]]
        assert (layer(x)[0][:, -1] - layer(swapped)[0][:, -1]).abs().max().gt(1e-4).item() == differs


def test_recency_looks_at_what_is_near():
    torch.manual_seed(0)
    layer = Attention(8, 1, "rope", recency=2.0)
    assert (layer.qkv.bias[:16] == 2).all() and (layer.qkv.bias[16:] != 2).all()
    b = layer.qkv.bias[None, None, None, :8].detach()
    scores = [(rotary(b, t) * b).sum().item() for t in range(4)]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("position", ["none", "rope"])
@pytest.mark.parametrize("sizes", PIECES)
def test_pieces_equal_one_call(position, sizes):
    layer, x = layer_and_input(2, position)
    y, cache = layer(x)
    y_pieces, cache_pieces = in_pieces(layer, x, sizes)
    assert torch.allclose(y, y_pieces, atol=1e-12)
    assert torch.allclose(cache.k, cache_pieces.k, atol=1e-12) and torch.allclose(cache.v, cache_pieces.v, atol=1e-12)


@pytest.mark.parametrize("position", ["none", "rope"])
@pytest.mark.parametrize("queries", [1, 3, 5])
@pytest.mark.parametrize("seen", [0, 4])
def test_last_queries_alone(position, queries, seen):
    layer, x = layer_and_input(2, position)
    state = layer(x[:, :seen])[1] if seen else None
    y, cache = layer(x[:, seen:seen + 5], state)
    y_last, cache_last = layer(x[:, seen:seen + 5], state, queries)
    assert y_last.shape[1] == queries and torch.allclose(y[:, -queries:], y_last, atol=1e-12)
    assert torch.equal(cache.k, cache_last.k) and torch.equal(cache.v, cache_last.v)


@pytest.mark.parametrize("position", ["none", "rope"])
def test_causal(position):
    layer, x = layer_and_input(2, position)
    changed = x.clone()
    changed[:, 6:] += 1
    difference = (layer(x)[0] - layer(changed)[0]).abs().amax((0, 2))
    assert (difference[:6] == 0).all() and (difference[6:] > 1e-6).all()


@pytest.mark.parametrize("arguments, sentence", [
    ((8, 3), "number of heads, 3"), ((8, 0), "number of heads, 0"), ((8, -1), "number of heads, -1"), ((6, 2, "rope"), "odd size 3"),
    ((7, 1, "rope"), "odd size 7"), ((8, 1, "learned"), "position is 'learned'")])
def test_wrong_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Attention(*arguments)


def test_odd_heads_need_no_rope():
    assert Attention(6, 2)(torch.zeros(1, 2, 6))[0].shape == (1, 2, 6)


def test_grouped_heads_are_heads_whose_keys_and_values_agree():
    torch.manual_seed(0)
    grouped, full, x = Attention(8, 4, "rope", kv_heads=2), Attention(8, 4, "rope"), torch.randn(2, 7, 8)
    rows = [*range(8), *[8 + p for g in (0, 0, 1, 1) for p in (2 * g, 2 * g + 1)],
            *[12 + p for g in (0, 0, 1, 1) for p in (2 * g, 2 * g + 1)]]
    full.load_state_dict({"qkv.weight": grouped.qkv.weight[rows], "qkv.bias": grouped.qkv.bias[rows],
                          "out_proj.weight": grouped.out_proj.weight, "out_proj.bias": grouped.out_proj.bias})
    (y, cache), (same, _) = grouped(x), full(x)
    assert torch.allclose(y, same, atol=1e-6) and cache.k.shape == cache.v.shape == (2, 2, 7, 2)
    for kv_heads in (3, 0):
        with pytest.raises(ValueError, match=f"kv_heads is {kv_heads}"):
            Attention(8, 4, kv_heads=kv_heads)


@pytest.mark.parametrize("position", ["none", "rope"])
@pytest.mark.parametrize("window", [1, 3, 20])
def test_sliding_window(window, position):
    torch.manual_seed(0)
    layer, x = Attention(8, 2, position, window=window).double(), torch.randn(3, 11, 8).double()
    whole, cache = layer(x)
    for t in range(11):                                        # a token's output is that of the window alone
        seen = x[:, max(0, t - window + 1):t + 1]
        assert torch.allclose(layer(seen)[0][:, -1], whole[:, t], atol=1e-6)
    assert torch.allclose(layer(x, queries=2)[0], whole[:, -2:], atol=1e-6)
    for sizes in PIECES:
        y, state = in_pieces(layer, x, sizes)
        assert torch.allclose(y, whole, atol=1e-6) and state.k.shape[2] == min(11, window - 1) == cache.k.shape[2]


@pytest.mark.parametrize("sizes", PIECES)
def test_learned_position(sizes):
    layer, x = LearnedPosition(8, 11), torch.randn(3, 11, 8)
    y, count = layer(x)
    assert torch.equal(y, layer.table[None]) and count == 11
    y_pieces, count = in_pieces(layer, x, sizes)
    assert torch.equal(y, y_pieces) and count == 11
    with pytest.raises(ValueError, match="sequence of 12 tokens is longer than the table of 11"):
        layer(x[:, :1], count)
    with pytest.raises(ValueError, match="sequence of 12 tokens"):
        layer(torch.zeros(1, 12, 8))
    layer.reach(10)
    assert layer.table.shape == (11, 8)
    layer.reach(40)
    longer, _ = layer(torch.zeros(1, 40, 8))
    assert torch.equal(longer[:, :11], y) and 0.05 < longer[0, 11:].norm(dim=1).mean() < 0.15
