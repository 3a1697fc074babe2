"""report/make.py: every experiment can be made, and one is."""

import glob
import os
import sys

import pytest
import torch
from conftest import ROOT, names

sys.path.insert(0, os.path.join(ROOT, "report"))

import eval as evaluation
import grid
import make
import train


@pytest.mark.parametrize("name", make.EXPERIMENTS)
def test_flags_are_those_of_train_eval_and_plot(name):
    """Configs are checked, no run is listed twice, and figures are of this experiment's runs."""
    experiment, seen = make.EXPERIMENTS[name], []
    for line in experiment["train"]:
        _, args = train.parse(line.split())
        seen += [grid.run_name(config) for config in grid.configs_of(args, torch.device("cpu"))]
    assert len(seen) == len(set(seen)) > 0
    for line in experiment["draw"]:
        assert f"{{}}/{name}/" in line and " --name " in line
    for _, line in experiment.get("test", ()):
        assert "--lengths" in line


def test_runs_tests_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "TEST_SEQUENCES", 32)
    monkeypatch.setattr(train, "EVAL_SEQUENCES", 16)
    tiny = {"train": ["--model nope --M 1 2 --L 8 --steps 2 --batch-size 4"],
            "test": [("*_M1_*", "--lengths 30 --sequences 20")],
            "draw": {"{}/tiny/*_M1_* {}/other/* --name one": "Told", "{}/tiny/* --name two": None}}
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
    make.main([*flags, "--draw"])
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
    with pytest.raises(SystemExit, match="--lr 1e30: train.py: 1 of 1 runs failed"):
        make.main(["tiny", "--out", out, "--device", "cpu", "--overwrite"])
    said = capsys.readouterr().out
    assert said.count("failed: the loss") == 1 and said.count("wrote ") == 1, "made twice"
    stem = "nope_M1_tau1_K16_d8_L8_batch-size4_steps20_seed0"
    assert names(out + "/tiny") == [f"{stem}.json", f"{stem}.pt"]


def test_titles_are_for_the_runs_of_the_report(monkeypatch):
    drawn = []
    monkeypatch.setattr(make, "draw", lambda line, more: drawn.append(more))
    make.main(["ladder", "--draw"])
    make.main(["ladder", "--draw", "--out", "report"])
    assert "--title" not in drawn[0] and "--title" in drawn[1]


def test_an_unknown_experiment(refuses):
    assert "problem1" in refuses(make.main, ["problem9"])


def test_nothing_to_draw(refuses, tmp_path):
    assert "no runs" in refuses(make.main, ["ladder", "--draw", "--out", tmp_path])
