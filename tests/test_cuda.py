"""What only a GPU can show: the fused scan, captured and compiled steps. Collected where there is
one."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpu
import hybrid
import runs
import train
from bench import peak_megabytes, time_forms
from conftest import embedding_for, relative
from data import TASKS, stream
from eval import training_accuracy
from family.mamba2 import ssd, ssd_ref
from fused_scan import compiled_scan, parallel_scan
from mamba import selective_scan, selective_scan_ref
from test_mamba import assert_close, everything, operands


def test_processes_of_torchrun_have_a_gpu_each(monkeypatch):
    before, count = torch.cuda.current_device(), torch.cuda.device_count()
    for rank in range(count + 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        for name in None, "cuda", "cuda:0":
            assert gpu.pick_device(name) == torch.device("cuda", rank % count)
            assert torch.cuda.current_device() == rank % count
        assert gpu.pick_device("cpu") == torch.device("cpu")
    torch.cuda.set_device(before)


@pytest.mark.parametrize("L, D", [(1, 16), (20, 16), (65, 48), (300, 130)])
def test_fused_scan_equals_the_recurrence(L, D):
    inputs = operands(L, D=D, N=16)
    found = everything(selective_scan, inputs, torch.float32, "cuda")
    assert_close(found, everything(selective_scan_ref, inputs))


def test_fused_scan_in_bfloat16():
    x, dt, A, B, C, h = (v.float() for v in operands(20, D=16, N=16))
    inputs = [x.bfloat16(), dt.bfloat16(), A, B.bfloat16(), C.bfloat16(), h]
    found = everything(selective_scan, inputs, device="cuda")
    exact = everything(selective_scan_ref, [v.double() for v in inputs])
    assert found["y"].dtype == torch.bfloat16 and found["last state"].dtype == torch.float32
    assert_close({"last state": found["last state"]}, {"last state": exact["last state"]})
    assert_close(found, exact, outputs=1e-2, gradients=1e-2)


def test_a_large_batch_costs_what_its_size_says():
    """Once the compiler's blocks outgrew the registers: five times as long for large batches."""
    def milliseconds(b):
        x, dt = torch.randn(b, 1024, 2048, device="cuda"), torch.rand(b, 1024, 2048, device="cuda")
        A = -torch.rand(2048, 16, device="cuda")
        B, C = torch.randn(2, b, 1024, 16, device="cuda")
        inputs = [v.requires_grad_() for v in (x, dt, A, B, C)]
        times = []
        for _ in range(4):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.autograd.grad(parallel_scan(*inputs)[0].sum(), inputs)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return min(times)

    assert milliseconds(64) < 1.5 * 8 * milliseconds(8)


def test_bfloat16_is_faster_than_float32():
    """Once a kernel of the bfloat16 scan ran out of registers with 32 chunks: 98 us, not 8."""
    b, L, D, N = 64, 256, 128, 16
    x, dt = torch.randn(b, L, D, device="cuda"), torch.rand(b, L, D, device="cuda")
    A, (B, C) = -torch.rand(D, N, device="cuda"), torch.randn(2, b, L, N, device="cuda")
    forms = {"ours": lambda *v: selective_scan(*v)[0]}
    ms = {dtype: next(time_forms("b, L, D, N", (b, L, D, N), forms, (x, dt, A, B, C), dtype))["ms"]
          for dtype in ("float32", "bfloat16")}
    assert ms["bfloat16"] < ms["float32"]


@pytest.mark.parametrize("L", [70, 300])                      # one chunk, and five
def test_ssd(L):
    torch.manual_seed(0)
    x, dt, A = torch.randn(2, L, 4, 8), torch.rand(2, L, 4), -torch.rand(4)
    B, C = torch.randn(2, 2, L, 2, 16)
    dy = torch.randn(2, L, 4, 8)

    def outcome(form, dtype, device):
        inputs = [v.to(device, dtype).requires_grad_() for v in (x, dt, A, B, C)]
        y, h = form(*inputs)
        return [y, h, *torch.autograd.grad(y, inputs, dy.to(y))]

    exact = outcome(ssd_ref, torch.float64, "cpu")
    for found, right in zip(outcome(ssd, torch.float32, "cuda"), exact):
        assert relative(found.cpu(), right) < 5e-3            # matmuls may use TF32


def test_memory_of_the_scans():
    """Beside x-sized results and gradients, Mamba's backward pass holds two tensors of states, and
    Mamba-2's no attention weights from the forward pass."""
    def peak(scan, inputs):
        inputs = [v.cuda().requires_grad_() for v in inputs]
        dy = torch.randn_like(inputs[0])

        def call():
            torch.autograd.grad(scan(*inputs)[0], inputs, dy)

        call()                                                # compiles
        return 1e6 * peak_megabytes(call)

    b, L, D, N = 64, 256, 128, 16
    for dtype in (torch.float32, torch.bfloat16):
        x, dt, A = torch.randn(b, L, D).to(dtype), torch.rand(b, L, D).to(dtype), -torch.rand(D, N)
        B, C = torch.randn(2, b, L, N).to(dtype)
        states = x.nbytes // 8 * N
        assert peak(selective_scan, (x, dt, A, B, C)) < 1.15 * (3 * x.nbytes + 2 * states)

    b, L, H, P, N = 64, 256, 2, 64, 16
    x, dt, A = torch.randn(b, L, H, P), torch.rand(b, L, H), -torch.rand(H)
    B, C = torch.randn(2, b, L, 1, N)
    assert peak(torch.compile(ssd), (x, dt, A, B, C)) < 7 * x.nbytes


def losses(model, mode, steps=12, switch=None):
    """The losses of a training step: plain ("none"), captured ("off") or compiled ("on")."""
    config = {**runs.DEFAULTS, "model": model, "K": 16, "d": 8, "L": 16, "M": 2, "tau": 1,
              "seed": 0, "lr": 1e-2, "batch_size": 32, "compile": mode}
    device = torch.device("cuda")
    torch.manual_seed(0)
    net = runs.model_from(config).to(device)
    generator = stream(0, "training", device)
    optimizer = train.make_optimizer(net, config, device)
    step, functions = train.make_training_step(net, optimizer, config, generator)
    if mode == "none":
        return [step(*functions).item() for _ in range(steps)]
    fast, found = gpu.Captured("training step", step, functions, generator, config), []
    for k in range(steps):
        if k == switch:
            fast.compile()
        found.append(fast().item())
    assert fast.replay is not None
    return found


@pytest.mark.parametrize("model", ["rope", "mamba", "hybrid-b", "mamba2", "gated-deltanet"])
def test_captured_and_compiled_steps_are_training_steps(model):
    plain = losses(model, "none")
    assert losses(model, "off") == pytest.approx(plain, rel=1e-3)
    assert losses(model, "on") == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("model, task", [("rope", "recall"), ("mamba", "recall"),
                                         ("hybrid-a", "mqar"), ("mamba3", "parity")])
def test_captured_and_compiled_tests_are_tests(model, task):
    config = {**runs.DEFAULTS, "task": task, "model": model, "K": 16, "d": 8, "L": 16, "M": 2,
              "tau": 1, "seed": 0}
    torch.manual_seed(0)
    net, device = runs.model_from(config).cuda(), torch.device("cuda")

    def accuracies(mode):
        generator = stream(0, "test", device)

        def test(net):
            return training_accuracy(net, config, generator)

        one = gpu.Captured("test", test, [net], generator, {**config, "compile": mode})
        return [float(one() if mode else test(net)) for _ in range(8)]

    found = accuracies(None)
    assert accuracies("off") == pytest.approx(found, abs=0.005)     # 2 of 512 answers
    assert accuracies("on") == pytest.approx(found, abs=0.005)
    assert len(set(found)) > 4                                      # fresh sequences in each


@pytest.mark.parametrize("task, uniform", [*((task, False) for task in TASKS), ("recall", True)])
def test_a_compiled_task_draws_the_same(task, uniform):
    device, config = torch.device("cuda"), {**runs.DEFAULTS, "model": "rope", "d": 8, "L": 24}

    def draw(task):
        return task(64, 24, 16, 4, 3, device, stream(0, "test", device), uniform)
    plain, compiled = draw(TASKS[task]), draw(gpu.compile_part(TASKS[task], config))
    for expected, found in zip(plain, compiled):
        assert (expected is None and found is None) or torch.equal(expected, found)


@pytest.mark.parametrize("word", ["forgetting", "linear-decay", "linear-rotation", "mamba3-mimo",
                                  "experts", "rnn"])
def test_a_compiled_model_has_the_same_gradients(word):
    """Models whose steps the tests above do not compile."""
    device = torch.device("cuda")
    config = {**runs.DEFAULTS, "model": f"conv+{word}", "K": 16, "d": 8, "L": 64}
    torch.manual_seed(0)
    model = runs.model_from(config).to(device)
    tokens = torch.randint(16, (32, 65), device=device)

    def loss_of(tokens):
        return model(tokens).square().mean()

    def gradients(function, compiled):
        with compiled_scan(compiled), sdpa_kernel([SDPBackend.MATH]):
            loss = function(tokens)
            weights = [p for p in model.parameters() if p.requires_grad]
            return [loss, *torch.autograd.grad(loss, weights)]
    plain = gradients(loss_of, False)
    for expected, found in zip(plain, gradients(gpu.compile_part(loss_of, config), True)):
        assert (found - expected).norm() < 1e-3 * (expected.norm() + 1e-3 * plain[0].norm())


@pytest.mark.parametrize("word", hybrid.LAYERS)
def test_autocast(word):
    torch.manual_seed(0)
    layer, x = hybrid.build_layer(word, 16, 40).cuda(), torch.randn(2, 40, 16).cuda()
    with compiled_scan(False):
        exact, _ = layer(x, **embedding_for(layer, x))
        with torch.autocast("cuda", torch.bfloat16):
            y, _ = layer(x, **embedding_for(layer, x))
        y.float().square().sum().backward()
    assert relative(y, exact) < (0.3 if word == "experts" else 0.03)     # it may choose others
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_compiling_in_the_middle_of_a_run():
    assert losses("mamba", "off", switch=6) == pytest.approx(losses("mamba", "none"), rel=1e-3)


def test_a_run_compiles_when_that_pays(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GUESSED_SECONDS", {"training step": 1e-9, "test": 1e-9})
    monkeypatch.setattr(gpu, "measured_seconds", {})
    said = []
    monkeypatch.setattr(gpu, "say", said.append)
    flags = ["--model", "nope", "--L", "8", "--steps", "200", "--device", "cuda"]
    result, = train.main([*flags, "--out", str(tmp_path)])
    assert ["training step" in line for line in said] == [True, False]     # then the test
    assert all("compiling it now" in line for line in said)
    assert all(math.isfinite(loss) for loss in result["train"]["loss"])


class Dropout(torch.nn.Dropout):
    """As a layer: it draws from torch's own generator, in a captured step, too."""
    def __init__(self, d):
        super().__init__(0.2)

    def forward(self, x, state=None):
        return super().forward(x), x[:, :0]


@pytest.mark.parametrize("model", ["hybrid-a", "mamba+dropout+attention"])
def test_a_killed_run_continues(model, tmp_path, monkeypatch):
    """Stopped after a save, and given again: the steps that follow are those of a whole run."""
    monkeypatch.setitem(hybrid.LAYERS, "dropout", Dropout)
    flags = ["--model", model, "--L", "8", "--steps", "80", "--device", "cuda"]
    flags += ["--compile", "off"]
    whole, = train.main([*flags, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    saves, real = [], runs.save_progress

    def save_and_stop(*arguments, **progress):
        real(*arguments, **progress)
        saves.append(1)
        if len(saves) == 8:                  # of 20
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "save_progress", save_and_stop)
    with pytest.raises(SystemExit):
        train.main([*flags, "--out", str(tmp_path / "killed")])
    monkeypatch.setattr(runs, "save_progress", real)
    killed, = train.main([*flags, "--out", str(tmp_path / "killed")])
    assert killed["train"]["step"] == whole["train"]["step"]
    assert killed["train"]["loss"] == pytest.approx(whole["train"]["loss"], rel=1e-3)
