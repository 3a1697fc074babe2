"""gpu.Captured without a GPU: when it launches, captures, replays and compiles. test_cuda.py has
the rest."""

import os
import subprocess
import sys
import types

import pytest
import torch

import gpu
import runs

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIG = {**runs.DEFAULTS, "model": "rope", "K": 16, "d": 8, "L": 64, "M": 1, "seed": 0}
CUDA = types.SimpleNamespace(device=torch.device("cuda"))                # instead of a generator


@pytest.fixture
def fast(monkeypatch):
    """fast(mode) -> a gpu.Captured; a call returns 2, or 102 if compiled."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "capture", lambda call, generator: lambda: ("replay", call()))
    monkeypatch.setattr(gpu, "compile_part", lambda part, config: lambda n: part(n) + 100)
    monkeypatch.setattr(gpu, "has_compiler", lambda: True)
    monkeypatch.setattr(gpu, "measured_seconds", {})
    monkeypatch.setattr(gpu, "say", lambda line: None)

    def make(mode, generator=CUDA):
        return gpu.Captured("test", lambda part: part(1), [lambda n: n + 1], generator,
                            {**CONFIG, "compile": mode})
    return make


@pytest.mark.parametrize("model, d, sums", [
    ("rope", 8, True), ("mamba+attention", 16, True), ("rope", 64, False),
    ("mamba2-hybrid", 8, False), ("2xgated-deltanet", 16, False), ("deltanet+mlp", 8, False)])
def test_small_models_without_large_matmuls_write_them_as_sums(model, d, sums, monkeypatch):
    found = []
    monkeypatch.setattr(gpu, "compile_each_shape", lambda part, options: found.append(options))
    gpu.compile_part(None, {**CONFIG, "model": model, "d": d})
    assert bool(found[0]["post_grad_fusion_options"]) == sums


def test_three_calls_are_launched_then_replayed(fast):
    for mode, value in ("off", 2), ("auto", 2), ("on", 102):
        call = fast(mode)
        assert [call() for _ in range(7)] == [value] * 3 + [("replay", value)] * 4


def test_waits_for_the_gpu_in_the_first_calls_alone(fast, monkeypatch):
    call, waits = fast("off"), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    for _ in range(20):
        call()
    assert len(waits) == 2 * gpu.FIRST_CALLS


def test_compiles_when_that_pays(fast):
    call, off = fast("auto"), fast("off")
    call.compile_if_it_pays(10**9)
    assert not call.compiled, "how long a call takes is not yet known"
    for _ in range(gpu.FIRST_CALLS):
        call(), off()
    call.last_seconds = off.last_seconds = 1.0
    enough = gpu.GUESSED_SECONDS["test"] / (1 - 1 / gpu.SPEEDUP)
    call.compile_if_it_pays(0.9 * enough)
    off.compile_if_it_pays(10**9)
    assert not call.compiled and not off.compiled
    call.compile_if_it_pays(1.1 * enough)
    assert [call() for _ in range(5)] == [102] * 3 + [("replay", 102)] * 2
    assert fast("auto").compiled, "the next run of a shape that has been compiled"


def test_a_cpu_only_calls(fast):
    call = fast("auto", torch.Generator())
    call.compile_if_it_pays(10**9)
    assert [call() for _ in range(7)] == [2] * 7


def test_steps_left():
    assert gpu.steps_left(100, 20000, 0) == 100                          # half over
    assert gpu.steps_left(15000, 20000, 0) == 5000                       # at most these
    assert gpu.steps_left(100, 20000, 3) == 100 + 3 * 200


def test_the_optimizer_is_torchs():
    """The same steps, and states that each can load from the other."""
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3), torch.randn(6, 5, 3)
    results = []
    for first, then in ((gpu.AdamW, torch.optim.AdamW), (torch.optim.AdamW, gpu.AdamW)):
        p = torch.nn.Parameter(start.clone())
        options = dict(lr=torch.tensor(0.1), betas=(0.9, 0.98), fused=True, weight_decay=0.5)
        optimizer = first([p], **options)
        for k, gradient in enumerate(gradients):
            if k == 3:
                state = optimizer.state_dict()
                optimizer = then([p], **options)
                optimizer.load_state_dict(state)
            p.grad = gradient.clone()
            optimizer.step()
            optimizer.zero_grad()
            assert p.grad is None
        results.append(p.detach())
    assert torch.equal(*results) and (results[0] - start).abs().min() > 0.01


@pytest.mark.parametrize("model", ["rope", "mamba"])
def test_a_run_on_a_cpu_does_not_import_the_compiler(model, tmp_path):
    """Importing it takes longer than many a run."""
    argv = ["--model", model, "--steps", "3", "--L", "8", "--device", "cpu", "--out", str(tmp_path)]
    program = f"import sys, train; train.main({argv}); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stdout + done.stderr
