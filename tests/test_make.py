"""report/make.py: every experiment can be made, and one is."""

import glob
import json
import os
import sys

import pytest
from conftest import ROOT, names

sys.path.insert(0, os.path.join(ROOT, "report"))

import eval as evaluation
import grid
import make
import plot
import train
from test_plot import texts, write
from test_plot_options import vertical_lines


@pytest.mark.parametrize("name", make.EXPERIMENTS)
def test_flags_are_those_of_train_eval_and_plot(name):
    """Configs are checked, no run is listed twice, and figures are of this experiment's runs."""
    experiment, seen = make.EXPERIMENTS[name], []
    for line in experiment["train"]:
        _, args = train.parse(line.split())
        seen += [train.runs.run_name(config) for config in grid.configs_of(args)]
    assert len(seen) == len(set(seen)) > 0
    for line in experiment.get("draw", {}):
        assert f"{{}}/{name}/" in line and " --name " in line
    for _, line in experiment.get("test", ()):
        assert "--lengths" in line


def test_runs_tests_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "TEST_SEQUENCES", 32)
    monkeypatch.setattr(train, "EVAL_SEQUENCES", 16)
    tiny = {"train": ["--model nope --M 1 2 --L 8 --steps 2 --batch-size 4"],
            "test": [("*_M1_*", "--lengths 30 --sequences 20")],
            "draw": {"{}/tiny/*_M1_* {}/other/* --name one": "Told", "{}/tiny/* --name two": "All"}}
    monkeypatch.setitem(make.EXPERIMENTS, "tiny", tiny)
    out, figures = str(tmp_path / "out"), str(tmp_path / "figures")
    flags = ["tiny", "--out", out, "--figures", figures, "--device", "cpu"]
    make.main(flags)
    stems = [f"nope_M{M}_tau1_K16_d8_L8_batch-size4_steps2_seed0" for M in (1, 2)]
    written = [f"{stem}{end}" for stem in stems for end in (".json", ".pt")]
    assert names(out + "/tiny") == sorted(written)
    assert 30 in train.runs.read_result(f"{out}/tiny/{stems[0]}.json")["eval"]["length"]
    assert 30 not in train.runs.read_result(f"{out}/tiny/{stems[1]}.json")["eval"]["length"]
    assert {"one.png", "two.png"} <= set(names(figures))
    for path in glob.glob(figures + "/*"):
        os.remove(path)
    before = os.path.getmtime(f"{out}/tiny/{stems[0]}.json")
    make.main([*flags[:-2], "--draw"])
    assert {"one.png", "two.png"} <= set(names(figures))
    assert os.path.getmtime(f"{out}/tiny/{stems[0]}.json") == before


def test_a_run_that_fails_does_not_keep_others_from_being_made(tmp_path, monkeypatch,
                                                                 capsys):
    monkeypatch.setattr(evaluation, "TEST_SEQUENCES", 32)
    monkeypatch.setattr(train, "EVAL_SEQUENCES", 16)
    line = "--model nope --L 8 --steps 20 --batch-size 4"
    tiny = {"train": [f"{line} --lr 1e30", line, "--no-such-flag"], "draw": {}}
    monkeypatch.setitem(make.EXPERIMENTS, "tiny", tiny)
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        make.main(["tiny", "--out", out, "--device", "cpu"])
    assert stop.value.code == 2, "a wrong flag is not a run that fails"
    tiny["train"].pop()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="train.py: 1 of 2 runs ended without a result"):
        make.main(["tiny", "--out", out, "--device", "cpu", "--overwrite"])
    said = capsys.readouterr().out
    assert said.count("failed: the loss") == 1 and said.count("wrote ") == 1, "made twice"
    stem = "nope_M1_tau1_K16_d8_L8_batch-size4_steps20_seed0"
    assert names(out + "/tiny") == [f"{stem}.json", f"{stem}.pt"]


def test_a_process_without_a_test_of_its_own_goes_on(tmp_path, monkeypatch, capsys):
    """One run for two processes, and the progress of another seed, which nobody tests."""
    monkeypatch.setattr(evaluation, "TEST_SEQUENCES", 32)
    monkeypatch.setattr(train, "EVAL_SEQUENCES", 16)
    monkeypatch.setattr(grid, "connect", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    tiny = {"train": ["--model nope --L 8 --steps 2 --batch-size 4"],
            "test": [("*", "--lengths 30 --sequences 20")], "draw": {}}
    monkeypatch.setitem(make.EXPERIMENTS, "tiny", tiny)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "nope_M1_tau1_K16_d8_L8_batch-size4_steps2_seed1.resume.pt").write_bytes(b"")
    for rank, tested in ("1", False), ("0", True):
        monkeypatch.setenv("RANK", rank)
        make.main(["tiny", "--out", str(tmp_path), "--device", "cpu"])
        result = train.runs.read_result(str(next(folder.glob("*.json"))))
        assert (30 in result["eval"]["length"]) == tested


def test_titles_are_for_the_runs_of_the_report(monkeypatch):
    drawn = []
    monkeypatch.setattr(make, "draw", lambda line, out, more: drawn.append(more) or [out])
    make.main(["ladder", "--draw"])
    make.main(["ladder", "--draw", "--out", "report"])
    assert "--title" not in drawn[0] and "--title" in drawn[1]


def test_an_unknown_experiment(refuses):
    assert "problem1" in refuses(make.main, ["problem9"])


def test_a_flag_before_the_names(refuses):
    assert "come after the names" in refuses(make.main, ["--steps", "20", "problem1"])


def test_a_folder_may_end_in_a_slash(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(make, "draw", lambda line, out, more: drawn.append((out, more)) or [out])
    make.main(["ladder", "sixteen", "--draw", "--out", "report/", "--figures", str(tmp_path)])
    assert drawn and all(out == "report" for out, _ in drawn)
    assert all("--title" in more for _, more in drawn)
    assert capsys.readouterr().out == "sixteen has no figure of its own\n"


def test_nothing_to_draw(refuses, tmp_path):
    assert "no runs" in refuses(make.main, ["ladder", "--draw", "--out", tmp_path])


@pytest.fixture
def drawn(monkeypatch):
    """The figures that plot.py writes, instead of writing them."""
    figures = []
    monkeypatch.setattr(plot, "write_figure", lambda path, fig: figures.append(fig))
    return figures


def test_published_numbers_are_hollow_points_on_their_task(tmp_path, drawn):
    (tmp_path / "published").mkdir()
    curve = {"length": [64, 128], "accuracy": [1, 0.25]}
    source = {"published": "a paper", "task": {"L": 64, "tau": 1}, "curves": {"rope": curve}}
    (tmp_path / "published/paper.json").write_text(json.dumps(source))
    for tau in (1, 5):
        write(tmp_path / f"tau{tau}", tau=tau)
        make.draw("{}/tau%d/* {}/published/paper*" % tau, str(tmp_path), [])
    assert ["a paper" in fig.get_supxlabel() for fig in drawn] == [True, False, False, False]
    for fig, expected in zip(drawn, [[[1, 0.25]], [], [], []]):      # not among training steps
        assert [list(line.get_ydata()) for line in fig.axes[0].lines
                if line.get_markerfacecolor() == "white"] == expected


def test_delays_have_the_reach_of_each_convolution(tmp_path, drawn):
    """Two taps reach one token back, four reach three; the axis has a place for each delay."""
    settings = [("conv2+attention", (1, 2, 4)), ("conv+attention", (1, 2, 4)), ("mamba", (1, 4))]
    for model, delays in settings:
        for tau in delays:
            write(tmp_path, model=model, tau=tau)
    make.draw("{}/* --against tau", str(tmp_path), [])
    write(tmp_path / "wide", model="conv+attention", d=8)
    write(tmp_path / "wide", model="conv+attention", d=16)
    make.draw("{}/wide/* --against d", str(tmp_path), [])
    colours = [plot.COLOURS[model] for model, _ in settings[:2]]
    assert vertical_lines(drawn[0].axes[0]) == dict(zip(colours, [0.5, 1.5]))
    assert "how far each convolution reaches" in drawn[0].get_supxlabel()
    assert vertical_lines(drawn[1].axes[0]) == {} and "reaches" not in drawn[1].get_supxlabel()
    assert texts(drawn[1].axes[0])[-1] == "conv+attention"


def test_a_figure_without_runs_does_not_keep_others_from_being_drawn(tmp_path, monkeypatch,
                                                                     capsys, refuses):
    """Also in a folder whose name a shell or glob would take apart."""
    out, figures = tmp_path / "my [old] runs", str(tmp_path / "figures")
    tiny = {"train": [], "draw": {"{}/none/* --name one": "One", "{}/tiny/* --name two": "Two"}}
    monkeypatch.setitem(make.EXPERIMENTS, "tiny", tiny)
    (out / "tiny").mkdir(parents=True)
    write(out / "tiny", "rope")
    make.main(["tiny", "--draw", "--out", str(out), "--figures", figures])
    assert "two.png" in names(figures) and "one.png" not in names(figures)
    assert "left out: no runs to draw" in capsys.readouterr().err
    tiny["draw"] = {"{}/tiny/* --against lr --name three": "", **tiny["draw"]}
    os.remove(figures + "/two.png")
    make.main(["tiny", "--draw", "--out", str(out), "--figures", figures])
    assert "two.png" in names(figures), "although plot.py refuses the figure before"
    tiny["draw"] = {"{}/none/* --name one": "One"}
    assert "no runs to draw" in refuses(make.main, ["tiny", "--draw", "--out", str(out)])


def test_a_flag_that_would_add_to_the_experiment_is_refused(tmp_path, refuses):
    for words in (["--tau", "1"], ["--tau=1"]):
        command = ["problem1", "--out", str(tmp_path / "out"), *words]
        assert "--tau is set by problem1" in refuses(make.main, command)
    assert "it takes no --tau" in refuses(make.main, ["problem1", "--draw", "--tau", "1"])
