"""mlp.py and zamba.py: what is computed, what is not, and what is shared."""

import pytest
import torch
import torch.nn.functional as F

import mlp
from hybrid import build_model
from mlp import MLP, MixtureOfExperts


def one_by_one(layer, x):
    """The mixture of experts, token by token."""
    y = []
    for token in x.flatten(0, 1):
        scores, chosen = layer.router(token).topk(layer.top_k)
        parts = []
        for e in chosen:
            gate, up = (token @ layer.up[e]).chunk(2)
            parts.append((F.silu(gate) * up) @ layer.down[e])
        y.append(scores.softmax(0) @ torch.stack(parts))
    return torch.stack(y).view_as(x)


def test_mlp_is_swiglu():
    layer, x = MLP(8), torch.randn(2, 3, 8)
    w1, w3 = layer.up.weight.chunk(2)
    assert torch.allclose(layer(x)[0], (F.silu(x @ w1.T) * (x @ w3.T)) @ layer.down.weight.T, atol=1e-6)


@pytest.mark.parametrize("B, L", [(1, 1), (3, 1), (2, 21), (16, 16)])
@pytest.mark.parametrize("experts, top_k", [(4, 2), (2, 2), (9, 3)])
def test_mixture_is_its_definition(B, L, experts, top_k):
    torch.manual_seed(0)
    layer, x = MixtureOfExperts(8, experts, top_k).double(), torch.randn(B, L, 8).double()
    found, exact = layer(x)[0], one_by_one(layer, x)
    assert torch.allclose(found, exact, atol=1e-12)
    weights = list(layer.parameters())
    for a, b in zip(torch.autograd.grad(found.square().sum(), weights), torch.autograd.grad(exact.square().sum(), weights)):
        assert torch.allclose(a, b, atol=1e-10)


def test_all_tokens_may_want_one_expert():
    layer, x = MixtureOfExperts(8), torch.rand(2, 40, 8)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([-1.0, 2.0, 1.0, -2.0])[:, None])                      # 1 first, 2 second
    y = layer(x)[0]
    assert torch.allclose(y, one_by_one(layer, x), atol=1e-6)
    up, = torch.autograd.grad(y.sum(), [layer.up])
    assert (up[[0, 3]] == 0).all() and (up[[1, 2]] != 0).any()


def test_cost_follows_the_experts_used(monkeypatch):
    rows, silu = [], F.silu
    monkeypatch.setattr(mlp.F, "silu", lambda gate: rows.append(gate[..., 0].numel()) or silu(gate))
    x = torch.randn(4, 160, 8)
    for experts in (2, 4, 16):
        MixtureOfExperts(8, experts)(x)
    used = 4 * 160 * 2
    assert all(used < n <= 1.35 * used for n in rows), rows    # whole blocks: one more for each expert at most


def test_uses_of_a_shared_block():
    zamba, zamba2, mini = (build_model(name) for name in ("zamba", "zamba2", "zamba2-mini"))
    blocks = lambda model: [layer.block for layer in model.layers if hasattr(layer, "block")]
    assert blocks(zamba)[0] is blocks(zamba)[1]
    a, b, c = blocks(zamba2)
    assert a is c and a is not b
    assert blocks(mini)[0] is blocks(mini)[1] and blocks(mini)[0].attention.position == "rope"
    once = build_model("MMZMM")
    size = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)
    use = zamba.layers[2]
    assert size(zamba) - size(once) == use.out_proj.weight.numel()                    # a second use costs its own map only
    assert build_model("zamba").layers[2].block is not blocks(zamba)[0], "two models must not share"

    tokens = torch.randint(16, (2, 9))
    states = zamba.stream(tokens)[1]
    assert not torch.equal(states[2].k, states[5].k), "each use has keys and values of its own"
    x, e = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    first, third = (zamba2.layers[i] for i in (2, 8))
    third.out_proj = first.out_proj
    assert torch.equal(first(x, None, e)[0], third(x, None, e)[0])                    # the corrections start at zero
    torch.nn.init.normal_(third.lora_b.weight)
    assert not torch.allclose(first(x, None, e)[0], third(x, None, e)[0])
