"""inside.py: what is shown is what the layers did, and the figure says it."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import inside
from conftest import relative
from hybrid import build_model
from mamba import selective_scan_ref


def look_into(stack, L=12, n_heads=1):
    """A model with random weights -> for each layer (layer, x, y, what inside says of it)."""
    torch.manual_seed(0)
    model = build_model(stack, L=L, n_heads=n_heads).double()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    tokens, calls = torch.randint(16, (L + 1,)), []

    def watch(layer, inputs, output):
        calls.append((layer, inputs[0].detach(), output[0].detach()))
    for layer in model.layers:
        layer.register_forward_hook(watch)
    with torch.no_grad():
        model.run_layers(tokens[None])                          # all tokens of the last layer too
    seen, calls = calls, []
    logits, found = inside.inspect_layers(model, tokens)
    assert np.allclose(logits, model(tokens[None])[0].detach())
    inner = [m for m in model.modules() if m not in list(model.layers)]
    assert not any(module._forward_hooks for module in inner), "a hook was left behind"
    return [(*call, of_layer) for call, of_layer in zip(seen, found)]


@pytest.mark.parametrize("stack, n_heads, attentions", [
    ("2xattention", 1, 2), ("2xrope", 1, 2), ("attention+rope", 2, 2),
    ("rope-half+rope-fast", 1, 2), ("position+attention", 4, 1), ("window+mlp+grouped", 4, 2)])
def test_maps_are_the_weights_that_attention_used(stack, n_heads, attentions):
    layers = [call for call in look_into(stack, n_heads=n_heads) if call[3]]
    assert len(layers) == attentions
    for layer, x, y, found in layers:
        maps, L = torch.tensor(found["maps"]), x.shape[1]                       # (H, L, L)
        assert maps.shape == (n_heads, L, L)
        assert torch.allclose(maps.sum(-1), torch.ones(()).double()) and (maps >= 0).all()
        assert (maps.triu(1) == 0).all()
        v = layer.qkv(x[0])[:, layer.qkv.weight.shape[1]:].chunk(2, dim=-1)[1]  # after q and k
        P = x.shape[-1] // n_heads
        v = v.view(L, -1, P).transpose(0, 1)
        v = v.repeat_interleave(n_heads // len(v), 0)                           # (H, L, P)
        out = layer.out_proj((maps @ v).transpose(0, 1).reshape(L, -1))
        assert relative(out, y[0]) < 1e-6                               # angles may be float32


def test_steps_are_those_that_mamba_used():
    for layer, x, y, found in look_into("2xmamba"):
        dt = torch.tensor(found["dt"]).T                                        # (L, D)
        assert dt.shape == (13, 16) and (dt > 0).all()
        u, z = layer.in_proj(x).chunk(2, dim=-1)
        u = F.silu(F.conv1d(F.pad(u.mT, (3, 0)), *layer.conv1d.parameters(), groups=u.shape[2]).mT)
        _, B, C = layer.x_proj(u).split([layer.dt_rank, 16, 16], dim=-1)
        scanned, _ = selective_scan_ref(u, dt[None], -layer.A_log.exp(), B, C)
        assert relative(layer.out_proj((scanned + layer.D * u) * F.silu(z)), y) < 1e-12
        decays = (-dt[:, :, None] * layer.A_log.exp()).exp()                    # (L, D, N)
        kept = torch.stack([decays[t + 1:].prod(0) for t in range(13)])
        assert np.allclose(found["kept"], kept.mean(-1).T.detach())


def test_the_weights_of_all_tokens_add_up_to_the_state():
    torch.manual_seed(0)
    u, dt, A = torch.randn(9, 3).double(), torch.rand(9, 3).double(), -torch.rand(3, 4).double()
    B, C = torch.randn(2, 9, 4).double()
    _, h = selective_scan_ref(u[None], dt[None], A, B[None], C[None])
    weighted = inside.share_kept(dt, A) * (dt * u)[:, :, None] * B[:, None]    # (L, D, N)
    assert torch.allclose(weighted.sum(0), h[0])


def test_channels_that_keep_the_value():
    dt = np.zeros((5, 25))                                     # q at 5, v at 6, seen until 9
    dt[:, [0, 1, 2, 5, 24]] = 1.0                              # the start and both q do not count
    dt[:3, 9] = 0.2
    dt[0, [3, 4, 10, 23]] = 2e-6                               # over 16 idle tokens a mean of 5e-7
    dt[1, 10] = 1e-4                                           # leaks
    dt[3, 10] = 0.2                                            # writes too late
    assert inside.count_keepers(dt, 5, 6, taps=4) == 2         # channels 0 and 2
    assert inside.count_keepers(dt, 5, 6, taps=5) == 4         # seen until 10: the next two as well
    assert inside.count_keepers(dt[:, :5], 1, 3, taps=4) == 0


def a_look(layers, K=16, n=25):
    tokens = np.arange(n) % K
    config = dict(model="a$b", M=4, tau=1, K=K, d=8, L=64, seed=3)
    return {"config": config, "tokens": tokens, "q": 11, "v": 12, "label": 12, "answer": 5,
            "layers": layers}


def test_the_figure_of_attention_says_who_looks_at_whom():
    weights = np.zeros((1, 25, 25))
    weights[0, 12, 11], weights[0, 24, 12] = 0.25, 0.75
    fig = inside.draw(a_look([{}, {"maps": weights}]))
    assert fig.get_suptitle() == ("a?b, M = 4, tau = 1, d = 8, L = 64, seed 3\n"
                                  "24 tokens, then the query: answer 5, label v = 12, wrong")
    part, = fig.subfigs
    assert part.get_suptitle() == "layer 2 of 2: attention"
    ax = part.axes[0]
    assert ax.get_title() == "v looks at q: 0.25\nlast q looks at v: 0.75"
    assert ax.get_xlabel() == "token looked at (key)"
    assert ax.get_ylabel() == "token that looks (query)"
    image = ax.images[0].get_array().filled(np.nan)
    assert image[12, 11] == 0.25 and image[24, 12] == 0.75
    assert np.isnan(image[0, 1:]).all() and not np.isnan(image[-1]).any()      # grey, not 0
    assert [t.get_text() for t in ax.get_xticklabels()] == [str(t % 16) for t in range(25)]
    marks = {(t.get_text(), t.xy[0]) for t in ax.texts if t.xy[1] == 1}
    assert marks == {("q", 11), ("v", 12), ("q", 24)}
    edges = {line.get_xdata()[0] for line in ax.lines if line.get_ydata() == [0, 1]}
    assert edges == {10.5, 11.5, 12.5, 23.5, 24.5}


def test_a_long_sequence_names_some_of_its_tokens():
    fig = inside.draw(a_look([{"maps": np.zeros((1, 65, 65))}], n=65))
    ax = fig.subfigs[0].axes[0]
    for axis in ax.xaxis, ax.yaxis:
        assert axis.get_ticklocs().tolist() == list(range(0, 65, 2))
        names = [label.get_text() for label in axis.get_ticklabels()]
        assert names == [str(token % 16) for token in range(0, 65, 2)]


def test_the_figure_of_mamba_keeps_channels_together():
    dt = np.full((2, 25), 0.1)
    dt[1] = 0.0
    dt[1, 12] = 2.0                                            # a wide range: on top
    kept = np.linspace(0.5, 1, 50).reshape(2, 25)
    fig = inside.draw(a_look([{"dt": dt, "kept": kept, "taps": 4}]))
    axes = [ax for ax in fig.axes if ax.images and ax.get_title()]
    shown = [ax.images[0].get_array() for ax in axes]
    for image, expected in zip(shown, (dt, kept, dt * kept)):
        assert np.allclose(image, expected[::-1])
    said = ("1 of 2 could hold v for a million tokens if A = -1:\n"
            "Δ > 0.1 at v or soon after, mean Δ < 1e-6 elsewhere")
    assert said in axes[0].get_title()
    assert [ax.get_ylabel() for ax in axes] == ["2 channels"] * 3
    assert axes[-1].get_xlabel() == "token, mixed by the convolution with the 3 before it"


@pytest.mark.parametrize("flags", [
    ["--model", "rope"], ["--model", "position+mamba+attention", "--n-heads", "2", "--tau", "7"],
    ["--model", "mamba", "--d", "16", "--L", "40", "--tau", "15"]])
def test_a_checkpoint_is_drawn(train_tiny, tmp_path, capsys, flags):
    train_tiny(*flags, "--steps", "2")
    path, = (tmp_path / "out").glob("*.pt")
    capsys.readouterr()
    found = inside.inspect_run(str(path))
    tokens, q, v, config = found["tokens"], found["q"], found["v"], found["config"]
    assert len(tokens) - 1 == min(max(24, 2 * config["tau"]), config["L"])
    assert v == q + config["tau"] < len(tokens) - 1 and tokens[v] == found["label"]
    assert tokens[q] == tokens[-1] and (tokens == tokens[-1]).sum() == 2
    written = inside.main([str(path), str(path), "--out", str(tmp_path / "figures")])
    assert written == [str(tmp_path / "figures" / f"inside_{path.stem}.png")]
    assert capsys.readouterr().out.split() == written
    assert os.listdir(tmp_path / "figures") == [os.path.basename(written[0])]
    with open(written[0], "rb") as f:
        assert f.read(4) == b"\x89PNG"


def test_one_unfit_checkpoint_does_not_prevent_the_others(train_tiny, tmp_path, capsys, refuses):
    train_tiny("--model", "attention", "--seed", "0", "1", "--steps", "1")
    train_tiny("--model", "mlp", "--steps", "1", out=tmp_path / "mlp")
    train_tiny("--model", "attention", "--steps", "1", out=tmp_path / "other")
    good, bad = sorted((tmp_path / "out").glob("*.pt"))
    bad.write_bytes(bad.read_bytes()[:1000])
    mlp, same = next((tmp_path / "mlp").glob("*.pt")), tmp_path / "other" / good.name
    capsys.readouterr()
    paths = [mlp, bad, tmp_path / "none.pt", good, same]
    assert len(inside.main([*map(str, paths), "--out", str(tmp_path / "figures")])) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and all(line.startswith("inside.py: left out: ") for line in errors)
    with pytest.raises(SystemExit) as stop:
        inside.main([str(bad), "--out", str(tmp_path / "x")])
    assert stop.value.code == 2 and str(bad) in capsys.readouterr().err
    assert "none.pt" in refuses(inside.main, [tmp_path / "none.pt"])            # one sentence
    assert "--out" in refuses(inside.main, [good, "--out", good])
    assert not (tmp_path / "x").exists()
