"""The models: shapes, causality, reading in pieces, and how another layer is added."""

import pytest
import torch
import torch.nn as nn

import hybrid
from conftest import in_pieces, relative
from data import embedding_table
from hybrid import FAMILY, MODELS, Model, build_model

SIX = ["nope", "learned", "rope", "mamba", "hybrid-a", "hybrid-b"]
NAMES = SIX + list(FAMILY)


def model_and_tokens(name, B=3, length=13, **options):
    torch.manual_seed(0)
    return build_model(name, L=8, **options).double(), torch.randint(16, (B, length))


def test_the_six_models():
    assert list(MODELS) == SIX


@pytest.mark.parametrize("name", NAMES)
def test_forward_gives_logits(name):
    model, tokens = model_and_tokens(name)
    logits = model(tokens)
    assert logits.shape == (3, 16) and logits.isfinite().all()
    x, states = model.stream(tokens)
    assert relative(model.head(x[:, -1]), logits) < 1e-5 and len(states) == len(model.layers)
    last, same_states = model.stream(tokens, only_last=True)
    assert relative(last, x[:, -1:]) < 1e-5 and last.shape == (3, 1, x.shape[2])
    for a, b in zip(states, same_states):
        assert all(map(torch.equal, a, b)) if isinstance(a, tuple) else torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("name, layers", [
    ("nope", ["none", "none"]), ("learned", ["table", "none", "none"]), ("rope", ["rope", "rope"]), ("mamba", ["Mamba", "Mamba"]),
    ("hybrid-a", ["Mamba", "none"]), ("hybrid-b", ["Mamba", "none", "Mamba"])])
def test_layers(name, layers):
    model, _ = model_and_tokens(name)
    kinds = ["table" if hasattr(layer, "table") else getattr(layer, "position", type(layer).__name__) for layer in model.layers]
    assert kinds == layers


def test_relatives():
    """What makes each of them itself, beside the order of its letters."""
    kinds = {name: [type(layer).__name__ for layer in build_model(name, d=16).layers] for name in FAMILY}
    assert kinds["rnn"] == ["RNN"] * 2 and kinds["lti"] == ["LTI"] * 2 and kinds["retention"] == ["Retention"] * 2
    assert kinds["griffin"] == ["RGLRU", "MLP"] * 2 + ["Attention", "MLP"] and kinds["mamba2"] == ["Mamba2"] * 2
    assert kinds["samba"] == ["Mamba", "MLP", "Attention", "MLP"]
    assert kinds["zamba"] == ["Mamba", "Mamba", "SharedUse"] * 2 and kinds["zamba2-mini"] == ["Mamba2", "Mamba2", "SharedUse"] * 2
    mixers, others = kinds["jamba"][::2], kinds["jamba"][1::2]
    assert mixers == ["Mamba"] * 4 + ["Attention"] + ["Mamba"] * 3 and others == ["MLP", "MixtureOfExperts"] * 4

    samba, jamba, hybrid8b = (build_model(name, d=16, L=64) for name in ("samba", "jamba", "mamba2-hybrid"))
    assert samba.layers[2].window == 16 and samba.layers[2].position == "rope"
    for model in jamba, hybrid8b:
        attention, = (layer for layer in model.layers if isinstance(layer, hybrid.Attention))
        assert (attention.n_heads, attention.kv_heads, attention.position, attention.window) == (4, 2, "none", None)
    assert all(len(layer.inner_norms) == 3 for layer in jamba.layers if isinstance(layer, hybrid.Mamba))
    for name in FAMILY:
        model = build_model(name)
        model(torch.randint(16, (2, 9))).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad), name


@pytest.mark.parametrize("name", FAMILY)
def test_float32_is_near_float64(name):
    model, tokens = model_and_tokens(name)
    exact = model(tokens)
    assert relative(model.float()(tokens), exact) < 1e-4


def test_inner_norms_see_dt_B_and_C():
    layer, x = hybrid.Mamba(8, dt_rank=8, inner_norms=True).double(), torch.randn(2, 7, 8).double()
    before = layer(x)[0]
    layer.x_proj.weight.data *= 3.0                            # which a norm takes away again
    assert relative(layer(x)[0], before) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_causal(name):
    model, tokens = model_and_tokens(name)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 16
    difference = (model.stream(tokens)[0] - model.stream(changed)[0]).abs().amax((0, 2))
    assert (difference[:7] < 1e-12).all() and (difference[7:] > 1e-6).all()


@pytest.mark.parametrize("name", NAMES)
def test_last_reads_the_shorter_sequence(name):
    model, tokens = model_and_tokens(name)
    last = torch.tensor([12, 0, 5])
    logits = model(tokens, last)
    for b, end in enumerate(last):
        assert torch.allclose(logits[b], model(tokens[b:b + 1, :end + 1])[0], atol=1e-12)


@pytest.mark.parametrize("sizes", [[], [1, 5], [4, 2, 3], [12]])
@pytest.mark.parametrize("name", NAMES)
def test_pieces_equal_one_call(name, sizes):
    model, tokens = model_and_tokens(name)
    assert torch.allclose(in_pieces(model.stream, tokens, sizes)[0], model.stream(tokens)[0], atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_select_rows(name):
    model, tokens = model_and_tokens(name, B=5)
    rows = torch.tensor([3, 0, 3])
    _, states = model.stream(tokens[:, :9])
    x, _ = model.stream(tokens[rows, 9:], model.select(states, rows))
    assert torch.allclose(x, model.stream(tokens[rows])[0][:, 9:], atol=1e-12)


def shapes(model):
    return {name: p.shape for name, p in model.named_parameters()}


def test_pattern_is_a_model():
    assert shapes(build_model("MAM", d=16)) == shapes(build_model("hybrid-b", d=16))
    assert shapes(build_model("RMA")) != shapes(build_model("MAM"))


def test_learned_table_covers_three_lengths():
    model = build_model("learned", L=8)
    assert model(torch.zeros(1, 25, dtype=torch.long)).shape == (1, 16)
    with pytest.raises(ValueError, match="26 tokens"):
        model(torch.zeros(1, 26, dtype=torch.long))


def test_learned_table_reaches_farther():
    model, tokens = build_model("learned", L=8), torch.zeros(1, 60, dtype=torch.long)
    before = model(tokens[:, :25])
    model.reach(60)
    assert model(tokens).shape == (1, 16) and torch.equal(model(tokens[:, :25]), before)


def test_options_of_mamba():
    for layer in build_model("mamba", d_state=4).layers:
        assert layer.A_log.shape == (16, 4)
    model = build_model("MAM", d=16, init="mimetic")
    for layer in (model.layers[0], model.layers[2]):
        _, B, C = layer.x_proj.weight.split([layer.dt_rank, 16, 16])
        x = torch.randn(5, layer.dt_rank)
        assert torch.equal(B, C) and torch.allclose(nn.functional.softplus(layer.dt_proj(x)), torch.ones(5, 32))
        assert (torch.exp(-64 * torch.exp(layer.A_log)) > 0.015).all()                # what is left of a token after 64 others


@pytest.mark.parametrize("name", ["gpt", "hybrid-c", "", "MAQ", "mam"])
def test_unknown_name_names_the_models(name):
    with pytest.raises(ValueError) as error:
        build_model(name)
    assert str(error.value).startswith(f"--model is {name!r}") and all(known in str(error.value) for known in NAMES)


@pytest.mark.parametrize("learn", [False, True])
def test_embedding_is_fixed_unless_learned(learn):
    model, tokens = model_and_tokens("hybrid-a", learn_embedding=learn)
    assert torch.equal(model.embedding.weight.float(), embedding_table(16, 8))
    model(tokens).sum().backward()
    assert (model.embedding.weight.grad is not None) == learn
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "embedding.weight")


class RunningMean(nn.Module):
    """A layer that somebody adds: the mean of the tokens so far. Its state is a plain tuple of tensors."""

    def forward(self, x, state=None):
        total, count = (x.new_zeros(len(x), x.shape[2]), x.new_zeros(len(x))) if state is None else state
        total = total[:, None] + x.cumsum(1)
        count = count[:, None] + torch.arange(1, x.shape[1] + 1)
        return total / count[..., None], (total[:, -1], count[:, -1])


def test_another_letter(monkeypatch):
    monkeypatch.setitem(hybrid.LAYERS, "X", lambda d, o: RunningMean())
    monkeypatch.setitem(MODELS, "mean", "XA")
    model, tokens = model_and_tokens("mean")
    assert model(tokens).shape == (3, 16)
    whole = model.stream(tokens)[0]
    assert torch.allclose(in_pieces(model.stream, tokens, [4])[0], whole, atol=1e-12)
    rows = torch.tensor([2, 0])
    states = Model.select(model.stream(tokens[:, :9])[1], rows)
    assert torch.allclose(model.stream(tokens[rows, 9:], states)[0], whole[rows, 9:], atol=1e-12)
