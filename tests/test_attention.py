"""Attention against its formula, its cache, and the ways to tell it positions."""

import math

import pytest
import torch

from attention import Attention, KVCache, LearnedPosition, rotary
from conftest import in_segments
from family.attention_variants import GroupedAttention, RotaryVariant, SlidingWindow
from hybrid import build_layer, build_model

SEGMENTS = [[], [1, 4], [5], [3, 1, 2], [2, 2, 2, 2]]  # the rest goes one token at a time


def layer_and_input(n_heads=2, position="none", L=11, d=8, **options):
    torch.manual_seed(0)
    layer = Attention(d, n_heads, position, **options).double()
    torch.nn.init.normal_(layer.qkv.bias)
    return layer, 2 * torch.randn(3, L, d, dtype=torch.float64)


def turn(v, t):
    """Rotary embedding of one vector at position t, by complex numbers."""
    P = len(v)
    angle = torch.tensor([t * 10000 ** (-2 * j / P) for j in range(P // 2)], dtype=torch.float64)
    z = torch.complex(v[:P // 2], v[P // 2:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag])


def formula(layer, x, position):
    """The definition, one query at a time."""
    y = torch.zeros_like(x)
    P = x.shape[2] // layer.n_heads
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, dim=-1)
    place = turn if position == "rope" else lambda vector, _: vector
    for b in range(x.shape[0]):
        for head in range(layer.n_heads):
            part = slice(head * P, (head + 1) * P)
            for t in range(x.shape[1]):
                query = place(q[b, t, part], t)
                scores = torch.stack([query @ place(k[b, s, part], s) for s in range(t + 1)])
                weights = torch.softmax(scores / math.sqrt(P), dim=0)
                y[b, t, part] = weights @ v[b, :t + 1, part]
    return y @ layer.out_proj.weight.T + layer.out_proj.bias


@pytest.mark.parametrize("position", ["none", "rope"])
@pytest.mark.parametrize("n_heads", [1, 2, 4])
def test_equals_the_formula(n_heads, position):
    layer, x = layer_and_input(n_heads, position)
    y, cache = layer(x)
    assert torch.allclose(y, formula(layer, x, position), atol=1e-12, rtol=0)
    assert cache.k.shape == cache.v.shape == (3, n_heads, 11, 8 // n_heads)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_rope_scores_depend_on_distance_only(dtype, tolerance):
    """The same pair at distance 5, from the start of a sequence to ten million tokens on."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)
    scores = []
    for s in (0, 1, 300, 65_536, 10**6, 10**7):
        scores.append((rotary(q.to(dtype), s + 5) * rotary(k.to(dtype), s)).sum().item())
    assert max(scores) - min(scores) < tolerance * q.norm() * k.norm(), scores
    assert abs(scores[0] - (rotary(q, 0) * rotary(k, 0)).sum()) > 1e-2
    assert abs(scores[0] - (rotary(q, 0) * rotary(k, 5)).sum()) > 1e-2


def test_rope_tells_neighbours_apart_however_far():
    x = torch.ones(1, 1, 2, 8)
    near, far = rotary(x, 2**24)[0, 0]
    assert (near - far).norm() > 0.5       # one unit of angle in the fastest pair of channels


def test_rope_sees_order_and_none_does_not():
    for position, differs in (("rope", True), ("none", False)):
        layer, x = layer_and_input(1, position)
        swapped = x[:, [1, 0, *range(2, 11)]]
        change = (layer(x)[0][:, -1] - layer(swapped)[0][:, -1]).abs().max()
        assert (change > 1e-4) == differs


def test_recency_looks_at_what_is_near():
    torch.manual_seed(0)
    layer = Attention(8, 1, "rope", recency=2.0)
    assert (layer.qkv.bias[:16] == 2).all() and (layer.qkv.bias[16:] != 2).all()
    b = layer.qkv.bias[None, None, None, :8].detach()
    scores = [(rotary(b, t) * b).sum().item() for t in range(4)]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("position", ["none", "rope"])
@pytest.mark.parametrize("sizes", SEGMENTS)
def test_segments_equal_one_call(position, sizes):
    layer, x = layer_and_input(2, position)
    y, cache = layer(x)
    y_segments, last = in_segments(layer, x, sizes)
    assert torch.allclose(y, y_segments, atol=1e-12)
    assert torch.allclose(cache.k, last.k, atol=1e-12)
    assert torch.allclose(cache.v, last.v, atol=1e-12)


@pytest.mark.parametrize("position", ["none", "rope"])
@pytest.mark.parametrize("seen", [0, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_last_token_alone(position, seen, window):
    layer, x = layer_and_input(2, position)
    if window:
        layer = SlidingWindow(8, 2, window, position).double()
    state = layer(x[:, :seen])[1] if seen else None
    y, cache = layer(x[:, seen:seen + 5], state)
    y_last, cache_last = layer(x[:, seen:seen + 5], state, last_only=True)
    assert y_last.shape == (3, 1, 8) and torch.allclose(y[:, -1:], y_last, atol=1e-12)
    assert torch.equal(cache.k, cache_last.k) and torch.equal(cache.v, cache_last.v)


@pytest.mark.parametrize("position", ["none", "rope"])
def test_causal(position):
    layer, x = layer_and_input(2, position)
    changed = x.clone()
    changed[:, 6:] += 1
    difference = (layer(x)[0] - layer(changed)[0]).abs().amax((0, 2))
    assert (difference[:6] == 0).all() and (difference[6:] > 1e-6).all()


def held(state):
    """Bytes of memory that a state keeps alive: each storage once."""
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in state}
    return sum(storages.values())


@pytest.mark.parametrize("position", ["none", "rope"])
@pytest.mark.parametrize("build", [
    lambda position: Attention(64, 4, position), lambda position: SlidingWindow(64, 4, 9, position),
    lambda position: GroupedAttention(64, 4, 2, position)], ids=["plain", "window", "grouped"])
def test_cache_holds_only_what_it_shows(build, position):
    layer, state = build(position), None
    for L in (100, 1, 5):
        _, state = layer(torch.randn(1, L, 64), state)
        assert held(state) == sum(v.numel() * v.element_size() for v in state)


@pytest.mark.parametrize("L", [1, 3])
def test_cache_of_a_short_first_segment(L):
    _, state = Attention(8)(torch.randn(1, L, 8))
    assert held(state) == 2 * L * 8 * 4


@pytest.mark.parametrize("layer", [
    Attention(8, 2), Attention(8, 2, "rope"), SlidingWindow(8, 2, 3), LearnedPosition(8, 40)],
    ids=["none", "rope", "window", "learned"])
def test_empty_segments_and_empty_batches(layer):
    x = torch.randn(3, 5, 8)
    _, state = layer(x)
    y, same = layer(x[:, :0], state)
    assert y.shape[1:] == (0, 8) and same is state
    assert layer(x[:, :0])[0].shape[1:] == (0, 8)
    continued = layer(x[:, :0])[1]
    assert torch.equal(layer(x, continued)[0], layer(x)[0])
    y, state = layer(x[:0])
    y, _ = layer(x[:0], state)
    assert y.shape[1:] == (5, 8)


@pytest.mark.parametrize("arguments, sentence", [
    ((8, 3), "n-heads is 3, .* width 8"), ((8, 0), "n-heads is 0"), ((8, -1), "n-heads is -1"),
    ((6, 2, "rope"), "odd size 3"), ((7, 1, "rope"), "odd size 7"),
    ((8, 1, "learned"), "position is 'learned'")])
def test_wrong_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Attention(*arguments)


@pytest.mark.parametrize("arguments, sentence", [
    ((8, 3, 1), "d is 8, but .* 3 heads"), ((8, 0, 1), "n-heads is 0"),
    ((6, 2, 1, "rope"), "odd size 3"),
    ((8, 4, 3), "kv_heads is 3"), ((8, 4, 0), "kv_heads is 0")])
def test_wrong_groups(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        GroupedAttention(*arguments)


@pytest.mark.parametrize("window", [0, -1])
def test_window_of_no_token(window):
    with pytest.raises(ValueError, match=f"window is {window}"):
        SlidingWindow(8, 1, window)


def test_odd_heads_need_no_rope():
    assert Attention(6, 2)(torch.zeros(1, 2, 6))[0].shape == (1, 2, 6)


def test_grouped_heads_are_heads_whose_keys_and_values_agree():
    torch.manual_seed(0)
    grouped, full = GroupedAttention(8, 4, 2, "rope"), Attention(8, 4, "rope")
    x = torch.randn(2, 7, 8)
    copies = [p for g in (0, 0, 1, 1) for p in (2 * g, 2 * g + 1)]
    rows = [*range(8), *[8 + p for p in copies], *[12 + p for p in copies]]
    full.load_state_dict({
        "qkv.weight": grouped.qkv.weight[rows], "qkv.bias": grouped.qkv.bias[rows],
        "out_proj.weight": grouped.out_proj.weight, "out_proj.bias": grouped.out_proj.bias})
    (y, cache), (same, _) = grouped(x), full(x)
    assert torch.allclose(y, same, atol=1e-6)
    assert cache.k.shape == cache.v.shape == (2, 2, 7, 2)
    assert torch.allclose(in_segments(grouped, x, [3])[0], y, atol=1e-6)


@pytest.mark.parametrize("position", ["none", "rope"])
@pytest.mark.parametrize("window", [1, 3, 20])
def test_sliding_window(window, position):
    torch.manual_seed(0)
    layer, x = SlidingWindow(8, 2, window, position).double(), torch.randn(3, 11, 8).double()
    whole, cache = layer(x)
    for t in range(11):                                  # an output depends on the window alone
        seen = x[:, max(0, t - window + 1):t + 1]
        assert torch.allclose(formula(layer, seen, position)[:, -1], whole[:, t], atol=1e-12)
    for sizes in SEGMENTS:
        y, state = in_segments(layer, x, sizes)
        assert torch.allclose(y, whole, atol=1e-12)
        assert state.k.shape[2] == min(11, window - 1) == cache.k.shape[2]


@pytest.mark.parametrize("sizes", SEGMENTS)
def test_learned_position(sizes):
    layer, x = LearnedPosition(8, 11), torch.randn(3, 11, 8)
    y, count = layer(x)
    assert torch.equal(y, layer.table[None]) and count == 11
    y_segments, count = in_segments(layer, x, sizes)
    assert torch.equal(y, y_segments) and count == 11
    assert (y.norm(dim=-1) > 0.02).all() and (y.norm(dim=-1) < 0.3).all()
    with pytest.raises(ValueError, match="sequence of 12 tokens is longer than the table of 11"):
        layer(x[:, :1], count)
    with pytest.raises(ValueError, match="sequence of 12 tokens"):
        layer(torch.zeros(1, 12, 8))


def test_extended_positions_train_and_load():
    """The new rows are random and short; training, saving and loading go on as before."""
    layer, x = LearnedPosition(8, 11), torch.zeros(1, 40, 8)
    saved = {name: v.clone() for name, v in layer.state_dict().items()}
    y, _ = layer(x[:, :11])
    layer.extend_positions(10)
    assert layer(x[:, :11])[0].shape == (1, 11, 8)
    layer.extend_positions(30)
    layer.extend_positions(40)
    longer, _ = layer(x)
    assert torch.equal(longer[:, :11], y) and 0.05 < longer[0, 11:].norm(dim=1).mean() < 0.15
    assert torch.equal(longer, layer(x)[0]), "the new rows stay the same"

    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(x)[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.table, saved["table"])
    assert torch.equal(layer(x)[0][:, 11:], longer[:, 11:])
    assert layer.state_dict().keys() == saved.keys()
    layer.load_state_dict(saved)
    assert torch.equal(layer(x[:, :11])[0], y)


def test_model_with_extended_positions_trains():
    model = build_model("learned", L=8)
    saved = {name: v.clone() for name, v in model.state_dict().items()}
    model.extend_positions(60)
    model(torch.zeros(2, 60, dtype=torch.long)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.load_state_dict(saved)
    assert isinstance(model.run_layers(torch.zeros(1, 60, dtype=torch.long))[1][1], KVCache)


@pytest.mark.parametrize("word, base, turned", [("rope", 10000.0, 8), ("rope-fast", 100.0, 8),
                                                ("rope-slow", 1e6, 8), ("rope-half", 10000.0, 4)])
def test_angles_of_the_rotary_words(word, base, turned):
    """Each pair of channels turns by t base^(-2j/P), written out; the other channels stay."""
    layer = build_layer(word, 8, 64)
    x = torch.randn(1, 1, 5, 8, dtype=torch.float64)
    y = layer.rotate(x, 3)
    half = turned // 2
    for t in range(5):
        for j in range(half):
            angle = (3 + t) * base ** (-2 * j / turned)
            a, b = x[0, 0, t, j].item(), x[0, 0, t, j + half].item()
            right = (a * math.cos(angle) - b * math.sin(angle),
                     a * math.sin(angle) + b * math.cos(angle))
            assert (y[0, 0, t, j].item(), y[0, 0, t, j + half].item()) == pytest.approx(right)
    assert torch.equal(y[..., turned:], x[..., turned:])


def test_a_head_too_small_to_rotate_a_part_of_is_refused():
    assert RotaryVariant(4, rotated=0.5).n_rotated == 2
    for d, heads in ((2, 1), (8, 4)):
        with pytest.raises(ValueError, match="heads of at least 4"):
            RotaryVariant(d, heads, rotated=0.5)


@pytest.mark.parametrize("word", ["rope", "rope-half"])
def test_scaled_positions_are_those_between_the_tokens(word):
    """At half the scale, every second token is where all tokens are at scale 1."""
    layer = build_layer(word, 8, 64)
    x = torch.randn(1, 1, 9, 8, dtype=torch.float64)
    plain = layer.rotate(x[:, :, ::2], 3)
    layer.scale = 0.5
    assert torch.allclose(layer.rotate(x, 6)[:, :, ::2], plain, rtol=1e-14, atol=1e-14)
