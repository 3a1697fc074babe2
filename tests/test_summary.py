"""summary.py: what a file is worth, which runs are the seeds of a setting, and the table."""

import json
import os

import numpy as np
import pytest

import plot
import summary
from test_plot import figures, thick, thin, write  # noqa: F401, a fixture


def test_a_seed_that_stopped_keeps_its_accuracy_and_lengths_are_common():
    runs = [{"training": (np.array([200, 400]), np.array([0.5, 0.9])),
             "length": (np.array([8, 64, 99]), np.array([1, 0.5, 0]))},
            {"training": (np.array([100, 200, 400, 1000]), np.array([0.1, 0.1, 0.7, 0.3])),
             "length": (np.array([8, 64]), np.array([0.5, 0.7]))}]
    x, y = summary.median_curve(runs, "training")
    assert x.tolist() == [200, 400, 1000] and np.allclose(y, [0.3, 0.8, 0.6])
    x, y = summary.median_curve(runs, "length")
    assert x.tolist() == [8, 64] and np.allclose(y, [0.75, 0.6])


def test_table(tmp_path, capsys):
    paths = [write(tmp_path, "rope", seed=s, at=a, beyond=b, solved=w)
             for s, (a, b, w) in enumerate([(1.0, 0.9, 300), (0.995, 0.5, 700), (0.7, 0.6, 500)])]
    paths += [write(tmp_path, "mamba", at=0.5, lr=0.001)]
    paths += [write(tmp_path, "a|b", d=16, lengths=[16, 64])]
    assert plot.main([*paths, "--table"]) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("| model | d | lr | seeds | median steps to 0.99 | at L: median | at L: worst "
                        "| lowest to 3L: median | lowest to 3L: worst |")
    assert lines[1] == "|" + " --- |" * 9
    assert lines[2:] == [
        "| `rope` | 8 | 0.008 | 3 | 700 | 0.995 | 0.700 | 0.600 | 0.500 |",
        "| `mamba` | 8 | 0.001 | 1 | never | 0.500 | 0.500 | 0.500 | 0.500 |",
        "| `a/b` | 16 | 0.008 | 1 | 500 | 1.000 | 1.000 |  |  |",
        "", "All rows: task = recall, M = 1, tau = 1, K = 16, L = 64."]
    plot.main([*paths[:3], "--table", "16", "129", "4096"])
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "| model | 16 | 129 | 4096 |", "|" + " --- |" * 4, "| `rope` | 0.995 | 0.600 |  |",
        "", "All rows: task = recall, d = 8, M = 1, tau = 1, K = 16, L = 64, seeds = 3."]
    assert "no run was tested at 4096 tokens" in said.err and "at 129" not in said.err


BAD = ["", "{", "[1, 2]", "3", '{"bench": {}}', "[" * 100000, '{"config": {}}']
CHANGES = [("config", "K", "16"), ("config", "seed", "x"), ("config", "model", None),
           ("config", "lr", [1]),
           ("eval", "length", [2, 3]), ("eval", "length", ["a"]), ("train", "step", [])]


def test_the_worst_of_a_table_is_empty_if_a_seed_was_not_tested(tmp_path, capsys):
    paths = [write(tmp_path, seed=0, beyond=0.7), write(tmp_path, seed=1, lengths=[64])]
    for order in paths, paths[::-1]:
        plot.main([*order, "--table"])
        assert capsys.readouterr().out.splitlines()[2].endswith("| 1.000 | 1.000 |  |  |")


def test_what_is_no_result_is_left_out(tmp_path, figures, capsys, refuses):
    good = write(tmp_path, "mamba")
    bad = [str(tmp_path / "missing.json"), str(tmp_path), write(tmp_path, lengths=[64, 32])]
    for n, content in enumerate(BAD):
        (tmp_path / f"bad{n}.json").write_text(content)
        bad.append(str(tmp_path / f"bad{n}.json"))
    for n, (section, key, value) in enumerate(CHANGES):
        result = json.loads(open(write(tmp_path, lengths=[64], steps=[1])).read())
        result[section][key] = value
        (tmp_path / f"changed{n}.json").write_text(json.dumps(result))
        bad.append(str(tmp_path / f"changed{n}.json"))
    assert len(figures(*bad, good)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(bad)
    assert all(line.startswith("plot.py: left out: ") for line in errors)
    with pytest.raises(SystemExit) as stop:
        plot.main(bad[:3])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("plot.py: there is nothing to draw\n")


def test_one_file_that_is_missing_is_one_sentence(tmp_path, refuses):
    for more in [], ["--table"]:
        assert "none.json" in refuses(plot.main, [tmp_path / "none.json", *more])


def test_the_same_run_twice(tmp_path, figures, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = write(tmp_path, at=1.0), write(tmp_path / "copy", at=0.5, device="cuda")
    fig = figures(one, two)["length_tau1_K16_d8_L64_M1.png"]
    (x, y), = thick(fig.axes[0]).values()
    assert y[0] == 1.0 and not thin(fig.axes[0])                # a single seed
    error = capsys.readouterr().err
    assert one in error and two in error
    figures(one, os.path.relpath(one), "./" + os.path.relpath(one))
    assert capsys.readouterr().err == ""


def test_a_test_at_exactly_99_percent_solves(tmp_path):
    path = write(tmp_path, "rope")
    with open(path) as f:
        result = json.load(f)
    result["train"] = {"step": [100, 200, 300], "loss": [1, 1, 1], "accuracy": [0.9899, 0.99, 1.0]}
    with open(path, "w") as f:
        json.dump(result, f)
    assert summary.load(path)["steps"] == 200


def test_results_from_before_a_flag_have_its_default(tmp_path, monkeypatch):
    path = write(tmp_path)
    monkeypatch.setitem(summary.GRID, "clip", 0.2)
    assert summary.load(path)["config"]["clip"] == 0.2
