"""The models: words, shapes, causality, segments, and how a layer is added."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hybrid
import mamba
from conftest import embedding_for, in_segments, relative
from data import embedding_table
from hybrid import (FAMILY, LAYERS, MODELS, RMSNorm, build_layer, build_model,
                    layer_words, state_bytes)

EVERY_WORD = list(LAYERS)
NAMES = [*MODELS, *FAMILY, *(f"{word}+attention" for word in EVERY_WORD)]


def model_and_tokens(name, B=3, length=13, **options):
    torch.manual_seed(0)
    return build_model(name, L=8, **options).double().eval(), torch.randint(16, (B, length))


# ---- names and words -----------------------------------------------------------------------------

@pytest.mark.parametrize("name, words", [
    ("nope", "attention attention"), ("learned", "position attention attention"),
    ("rope", "rope rope"), ("mamba", "mamba mamba"), ("hybrid-a", "mamba attention"),
    ("hybrid-b", "mamba attention mamba"), ("1xmamba", "mamba"), ("mamba+mlp", "mamba mlp"),
    ("3xmamba+attention+2xmlp", "mamba mamba mamba attention mlp mlp")])
def test_words(name, words):
    assert layer_words(name) == words.split()


def test_words_make_layers():
    layers = build_model("position+attention+rope+window+grouped+mamba+normed-mamba", d=16).layers
    names = [type(layer).__name__ for layer in layers]
    assert names == ["LearnedPosition", "Attention", "Attention", "SlidingWindow",
                     "GroupedAttention", "Mamba", "NormedMamba"]
    _, none, rope, window, grouped, *_ = layers
    assert [layer.position for layer in (none, rope, grouped)] == ["none", "rope", "none"]
    assert window.window == 16
    assert (grouped.n_heads, grouped.kv_heads) == (4, 2)


def test_a_word_in_layers_replaces_a_layer_of_this_name(monkeypatch):
    class Mine(nn.Identity):
        pass

    monkeypatch.setitem(LAYERS, "conv", Mine)
    first, second = build_model("conv+attention", d=16).layers
    assert type(first) is Mine and type(second).__name__ == "Attention"


def test_layers_of_the_delta_rule_and_after():
    layers = build_model("conv8+deltanet+gated-deltanet+mamba3+mamba3-mimo+alibi+forgetting").layers
    conv, delta, gated, siso, mimo, alibi, forgetting = layers
    assert conv.conv1d.kernel_size == (8,)
    assert (delta.gated, gated.gated) == (False, True)
    assert (siso.rank, mimo.rank) == (1, 4)
    assert (alibi.decay, forgetting.decay) == ("alibi", "forgetting")


def test_the_family():
    """Each has the order of layers that it is known for."""
    kinds = {name: [type(layer).__name__ for layer in build_model(name, d=16).layers]
             for name in FAMILY}
    for name, kind in {"rnn": "RNN", "lti": "LTI", "retention": "Retention", "mamba2": "Mamba2",
                       "deltanet": "GatedDeltaNet", "gated-deltanet": "GatedDeltaNet",
                       "alibi": "DecayAttention", "forgetting": "DecayAttention"}.items():
        assert kinds[name] == [kind] * 2
    assert kinds["griffin"] == ["RGLRU", "MLP"] * 2 + ["SlidingWindow", "MLP"]
    assert kinds["samba"] == ["Mamba", "MLP", "SlidingWindow", "MLP"]
    assert kinds["mamba2-hybrid"] == ["Mamba2", "MLP"] * 2 + ["GroupedAttention", "MLP"] + [
        "Mamba2", "MLP"]
    mixers, others = kinds["jamba"][::2], kinds["jamba"][1::2]
    assert mixers == ["NormedMamba"] * 4 + ["GroupedAttention"] + ["NormedMamba"] * 3
    assert others == ["MLP", "MixtureOfExperts"] * 4
    assert kinds["zamba"] == ["Mamba", "Mamba", "SharedUse"] * 2
    assert kinds["zamba2-mini"] == ["Mamba2", "Mamba2", "SharedUse"] * 2
    assert kinds["zamba2"] == ["Mamba2", "Mamba2", "SharedUse"] * 3


@pytest.mark.parametrize("name", [
    "gpt", "hybrid-c", "", "xmamba", "mamba+", "+mamba", "mamba*2", "Mamba",
    "mamba + mlp", "-1xmamba", "rope\n"])
def test_unknown_words(name):
    with pytest.raises(ValueError) as error:
        build_model(name)
    sentence = str(error.value)
    assert sentence.startswith(f"--model is {name!r}, ") and "\n" not in sentence
    for known in [*MODELS, *FAMILY, *LAYERS]:
        assert known in sentence


@pytest.mark.parametrize("name, part, near", [
    ("2xmabma+mlp", "2xmabma", "mamba"), ("Mamba", "Mamba", "mamba"), ("zamba3", "zamba3", "zamba"),
    ("hybird-a", "hybird-a", "hybrid-a"), ("2xhybrid-a", "2xhybrid-a", None)])
def test_an_unknown_word_names_its_neighbour(name, part, near):
    with pytest.raises(ValueError) as error:
        build_model(name)
    assert f"{part!r} is no layer; " in str(error.value)
    assert ("did you mean" in str(error.value)) == bool(near)
    assert not near or f"did you mean {near}? " in str(error.value)


@pytest.mark.parametrize("word", EVERY_WORD)
def test_every_word_builds_a_layer_that_gets_gradients(word):
    stack = f"2xmamba2+{word}+rnn" if word.startswith("zamba") else f"{word}+rnn"
    model = build_model(stack, d=8)
    model(torch.randint(16, (2, 9))).square().sum().backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad is not None, name


# ---- what every model must do --------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_forward_answers_the_last_token(name):
    model, tokens = model_and_tokens(name)
    logits = model(tokens)
    assert logits.shape == (3, 16) and logits.isfinite().all()
    x, states = model.run_layers(tokens)
    assert x.shape == (3, 13, 8) and len(states) == len(model.layers)
    assert torch.allclose(model.head(x[:, -1]), logits, atol=1e-12)
    last, _ = model.run_layers(tokens, last_only=True)
    assert last.shape == (3, 1, 8) and torch.allclose(last, x[:, -1:], atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_forward_answers_the_tokens_that_are_asked_for(name):
    model, tokens = model_and_tokens(name)
    at = torch.tensor([12, 0, 5])
    logits = model(tokens, at)
    for b, end in enumerate(at):
        alone = model(tokens[b:b + 1, :end + 1])[0]
        assert torch.allclose(logits[b], alone, atol=1e-12)
    several = torch.tensor([[12, 3], [0, 12], [5, 5]])
    answers = model(tokens, several)
    assert answers.shape == (3, 2, 16)
    for q in range(2):
        assert torch.allclose(answers[:, q], model(tokens, several[:, q]), atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_causal(name):
    model, tokens = model_and_tokens(name)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 16
    difference = (model.run_layers(tokens)[0] - model.run_layers(changed)[0]).abs().amax((0, 2))
    assert (difference[:7] < 1e-12).all(), "an output depends on a later token"
    assert (difference[7:] > 1e-6).all(), "an output does not depend on its own token"


def attends(word):
    """Softmax gives later tokens the weight 0, and 0 times NaN is NaN, as in torch's attention."""
    return getattr(build_layer(word, 8, 40), "attends", False)


RECURRENT = [word for word in EVERY_WORD if not attends(word)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("word", RECURRENT)
def test_a_token_that_is_not_finite_reaches_no_earlier_output(word, bad):
    """And all that is NaN after single steps is not finite after one call."""
    torch.manual_seed(0)
    layer = build_layer(word, 8, 40).eval().double()

    def call(x, state=None):
        return layer(x, state, **embedding_for(layer, x))
    x = torch.randn(3, 40, 8).double()
    right, _ = call(x)
    x[1, 21] = bad                                               # in the middle of a chunk
    y, state = call(x)
    steps, last = in_segments(call, x, [])
    tolerance = 1e-12 if word == "lti" else 0.0                  # a transform rounds all together
    assert torch.allclose(y[::2], right[::2], rtol=0, atol=tolerance)
    early = torch.allclose(y[1 % len(y), :21], right[1 % len(y), :21], rtol=0, atol=tolerance)
    assert early, "NaN or infinity reaches an output before its token"
    assert not y[steps.isnan()].isfinite().any()
    for found, expected in zip(tensors(state), tensors(last), strict=True):
        assert not found[expected.isnan()].isfinite().any()


class Written(TorchDispatchMode):
    """Counts the numbers that operations write, in both passes."""
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for v in results if isinstance(results, (tuple, list)) else [results]:
            if torch.is_tensor(v) and v._base is None:               # not a view
                self.numbers += v.numel()
        return results


@pytest.mark.parametrize("word", [word for word in RECURRENT if word != "position"])
def test_work_grows_with_the_length_alone(word):
    """A loop that indexes a chunk, v[:, i], writes a gradient of the size of v for each chunk."""
    def work(L):
        layer, x = build_layer(word, 16, L).eval(), torch.randn(2, L, 16, requires_grad=True)
        with Written() as written:
            layer(x, **embedding_for(layer, x))[0].sum().backward()
        return written.numbers

    assert work(512) < 4.1 * work(128), "use x.unbind(1), not x[:, t]: see hybrid.py"


def tensors(state):
    """The tensors of a layer's state, in their order."""
    if torch.is_tensor(state):
        return [state]
    return [v for part in state for v in tensors(part)] if isinstance(state, tuple) else []


@pytest.mark.parametrize("sizes", [[], [1, 5], [4, 2, 3], [12]])
@pytest.mark.parametrize("name", NAMES)
def test_segments_equal_one_call(name, sizes):
    model, tokens = model_and_tokens(name)
    x, states = in_segments(model.run_layers, tokens, sizes)
    whole, last = model.run_layers(tokens)
    message = "segments give other outputs than one call: does the state hold all that matters?"
    assert torch.allclose(x, whole, atol=1e-12), message
    more = tokens[:, :4]
    after = model.run_layers(more, states)[0]
    assert torch.allclose(after, model.run_layers(more, last)[0], atol=1e-12), message


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gradients", [True, False])
def test_states_are_not_written_over(gradients, name):
    model, tokens = model_and_tokens(name)
    with torch.set_grad_enabled(gradients):
        _, states = model.run_layers(tokens[:, :9])
        first = model.run_layers(tokens[:, 9:], states)[0]
        again = model.run_layers(tokens[:, 9:], states)[0]
    assert torch.equal(again, first), f"{name} writes over the state that it was given"


@pytest.mark.parametrize("name", FAMILY)
def test_float32_is_near_float64(name):
    model, tokens = model_and_tokens(name)
    exact = model(tokens)
    assert relative(model.float()(tokens), exact) < 1e-4


@pytest.mark.parametrize("word", EVERY_WORD)
def test_norms_add_the_same_in_float32_and_float64(word):
    torch.manual_seed(0)
    layer, x = build_layer(word, 8, 13).eval(), 1e-4 * torch.randn(2, 13, 8)
    exact, _ = layer.double()(x.double(), **embedding_for(layer, x.double()))
    found, _ = layer.float()(x, **embedding_for(layer, x))
    assert relative(found, exact) < 1e-4


@pytest.mark.parametrize("word", EVERY_WORD)
def test_a_context_in_another_dtype(word):
    """Read a context in one dtype, then continue in another: y has that of x, for any state."""
    torch.manual_seed(0)
    layer, x = build_layer(word, 8, 40).eval().double(), torch.randn(2, 20, 8).double()
    exact, _ = layer(x, **embedding_for(layer, x))
    for first, then, tolerance in ((torch.float64, torch.float32, 1e-4),
                                   (torch.float32, torch.float64, 1e-4),
                                   (torch.float32, torch.bfloat16, 0.1)):
        context, rest = x[:, :12].to(first), x[:, 12:].to(then)
        _, state = layer.to(first)(context, **embedding_for(layer, context))
        y, _ = layer.to(then)(rest, state, **embedding_for(layer, rest))
        assert y.dtype == then
        rerouted = word == "experts" and then == torch.bfloat16      # rounded, some change experts
        assert rerouted or relative(y, exact[:, 12:]) < tolerance
        layer.double()


@pytest.mark.parametrize("word", ["mamba", "normed-mamba", "mamba-own", "rglru"])
def test_a_layer_has_a_second_derivative_with_the_recurrence(word, monkeypatch):
    """Setting mamba.selective_scan reaches all layers that scan."""
    monkeypatch.setattr(mamba, "selective_scan", mamba.selective_scan_ref)
    layer = build_layer(word, 2, 8, d_state=2).eval().double()
    x = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)


def test_states_of_another_model_are_refused():
    model, tokens = model_and_tokens("2xmamba")
    for other in "1xmamba", "3xmamba":
        _, states = model_and_tokens(other)[0].run_layers(tokens)
        with pytest.raises(ValueError):
            model.run_layers(tokens, states)


# ---- torch.func, and the device "meta" -----------------------------------------------------------

@pytest.mark.filterwarnings("ignore:There is a performance drop")    # of vmap over attention
@pytest.mark.parametrize("word", EVERY_WORD)
def test_an_ensemble_and_gradients_per_sample(word):
    def loss(p, x):
        x = x[None]
        y, _ = torch.func.functional_call(layer, p, (x,), embedding_for(layer, x))
        return y.square().sum()
    torch.manual_seed(0)
    layers = [build_layer(word, 8, 20).eval().double() for _ in range(2)]
    layer, xs = layers[0], torch.randn(3, 20, 8).double()
    parameters, _ = torch.func.stack_module_state(layers)
    found = torch.func.vmap(loss)(parameters, xs[:2])
    for layer, x, value in zip(layers, xs[:2], found, strict=True):
        assert relative(value, loss(dict(layer.named_parameters()), x)) < 1e-10

    layer, own = layers[0], dict(layers[0].named_parameters())
    gradient = torch.func.grad(loss, argnums=(0, 1))
    gradients, of_xs = torch.func.vmap(gradient, in_dims=(None, 0))(own, xs)
    for i, x in enumerate(xs):
        inputs = [*own.values(), x.clone().requires_grad_()]
        expected = torch.autograd.grad(loss(own, inputs[-1]), inputs, materialize_grads=True)
        for found, exact in zip([*gradients.values(), of_xs], expected, strict=True):
            assert torch.allclose(found[i], exact, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("word", [word for word in RECURRENT if word != "position"])
def test_forward_mode(word):
    torch.manual_seed(0)
    layer = build_layer(word, 8, 20).eval().double()
    x, direction = torch.randn(2, 2, 20, 8).double()

    def outputs(x):
        return layer(x, **embedding_for(layer, x))[0]
    y, tangent = torch.func.jvp(outputs, (x,), (direction,))
    ahead, behind = outputs(x + 1e-6 * direction), outputs(x - 1e-6 * direction)
    assert relative(y, outputs(x)) < 1e-12
    assert relative(tangent, (ahead - behind) / 2e-6) < 1e-6


@pytest.mark.parametrize("word", EVERY_WORD)
def test_shapes_on_meta(word):
    layer, x = build_layer(word, 8, 40).eval().to("meta"), torch.empty(2, 40, 8, device="meta")
    y, _ = layer(x, **embedding_for(layer, x))
    assert y.shape[1:] == (40, 8) and y.is_meta


# ---- norms, embedding, options -------------------------------------------------------------------

def test_norm():
    x = torch.randn(5, 7, 16)
    assert torch.allclose(RMSNorm(16)(x), F.rms_norm(x, (16,)), atol=1e-6)
    norm = RMSNorm(16, bias_std=0.5)
    norm.weight.data.fill_(3.0)
    assert torch.allclose(norm(x), 3 * F.rms_norm(x, (16,)) + norm.bias, atol=1e-5)
    assert 0.3 < RMSNorm(4096, bias_std=0.5).bias.std() < 0.6
    assert RMSNorm(16).bias is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_in_half_precision(dtype):
    """The mean square is added up in float32, whatever comes in."""
    norm = RMSNorm(4).to(dtype)
    x = torch.tensor([300.0, -300.0, 300.0, 300.0], dtype=dtype)
    assert torch.equal(norm(x), torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=dtype))
    small = embedding_table(16, 256).to(dtype)                      # rows of length 1
    length = RMSNorm(256).to(dtype)(small).float().square().mean(-1).sqrt()
    assert ((length - 1).abs() < 0.02).all()


def test_biases_start_at_random_only_beside_attention():
    def biases(name):
        return [norm.bias for norm in build_model(name).norms if hasattr(norm, "bias")]
    for name in ("mamba", "mamba2", "mamba+mlp"):
        assert any(bias is not None for bias in biases(name))
        assert all((bias == 0).all() for bias in biases(name) if bias is not None)
    for name in ("hybrid-a", "hybrid-b", "mamba+rope", "zamba"):
        started = [bias for bias in biases(name) if bias is not None]
        assert started and all((bias != 0).all() for bias in started)
        assert 0.2 < torch.cat(started).std() < 0.9
    assert biases("nope") == biases("rope") == [None, None]


def test_a_layer_that_skips_norm_has_no_norm():
    kinds = [type(norm).__name__ for norm in build_model("learned").norms]
    assert kinds == ["Identity", "RMSNorm", "RMSNorm"]


@pytest.mark.parametrize("learn", [False, True])
def test_embedding_is_fixed_unless_learned(learn):
    model, tokens = model_and_tokens("hybrid-a", learn_embedding=learn)
    assert torch.equal(model.embedding.weight.float(), embedding_table(16, 8))
    model(tokens).sum().backward()
    assert (model.embedding.weight.grad is not None) == learn
    for name, p in model.named_parameters():
        assert name == "embedding.weight" or p.grad is not None


def test_number_of_parameters():
    norms, head = 3 * 8, 8 * 16
    assert build_model("rope").n_params() == 2 * (4 * 8 * 8 + 4 * 8) + norms + head


def test_options():
    for layer in build_model("mamba", d_state=4).layers:
        assert layer.A_log.shape == (16, 4)
    for layer in build_model("nope", n_heads=2).layers:
        assert layer.n_heads == 2
    rates = build_model("rope").layers
    recency = [layer.qkv.bias[:16].unique().tolist() for layer in rates]
    assert recency[0] == [2.0] and len(recency[1]) > 8       # the first layer prefers recent tokens
    with pytest.raises(ValueError, match="3"):
        build_model("nope", n_heads=3)
    with pytest.raises(ValueError):
        build_model("mamba", d_state=0)


def test_learned_positions_cover_three_lengths_and_can_be_extended():
    model, tokens = build_model("learned", L=8), torch.zeros(1, 60, dtype=torch.long)
    before = model(tokens[:, :25])
    with pytest.raises(ValueError, match="26 tokens"):
        model(tokens[:, :26])
    model.extend_positions(60)
    assert model(tokens).shape == (1, 16) and torch.equal(model(tokens[:, :25]), before)
    model.load_state_dict(build_model("learned", L=8).state_dict())     # the added rows are no part
    model(tokens).sum().backward()


@pytest.mark.parametrize("name, after_10, after_30", [
    ("nope", 2 * 2 * 10 * 8 * 4, 2 * 2 * 30 * 8 * 4),               # keys and values, float32
    ("mamba", 2 * (16 * 16 + 16 * 3) * 4, 2 * (16 * 16 + 16 * 3) * 4),
    ("hybrid-a", (16 * 16 + 16 * 3 + 2 * 10 * 8) * 4, (16 * 16 + 16 * 3 + 2 * 30 * 8) * 4),
    ("mlp", 0, 0), ("learned", 2 * 2 * 10 * 8 * 4, 2 * 2 * 30 * 8 * 4)])
def test_state_bytes(name, after_10, after_30):
    model = build_model(name, L=4)
    assert [state_bytes(model, 10), state_bytes(model, 30)] == [after_10, after_30]


# ---- a layer of one's own ------------------------------------------------------------------------

class RunningMean(nn.Module):
    """The mean of the tokens so far. Its state is a plain tuple of tensors."""

    def __init__(self, d):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d))

    def forward(self, x, state=None):
        zeros = x.new_zeros(len(x), x.shape[2]), x.new_zeros(len(x))
        total, count = state or zeros
        total = total[:, None] + x.cumsum(1)
        count = count[:, None] + torch.arange(1, x.shape[1] + 1)
        return self.scale * total / count[..., None], (total[:, -1], count[:, -1])


class SeesEmbedding(RunningMean):
    needs_embedding = skips_norm = True

    def forward(self, x, state=None, embedding=None):
        return embedding - x, state


def test_a_layer_of_ones_own_trains(monkeypatch, train_tiny):
    monkeypatch.setitem(LAYERS, "mean", RunningMean)
    result, = train_tiny("--model", "2xmean+attention", "--M", 2, "--steps", 5)
    assert result["config"]["model"] == "2xmean+attention"
    model, tokens = model_and_tokens("mean+attention")
    whole = model.run_layers(tokens)[0]
    assert torch.allclose(in_segments(model.run_layers, tokens, [4])[0], whole, atol=1e-12)


def test_a_layer_gets_what_it_says_it_needs(monkeypatch):
    monkeypatch.setitem(LAYERS, "sees", SeesEmbedding)
    model, tokens = model_and_tokens("rnn+sees")
    x, _ = model.run_layers(tokens)
    assert torch.allclose(x, model.embedding(tokens), atol=1e-12)      # x + (embedding - x)
    assert isinstance(model.norms[1], nn.Identity)


@pytest.mark.parametrize("wrong", [lambda x: x[:, 1:], lambda x: x[:, :1], lambda x: x[..., :1],
                                   lambda x: x.repeat(2, 1, 1)])
def test_a_layer_that_changes_the_shape_is_refused(wrong, monkeypatch):
    """Cut or broadcast, it would train without a word."""
    class Wrong(nn.Module):
        def __init__(self, d):
            super().__init__()

        def forward(self, x, state=None):
            return wrong(x), state
    monkeypatch.setitem(hybrid.LAYERS, "wrong", Wrong)
    model = build_model("wrong+attention", d=8)
    for at in (None, torch.zeros(2, dtype=torch.long)):
        with pytest.raises(ValueError, match="Wrong returned y"):
            model(torch.zeros(2, 9, dtype=torch.long), at)


def test_a_layer_without_a_state_is_refused(monkeypatch):
    """Two sequences would be taken for y and a state."""
    class Stateless(nn.Module):
        def __init__(self, d):
            super().__init__()

        def forward(self, x, state=None):
            return x
    monkeypatch.setitem(hybrid.LAYERS, "stateless", Stateless)
    with pytest.raises(ValueError, match="Stateless must return y and its next state"):
        build_model("stateless", d=8)(torch.zeros(2, 9, dtype=torch.long))


@pytest.mark.parametrize("name, flag, value", [("rope", "d_state", 4), ("mamba", "n_heads", 2)])
def test_an_option_that_no_layer_takes_is_refused(name, flag, value):
    sentence = f"--{flag.replace('_', '-')} is {value}, but no layer of {name} takes it"
    with pytest.raises(ValueError, match=sentence):
        build_model(name, **{flag: value})
    build_model("hybrid-a", **{flag: value})


def test_only_the_last_layer_may_skip_tokens(monkeypatch):
    model, tokens = model_and_tokens("hybrid-a")
    calls = []
    forward = hybrid.Attention.forward

    def noted(self, x, state=None, last_only=False):
        calls.append((x.shape[1], last_only))
        return forward(self, x, state, last_only)
    monkeypatch.setattr(hybrid.Attention, "forward", noted)
    model(tokens)
    build_model("nope").double()(tokens)
    assert calls == [(13, True), (13, False), (13, True)]


def test_a_count_of_zero():
    for name in ("0xmamba", "mlp+00xmamba"):
        with pytest.raises(ValueError, match="a count must be at least 1"):
            layer_words(name)
