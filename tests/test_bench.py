"""bench.py on tiny sizes: every table is printed, what it writes can be drawn, and wrong flags are refused before it begins."""

import gc
import json

import pytest
import torch

import bench
import plot


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"cpu": [(2, 5, 3, 4)]})
    monkeypatch.setattr(bench, "FEWEST_TOKENS", 8)
    monkeypatch.setattr(bench, "MOST_TOKENS", {"cpu": {"rope": 32, "mamba": 32}})


def test_tables(tiny, tmp_path, capsys):
    out = tmp_path / "mine.json"
    bench.main(["--device", "cpu", "--tables", "step", "scan", "length", "--out", str(out)])
    printed, tables = capsys.readouterr().out, json.loads(out.read_text())["bench"]
    assert {row["form"] for row in tables["scan"]} >= {"recurrence", "chunked", "parallel"}
    assert "mambapy" in printed and "mamba_ssm" in printed                             # beside them, or why they are not
    assert [row["model"] for row in tables["step"]] == list(bench.MODELS)
    assert all(0 < row["ms_lowest"] <= row["ms"] <= row["ms_highest"] for row in tables["scan"] + tables["step"])

    assert [(row["model"], row["length"]) for row in tables["length"]] == [(m, L) for m in ("rope", "mamba") for L in (8, 32)]
    P, D, N, d_conv = 64, 128, 16, 4
    assert [row["state_bytes"] for row in tables["length"]] == [                       # keys and values; window and h
        2 * 2 * 4 * 8 * P, 2 * 2 * 4 * 32 * P, *[2 * 4 * D * (d_conv - 1 + N)] * 2]
    plot.main([str(out), "--out", str(tmp_path)])
    assert (tmp_path / "cost_mine.png").exists()


def test_no_row_counts_what_another_left_behind(tiny, monkeypatch):
    held = []

    def count(device):
        gc.collect()
        held.append(sum(thing.nbytes for thing in gc.get_objects() if type(thing) is torch.Tensor))
    monkeypatch.setattr(bench, "bytes_held", count)
    bench.scan_table(torch.device("cpu"))
    assert len(held) >= 4 and len(set(held)) == 1


@pytest.mark.parametrize("flags, sentence", [
    ("--tables all", "--tables"), ("--device cuda:77", "cuda:77"), ("--device nonsense", "nonsense"), ("--out .", "--out is"),
    ("--out none/x.json", "--out is"), ("--scan", "--scan")])
def test_wrong_flags(flags, sentence, tiny, refuses, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sentence in refuses(bench.main, flags.split()) and capsys.readouterr().out == ""
