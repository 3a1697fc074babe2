"""bench.py: rows of each table, a model that is asked for, wrong commands, the length figure."""

import json

import pytest
import torch

import bench
from conftest import ROOT, relative


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "SCAN_SHAPES", {"cpu": [(2, 5, 4, 3)]})
    monkeypatch.setattr(bench, "SSD_SHAPES", {"cpu": [(2, 5, 2, 4, 3)]})
    monkeypatch.setattr(bench, "LENGTHS", {"cpu": [16, 32]})


def test_tables(tiny, tmp_path, capsys):
    out = tmp_path / "bench.json"
    result = bench.main(["--tables", "step", "scan", "ssd", "length", "--model", "rope", "mamba",
                         "--device", "cpu", "--out", str(out)])
    assert json.loads(out.read_text()) == result
    step, scan, ssd, length = (result[name] for name in ("step", "scan", "ssd", "length"))
    assert [row["model"] for row in step] == ["rope", "mamba"]
    assert [row["params"] for row in step] == [728, 2760]
    assert [row["state 64"] for row in step] == [8192, 2432]
    assert [row["form"] for row in ssd] == ["ours", "ours", "delta rule"]
    for row in (scan[0], ssd[0], ssd[1]):
        assert row["form"] == "ours" and row["of ours"] == 1.0
    assert [row["length"] for row in length] == [16, 32, 16, 32]
    assert all(row["ms"] > 0 for row in step + scan + ssd)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("rope", "mamba", "ours", "2 5 4 3", "2 5 2 4 1 3",
                                           "2 5 2 4 2 3"))


def test_a_form_is_compared_with_ours(monkeypatch):
    """Each gets the same numbers, and its time is divided by the first's."""
    took, seen = iter([3.0, 6.0]), []
    monkeypatch.setattr(bench, "timed", lambda *arguments, **options: next(took))

    def form(x, dt, A, B, C):
        seen.append(x.sum().item())
        return x + dt + A.sum() + B.sum() + C.sum()

    def missing(*inputs):
        raise ImportError
    monkeypatch.setattr(bench, "mambapy_scan", missing)
    inputs = [torch.rand(2, 3) for _ in range(5)]
    forms = {"ours": form, "missing": missing, "theirs": form}
    ours, theirs = bench.time_forms("shape", (2, 3), forms, inputs, "float32")
    assert (ours["ms"], theirs["ms"], theirs["of ours"]) == (0.3, 0.6, 2.0)
    assert theirs["form"] == "theirs" and len(set(seen)) == 1


def test_times_are_per_call_and_the_median(monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 12.0, 20.0, 28.0])         # three repeats: 4, 2 and 8 seconds
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    found = bench.timed(lambda: None, torch.device("cpu"), repeats=3, in_a_row=4)
    assert found == 1000.0                                   # milliseconds of one of four calls


def test_costs_are_per_token(tiny, monkeypatch):
    monkeypatch.setattr(bench, "timed", lambda *arguments, **options: 8.0)
    rows = bench.main(["--tables", "length", "--model", "mamba", "--device", "cpu"])["length"]
    assert [row["train us/token"] for row in rows] == [500.0, 250.0]     # 8 ms over 16, 32 tokens
    assert [row["decode ms"] for row in rows] == [8.0, 8.0]


def test_the_step_is_a_training_step():
    config = bench.config_for("rope")
    torch.manual_seed(0)
    model, step = bench.model_and_step(config, torch.device("cpu"))
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.clone() for p in trained]
    losses = [step().item() for _ in range(2)]
    assert all(2 < loss < 4 for loss in losses) and losses[0] != losses[1]
    assert all(relative(a, b) > 0 for a, b in zip(trained, before))


def test_figure_of_lengths(tiny, tmp_path, capsys):
    out = tmp_path / "length.json"
    bench.main(["--tables", "length", "--model", "mamba", "--device", "cpu", "--out", str(out)])
    bench.main(["--draw", str(out)])
    bench.main(["--draw", str(out), "--out", str(tmp_path / "own.svg")])
    assert b"<svg" in (tmp_path / "own.svg").read_bytes()
    assert (tmp_path / "length.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", [
    '{"length": []}', '{"length": [{"model": "rope"}], "env": {"device": "x"}}', "[]",
    '{"length": 3, "env": {"device": "x"}}'])
def test_a_file_of_another_table_is_refused(text, tmp_path, refuses):
    (tmp_path / "x.json").write_text(text)
    assert "no file of --tables length" in refuses(bench.main, ["--draw", tmp_path / "x.json"])


@pytest.mark.parametrize("flags, word", [
    ("--tables all", "--tables"), ("--device cuda:77", "cuda:77"),
    ("--device nonsense", "nonsense"),
    ("--model nonsense", "--model"), (f"--out {__file__}/x.json", "--out"), ("--out .", "--out"),
    ("--draw none.json", "none.json"), ("--scan", "--scan"),
    (f"--draw {ROOT}/report/bench/length_cpu.json --out x.json", "json"),
    (f"--draw {__file__}", "no file of --tables length")])
def test_wrong_flags(tiny, refuses, flags, word):
    assert word in refuses(bench.main, flags.split())
