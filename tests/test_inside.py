"""inside.py and plot.py --inside: what is shown is what the layers did; files that are no checkpoints."""

import os

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import inside
import plot
from conftest import relative
from hybrid import build_model
from mamba import selective_scan_ref


def look_into(pattern, L=12, n_heads=1):
    """A model with random weights, its inputs and outputs at each layer, and what inside says of each -> a list of triples."""
    torch.manual_seed(0)
    model = build_model(pattern, L=L, n_heads=n_heads).double()
    for layer in model.layers:
        if hasattr(layer, "qkv"):
            torch.nn.init.normal_(layer.qkv.bias)
    tokens, calls = torch.randint(16, (L + 1,)), []
    hooks = [layer.register_forward_hook(lambda layer, inputs, output: calls.append((layer, inputs[0], output[0])))
             for layer in model.layers]
    logits, found = inside.look_at(model, tokens)
    for hook in hooks:
        hook.remove()
    assert np.allclose(logits, model(tokens[None])[0].detach())
    assert not any(module._forward_hooks for module in model.modules()), "a hook was left behind"
    return [(*call, of_layer) for call, of_layer in zip(calls, found)]


@pytest.mark.parametrize("pattern, n_heads", [("AA", 1), ("RR", 1), ("AR", 2), ("PA", 4), ("SFG", 4)])
def test_maps_are_what_attention_used(pattern, n_heads):
    seen = [call for call in look_into(pattern, n_heads=n_heads) if call[3]]
    assert len(seen) == sum(pattern.count(letter) for letter in "ARSG")
    for layer, x, y, found in seen:
        maps = torch.tensor(found["maps"])                                             # (H, L, L)
        L = x.shape[1]
        assert maps.shape == (n_heads, L, L)
        assert torch.allclose(maps.sum(-1), torch.ones(()).double())
        assert (maps.triu(1) == 0).all() and (maps >= 0).all()
        v = layer.qkv(x[0]).split(layer.sizes, dim=-1)[2].view(L, layer.kv_heads, -1).transpose(0, 1)
        v = v.repeat_interleave(n_heads // layer.kv_heads, 0)                          # (H, L, P)
        assert relative(layer.out_proj((maps @ v).transpose(0, 1).reshape(L, -1)), y[0]) < 1e-6  # rotary is in float32


def test_steps_are_what_mamba_used():
    for layer, x, y, found in look_into("MM"):
        dt = torch.tensor(found["dt"]).T                                               # (L, D)
        assert dt.shape == (13, 16) and (dt > 0).all()
        u, z = layer.in_proj(x).chunk(2, dim=-1)
        u = F.silu(layer.conv1d(u.mT)[..., :-3].mT)
        _, B, C = layer.x_proj(u).split([layer.dt_rank, 16, 16], dim=-1)
        scanned, _ = selective_scan_ref(u, dt[None], -layer.A_log.exp(), B, C)
        assert relative(layer.out_proj((scanned + layer.D * u) * F.silu(z)), y) < 1e-12


def test_what_is_left_is_the_product_of_the_decays():
    for layer, _, _, found in look_into("MA")[:1]:
        dt, A = torch.tensor(found["dt"]).T, -layer.A_log.detach().exp()
        left = torch.stack([torch.exp(dt[t + 1:, :, None] * A).prod(0) for t in range(len(dt))])  # (L, D, N)
        assert torch.allclose(inside.what_is_left(dt, A), left)
        assert np.allclose(found["left"], left.mean(-1).T)
        assert (found["left"][:, -1] == 1).all() and (np.diff(found["left"]) > 0).all()


def test_the_weights_add_up_to_the_state():
    torch.manual_seed(0)
    u, dt, A = torch.randn(9, 3).double(), torch.rand(9, 3).double(), -torch.rand(3, 4).double()
    B, C = torch.randn(2, 9, 4).double()
    _, h = selective_scan_ref(u[None], dt[None], A, B[None], C[None])
    weighted = inside.what_is_left(dt, A) * (dt * u)[:, :, None] * B[:, None]          # (L, D, N)
    assert torch.allclose(weighted.sum(0), h[0])


def draw(tmp_path, capsys, paths):
    capsys.readouterr()
    plot.main(["--inside", *map(str, paths), "--out", str(tmp_path / "figures")])
    return capsys.readouterr().out.split()


@pytest.mark.parametrize("flags, texts", [
    (["--model", "rope"], ["layer 1 of 2: attention", "layer 2 of 2: attention"]),
    (["--model", "PMA", "--n-heads", "2", "--tau", "7"], ["layer 2 of 3: Mamba", "layer 3 of 3: attention"]),
    (["--model", "M", "--d", "16", "--L", "40", "--tau", "15"], ["layer 1 of 1: Mamba"]),
])
def test_the_figure(train_tiny, tmp_path, capsys, flags, texts):
    train_tiny(*flags)
    path, = (tmp_path / "out").glob("*.pt")
    name, = draw(tmp_path, capsys, [path])
    assert os.listdir(tmp_path / "figures") == [f"inside_{path.stem}.png"] == [os.path.basename(name)]
    image = matplotlib.image.imread(name)[..., :3]
    assert image.shape[1] >= 1000 and 0.2 < (image == 1).all(-1).mean() < 0.99         # white, but not blank

    look = inside.look(str(path))
    tokens, q, v = look["tokens"], look["q"], look["v"]
    assert len(tokens) - 1 == min(max(24, 2 * look["config"]["tau"]), look["config"]["L"])
    assert v == q + look["config"]["tau"] < len(tokens) - 1
    assert tokens[q] == tokens[-1] and tokens[v] == look["label"] and (tokens == tokens[-1]).sum() == 2
    fig = inside.draw(look)
    assert [part.get_suptitle() for part in fig.subfigs] == texts
    verdict = "right" if look["answer"] == look["label"] else "wrong"
    assert f"answer {look['answer']}, label v = {look['label']}, {verdict}" in fig.get_suptitle()
    fig.draw_without_rendering()
    titles = [part._suptitle for part in fig.subfigs] + [ax.title for ax in fig.axes if ax.get_title()] + [fig._suptitle]
    boxes = [title.get_window_extent() for title in titles]
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
    assert all(fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1 for box in boxes)
    for ax in fig.axes:
        if ax.images:
            marks = {(text.get_text(), text.xy[0]) for text in ax.texts if text.xy[1] == 1}
            assert marks == {("q", q), ("v", v), ("q", len(tokens) - 1)}


def test_the_map_says_who_looks_at_whom(train_tiny, tmp_path):
    train_tiny("--model", "A")
    look = inside.look(str(next((tmp_path / "out").glob("*.pt"))))
    last = len(look["tokens"]) - 1
    w = np.zeros((1, last + 1, last + 1))
    w[0, look["v"], look["q"]], w[0, last, look["v"]] = 0.25, 0.75
    (title, image, _, _), = inside.images({"maps": w}, look)
    assert title == "v looks at q: 0.25\nlast q looks at v: 0.75"
    assert np.isnan(image[0, 1:]).all() and not np.isnan(image[-1]).any()              # the future is not drawn as a zero


def test_channels_that_hold_the_value():
    dt = np.zeros((5, 25))                                     # q at 5, v at 6, which the convolution sees until 9
    dt[:, [0, 1, 2, 5, 24]] = 1.0                              # the start, q and the last q: no matter
    dt[:3, 9] = 0.2
    dt[0, [3, 4, 10, 23]] = 2e-6                               # of 16 tokens that do not matter: a mean of 5e-7
    dt[1, 10] = 1e-4                                           # leaks
    dt[3, 10] = 0.2                                            # writes too late
    assert inside.holding(dt, 5, 6) == 2                       # channels 0 and 2
    assert inside.holding(dt[:, :5], 1, 3) is None


def test_channels_stay_together():
    layer = {"dt": np.array([[0.1, 0.1, 0.1], [0.0, 2.0, 0.0]]), "left": np.array([[0.8, 0.9, 1.0], [0.1, 1.0, 1.0]])}
    images = [image.tolist() for _, image, _, _ in inside.images(layer, {"q": 0, "v": 1})]
    assert images == [layer["dt"][::-1].tolist(), layer["left"][::-1].tolist(), (layer["dt"] * layer["left"])[::-1].tolist()]
    _, dt, _, colours = inside.images(layer, {"q": 0, "v": 1})[0]
    assert colours["norm"](dt)[0].tolist()[0] == 0  # a step that underflows is pale, not missing


def test_one_figure_for_each_checkpoint(train_tiny, tmp_path, capsys, refuses):
    train_tiny("--model", "A", "--seed", "0", "1", "--steps", "1")
    paths = sorted((tmp_path / "out").glob("*.pt"))
    assert len(draw(tmp_path, capsys, paths + paths[:1])) == 2                         # the same file twice is harmless
    train_tiny("--model", "A", "--steps", "1", out=tmp_path / "other")
    other = tmp_path / "other" / paths[0].name
    assert "give each its own --out" in refuses(plot.main, ["--inside", paths[0], other, "--out", tmp_path / "none"])
    assert not (tmp_path / "none").exists()


BAD = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "no checkpoint": lambda path: path.write_text("{}"),
    "another checkpoint": lambda path: torch.save({"weights": torch.ones(3)}, path),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
    "without its JSON": lambda path: path.with_suffix(".json").unlink(),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints(train_tiny, tmp_path, capsys, refuses, case):
    train_tiny("--model", "A", "--seed", "0", "1", "--steps", "1")
    good, bad = sorted((tmp_path / "out").glob("*.pt"))
    BAD[case](bad)
    error = refuses(plot.main, ["--inside", good, bad, "--out", tmp_path / "figures"])
    assert error.startswith("plot.py: ") and bad.stem in error
    assert not (tmp_path / "figures").exists() and capsys.readouterr().out == ""


def test_wrong_commands(train_tiny, tmp_path, refuses):
    train_tiny("--model", "P", "--steps", "1")
    path, = (tmp_path / "out").glob("*.pt")
    result, out = path.with_suffix(".json"), tmp_path / "figures"
    assert "nothing to look at" in refuses(plot.main, ["--inside", path, "--out", out])
    assert "--inside" in refuses(plot.main, ["--inside"])
    assert "either results" in refuses(plot.main, [result, "--inside", path, "--out", out])
    assert "not a whole checkpoint" in refuses(plot.main, ["--inside", result, "--out", out])
    assert "not a whole result" in refuses(plot.main, [path, "--out", out])
    assert "either results" in refuses(plot.main, [])
    assert not out.exists()


def test_no_place_for_the_figure(train_tiny, tmp_path, refuses):
    train_tiny("--model", "A", "--steps", "1")
    path, = (tmp_path / "out").glob("*.pt")
    assert "--out" in refuses(plot.main, ["--inside", path, "--out", path])
