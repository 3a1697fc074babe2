"""plot.py: what is in the figures, how runs are grouped into them, and what it answers to files that are no results."""

import json
import os
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

import costs
import look
import plot
import records

SIX = ["nope", "learned", "rope", "mamba", "hybrid-a", "hybrid-b"]


def write(folder, model="rope", M=1, tau=1, K=16, d=8, L=64, seed=0, steps=None, lengths=None, accuracy=1.0,
          sequences=1024, **flags):
    """A result as train.py writes it: at chance before step 500 and beyond 2L, at `accuracy` elsewhere. Returns its path."""
    steps = steps or list(range(100, 2001, 100))
    lengths = lengths or list(range(tau + 1, 3 * L + 1))
    record = {
        "config": dict(model=model, M=M, tau=tau, K=K, d=d, L=L, seed=seed, **flags), "params": 1,
        "train": {"step": steps, "loss": [0.1] * len(steps), "accuracy": [1 / K if s < 500 else accuracy for s in steps]},
        "eval": {"length": lengths, "accuracy": [accuracy if n <= 2 * L else 1 / K for n in lengths],
                 "sequences": sequences},
        "env": {}, "seconds": {"train": 1.0, "eval": 1.0}}
    path = os.path.join(folder, f"{model}_M{M}_tau{tau}_K{K}_d{d}_L{L}_seed{seed}.json")
    with open(path, "w") as f:
        json.dump(record, f)
    return path


def draw(tmp_path, paths, capsys):
    """Run plot.py -> {name: image (height, width, 3)}, checked against the names that it prints."""
    out = str(tmp_path / "out" / "figures")
    plot.main([*paths, "--out", out])
    names = sorted(os.listdir(out))
    assert sorted(capsys.readouterr().out.split()) == [os.path.join(out, name) for name in names]
    return {name: matplotlib.image.imread(os.path.join(out, name))[..., :3] for name in names}


def ink(image, colour):
    """The number of pixels of that colour."""
    return int((np.abs(image - to_rgb(colour)).max(-1) < 0.02).sum())


def figure(paths, kind, flags=("M",), published=()):
    panels, = records.group(paths, flags).values()
    return plot.draw(panels, kind, flags, published)


def texts(fig):
    return [t.get_text() for ax in fig.axes for t in ax.texts]


def test_six_models_at_one_can_all_be_seen(tmp_path, capsys):
    paths = [write(tmp_path, model) for model in SIX] + [write(tmp_path, "MAM")]
    images = draw(tmp_path, paths, capsys)
    assert list(images) == ["length_tau1_K16_d8_L64_M1.png", "training_tau1_K16_d8_L64_M1.png"]
    for image in images.values():
        assert image.shape[1] >= 900 and 0.5 < (image == 1).all(-1).mean() < 0.99  # white, but not blank
        for model in SIX + ["MAM"]:
            assert ink(image, look.style(model)[0]) > 100, model
    curves = images["length_tau1_K16_d8_L64_M1.png"][:, :int(0.8 * image.shape[1])]  # without the labels on the right
    for model in SIX:
        assert ink(curves, look.style(model)[0]) > 50, model


def test_a_model_looks_the_same_everywhere(tmp_path):
    for models in (["mamba"], ["MAM", "mamba", "rope"], SIX):
        for kind in ("length", "training"):
            fig = figure([write(tmp_path, model) for model in models], kind)
            drawn = {text.get_text(): text.get_color() for text in fig.axes[0].texts}
            assert [drawn[model] for model in models] == [look.style(model)[0] for model in models]
    looks = [look.style(model) for model in SIX + ["MAM", "MA", "RR", "XYZ"]]
    assert len(set(looks)) == len(looks)


def test_labels_do_not_overlap(tmp_path):
    paths = [write(tmp_path, model) for model in SIX]
    for kind in ("length", "training"):
        fig = figure(paths, kind)
        fig.draw_without_rendering()
        boxes = [t.get_window_extent() for t in fig.axes[0].texts if t.get_text() in SIX]
        assert len(boxes) == 6
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1 for box in boxes)


@pytest.mark.parametrize("heights", [[1.0] * 6, [0.06] * 6, [1, 0.99, 0.5, 0.49, 0.06, 0.05], [0.3]])
def test_spread(heights):
    placed = look.spread(heights, 0.0, 1.02)
    assert all(a - b > look.LABEL_GAP - 1e-9 for a, b in zip(placed, placed[1:]))
    assert max(placed) <= 1.02 and min(placed) >= 0
    assert look.spread([0.9, 0.5], 0.0, 1.02) == [0.9, 0.5]


def test_panels_by_M_and_figures_by_task(tmp_path, monkeypatch):
    paths = [write(tmp_path, model, M=M) for M in (16, 4, 8) for model in ("rope", "mamba")]
    paths += [write(tmp_path, "rope", tau=5), write(tmp_path, "rope", d=64)]
    paths += [write(tmp_path, "rope", L=32, train_lengths="uniform")]
    tasks = ["tau1_K16_d64_L64_M1", "tau1_K16_d8_L32_M1_uniform", "tau1_K16_d8_L64_M4-8-16", "tau5_K16_d8_L64_M1"]
    monkeypatch.setattr(plot, "save", lambda fig, path: open(path, "w").close())  # the names only, which is faster
    plot.main([*paths, "--out", str(tmp_path / "out")])
    names = [f"{kind}_{task}.png" for kind in ("length", "training") for task in tasks]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(names)
    fig = figure(paths[:6], "length")
    assert [ax.get_title() for ax in fig.axes] == ["M = 4", "M = 8", "M = 16"]
    assert len({ax.get_ylim() for ax in fig.axes}) == 1
    assert texts(fig).count("trained at 64") == texts(fig).count("chance 1/16") == texts(fig).count("mamba") == 3
    assert "M = 4, 8, 16 queries, delay tau = 1, trained at L = 64, d = 8\n1 seed" in fig.get_suptitle()
    assert "M = 1 query, delay tau = 1, trained at lengths up to L = 32" in figure(paths[-1:], "length").get_suptitle()


def test_panels_by_other_flags(tmp_path, monkeypatch):
    paths = [write(tmp_path, model, M=M, d=d) for M in (4, 8) for d in (64, 8) for model in ("rope", "mamba")][:-1]
    fig = figure(paths, "length", ("d", "M"))
    assert [ax.get_title() for ax in fig.axes] == [f"d = {d}, M = {M}" for d in (8, 64) for M in (4, 8)]
    assert "M = 4, 8 queries" in fig.get_suptitle() and "d = 8, 64" in fig.get_suptitle()
    fig = figure(paths[:-2], "training", ("d", "M"))
    assert len([ax for ax in fig.axes if ax.axison]) == 3                            # d = 8, M = 8 has no run
    (tmp_path / "uniform").mkdir()
    paths = [write(tmp_path), write(tmp_path / "uniform", train_lengths="uniform")]
    fig = figure(paths, "length", ("train_lengths",))
    assert [ax.get_title() for ax in fig.axes] == ["one length", "mixed lengths"]
    assert texts(fig).count("trained at 64") == texts(fig).count("trained up to 64") == 1
    monkeypatch.setattr(plot, "save", lambda fig, path: open(path, "w").close())
    plot.main([*paths, "--panels", "train_lengths", "--out", str(tmp_path / "out")])
    assert "length_tau1_K16_d8_L64_M1_fixed-uniform.png" in os.listdir(tmp_path / "out")


def test_against_model(tmp_path, capsys, refuses):
    """A row for each model: dots at the training length, diamonds at the lowest from there on."""
    runs = [("mamba", 1, 0, 0.5), ("mamba", 1, 1, 0.9), ("mamba", 1, 2, 1.0), ("rope", 1, 0, 0.75), ("jamba", 4, 0, 0.25)]
    paths = [write(tmp_path, model, M=M, seed=seed, accuracy=accuracy) for model, M, seed, accuracy in runs]
    panels, = records.group(paths).values()
    fig = plot.draw_models(panels)
    assert [ax.get_title() for ax in fig.axes] == ["M = 1", "M = 4"]
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["rope", "mamba", "jamba"]
    found = {(n, line.get_marker(), round(line.get_ydata()[0])): line.get_xdata()[0] for n, ax in enumerate(fig.axes)
             for line in ax.lines if line.get_marker() in ("o", "D")}
    chance = 1 / 16                                            # where write's runs are beyond 2 L
    assert found == {(0, "o", 0): 0.75, (0, "D", 0): chance, (0, "o", 1): 0.9, (0, "D", 1): chance, (1, "o", 2): 0.25,
                     (1, "D", 2): chance}
    assert list(draw(tmp_path, ["--against", "model", *paths], capsys)) == ["against_model_tau1_K16_d8_L64_M1-4.png"]
    long = write(tmp_path, "nope", lengths=[64, 200])          # lowest beyond what all were tested at: does not count
    panels, = records.group([*paths, long]).values()
    fig = plot.draw_models(panels)
    assert 1.0 in [line.get_xdata()[0] for line in fig.axes[0].lines if line.get_marker() == "D"] and "to 192" in fig.get_suptitle()
    untested = write(tmp_path, "nope", lengths=[9])
    assert "not tested at its training length" in refuses(plot.main, [untested, "--against", "model", "--out", tmp_path])
    shorter = [write(tmp_path, L=32, lengths=[32, 64]), write(tmp_path, L=128, lengths=[128, 256])]
    assert "tested to 64 only" in refuses(plot.main, [*shorter, "--against", "model", "--panels", "L", "--out", tmp_path])


def test_against_model_across_widths(tmp_path, capsys):
    """Models of different widths are rows of one figure; panels for each d are rows of their names alone."""
    paths = [write(tmp_path, model, d=d, accuracy=accuracy)
             for model, d, accuracy in [("mamba", 64, 0.5), ("mamba", 8, 0.25), ("rope", 16, 0.75)]]
    panels, = records.group(paths, across_widths=True).values()
    fig = plot.draw_models(panels)
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["rope, d = 16", "mamba, d = 8", "mamba, d = 64"]
    dots = {round(line.get_ydata()[0]): line.get_xdata()[0] for line in fig.axes[0].lines if line.get_marker() == "o"}
    assert dots == {0: 0.75, 1: 0.25, 2: 0.5} and "d = 8, 16, 64" in fig.get_suptitle()
    assert list(draw(tmp_path, ["--against", "model", *paths], capsys)) == ["against_model_tau1_K16_d8-16-64_L64_M1.png"]
    panels, = records.group(paths, ("d",), across_widths=True).values()
    assert [list(of_d) for of_d in panels.values()] == [["mamba"], ["rope"], ["mamba"]]
    many = [write(tmp_path, d=d) for d in (10, 12, 14)]
    (tmp_path / "many").mkdir()
    drawn = draw(tmp_path / "many", ["--against", "model", *paths, *many], capsys)
    assert list(drawn) == ["against_model_tau1_K16_d8to64_L64_M1.png"]
    assert len(records.group(paths)) == 3

    # Where a figure has one width only, it is not a part of the names, whatever other figures have.
    (tmp_path / "delay").mkdir()
    delayed = write(tmp_path / "delay", "mamba", tau=5)
    one, two = records.group([*paths, delayed], across_widths=True).values()
    assert list(one[1,]) == ["rope, d = 16", "mamba, d = 8", "mamba, d = 64"] and list(two[1,]) == ["mamba"]
    unnamed = sorted(["RARA, d = 64", "MAMA, d = 64", "RARA, d = 8", "MAMA, d = 8"], key=look.order)
    assert unnamed == ["MAMA, d = 8", "MAMA, d = 64", "RARA, d = 8", "RARA, d = 64"]


def test_against_a_flag(tmp_path, monkeypatch, refuses):
    for folder in "abc":
        (tmp_path / folder).mkdir()
    paths = [write(tmp_path, "mamba", d=d, seed=seed, accuracy=accuracy)
             for d, accuracies in ((8, (0.2, 0.3, 0.9)), (64, (1.0, 0.8, 0.9))) for seed, accuracy in enumerate(accuracies)]
    paths.append(write(tmp_path / "a", "mamba", init="mimetic", accuracy=0.5))
    panels, = records.group(paths, ("d",)).values()
    fig = plot.draw_against(panels, "d")
    drawn = [list(line.get_ydata()) for line in fig.axes[0].lines if line.get_marker() == "o"]
    assert drawn[0] == [0.3, 0.9] and drawn[1][0] == 0.5 and np.isnan(drawn[1][1])    # no mimetic run at d = 64
    seeds = [list(line.get_ydata()) for line in fig.axes[0].lines if line.get_marker() == "."]
    assert [0.2, 0.3, 0.9] in seeds and [1.0, 0.8, 0.9] in seeds
    assert {"mamba", "mamba, mimetic"} <= set(texts(fig)) and "median of 1 to 3 seeds, small dots" in fig.get_suptitle()
    names = []
    monkeypatch.setattr(plot, "save", lambda fig, path: names.append(os.path.basename(path)))
    small = write(tmp_path / "b", "mamba", d_state=4)
    plot.main([paths[0], small, "--against", "d_state", "--out", str(tmp_path / "out")])
    plot.main([*paths, "--against", "d", "--out", str(tmp_path / "out")])
    assert names == ["against_d_state_tau1_K16_d8_L64_M1_N4-16.png", "against_d_tau1_K16_d8-64_L64_M1.png"]
    panels, = records.group([write(tmp_path / "b", K=K) for K in (8, 16)], ("K",)).values()
    chance, = (line for line in plot.draw_against(panels, "K").axes[0].lines if line.get_linestyle() == ":")
    assert list(chance.get_ydata()) == [1 / 8, 1 / 16]
    untested = write(tmp_path / "c", lengths=[9])
    assert "not tested at its training length" in refuses(plot.main, [untested, "--against", "d", "--out", tmp_path / "out"])


def test_sizes_of_the_state_are_not_seeds_of_one_run(tmp_path):
    (tmp_path / "4").mkdir()
    paths = [write(tmp_path, "mamba"), write(tmp_path / "4", "mamba", d_state=4)]
    assert len(records.group(paths)) == 2


def test_published_numbers_stand_beside_the_runs_of_their_task(tmp_path, capsys):
    path = tmp_path / "paper.json"
    path.write_text(json.dumps({"published": "a paper", "task": {"L": 64, "tau": 1},
                                "curves": {"rope": {"length": [64, 128], "accuracy": [1.0, 0.25]}}}))
    published = records.load_published(path)
    fig = figure([write(tmp_path)], "length", published=[published])
    assert any(list(line.get_ydata()) == [1.0, 0.25] for line in fig.axes[0].lines) and "a paper" in fig.get_suptitle()
    for fig in (figure([write(tmp_path, tau=5)], "length", published=[published]),
                figure([write(tmp_path)], "training", published=[published])):
        assert not any(list(line.get_ydata()) == [1.0, 0.25] for line in fig.axes[0].lines)
        assert "a paper" not in fig.get_suptitle()
    assert len(draw(tmp_path, [write(tmp_path), str(path)], capsys)) == 2


def test_several_seeds_are_a_median_in_a_band(tmp_path):
    paths = [write(tmp_path, seed=seed, accuracy=accuracy) for seed, accuracy in enumerate((0.5, 0.8, 0.9))]
    for kind in ("length", "training"):
        fig = figure(paths, kind)
        band, = fig.axes[0].collections
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.max() == 0.9 and 0.5 in heights
        line = next(line for line in fig.axes[0].lines if len(line.get_xdata()) > 2)
        assert max(line.get_ydata()) == 0.8
        assert "median of 3 seeds, band" in fig.get_suptitle()
    assert not figure(paths[:1], "length").axes[0].collections
    paths.append(write(tmp_path, "mamba"))
    assert "median of 1 to 3 seeds" in figure(paths, "length").get_suptitle()


def test_a_run_that_has_ended_holds_its_accuracy(tmp_path):
    paths = [write(tmp_path, seed=0, steps=[200, 400, 600], accuracy=0.9),
             write(tmp_path, seed=1, steps=[100, 200, 300, 400, 500, 600, 1000], accuracy=0.7)]
    runs = [records.load(path) for path in paths]
    x, y = records.curve(runs, "training")
    assert x.tolist() == [200, 300, 400, 500, 600, 1000]
    assert y[0, -2:].tolist() == [0.9, 0.9] and y[1, -3:].tolist() == [0.7, 0.7, 0.7]
    assert any("the last seed ended" in t.get_text() for t in figure(paths + [write(tmp_path, "mamba")], "training").texts)


def test_lengths_common_to_all_seeds(tmp_path, refuses):
    paths = [write(tmp_path, seed=0), write(tmp_path, seed=1, lengths=[8, 64, 128, 4096], sequences=[1024, 1024, 1024, 16])]
    assert records.curve([records.load(path) for path in paths], "length")[0].tolist() == [8, 64, 128]
    paths[0] = write(tmp_path, seed=0, lengths=[9])
    assert "no context length in common" in refuses(plot.main, [*paths, "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


def test_long_contexts_are_on_a_logarithmic_axis(tmp_path):
    paths = [write(tmp_path, "mamba", L=256, lengths=[2**i for i in range(6, 21)]),
             write(tmp_path, "learned", L=256, lengths=[64, 128, 256, 512, 768])]
    fig = figure(paths, "length")
    fig.draw_without_rendering()
    assert fig.axes[0].get_xscale() == "log"
    assert figure(paths, "training").axes[0].get_xscale() == "log"                   # as it always is
    assert figure([write(tmp_path, lengths=[2, 64, 512])], "length").axes[0].get_xscale() == "linear"


def test_a_single_point_is_drawn_as_one(tmp_path):
    for kind in ("length", "training"):
        fig = figure([write(tmp_path, steps=[1], lengths=[64])], kind)
        fig.draw_without_rendering()
        assert any(line.get_marker() == "o" and len(line.get_xdata()) == 1 for line in fig.axes[0].lines)


def changed(**sections):
    def change(record):
        for name, values in sections.items():
            record[name].update(values)
        return json.dumps(record)
    return change


BAD = {
    "missing": None,
    "empty": lambda record: "",
    "truncated": lambda record: json.dumps(record)[:300],
    "binary": lambda record: "\x80\xff",
    "a list": lambda record: "[1, 2]",
    "a number": lambda record: "3",
    "other JSON": lambda record: '{"speed": {"length": [1]}}',
    "no eval": lambda record: json.dumps({**record, "eval": None}),
    "no seed": lambda record: json.dumps({**record, "config": {"model": "rope", "M": 1}}),
    "no name": changed(config={"model": ""}),
    "K in words": changed(config={"K": "16"}),
    "L = 0": changed(config={"L": 0}),
    "lists of two lengths": changed(eval={"length": [2, 3]}),
    "no points": changed(train={"step": [], "accuracy": []}),
    "not a number": changed(train={"step": [1], "accuracy": [float("nan")]}),
    "above 1": changed(eval={"length": [64], "accuracy": [97.0]}),
    "not in order": changed(eval={"length": [64, 32], "accuracy": [1.0, 1.0]}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, capsys, refuses, case):
    good, bad = write(tmp_path, "mamba"), write(tmp_path, "rope")
    if BAD[case] is None:
        os.remove(bad)
    else:
        with open(bad) as f:
            record = json.load(f)
        with open(bad, "w", encoding="latin-1") as f:
            f.write(BAD[case](record))
    assert refuses(plot.main, [good, bad, "--out", tmp_path / "out"]).startswith(f"plot.py: {bad} is not ")
    assert not (tmp_path / "out").exists() and capsys.readouterr().out == ""


def test_one_run_twice(tmp_path, refuses):
    (tmp_path / "copy").mkdir()
    paths = [write(tmp_path), write(tmp_path / "copy")]
    assert "same model, task and seed" in refuses(plot.main, [*paths, "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists()
    assert len(figure([paths[0], paths[0]], "length").axes) == 1  # the same file twice is harmless


def test_folders(tmp_path, refuses):
    path = write(tmp_path)
    assert "cannot be read" in refuses(plot.main, [tmp_path, "--out", tmp_path / "out"])
    assert "--out" in refuses(plot.main, [path, "--out", path])
    assert "RUN.json" in refuses(plot.main, [])
    assert "takes no --panels" in refuses(plot.main, [path, "--against", "d", "--panels", "tau"])
    assert "neither --panels nor --against" in refuses(plot.main, ["--inside", "x.pt", "--against", "model"])
    published = os.path.join(os.path.dirname(os.path.dirname(__file__)), "results", "published", "table2.json")
    assert "beside results of train.py" in refuses(plot.main, [published, "--out", tmp_path / "out"])


def test_as_a_command_without_torch(tmp_path):
    code = ("import os, sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
            "sys.path.insert(0, os.path.dirname(sys.argv[0])); runpy.run_path(sys.argv[0], run_name='__main__')")
    names = ["length_tau1_K16_d8_L64_M1.png", "training_tau1_K16_d8_L64_M1.png"]
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / names[0]).write_text("an older figure")
    done = subprocess.run([sys.executable, "-c", code, os.path.abspath(plot.__file__), write(tmp_path)], cwd=tmp_path,
                          env={**os.environ, "DISPLAY": "", "MPLBACKEND": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [os.path.join("figures", name) for name in names]
    assert sorted(os.listdir(tmp_path / "figures")) == names
    assert (tmp_path / "figures" / names[0]).read_bytes().startswith(b"\x89PNG")


# ---- what length costs ----

def write_bench(path, **changes):
    rows = [{"model": model, "length": L, "train_us": 10.0, "read_us": 2.0, "token_ms": 0.5,
             "state_bytes": 100 * L**(model == "rope"), "train_megabytes": None, "read_megabytes": None, **changes}
            for model in ("rope", "mamba") for L in (4096, 1024)]
    with open(path, "w") as f:
        json.dump({"bench": {"scan": [], "length": rows}, "env": {"device": "cpu", "torch": "2", "threads": 1, "date": ""}}, f)
    return str(path)


def test_costs(tmp_path, capsys):
    path, run = write_bench(tmp_path / "mine.json"), write(tmp_path)
    images = draw(tmp_path, [path, run], capsys)
    assert sorted(images) == ["cost_mine.png", "length_tau1_K16_d8_L64_M1.png", "training_tau1_K16_d8_L64_M1.png"]
    assert all(ink(images["cost_mine.png"], look.style(model)[0]) > 200 for model in ("rope", "mamba"))

    found, env = costs.load_costs(path)
    assert found["rope"]["state_bytes"].tolist() == [[1024, 4096], [102400, 409600]] and "train_megabytes" not in found["rope"]
    fig = costs.draw_costs(found, env)
    assert [ax.get_title() for ax in fig.axes] == [costs.COSTS[c] for c in ("train_us", "read_us", "token_ms", "state_bytes")]
    for ax in fig.axes:
        rope, mamba = ax.lines
        assert list(rope.get_xdata()) == [1024, 4096] and [t.get_text() for t in ax.texts] == ["rope", "mamba"]
        low, high = ax.get_ylim()
        assert low < min(mamba.get_ydata()) and max(rope.get_ydata()) < high
    assert list(fig.axes[3].lines[0].get_ydata()) == [102400, 409600] and list(fig.axes[3].lines[1].get_ydata()) == [100, 100]
    assert len(costs.draw_costs(*costs.load_costs(write_bench(tmp_path / "gpu.json", train_megabytes=3.0))).axes) == 6


@pytest.mark.parametrize("changes", [{"token_ms": -1.0}, {"token_ms": "fast"}, {"length": 0}, {"read_us": float("nan")},
                                     {"read_us": [1]}, {"read_us": 10**400}, {"model": 3}, {"model": ""}, {"length": 7}])
def test_costs_that_are_none(changes, tmp_path, refuses):
    path = write_bench(tmp_path / "x.json", **changes)
    assert "is of bench.py, but" in refuses(plot.main, [path, "--out", str(tmp_path / "none")])


def test_two_files_of_one_name(tmp_path, refuses):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    paths = [write_bench(tmp_path / folder / "cpu.json") for folder in "ab"]
    assert "both be drawn into cost_cpu.png" in refuses(plot.main, [*paths, "--out", str(tmp_path / "none")])
