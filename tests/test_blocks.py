"""family/experts.py and family/zamba.py: what is computed, what is not, and what is shared."""

import copy

import pytest
import torch
import torch.nn.functional as F

from family import experts
from family.experts import MLP, MixtureOfExperts, NormedMamba
from family.zamba import SharedBlock, SharedUse
from hybrid import build_model


def one_by_one(layer, x):
    """Jamba's mixture of experts, token by token: a softmax over all experts, then the top k."""
    y = []
    for token in x.flatten(0, 1):
        weights = torch.exp(layer.router.weight @ token)
        weights = weights / weights.sum()
        out = 0
        for e in weights.argsort(descending=True)[:layer.top_k]:
            gate, up = (token @ layer.up[e]).chunk(2)
            out = out + weights[e] * ((gate * torch.sigmoid(gate) * up) @ layer.down[e])
        y.append(out)
    return torch.stack(y).view_as(x)


def test_mlp_is_swiglu():
    layer, x = MLP(8), torch.randn(2, 3, 8)
    w1, w3 = layer.up.weight.chunk(2)
    right = (F.silu(x @ w1.T) * (x @ w3.T)) @ layer.down.weight.T
    assert torch.allclose(layer(x)[0], right, atol=1e-6)
    assert layer.down.weight.shape == (8, 21)


@pytest.mark.parametrize("B, L", [(1, 1), (3, 1), (2, 21), (16, 16)])
@pytest.mark.parametrize("experts, top_k", [(4, 2), (2, 2), (9, 3)])
def test_mixture_is_its_definition(B, L, experts, top_k):
    torch.manual_seed(0)
    layer, x = MixtureOfExperts(8, experts, top_k).double(), torch.randn(B, L, 8).double()
    found, exact = layer(x)[0], one_by_one(layer, x)
    assert torch.allclose(found, exact, atol=1e-12)
    weights = list(layer.parameters())
    gradients = torch.autograd.grad(found.square().sum(), weights)
    right = torch.autograd.grad(exact.square().sum(), weights)
    for a, b in zip(gradients, right):
        assert torch.allclose(a, b, atol=1e-10)


def test_all_tokens_may_want_one_expert():
    layer, x = MixtureOfExperts(8), torch.rand(2, 40, 8)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([-1.0, 2.0, 1.0, -2.0])[:, None])     # 1, then 2
    y = layer(x)[0]
    assert torch.allclose(y, one_by_one(layer, x), atol=1e-6)
    up, = torch.autograd.grad(y.sum(), [layer.up])
    assert (up[[0, 3]] == 0).all() and (up[[1, 2]] != 0).any()


def test_cost_follows_the_experts_used(monkeypatch):
    rows, silu = [], F.silu

    def counted(gate):
        rows.append(gate[..., 0].numel())
        return silu(gate)
    monkeypatch.setattr(experts.F, "silu", counted)
    x = torch.randn(4, 160, 8)
    for count in (2, 4, 16):
        MixtureOfExperts(8, count)(x)
    used = 4 * 160 * 2
    assert all(used < n <= 1.35 * used for n in rows), rows      # whole blocks


@pytest.mark.parametrize("top_k", [0, 5, -1])
def test_experts_that_there_are_not(top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}"):
        MixtureOfExperts(8, experts=4, top_k=top_k)


def test_empty_segments_and_batches():
    for layer in (MLP(8), MixtureOfExperts(8)):
        for B, L in ((3, 0), (0, 3)):
            assert layer(torch.zeros(B, L, 8))[0].shape == (B, L, 8)
    use, x = SharedUse(8, []), torch.randn(3, 5, 8)
    _, state = use(x, None, x)
    y, same = use(x[:, :0], state, x[:, :0])
    assert y.shape == (3, 0, 8) and same is state
    assert use(x[:0], None, x[:0])[0].shape == (0, 5, 8)


def test_normed_mamba_norms_dt_B_and_C():
    torch.manual_seed(0)
    layer, x = NormedMamba(8).double(), torch.randn(2, 7, 8).double()
    assert [norm.weight.numel() for norm in layer.inner_norms] == [8, 16, 16]
    layer.x_proj.weight.data *= 1000.0                           # far above the norms' epsilon
    before = layer(x)[0]
    layer.x_proj.weight.data *= 3.0                              # a norm takes this away again
    assert torch.allclose(layer(x)[0], before, rtol=1e-4, atol=1e-8)


def test_shared_block_is_attention_and_mlp_with_residuals():
    torch.manual_seed(0)
    block, x = SharedBlock(8, n_heads=2).double(), torch.randn(2, 6, 8).double()
    norm = lambda v: F.rms_norm(v, (8,), eps=torch.finfo(torch.float32).eps)
    middle = x + block.attention(norm(x))[0]
    right = middle + block.mlp(norm(middle))[0]
    assert torch.allclose(block(x, None)[0], right, atol=1e-12)


def test_a_use_is_fed_the_stream_and_the_embedding():
    torch.manual_seed(0)
    use, (x, e) = SharedUse(4, []), torch.randn(2, 2, 6, 4)
    inner = use.block(torch.cat([x, e], dim=-1), None)[0]
    assert torch.allclose(use(x, None, e)[0], inner @ use.out_proj.weight.T, atol=1e-6)


def build(*kinds):
    layers = []
    for options in kinds:
        layers.append(SharedUse(8, layers, **options))
    return layers


def test_uses_share_with_their_own_kind_only():
    a, b, c = build({}, {}, {})
    assert a.block is b.block is c.block
    a, b, c = build(dict(blocks=2), dict(blocks=2), dict(blocks=2))
    assert a.block is c.block is not b.block
    a, b, c, d = build({}, dict(rank=4), {}, dict(rank=4))
    assert a.block is c.block and b.block is d.block and a.block is not b.block
    a, b = build({}, dict(position="rope"))
    assert a.block is not b.block and b.block.attention.position == "rope"
    assert build({})[0].block is not build({})[0].block, "two models must not share"


def test_corrections_start_at_zero():
    first, second = build(dict(rank=4), dict(rank=4))
    second.out_proj = first.out_proj
    x, e = torch.randn(2, 2, 5, 8)
    assert torch.equal(first(x, None, e)[0], second(x, None, e)[0])
    torch.nn.init.normal_(second.lora[1].weight)
    assert not torch.allclose(first(x, None, e)[0], second(x, None, e)[0])


@pytest.mark.parametrize("name", ["zamba", "zamba2", "zamba2-mini"])
def test_shared_weights_are_in_the_model_once(name):
    model, tokens = build_model(name), torch.randint(16, (2, 9))
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len({id(p) for p in model.parameters()})
    assert {*model.state_dict()} - {*dict(model.named_buffers())} == {*names}

    # One set of other weights, through functional_call, is that of a model which has them.
    other = build_model(name)
    y = torch.func.functional_call(model, dict(other.named_parameters()), (tokens,))
    assert torch.equal(y, other(tokens)) and not torch.equal(y, model(tokens))
    assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())
    use = [layer for layer in model.layers if isinstance(layer, SharedUse)][-1]
    assert all(isinstance(p, torch.nn.Parameter) for p in use.block.parameters())

    model.load_state_dict(other.state_dict())
    assert torch.equal(model(tokens), other(tokens))
    copied = copy.deepcopy(model).double()
    uses = [layer for layer in copied.layers if isinstance(layer, SharedUse)]
    assert uses[0].block is uses[2 if name == "zamba2" else 1].block
    assert uses[0].block is not use.block and copied(tokens).dtype == torch.float64


def test_hooks_of_all_parts_run():
    model, called = build_model("zamba2"), set()
    for name, part in model.named_modules():
        part.register_forward_hook(lambda *words, name=name: called.add(name))
    model(torch.randint(16, (2, 9)))
    lists = {name for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList)}
    assert called == {name for name, _ in model.named_modules()} - lists


def test_caches_of_uses_are_their_own():
    model = build_model("zamba")
    _, states = model.run_layers(torch.randint(16, (2, 9)))
    assert not torch.equal(states[2].k, states[5].k)


def test_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="n-heads is 3, but it must divide 2 d = 16"):
        build_model("zamba", d=8, n_heads=3)
