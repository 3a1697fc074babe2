"""What only a CUDA device can show. Collected only where there is one: conftest.py sees to that."""

import json

import pytest
import torch

import bench
import fused_scan
import mamba
from mamba import selective_scan, selective_scan_ref
from test_mamba import assert_close, everything, operands


@pytest.mark.parametrize("L, with_h", [(20, True), (50, False)])
def test_compiled_scan_equals_float64(L, with_h, monkeypatch):
    """Two groups of chunks, and four, steps and chunks filled up with zeros."""
    monkeypatch.setattr(fused_scan, "CHUNK_STEPS", 4)
    monkeypatch.setattr(fused_scan, "GROUP_CHUNKS", 4)
    inputs = [None if v is None else v.float().double() for v in operands(L, D=16, N=16, h=with_h)]
    assert mamba.compile_scan
    assert_close(everything(selective_scan, inputs, torch.float32, "cuda"), everything(selective_scan_ref, inputs))


def test_the_scan_of_a_large_batch_takes_longer_by_its_size_alone():
    """Kernels whose blocks grow with the shape until they have too few registers took five times as long."""
    device, scan = torch.device("cuda"), lambda *inputs: mamba.parallel_scan(*inputs, None)[0]
    small, large = (bench.scan_row("parallel", scan, (b, 1024, 2048, 16), device)["ms"] for b in (8, 64))
    assert large < 1.5 * 64 / 8 * small


def test_bfloat16_inputs():
    x, dt, A, B, C, h = (v.float() for v in operands(20, D=16, N=16))
    inputs = [x.bfloat16(), dt.bfloat16(), A, B.bfloat16(), C.bfloat16(), h]
    found = everything(selective_scan, inputs, device="cuda")
    assert found["y"].dtype == torch.bfloat16 and found["last state"].dtype == torch.float32
    exact = everything(selective_scan_ref, [v.double() for v in inputs])
    assert_close({"last state": found["last state"]}, {"last state": exact["last state"]})
    assert_close(found, exact, outputs=1e-2, gradients=1e-2)


@pytest.mark.parametrize("model", ["hybrid-b", "mamba2-hybrid"])
def test_recorded_training_equals_plain(model, train_tiny, tmp_path):
    """Matrix products as sums, and by the library."""
    flags = "--device", "cuda", "--model", model, "--M", 2
    fast, = train_tiny(*flags, "--compile", out=tmp_path / "fast")
    plain, = train_tiny(*flags, "--no-compile", out=tmp_path / "plain")
    assert fast["train"]["step"] == plain["train"]["step"]
    assert fast["train"]["loss"] == pytest.approx(plain["train"]["loss"], rel=1e-3)
    assert fast["train"]["accuracy"] == pytest.approx(plain["train"]["accuracy"], abs=0.1)


def test_bench_records_every_scan(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"cuda": [(2, 20, 16, 16)]})
    bench.main(["--device", "cuda", "--tables", "scan", "--out", str(tmp_path / "b.json")])
    rows = json.loads((tmp_path / "b.json").read_text())["bench"]["scan"]
    assert {row["form"] for row in rows} >= {"recurrence", "chunked", "parallel", "mamba-2"}
