"""The Mamba layer: the published one, in segments, and inside torch's own tools."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune

import fused_scan
from conftest import in_segments
from mamba import CausalConv1d, Mamba, compare_forms, selective_scan_ref
from test_mamba import CHUNK, operands, small_chunks  # noqa: F401


def layer_and_input(L, **options):
    torch.manual_seed(0)
    layer = Mamba(6, **options).double()
    nn.init.normal_(layer.D)
    return layer, torch.randn(2, L, 6, dtype=torch.float64)


def gradients_of(y, layer, dy=None):
    dy = torch.ones_like(y) if dy is None else dy
    return torch.autograd.grad(y, list(layer.parameters()), dy)


def all_close(a, b, atol=1e-12):
    return all(torch.allclose(v, w, atol=atol) for v, w in zip(a, b, strict=True))


# ---- the published layer ----

@pytest.mark.parametrize("d_model, d_inner, dt_rank", [(8, 16, 1), (64, 128, 4), (20, 40, 2)])
def test_state_dict_is_the_official_one(d_model, d_inner, dt_rank):
    official = {
        "A_log": (d_inner, 16), "D": (d_inner,), "in_proj.weight": (2 * d_inner, d_model),
        "conv1d.weight": (d_inner, 1, 4), "conv1d.bias": (d_inner,),
        "x_proj.weight": (dt_rank + 32, d_inner), "dt_proj.weight": (d_inner, dt_rank),
        "dt_proj.bias": (d_inner,), "out_proj.weight": (d_model, d_inner)}
    ours = {name: tuple(v.shape) for name, v in Mamba(d_model).state_dict().items()}
    assert ours == official


def test_initial_values():
    torch.manual_seed(0)
    layer = Mamba(64)
    assert torch.allclose(-torch.exp(layer.A_log), -torch.arange(1.0, 17).expand(128, 16))
    assert (layer.D == 1).all()
    dt = F.softplus(layer.dt_proj.bias)
    assert 0.999e-3 < dt.min() < 2e-3 and 5e-2 < dt.max() < 1.001e-1
    assert 5e-3 < dt.median() < 2e-2                                     # uniform on a log scale
    assert 0.4 < layer.dt_proj.weight.abs().max() <= 0.5                 # dt_rank^-1/2


def plain_mamba(layer, x):
    """The layer as in the paper's figure 3 and the official module, with PyTorch's convolution."""
    L = x.shape[1]
    x, z = layer.in_proj(x).chunk(2, dim=-1)
    weight, bias = layer.conv1d.weight, layer.conv1d.bias
    x = F.conv1d(x.mT, weight, bias, padding=weight.shape[2] - 1, groups=len(weight))[:, :, :L].mT
    x = F.silu(x)
    sizes = [layer.dt_rank, layer.d_state, layer.d_state]
    dt, B, C = (x @ layer.x_proj.weight.T).split(sizes, dim=-1)
    dt = F.softplus(dt @ layer.dt_proj.weight.T + layer.dt_proj.bias)
    y, _ = selective_scan_ref(x, dt, -layer.A_log.exp(), B, C)
    return ((y + layer.D * x) * F.silu(z)) @ layer.out_proj.weight.T


@pytest.mark.parametrize(
    "options", [{}, dict(d_state=3, d_conv=2, expand=3, dt_rank=2), dict(d_conv=7)])
@pytest.mark.parametrize("L", [1, 2, 20])
def test_layer_equals_plain_mamba(L, options):
    layer, x = layer_and_input(L, **options)
    y, expected = layer(x)[0], plain_mamba(layer, x)
    assert torch.allclose(y, expected, atol=1e-12)
    dy = torch.randn_like(y)
    assert all_close(gradients_of(y, layer, dy), gradients_of(expected, layer, dy))


# ---- segments ----

@pytest.mark.parametrize("d_conv", [2, 4])
@pytest.mark.parametrize("sizes", [[], [1, 2, 5], [2, 2], [9], [16, 3], [4, 0, 6]])
def test_segments_equal_one_call(sizes, d_conv):
    layer, x = layer_and_input(20, d_conv=d_conv)
    y, state = layer(x)
    y_segments, state_segments = in_segments(layer, x, sizes)
    assert torch.allclose(y, y_segments, atol=1e-12)
    assert all_close(state, state_segments)


def test_gradient_through_segments():
    layer, x = layer_and_input(20)
    whole = gradients_of(layer(x)[0].square().sum(), layer)
    segments = gradients_of(in_segments(layer, x, [7, 9])[0].square().sum(), layer)
    assert all_close(whole, segments, atol=1e-10)


def test_causal():
    layer, x = layer_and_input(12)
    changed = x.clone()
    changed[:, 5:] += 1
    difference = (layer(x)[0] - layer(changed)[0]).abs().amax((0, 2))
    assert (difference[:5] == 0).all() and (difference[5:] > 1e-6).all()


@torch.no_grad()
def test_state_does_not_grow():
    layer, x = layer_and_input(100)
    for L in (1, 2, 100):
        state = layer(x[:, :L])[1]
        assert state.conv.shape == (2, 12, 3) and state.h.shape == (2, 12, 16)
        # Nor may it hold on to more memory than it shows.
        assert all(v.untyped_storage().nbytes() <= 8 * 2 * 12 * 16 for v in state), f"{L} tokens"


@pytest.mark.parametrize("b, L", [(2, 0), (0, 5), (0, 1), (0, 0)])
def test_nothing_to_read(b, L):
    layer, x = layer_and_input(5)
    _, before = layer(x[:b])
    y, state = layer(x[:b, :L], before)
    assert y.shape == (b, L, 6)
    assert b == 0 or all(torch.equal(v, w) for v, w in zip(state, before, strict=True))
    assert all(v.eq(0).all() for v in gradients_of(layer(x[:0])[0], layer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layer_keeps_a_float32_state(dtype):
    layer, x = layer_and_input(20)
    exact, _ = layer(x)
    y, state = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype and state.h.dtype == torch.float32
    assert (y - exact).norm() < 0.02 * exact.norm()


# ---- the convolution is a module like any other ----

@pytest.mark.parametrize("L", [1, 2, 7])
@pytest.mark.parametrize("window", [None, torch.ones(2, 5, 3)])
def test_the_convolution_is_that_of_conv1d(L, window):
    torch.manual_seed(0)
    ours, plain = CausalConv1d(5, 4), nn.Conv1d(5, 5, 4, groups=5)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, L, 5)
    before = torch.zeros(2, 5, 3) if window is None else window
    inputs = torch.cat([before, x.mT], dim=2)
    y, after = ours(x, window)
    assert torch.allclose(y, plain(inputs).mT, atol=1e-6)
    assert torch.equal(after, inputs[:, :, -3:])


def test_forward_hooks_on_the_convolution():
    layer, x = layer_and_input(8)
    plain, _ = layer(x)
    layer.conv1d.register_forward_hook(lambda module, arguments, y: (0 * y[0], y[1]))
    assert plain.abs().max() > 0 and layer(x)[0].abs().max() == 0


def test_pruning_and_weight_norm_of_the_convolution():
    layer, x = layer_and_input(8)
    y, _ = layer(x)
    parametrizations.weight_norm(layer.conv1d)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    assert torch.allclose(layer(x)[0], y)
    for _ in range(2):                                   # each step needs a weight computed anew
        layer(x)[0].square().sum().backward()
        optimizer.step()
    assert layer.conv1d.parametrizations.weight.original0.grad.abs().max() > 0

    layer, x = layer_and_input(8)
    prune.random_unstructured(layer.conv1d, "weight", amount=1.0)
    prune.random_unstructured(layer.conv1d, "bias", amount=1.0)
    assert layer(x)[0].abs().max() == 0                  # nothing reaches the scan


# ---- torch's tools ----

@pytest.mark.parametrize("L", [1, 20])
def test_fullgraph_compile(L):
    """One graph, forwards and backwards, from the start and from a state."""
    layer, x = layer_and_input(L)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.no_grad():
        _, state = layer(x)
    for s in (None, state):
        y, expected = compiled(x, s)[0], layer(x, s)[0]
        assert torch.allclose(y, expected)
        assert all_close(gradients_of(y, layer), gradients_of(expected, layer))


def test_export():
    layer, x = layer_and_input(20)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.allclose(exported(x)[0], layer(x)[0])


def test_meta_and_fake_tensors():
    def check(layer, x):
        y, state = layer(x)
        y.sum().backward()
        assert y.shape == (2, 20, 6) and state.h.shape == (2, 12, 5)
        assert layer.A_log.grad.shape == (12, 5)
    check(Mamba(6, d_state=5).to("meta"), torch.empty(2, 20, 6, device="meta"))
    with FakeTensorMode():
        check(Mamba(6, d_state=5), torch.randn(2, 20, 6))


def test_gradients_per_sample():
    layer, x = layer_and_input(20)
    parameters = dict(layer.named_parameters())

    def loss(parameters, sequence):
        y, _ = torch.func.functional_call(layer, parameters, (sequence[None],))
        return y.square().sum()
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        expected = gradients_of(loss(parameters, x[i]), layer)
        assert all_close([v[i] for v in found.values()], expected)


def test_vmap_and_forward_mode():
    layer, x = layer_and_input(20)
    batches = torch.stack([x, 2 * x])
    found = torch.func.vmap(lambda batch: layer(batch)[0])(batches)
    assert torch.allclose(found, torch.stack([layer(x)[0], layer(2 * x)[0]]))

    direction = torch.randn_like(x)
    ahead, behind = layer(x + 1e-6 * direction)[0], layer(x - 1e-6 * direction)[0]
    _, tangent = torch.func.jvp(lambda x: layer(x)[0], (x,), (direction,))
    assert torch.allclose(tangent, (ahead - behind) / 2e-6, atol=1e-8)
    with forward_ad.dual_level():
        y, _ = layer(forward_ad.make_dual(x, direction))
        assert torch.allclose(forward_ad.unpack_dual(y).tangent, tangent)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("b, L, transposed", [
    (1, 1, False), (2, CHUNK, True), (1, CHUNK * CHUNK + 1, False), (2, 37, True),
    (2, 8 * CHUNK, False)])
def test_operators_are_what_they_are_declared_to_be(b, L, transposed, dtype, monkeypatch):
    monkeypatch.setattr(fused_scan, "ONE_GROUP", 8)
    monkeypatch.setattr(fused_scan, "GROUP_CHUNKS", 4)
    x, dt, A, B, C, h = operands(L, b=b)
    x, dt, B, C = (v.to(dtype) for v in (x, dt, B, C))
    A, h = (v.to(torch.promote_types(dtype, torch.float32)) for v in (A, h))
    if transposed:
        x, h = x.mT.contiguous().mT, h.mT.contiguous().mT
    x_k, dt_k, B_k, C_k = (fused_scan.split(v, CHUNK) for v in (x, dt, B, C))
    torch.library.opcheck(fused_scan._scan, (x_k, dt_k, A, B_k, C_k, h, False))
    y, last, *saved = fused_scan._scan(x_k, dt_k, A, B_k, C_k, h, False)
    torch.library.opcheck(
        fused_scan._scan_backward, (x_k, dt_k, A, B_k, C_k, *saved, y, last, False))
    assert last.untyped_storage().nbytes() == last.nbytes, "the last state keeps others alive"


def test_kernels_are_compiled_only_for_training_on_cuda(monkeypatch):
    asked = []

    def scan(x, dt, A, B, C, h, compiled):
        asked.append(compiled)
        return x, h, None
    monkeypatch.setattr(fused_scan, "_scan", scan)
    inputs = operands(5)
    fused_scan.parallel_scan(*inputs)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    fused_scan.parallel_scan(*inputs)
    with fused_scan.compiled_scan(False):
        fused_scan.parallel_scan(*inputs)
    with torch.no_grad():
        fused_scan.parallel_scan(*inputs)
    fused_scan.parallel_scan(*inputs)
    assert asked == [False, True, False, False, True]


def test_what_the_script_prints(capsys):
    compare_forms(b=2, L=20, D=4, N=3)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if " ms" in line]
    assert len(rows) == 5
    assert all(float(row[-1]) < 1e-4 for row in rows)
