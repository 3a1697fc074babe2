"""plot.py and summary.py: which runs belong together, what figures and tables say, what is refused.

The figures are read: the labels and lines of their axes. Results are made up, with numbers that can
be worked out by hand.
"""

import json
import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

import output
import plot


def write(folder, model="rope", M=1, tau=1, K=16, d=8, L=64, seed=0, steps=None, lengths=None,
          at=1.0, beyond=None, sequences=1024, solved=500, name=None, state=(100, 200), **flags):
    """A result as train.py writes it -> its path. Accuracy is chance until the step `solved`, then
    `at`; by length it is `at` to 2L and then `beyond`, if that is given."""
    steps = steps or list(range(100, 2001, 100))
    lengths = lengths or list(range(tau + 1, 3 * L + 1))
    result = {
        "config": dict(model=model, M=M, tau=tau, K=K, d=d, L=L, seed=seed, **flags), "params": 1,
        "train": {"step": steps, "loss": [0.1] * len(steps),
                  "accuracy": [at if step >= solved else 1 / K for step in steps]},
        "eval": {"length": lengths, "sequences": sequences,
                 "accuracy": [at if n <= 2 * L or beyond is None else beyond for n in lengths]}}
    if state:
        result["state_bytes"] = {"64": state[0], "4096": state[1]}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name or f"{model[:99]}_{len(list(folder.iterdir()))}.json")
    path.write_text(json.dumps(result))
    return str(path)


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """figures(*argv) -> {file name: figure} of what plot.main writes."""
    def call(*argv):
        drawn = {}

        def keep(path, fig):
            drawn[os.path.basename(path)] = fig
        monkeypatch.setattr(plot, "write_figure", keep)
        plot.main([*map(str, argv), "--out", str(tmp_path / "out")])
        return drawn
    return call


def texts(ax):
    return [t.get_text() for t in ax.texts]


def thick(ax):
    """{colour: (x, y)} of the medians: thick lines of the data, not of the labels."""
    return {to_hex(line.get_color()): line.get_data() for line in ax.lines
            if line.get_linewidth() == 2 and line.get_transform() == ax.transData}


def thin(ax):
    return [list(line.get_ydata()) for line in ax.lines if line.get_linewidth() == 0.6]


def constants(ax, style):
    """Where the lines of this style, across the axes, are: (x, x) or (y, y)."""
    return [tuple(line.get_xdata()) + tuple(line.get_ydata()) for line in ax.lines
            if line.get_linestyle() == style and line.get_linewidth() == 1]


def test_accuracy_against_length(tmp_path, figures):
    paths = [write(tmp_path, seed=s, at=a, beyond=0.5) for s, a in enumerate((1.0, 0.97, 0.98))]
    paths += [write(tmp_path, "mamba", at=1.0), write(tmp_path, "hybrid-a", at=0.5)]
    drawn = figures(*paths)
    assert list(drawn) == ["length_tau1_K16_d8_L64_M1.png", "training_tau1_K16_d8_L64_M1.png"]
    fig = drawn["length_tau1_K16_d8_L64_M1.png"]
    ax, = fig.axes
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("context length", "accuracy", "")
    assert constants(ax, ":") == [(0, 1, 1 / 16, 1 / 16)]               # chance
    assert constants(ax, "--") == [(64, 64, 0, 1)]                      # the training length
    assert texts(ax) == ["trained at 64", "chance 1/16", "mamba", "rope", "hybrid-a"]
    x, y = thick(ax)[plot.COLOURS["rope"].lower()]
    assert list(x) == list(range(2, 193)) and y[0] == 0.98 and y[-1] == 0.5
    assert sorted(seed[0] for seed in thin(ax)) == [0.97, 0.98, 1.0]    # every seed, if several
    assert fig.get_suptitle().replace("\n", " ") == (
        "In the median, at least 0.95 from 64 tokens on: mamba; not: rope and hybrid-a")
    words = fig.get_supxlabel().replace("\n", " ")
    assert "task recall: tau = 1, K = 16, d = 8, L = 64, M = 1" in words
    assert "seeds: 0, 1, 2 (mamba: 0, hybrid-a: 0)" in words and "1,024" in words


def test_accuracy_against_step(tmp_path, figures):
    paths = [write(tmp_path, "rope", seed=s, solved=w) for s, w in enumerate((300, 600, 1500))]
    paths += [write(tmp_path, "mamba", steps=[100, 200, 300], solved=200)]
    paths += [write(tmp_path, "nope", at=0.98)]
    fig = figures(*paths)["training_tau1_K16_d8_L64_M1.png"]
    ax, = fig.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training step", "accuracy")
    assert ax.get_xscale() == "log"
    assert texts(ax) == ["chance 1/16", "mamba: 200", "rope: 600", "nope: never"]     # by speed
    x, y = thick(ax)[plot.COLOURS["rope"].lower()]
    assert list(y[:8]) == [1 / 16] * 5 + [1.0] * 3 and not constants(ax, "--")
    fig.draw_without_rendering()
    low, high = ax.get_xlim()
    shown = [t.get_text() for t in ax.get_xticklabels() if low <= t.get_position()[0] <= high]
    assert shown == ["100", "200", "500", "1k", "2k"]
    words = fig.get_supxlabel().replace("\n", " ")
    assert "numbers: median steps to 0.99" in words
    assert fig.get_suptitle().replace("\n", " ") == (
        "In the median, reached 0.99: rope and mamba; not: nope")


def test_long_contexts(tmp_path, figures):
    path = write(tmp_path, "mamba", L=256, lengths=[2**n for n in range(6, 21)], beyond=0.1)
    fig = figures(path)["length_tau1_K16_d8_L256_M1.png"]
    ax, = fig.axes
    assert ax.get_xscale() == "log" and ax.get_xlim() == (64, 2**20)
    assert any("2^{20}" in t.get_text() for t in ax.get_xticklabels())
    assert fig.get_suptitle() == "At least 0.95 from 256 tokens on: none"    # beyond 3L


def test_panels(tmp_path, figures, refuses):
    paths = [write(tmp_path, m, M=M, at=1.0 if m == "rope" or M == 4 else 0.5) for M in (16, 4, 8)
             for m in ("mamba", "rope")]
    fig = figures(*paths)["length_tau1_K16_d8_L64_M4-8-16.png"]
    assert [ax.get_title() for ax in fig.axes] == ["M = 4", "M = 8", "M = 16"]
    assert fig.get_suptitle().replace("\n", " ").replace("\u00a0", " ") == (
        "At least 0.95 from 64 tokens on: rope; in part: mamba (1 of 3)")
    fig = figures(*paths, "--panels", "model")["length_by_model_tau1_K16_d8_L64_M4-8-16.png"]
    assert [ax.get_title() for ax in fig.axes] == ["rope", "mamba"]
    assert texts(fig.axes[1])[2:] == ["M = 4", "M = 8", "M = 16"]
    title = fig.get_suptitle().replace("\u00a0", " ")
    assert title == "At least 0.95 from 64 tokens on: rope; in part: mamba (1 of 3)"
    paths += [write(tmp_path, "rope", M=4, train_lengths="uniform")]
    drawn = figures(*paths, "--panels", "train-lengths", "M")
    fig = drawn["length_by_train_lengths-M_tau1_K16_d8_L64_M4-8-16.png"]
    assert fig.axes[-1].get_title() == "train_lengths = uniform, M = 4"
    assert "trained up to 64" in texts(fig.axes[-1]) and "trained at 64" in texts(fig.axes[0])
    assert "'depth' is no flag" in refuses(plot.main, [paths[0], "--panels", "depth"])


def test_runs_that_differ_in_any_flag_are_not_pooled(tmp_path, figures):
    paths = [write(tmp_path, seed=0, at=1.0), write(tmp_path, seed=1, at=1.0, lr=0.008, n_heads=1),
             write(tmp_path, seed=0, at=0.5, lr=0.001), write(tmp_path, n_heads=2, new=True),
             write(tmp_path, "mamba", steps=[1], lr=0.001)]
    fig = figures(*paths)["length_tau1_K16_d8_L64_M1.png"]
    assert sorted(texts(fig.axes[0])[2:]) == [
        "mamba (lr = 0.001)", "rope", "rope (lr = 0.001)", "rope (n_heads = 2, new = True)"]
    assert "lr" not in fig.get_supxlabel()
    fig = figures(paths[0], paths[-1])["length_tau1_K16_d8_L64_M1.png"]
    assert texts(fig.axes[0])[2:] == ["rope", "mamba"]                  # one curve each, so the
    assert "lr = 0.001 (mamba)" in fig.get_supxlabel()                  # flag is in the caption
    wide = [write(tmp_path, d=64, lr=0.002), write(tmp_path, d=64, seed=1)]      # the default there
    fig = figures(*wide)["length_tau1_K16_d64_L64_M1.png"]
    assert texts(fig.axes[0])[2:] == ["rope"] and "lr" not in fig.get_supxlabel()


def test_against_a_flag(tmp_path, figures):
    paths = [write(tmp_path, "mamba", d=d, seed=seed, at=at, beyond=0.1)
             for d, seeds in ((8, (0.2, 0.3, 0.9)), (64, (1.0, 0.8, 1.0)))
             for seed, at in enumerate(seeds)]
    paths += [write(tmp_path, "rope", d=8), write(tmp_path, "rope", lengths=[9], d=64)]
    fig, = figures(*paths, "--against", "d").values()
    ax, = fig.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("d", "accuracy at L")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["8", "64"]
    assert texts(ax) == ["chance 1/16", "rope", "mamba"]
    assert constants(ax, ":") == [(0, 1, 1 / 16, 1 / 16)]
    assert list(thick(ax)[plot.COLOURS["mamba"].lower()][1]) == [0.3, 1.0]
    # The line that leads to a curve's name starts at the curve's right end.
    leads = [line.get_xydata()[0].round().tolist() for line in ax.lines
             if line.get_linestyle() == ":" and to_hex(line.get_color()) != to_hex(plot.GREY)]
    assert sorted(leads) == [[0, 1], [1, 1]]                             # rope at 8, mamba at 64
    seeds = [sorted(line.get_ydata()) for line in ax.lines if line.get_marker() == "."]
    assert [0.2, 0.3, 0.9] in seeds and [0.8, 1.0, 1.0] in seeds
    assert fig.get_suptitle().replace("\u00a0", " ").replace("\n", " ") == (
        "In the median, 0.99 or more at 64 tokens: rope (1 of 1); in part: mamba (1 of 2)")


def test_against_state(tmp_path, figures, capsys):
    paths = [write(tmp_path, "mamba", state=(100, 100)), write(tmp_path, "rope", state=(300, 9000)),
             write(tmp_path, "hybrid-b", d=16, state=(100, 5000)),
             write(tmp_path, "jamba", state=None), write(tmp_path, "2xmlp", state=(0, 0))]
    fig, = figures(*paths, "--against", "state").values()
    # jamba, and 2xmlp, which has no place on a log axis
    assert capsys.readouterr().err.count("no bytes of state") == 2
    assert [ax.get_xlabel() for ax in fig.axes] == [
        "bytes of state after 64 tokens", "bytes of state after 4,096 tokens"]
    found = [sorted(x[0] for x, _ in thick(ax).values()) for ax in fig.axes]
    assert found == [[100, 100, 300], [100, 5000, 9000]]


def test_against_model(tmp_path, figures):
    paths = [write(tmp_path, "mamba", seed=s, at=a, beyond=a / 2)
             for s, a in enumerate((0.5, 0.9, 1.0))]
    paths += [write(tmp_path, "rope", d=16), write(tmp_path, "rope")]
    paths += [write(tmp_path, "jamba", M=4, lengths=[64, 128])]
    fig, = figures(*paths, "--against", "model").values()
    assert [ax.get_title() for ax in fig.axes] == ["M = 1", "M = 4"]
    names = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert names == ["rope (d = 8)", "rope (d = 16)", "mamba (d = 8)", "jamba (d = 8)"]
    dots = {(line.get_marker(), names[round(line.get_ydata()[0])]): line.get_xdata()[0]
            for ax in fig.axes for line in ax.lines if line.get_marker() in "oD"}
    assert dots["o", "mamba (d = 8)"] == 0.9 and dots["D", "mamba (d = 8)"] == 0.45
    assert dots["o", "jamba (d = 8)"] == 1.0
    assert np.isnan(dots["D", "jamba (d = 8)"])                          # not tested to 3L
    seeds = [list(line.get_xdata()) for line in fig.axes[0].lines if line.get_marker() == "|"]
    assert [0.5, 0.9, 1.0] in seeds and [0.25, 0.45, 0.5] in seeds
    assert constants(fig.axes[0], ":") == [(1 / 16, 1 / 16, 0, 1)]
    assert "diamonds for the lowest" in fig.get_supxlabel()


def test_long_names_stay_apart(tmp_path, figures, capsys):
    """Two names of 44 letters that differ in their last word; two learning rates alike to :g."""
    stack = "mamba2+mlp+mamba2+mlp+window+mlp+mamba2+"
    paths = [write(tmp_path, stack + "mlp"), write(tmp_path, stack + "rope", beyond=0.3)]
    fig, = figures(*paths, "--against", "model").values()
    title = fig.get_suptitle().replace("\n", " ").replace(" ", "")
    assert title == "Atleast0.95fromLto3L:mamba2+mlp+mamba2+ml…ndow+mlp+mamba2+mlp"
    assert len({t.get_text() for t in fig.axes[0].get_yticklabels()}) == 2
    alike = ["+".join(["mamba"] * 4 + [word] + ["mamba"] * 4) for word in ("rope", "alibi")]
    paths = [write(tmp_path, alike[0]), write(tmp_path, alike[1], beyond=0.3)]
    title = next(iter(figures(*paths).values())).get_suptitle().replace("\n", " ")
    short = "mamba+mamba+mamba+ma…a+mamba+mamba+mamba"
    assert title == f"At least 0.95 from 64 tokens on: {short}; not: {short}"
    paths = [write(tmp_path, lr=lr) for lr in (0.00123456, 0.001234561, 0.5)]
    plot.main([*paths, "--table"])
    table = capsys.readouterr().out
    assert all(f"| {lr} |" in table for lr in ("0.00123456", "0.001234561", "0.5"))


def test_a_figure_has_one_task_and_one_training_length(tmp_path, figures):
    """Whatever the panels are: each marks one chance and one L."""
    tasks = [write(tmp_path), write(tmp_path, task="parity")]
    for fig in figures(*tasks, "--panels", "model", "M").values():
        chance, = [t for ax in fig.axes for t in texts(ax) if t.startswith("chance")]
        assert chance == ("chance 1/2" if "parity" in fig.get_supxlabel() else "chance 1/16")
    lengths = [write(tmp_path), write(tmp_path, L=32)]
    drawn = figures(*lengths, "--panels", "model", "M", "tau", "task", "K", "d")
    trained = [t for fig in drawn.values() for t in texts(fig.axes[0]) if t.startswith("trained")]
    assert sorted(trained) == ["trained at 32", "trained at 64"]


def test_looks():
    names = [("rope",), ("rope", ("lr", 1)), ("mamba",), ("a+b",), ("b+c",), ("c+d",)]
    curves = [(("model", model), *more) for model, *more in names]
    look = plot.curve_styles(curves)
    assert len(set(look.values())) == 6 and len({look[curve][0] for curve in curves[2:]}) == 4
    assert look[curves[0]][0] == look[curves[1]][0] == "#0072B2"
    assert plot.curve_styles(curves[2:3]) == {curves[2]: look[curves[2]]}
    styles = plot.curve_styles([(("M", 4),), (("M", 8),)])
    assert len({colour for colour, _ in styles.values()}) == 2


@pytest.mark.parametrize("heights", [[1.0] * 6, [0.06] * 6, [1, 0.99, 0.5, 0.49, 0.05], [1.0] * 30])
def test_labels_do_not_touch(heights):
    placed = output.spread(heights, 0.0, 1.02)
    assert all(a - b > min(0.065, 1.02 / len(heights)) - 1e-9 for a, b in zip(placed, placed[1:]))
    assert max(placed) <= 1.02 + 1e-9 and min(placed) >= -1e-9
    assert output.spread([0.9, 0.5], 0.0, 1.02) == [0.9, 0.5]


def test_names_are_plain_text(tmp_path, capsys):
    names = ["$\\frac$", "\x1b[31mred", "x" * 5000]
    paths = [write(tmp_path, name, name=f"{n}.json") for n, name in enumerate(names)]
    written = plot.main([*paths, "--out", str(tmp_path / "out")])
    assert len(written) == 2
    os.rename(paths[1], tmp_path / "\x1b[31m.json")
    plot.main([*paths[:1], str(tmp_path / "\x1b[31m.json"), "--table"])
    (tmp_path / "\x1b[31m.json").write_text("")
    plot.main([paths[0], str(tmp_path / "\x1b[31m.json"), "--table"])
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and "[31m" in said.err


def test_main_leaves_nothing_behind(tmp_path, capsys, refuses, monkeypatch):
    path, out = write(tmp_path / "in"), tmp_path / "out"
    written = plot.main([path, "--out", str(out), "--name", "mine"])
    assert written == [str(out / "mine.png"), str(out / "mine_training.png")]
    assert capsys.readouterr().out.split() == written
    for key in plot.RC_PARAMS:
        assert matplotlib.rcParams[key] == matplotlib.rcParamsDefault[key]
    assert sorted(os.listdir(out)) == ["mine.png", "mine_training.png"]
    other = write(tmp_path / "in", tau=5)                               # a second task, same name
    assert plot.main([path, other, "--out", str(out), "--name", "mine"]) == written
    assert "another figure has this name" in capsys.readouterr().err
    old = (out / "mine.png").read_bytes()
    assert old.startswith(b"\x89PNG") and (out / "mine.png").stat().st_mode & 0o044
    assert "--out" in refuses(plot.main, [path, "--out", path])

    def replace(source, target):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", replace)
    assert "No space left" in refuses(plot.main, [path, "--out", out, "--name", "mine"])
    assert (out / "mine.png").read_bytes() == old and len(os.listdir(out)) == 2


def test_as_a_command_without_torch_and_with_a_closed_stdout(tmp_path):
    code = ("import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
            f"sys.path.insert(0, {os.path.dirname(plot.__file__)!r}); "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", code, plot.__file__, write(tmp_path / "in")]
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(os.listdir(tmp_path / "figures")) == 2
