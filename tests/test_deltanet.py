"""family/deltanet.py: the chunks equal the recurrence, and the recurrence is the published
formula."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import in_segments, relative
from family.deltanet import GatedDeltaNet, delta_rule, delta_rule_ref, unit
from family.triangular import UnitTriangularSolve, unit_inverse, unit_inverse_by_blocks


def operands(b=2, L=37, H=2, N=5, P=3, first=True, decay=1.0, states=None):
    torch.manual_seed(0)
    q, k = torch.randn(2, b, L, H, N).double()
    v, beta = torch.randn(b, L, H, P).double(), torch.rand(b, L, H).double()
    log_a = -decay * torch.rand(b, L, H).double()
    S = torch.randn(states or b, H, P, N).double() if first else None
    return [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, log_a, S]


def everything(form, inputs):
    """y, the last state, and the gradient of a random sum of both with respect to each input."""
    inputs = [None if v is None else v.clone().requires_grad_() for v in inputs]
    y, S = form(*inputs)
    generator = torch.Generator().manual_seed(1)
    loss = sum((v * torch.randn(v.shape, generator=generator)).sum() for v in (y, S))
    return [y, S, *torch.autograd.grad(loss, [v for v in inputs if v is not None])]


def test_recurrence_is_the_formula_of_the_paper():
    """S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, with the matrix written out."""
    inputs = operands(b=1, L=9, H=1)
    y, last = delta_rule_ref(*inputs)
    q, k, v, beta, log_a, S = (u.numpy()[0] for u in inputs)
    S = S[0]
    for t in range(9):
        kt, bt = k[t, 0], beta[t, 0]
        S = np.exp(log_a[t, 0]) * S @ (np.eye(5) - bt * np.outer(kt, kt))
        S = S + bt * np.outer(v[t, 0], kt)
        assert np.allclose(y[0, t, 0].numpy(), S @ q[t, 0], atol=1e-12)
    assert np.allclose(last[0, 0].numpy(), S, atol=1e-12)


def test_operands_of_other_lengths_are_refused():
    inputs = operands()
    for k in range(5):
        for rule in (delta_rule_ref, delta_rule):
            with pytest.raises(ValueError):
                rule(*inputs[:k], inputs[k][:, 1:], *inputs[k + 1:])


@pytest.mark.parametrize("shape", [
    {}, dict(L=1), dict(L=16), dict(L=65), dict(H=1), dict(first=False), dict(states=1),
    dict(states=1, L=9)])
@pytest.mark.parametrize("T", [1, 4, 16, 100])
def test_chunks_equal_the_recurrence(shape, T):
    inputs = operands(**shape)
    chunks = everything(lambda *v: delta_rule(*v, T=T), inputs)
    for found, exact in zip(chunks, everything(delta_rule_ref, inputs), strict=True):
        assert found.shape == exact.shape and relative(found, exact) < 1e-10


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("L", [10, 70])                              # one chunk, and several
def test_bfloat16_multiplies_in_bfloat16_and_keeps_its_state_in_float32(L, first, monkeypatch):
    inputs = operands(b=4, L=L, N=16, P=16, first=first)
    halves = [None if v is None else v.bfloat16() for v in inputs]
    exact = everything(delta_rule_ref, [None if v is None else v.double() for v in halves])
    multiplied = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__",
                        lambda A, B: multiplied.append(A.dtype) or matmul(A, B))
    found = everything(delta_rule, halves)
    assert set(multiplied) == {torch.bfloat16}
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    for v, right in zip(found, exact, strict=True):
        assert relative(v, right) < 0.01


@pytest.mark.parametrize("decay", [0.0, 1e-6, 30.0, 1e4])
def test_weak_and_strong_decay(decay):
    inputs = operands(L=70, decay=decay)
    exact = everything(delta_rule_ref, inputs)
    found = everything(delta_rule, [v.float() for v in inputs])
    assert relative(found[0], exact[0]) < 1e-4 and relative(found[1], exact[1]) < 1e-4
    assert all(v.isfinite().all() for v in found)


def test_gradients_where_strong_and_weak_steps_mix():
    inputs = operands(L=128)
    inputs[4] = torch.where(torch.rand(inputs[4].shape) < 0.5, -30.0, -3e-3).double()
    exact = everything(delta_rule_ref, inputs)
    found = everything(delta_rule, [v.float() for v in inputs])
    for v, right in list(zip(found, exact))[:7]:                     # of S nothing is left
        assert relative(v, right) < 2e-6


@pytest.mark.parametrize("inverse", [unit_inverse, unit_inverse_by_blocks])
@pytest.mark.parametrize("T", [1, 2, 11, 16, 50])
def test_inverse_of_a_unit_triangular_matrix(inverse, T):
    """On and above the diagonal, the matrix is not read. Equal keys are the hardest case: powers of
    the matrix of ones grow to 10^13, while its inverse has ones and minus ones alone."""
    ones = inverse(torch.ones(3, T, T))
    assert torch.equal(ones, (torch.eye(T) - torch.diag(torch.ones(T - 1), -1)).expand(3, T, T))
    torch.manual_seed(0)
    system = torch.rand(2, T, T).double() / 2
    whole = system.tril(-1) + torch.eye(T).double()
    assert relative(inverse(system) @ whole, torch.eye(T).double().expand(2, T, T)) < 1e-12


@pytest.mark.parametrize("T", [1, 2, 11, 16, 50])
def test_triangular_systems_and_their_gradients(T):
    torch.manual_seed(0)
    system, right = torch.rand(2, T, T).double() / 2, torch.randn(2, T, 3).double()
    operands = [v.requires_grad_() for v in (system, right)]
    u = UnitTriangularSolve.apply(*operands)
    exact = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    assert relative(u, exact) < 1e-10
    found, expected = (torch.autograd.grad(y.sin().sum(), operands) for y in (u, exact))
    assert relative(found[1], expected[1]) < 1e-10
    assert relative(found[0], expected[0]) < 1e-10 or T == 1         # nothing below its diagonal


def test_gradients_against_differences():
    inputs = [v.requires_grad_() for v in operands(b=1, L=5, N=3, P=2)]
    assert torch.autograd.gradcheck(lambda *v: delta_rule(*v, T=2), inputs)


@pytest.mark.parametrize("L", [5, 40])                               # one chunk, and several
@pytest.mark.parametrize("which", range(1, 5))
def test_refuses_a_second_derivative(L, which):
    """It would lack terms."""
    inputs = operands(L=L, first=False)
    inputs[which].requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(delta_rule(*inputs)[1].sum(), inputs[which], create_graph=True)


def test_compiled_in_one_graph():
    inputs = operands(L=40)
    compiled = torch.compile(delta_rule, backend="aot_eager", fullgraph=True)
    for found, exact in zip(everything(compiled, inputs), everything(delta_rule, inputs)):
        assert relative(found, exact) < 1e-12


def test_a_full_correction_recalls_the_last_value():
    """beta = 1 and no decay: what is read under a key is the value last written there."""
    torch.manual_seed(0)
    keys = torch.eye(4).double()[torch.tensor([0, 1, 2, 0, 3])][None, :, None]
    values = torch.randn(1, 5, 1, 3).double()
    ones = torch.ones(1, 5, 1).double()
    _, S = delta_rule(keys, keys, values, ones, 0 * ones)
    assert torch.allclose(S[0, 0].T, values[0, [3, 1, 2, 4], 0], atol=1e-12)


KINDS = [dict(gated=True), dict(gated=False), dict(d_conv=None), dict(gated=False, d_conv=None)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[], [1], [5, 2, 11], [30]])
def test_layer_in_segments(kind, sizes):
    torch.manual_seed(0)
    layer, x = GatedDeltaNet(8, 2, d_state=4, **kind).double(), torch.randn(2, 37, 8).double()
    (whole, last), (y, state) = layer(x), in_segments(layer, x, sizes)
    assert relative(y, whole) < 1e-10 and relative(state.S, last.S) < 1e-10
    assert torch.allclose(state.conv, last.conv, atol=1e-12)
    assert state.S.shape == (2, 2, 8, 4) and state.conv.shape[2] == (0 if "d_conv" in kind else 3)


@pytest.mark.parametrize("which", range(5))
def test_nan_in_one_argument(which):
    """One head of q, k, v, beta or log_a at step 21: the steps before are as without it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 40, 2, 4).double()
    arguments = [unit(q), unit(k), v, torch.rand(2, 40, 2).double(), -torch.rand(2, 40, 2).double()]
    right, _ = delta_rule(*arguments)
    arguments[which][1, 21, 0] = float("nan")
    y, S = delta_rule(*arguments)
    exact, last = delta_rule_ref(*arguments)
    assert torch.equal(y[0], right[0]) and torch.equal(y[1, :21], right[1, :21])
    assert exact[1, 21].isnan().any() and y[exact.isnan()].isnan().all()
    assert S[last.isnan()].isnan().all() and S[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_causal_and_differentiable(kind):
    torch.manual_seed(0)
    layer, x = GatedDeltaNet(4, d_state=3, **kind).double(), torch.randn(1, 9, 4).double()
    changed = x.clone()
    changed[:, 5:] += 1
    difference = (layer(x)[0] - layer(changed)[0]).abs().amax((0, 2))
    assert (difference[:5] < 1e-12).all() and (difference[5:] > 1e-6).all()
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x.requires_grad_())
    layer(x)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_layer_is_its_figure():
    torch.manual_seed(0)
    layer, x = GatedDeltaNet(8, 2, d_state=4).double(), torch.randn(2, 9, 8).double()
    for p in layer.parameters():
        p.data = torch.randn_like(p) / 2
    qkv = F.silu(F.conv1d(F.pad((x @ layer.qkv.weight.T).mT, (3, 0)), layer.conv1d.weight,
                          layer.conv1d.bias, groups=32).mT)
    q, k, v = qkv[..., :8].view(2, 9, 2, 4), qkv[..., 8:16].view(2, 9, 2, 4), qkv[..., 16:]
    q, k = (u / (u.square().sum(-1, keepdim=True) + 1e-6).sqrt() for u in (q, k))
    beta = torch.sigmoid(x @ layer.b_proj.weight.T)
    log_a = -layer.A_log.exp() * F.softplus(x @ layer.a_proj.weight.T + layer.dt_bias)
    y, _ = delta_rule_ref(q / 2, k, v.reshape(2, 9, 2, 8), beta, log_a)
    y = F.rms_norm(y, (8,), eps=1e-5) * layer.o_norm
    y = y.flatten(2) * F.silu(x @ layer.g_proj.weight.T)
    assert relative(layer(x)[0], y @ layer.o_proj.weight.T) < 1e-12


def test_what_deltanet_leaves_out():
    names = {name.split(".")[0] for name in GatedDeltaNet(8, gated=False, d_conv=None).state_dict()}
    assert names == {"qkv", "b_proj", "o_norm", "o_proj"}


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_half_precision_and_autocast(dtype, tolerance):
    torch.manual_seed(0)
    layer, x = GatedDeltaNet(16), torch.randn(2, 40, 16)
    exact, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
    assert relative(y, exact) < 5e-2 and state.S.dtype == torch.float32
    y, state = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype and relative(y, exact) < tolerance and state.S.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_square_in_float32(dtype):
    v = torch.tensor([300.0, -300.0, 300.0, 300.0], dtype=dtype)
    right = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=dtype)
    layer = GatedDeltaNet(4, expand=1, gated=False).to(dtype)
    torch.nn.init.eye_(layer.o_proj.weight)
    assert torch.equal(layer.output(v.view(1, 1, 1, 4), None).flatten(), right)
    assert torch.equal(unit(v), right / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_segments_and_batches(kind):
    layer, x = GatedDeltaNet(8, **kind), torch.randn(3, 5, 8)
    _, state = layer(x)
    y, same = layer(x[:, :0], state)
    assert y.shape == (3, 0, 8) and same is state
    assert layer(x[:, :0])[0].shape == (3, 0, 8) and layer(x[:0])[0].shape == (0, 5, 8)


def test_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="--n-heads is 3, but it must divide 16 channels"):
        GatedDeltaNet(8, 3)
