"""What only a CUDA device can show. Collected only where there is one: see conftest.py."""

import os

import pytest
import torch

import gpu
import runs
from conftest import stopped_run
from data import stream
from mamba import selective_scan, selective_scan_ref
from test_mamba import assert_close, everything, operands

CUDA = ["--device", "cuda", "--M", 2, "--no-stop-early"]


class PlainStep(gpu.FastStep):
    """The step, its kernels launched one by one: neither captured nor compiled."""

    def __call__(self):
        return self.plain()

    def compile(self):
        pass

    def compile_if_it_pays(self, *_):
        pass


@pytest.fixture
def plain(train_tiny, monkeypatch, tmp_path):
    """plain(*flags): the losses of a run whose steps are neither captured nor compiled."""
    def call(*flags):
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "FastStep", PlainStep)
            return train_tiny(*CUDA, *flags, out=tmp_path / "plain")[0]["train"]["loss"]
    return call


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("model", ["rope", "mamba", "hybrid-b"])
def test_captured_and_compiled_steps_equal_plain_ones(model, mode, plain, train_tiny):
    result, = train_tiny(*CUDA, "--model", model, "--compile", mode)
    assert result["train"]["loss"] == pytest.approx(plain("--model", model), rel=1e-3)


def test_a_run_that_is_compiled_on_the_way_equals_a_plain_one(plain, train_tiny, monkeypatch):
    """auto: captured first, compiled when it pays, which at a cost of 0 s it does at once."""
    compiled, compile_step = [], gpu.FastStep.compile

    def noted(self):
        compiled.append(self.calls)
        compile_step(self)
    monkeypatch.setattr(gpu, "COMPILE_SECONDS", 0)
    monkeypatch.setattr(gpu, "compiled_shapes", {})
    monkeypatch.setattr(gpu.FastStep, "compile", noted)
    result, = train_tiny(*CUDA, "--model", "hybrid-a", "--compile", "auto")
    assert len(compiled) == 1 and compiled[0] > gpu.WARM_UP, "once, and after it was captured"
    assert len(gpu.compiled_shapes) == 1
    assert result["train"]["loss"] == pytest.approx(plain("--model", "hybrid-a"), rel=1e-3)


def test_a_stopped_run_is_resumed(train_tiny, monkeypatch, tmp_path):
    flags = [*CUDA, "--model", "hybrid-a", "--compile", "off"]
    stopped_run(train_tiny, monkeypatch, flags, 9)
    resumed, = train_tiny(*flags)
    whole, = train_tiny(*flags, out=tmp_path / "whole")
    assert resumed["train"]["step"] == whole["train"]["step"]
    assert resumed["train"]["loss"] == pytest.approx(whole["train"]["loss"], rel=1e-3)


def test_a_checkpoint_of_cuda_is_read_on_a_cpu(train_tiny, tmp_path):
    result, = train_tiny(*CUDA, "--model", "mamba", "--compile", "off")
    path = os.path.join(tmp_path / "out", runs.run_name(result["config"]) + ".pt")
    model, _ = runs.load_run(path)
    tokens = torch.randint(16, (4, 9))
    on_cuda = runs.load_run(path, "cuda")[0](tokens.cuda()).cpu()
    assert torch.allclose(model(tokens), on_cuda, atol=1e-3)


def test_streams_share_no_draws_on_cuda():
    draws = [torch.randint(2**31 - 1, (4000,), device="cuda", generator=stream(seed, purpose,
                                                                               "cuda")).tolist()
             for seed in (0, 1, 2, 2**30 - 1) for purpose in ("training", "test", "evaluation")]
    windows = [{tuple(row[k:k + 4]) for k in range(len(row) - 3)} for row in draws]
    assert len(set.union(*windows)) == sum(map(len, windows))


@pytest.mark.parametrize("L, with_h", [(20, True), (50, False)])
def test_compiled_scan_equals_float64(L, with_h, monkeypatch):
    """Two groups of chunks, and four, steps and chunks filled up with zeros."""
    monkeypatch.setattr("fused_scan.CHUNK_STEPS", 4)
    monkeypatch.setattr("fused_scan.GROUP_CHUNKS", 4)
    inputs = [None if v is None else v.float().double()
              for v in operands(L, D=16, N=16, h=with_h)]
    assert_close(everything(selective_scan, inputs, torch.float32, "cuda"),
                 everything(selective_scan_ref, inputs))


def test_bfloat16_inputs():
    x, dt, A, B, C, h = (v.float() for v in operands(20, D=16, N=16))
    inputs = [x.bfloat16(), dt.bfloat16(), A, B.bfloat16(), C.bfloat16(), h]
    found = everything(selective_scan, inputs, device="cuda")
    exact = everything(selective_scan_ref, [v.double() for v in inputs])
    assert found["y"].dtype == torch.bfloat16
    assert_close(found, exact, outputs=1e-2, gradients=1e-2)
