"""What only a CUDA device can show. Collected only where there is one: conftest.py sees to that."""

import pytest
import torch

import mamba
from mamba import selective_scan, selective_scan_ref
from test_mamba import assert_close, everything, operands


@pytest.mark.parametrize("L, with_h", [(64, True), (100, False)])
def test_compiled_scan_equals_float64(L, with_h):
    inputs = [None if v is None else v.float().double() for v in operands(L, D=16, N=16, h=with_h)]
    assert mamba.compile_scan
    assert_close(everything(selective_scan, inputs, torch.float32, "cuda"), everything(selective_scan_ref, inputs))


def test_recorded_training_equals_plain(train_tiny, tmp_path):
    flags = "--device", "cuda", "--model", "hybrid-b", "--M", 2
    fast, = train_tiny(*flags, "--compile", out=tmp_path / "fast")
    plain, = train_tiny(*flags, "--no-compile", out=tmp_path / "plain")
    assert fast["train"]["step"] == plain["train"]["step"]
    assert fast["train"]["loss"] == pytest.approx(plain["train"]["loss"], rel=1e-3)
    assert fast["train"]["accuracy"] == pytest.approx(plain["train"]["accuracy"], abs=0.1)
