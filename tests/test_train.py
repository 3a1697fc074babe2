"""Training: its steps, its schedule, its results, and losses that are no number."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import output
import runs
import summary
import train
from conftest import ROOT, names, numbers
from data import TASKS, embedding_table, recall_batch, stream
from hybrid import FAMILY, LAYERS, MODELS, build_model
from summary import DEFAULTS

NAME = "rope_M2_tau1_K16_d8_L8_batch-size4_steps20_seed0"


# ---- a training step -----------------------------------------------------------------------------

@pytest.mark.parametrize("model, flags", [
    ("mamba", []), ("rope", ["--train-lengths", "uniform"]), ("mamba", ["--learn-embedding"])])
def test_two_steps_equal_a_loop_written_out(model, flags, train_tiny, tmp_path):
    """The loss, its gradient, clipping, decay of matrices alone, AdamW, the learning rate."""
    steps, lr, decay = 3, 0.3, 0.5
    result, = train_tiny("--model", model, "--M", 4, "--steps", steps, "--lr", lr, "--weight-decay",
                         decay, "--seed", 5, *flags)
    torch.manual_seed(5)
    network, generator = build_model(model, L=8, learn_embedding="--learn-embedding" in flags), (
        stream(5, "training"))
    mean, square, losses = {}, {}, []
    for step in range(1, steps + 1):
        lengths = None
        if "uniform" in flags:
            lengths = torch.randint(2, 9, (4,), generator=generator)
        tokens, labels = recall_batch(4, 8, 16, 4, 1, generator=generator, lengths=lengths)
        loss = F.cross_entropy(network(tokens, lengths), labels)
        losses.append(loss.item())
        trained = [p for p in network.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, trained)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        assert norm > 0.2, "clipping matters"
        rate = lr * min(step / 400, (steps - step + 1) / (steps / 4))
        for (name, p), g in zip([(n, p) for n, p in network.named_parameters() if p.requires_grad],
                                gradients):
            g = g * 0.2 / norm
            mean[name] = 0.9 * mean.get(name, 0) + 0.1 * g
            square[name] = 0.98 * square.get(name, 0) + 0.02 * g * g
            if p.dim() > 1 and not name.endswith("A_log"):
                p.data *= 1 - rate * decay
            denominator = (square[name] / (1 - 0.98**step)).sqrt() + 1e-8
            p.data -= rate * mean[name] / (1 - 0.9**step) / denominator
    assert result["train"]["loss"] == pytest.approx(losses, rel=1e-6)
    saved = torch.load(next((tmp_path / "out").glob("*.pt")), weights_only=True)["model"]
    for name, p in network.state_dict().items():
        assert torch.allclose(saved[name], p, rtol=1e-4, atol=1e-7), name


def test_two_steps_equal_a_loop_of_torch_bit_for_bit(train_tiny, tmp_path):
    result, = train_tiny("--model", "hybrid-b", "--steps", 2, "--weight-decay", 0.5)
    torch.manual_seed(0)
    model, generator = build_model("hybrid-b", L=8), stream(0, "training")
    matrices = [p for n, p in model.named_parameters()
                if p.requires_grad and p.dim() > 1 and not n.endswith("A_log")]
    vectors = [p for n, p in model.named_parameters()
               if p.requires_grad and (p.dim() < 2 or n.endswith("A_log"))]
    assert matrices and vectors
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.5),
                                   dict(params=vectors, weight_decay=0.0)],
                                  betas=(0.9, 0.98), fused=True)
    losses = []
    for step in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 0.008 * min((step + 1) / 400, (2 - step) / 0.5)
        tokens, labels = recall_batch(4, 8, generator=generator)
        loss = F.cross_entropy(model(tokens, None), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.2)
        optimizer.step()
    assert result["train"]["loss"] == losses
    saved = torch.load(next((tmp_path / "out").glob("*.pt")), weights_only=True)["model"]
    for name, p in model.state_dict().items():
        assert torch.equal(saved[name], p), name


def test_learning_rate():
    for last in 4000, 20000:
        fall = max(1000, round(last / 5))
        rates = [train.learning_rate(step, last, 0.01) for step in range(last + 1)]
        assert rates[0] == pytest.approx(0.01 / 400) and rates[199] == pytest.approx(0.005)
        assert set(rates[399:last + 1 - fall]) == {0.01}                # the plateau
        assert rates[last - fall // 2] == pytest.approx(0.005) and rates[last] == 0
        assert all(a > b for a, b in zip(rates[last - fall:], rates[last + 1 - fall:]))
    assert all(0 < train.learning_rate(step, 10, 1.0) < 1 for step in range(10))
    assert train.learning_rate(700, 1000, 1.0) == 1 > train.learning_rate(800, 1000, 1.0)


def curve(accuracy, every=10):
    return {"step": list(range(every, every * len(accuracy) + 1, every)), "accuracy": accuracy}


def test_solved_after_three_tests_in_a_row():
    assert train.solved_at(curve([])) is train.solved_at(curve([1.0] * 2)) is None
    assert train.solved_at(curve(([1.0] * 2 + [0.98]) * 3)) is None
    assert train.solved_at(curve([0.99] * 3)) == 30
    assert train.solved_at(curve([0.5] + [0.99] * 3 + [0.0] * 3)) == 40


def test_last_step():
    def last(accuracy, every=10, steps=10**6, stop_early=True):
        return train.last_step(curve(accuracy, every), dict(steps=steps, stop_early=stop_early))
    solved = [0.99] * 3
    assert last([]) == last([1.0] * 2) == 10**6
    assert last(solved) == 30 + 1000
    assert last(solved + [0.0] * 3) == 30 + 1000                        # solved once and for all
    assert last(solved, every=10**4) == pytest.approx(3 * 10**4 / 0.8)  # a long run falls longer
    assert last(solved, steps=500) == 500 and last(solved, stop_early=False) == 10**6


def test_stops_early_and_the_last_step_is_on_the_curve(train_tiny, monkeypatch):
    monkeypatch.setattr(train, "SOLVED", 0.0)
    monkeypatch.setattr(train, "SOLVED_TESTS", 3)
    monkeypatch.setattr(train, "COOLDOWN_STEPS", 5)
    assert train_tiny("--steps", 400)[0]["train"]["step"] == [10, 20, 30, 38]
    assert train_tiny("--steps", 7)[0]["train"]["step"] == [1, 2, 3, 4, 5, 6, 7]
    assert train_tiny("--steps", 9, "--no-stop-early")[0]["train"]["step"] == list(range(1, 10))
    monkeypatch.setattr(train, "TESTS", 3)
    assert train_tiny("--steps", 11, "--no-stop-early")[0]["train"]["step"] == [3, 6, 9, 11]


def test_the_terminal_and_the_figures_name_the_same_step(train_tiny, monkeypatch, tmp_path, capsys):
    """A first test at 0.99 solves nothing; the third in a row does."""
    accuracies = iter([0.5, 0.5, 1.0, 0.5, 0.99, 0.99, 0.99] + [1.0] * 20)
    monkeypatch.setattr(train, "training_accuracy", lambda *words: next(accuracies))
    train_tiny()
    path, = (tmp_path / "out").glob("*.json")
    line, = [line for line in capsys.readouterr().out.splitlines() if "stopped at" in line]
    assert summary.load(str(path))["steps"] == 3
    assert re.findall(r"step (\d+)", line) == ["3", "7"] and line.endswith("stopped at 20")


def test_without_a_terminal_a_run_says_how_it_goes(train_tiny, monkeypatch, capsys):
    train_tiny()
    assert "step 20 of 20" not in capsys.readouterr().out          # too quick for that
    monkeypatch.setattr(output, "SAY_SECONDS", -1)
    train_tiny("--overwrite")
    lines = [line for line in capsys.readouterr().out.splitlines() if " of 20, accuracy" in line]
    assert len(lines) == 20 and lines[-1].startswith("step 20 of 20")


def test_the_test_reads_fresh_sequences_of_its_own_stream(train_tiny, monkeypatch):
    asked = []
    for module in train, evaluation:
        monkeypatch.setattr(module, "stream", lambda *words: asked.append(words) or stream(*words))
    train_tiny("--seed", 3, "--steps", 1)
    purposes = [(seed, purpose) for seed, purpose, *_ in asked]
    assert purposes[:2] == [(3, "training"), (3, "test")]
    assert {purpose for _, purpose in purposes[2:]} == {"evaluation", "places"}


# ---- results -------------------------------------------------------------------------------------

def test_command_line(tmp_path):
    """With the defaults of the other flags, in a fresh process: files, result, printed lines."""
    script = os.path.join(ROOT, "train.py")
    flags = "--d 8 --L 8 --M 2 --steps 4 --lr 0.01 --batch-size 4 --device cpu".split()
    done = subprocess.run([sys.executable, script, *flags], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    name = "rope_M2_tau1_K16_d8_L8_batch-size4_steps4_lr0.01_seed0"
    assert names(tmp_path) == ["results"]
    assert names(tmp_path / "results") == [name + ".json", name + ".pt"]
    result = json.loads((tmp_path / "results" / (name + ".json")).read_text())
    assert result["config"] == {
        **DEFAULTS, "model": "rope", "M": 2, "tau": 1, "K": 16, "d": 8, "L": 8, "seed": 0,
        "batch_size": 4, "steps": 4, "lr": 0.01, "device": "cpu", "compile": "auto",
        "out": "results", "overwrite": False}
    assert result["params"] == 2 * (4 * 8 * 8 + 4 * 8) + 3 * 8 + 8 * 16
    assert result["train"]["step"] == [1, 2, 3, 4]
    assert all(0 < loss < 10 for loss in result["train"]["loss"])
    assert result["eval"]["length"] == list(range(2, 25))
    assert result["eval"]["sequences"] == 1024
    assert all(0 <= a <= 1 for a in result["eval"]["accuracy"] + result["train"]["accuracy"])
    assert result["state_bytes"] == {"64": 2 * 2 * 64 * 8 * 4, "4096": 2 * 2 * 4096 * 8 * 4}
    assert {"torch", "device", "commit", "threads"} <= set(result["env"])
    assert set(result["seconds"]) == {"train", "eval"} and min(result["seconds"].values()) >= 0

    model, config = runs.load_run(str(tmp_path / "results" / (name + ".pt")))
    assert config == result["config"] and model.n_params() == result["params"]
    lines = done.stdout.splitlines()
    assert "not solved" in lines[0] and lines[1] == f"wrote results/{name}.json"
    assert lines[2].split()[0] == "length" and lines[3].split()[0] == "accuracy"
    assert len([line for line in lines if "->" in line]) == 3          # three sequences


def test_the_commit_that_made_it(tmp_path, monkeypatch):
    """With + for uncommitted changes; unknown outside of a repository that has the code."""
    def git(*words):
        done = subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
                              cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()
    (tmp_path / "runs.py").write_text("1\n")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    assert runs.commit() == "unknown"
    git("init", "-q")
    (tmp_path / "other").touch()
    git("add", "other")
    git("commit", "-qm", "not of this code")
    assert runs.commit() == "unknown"
    git("add", "runs.py")
    git("commit", "-qm", "first")
    assert git("rev-parse", "HEAD").startswith(runs.commit()) and len(runs.commit()) >= 7
    (tmp_path / "runs.py").write_text("2\n")
    assert runs.commit() == git("rev-parse", "--short", "HEAD") + "+"


def test_tests_are_made_in_eval_mode(train_tiny, monkeypatch):
    """A layer with dropout trains with it and is tested without."""
    modes = []

    class Spy(torch.nn.Module):
        def __init__(self, d):
            super().__init__()

        def forward(self, x, state=None):
            modes.append((torch.is_grad_enabled(), self.training))
            return x, state
    monkeypatch.setitem(LAYERS, "spy", Spy)
    train_tiny("--model", "spy+attention", "--steps", 3)
    assert set(modes) == {(True, True), (False, False)}


def test_every_model_trains(train_tiny):
    stack = "mamba+rope+mlp"
    results = train_tiny("--model", *MODELS, *FAMILY, stack, "--tau", 2, "--L", 5, "--steps", 2)
    assert [r["config"]["model"] for r in results] == [*MODELS, *FAMILY, stack]
    for result in results:
        assert result["eval"]["length"] == list(range(3, 16))
        assert result["params"] > 0 and all(map(math.isfinite, result["train"]["loss"]))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains(task, train_tiny):
    result, = train_tiny("--task", task, "--M", 2, "--L", 8, "--model", "hybrid-a")
    assert len(result["train"]["loss"]) == 20 and result["eval"]["length"][-1] == 24
    assert all(0 <= a <= 1 for a in result["eval"]["accuracy"])


def test_a_task_of_ones_own_trains(train_tiny, monkeypatch):
    def first(batch_size, L, K, M, tau, device, generator, uniform=False):
        tokens = torch.randint(K, (batch_size, L), device=device, generator=generator)
        return tokens, tokens[:, 0], None
    monkeypatch.setitem(TASKS, "first", first)
    result, = train_tiny("--task", "first", "--steps", 150, "--batch-size", 32, "--lr", 0.05,
                         "--model", "learned", "--L", 3)
    assert result["train"]["loss"][-1] < 0.5 * result["train"]["loss"][0]


def test_a_task_with_long_sequences_has_positions(train_tiny, monkeypatch):
    """Longer than the sequences of any task here; `learned` needs a row for each token."""
    def padded(batch_size, L, K, M, tau, device, generator, uniform):
        tokens = torch.randint(K, (batch_size, L + 5), device=device, generator=generator)
        return tokens, tokens[:, 0], None
    monkeypatch.setitem(TASKS, "padded", padded)
    result, = train_tiny("--task", "padded", "--model", "learned")
    assert result["eval"]["length"][-1] == 24


def test_a_model_learns(train_tiny):
    """The assignment's easiest question, at a length at which it takes a moment."""
    result, = train_tiny("--d", 16, "--L", 6, "--steps", 400, "--batch-size", 32)
    assert result["train"]["accuracy"][0] < 0.3 and result["train"]["accuracy"][-1] > 0.9
    assert result["eval"]["accuracy"][result["eval"]["length"].index(6)] > 0.8


def test_learned_embedding_moves(train_tiny, tmp_path):
    for flags, moves in ([], False), (["--learn-embedding"], True):
        result, = train_tiny(*flags)
        name = tmp_path / "out" / (runs.run_name(result["config"]) + ".pt")
        weight = torch.load(name, weights_only=True)["model"]["embedding.weight"]
        assert torch.equal(weight, embedding_table(16, 8)) != moves


@pytest.mark.parametrize("model", ["learned", "hybrid-b"])
def test_same_seed_same_run(model, train_tiny, tmp_path):
    flags = "--model", model, "--M", 4, "--train-lengths", "uniform"
    once, = train_tiny(*flags, out=tmp_path / "a")
    torch.rand(5)
    assert numbers(once) == numbers(train_tiny(*flags, out=tmp_path / "b")[0])
    other, = train_tiny(*flags, "--seed", 1, out=tmp_path / "c")
    assert numbers(once) != numbers(other)


def test_one_thread_unless_the_environment_says_otherwise(train_tiny, monkeypatch):
    threads, run = [], train.train_one
    monkeypatch.setattr(train, "train_one", lambda *w: threads.append(torch.get_num_threads()) or
                        run(*w))
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    train_tiny("--steps", 1)
    monkeypatch.delenv("OMP_NUM_THREADS")
    train_tiny("--steps", 2)
    assert threads == [2, 1]


# ---- a loss that is no number --------------------------------------------------------------------

def spoil_loss(monkeypatch, at, value):
    calls, loss = [], torch.nn.functional.cross_entropy

    def spoiled(*arguments, **options):
        calls.append(0)
        return loss(*arguments, **options) * (value if len(calls) == at else 1)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spoiled)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_grid_goes_on_after_a_run_that_failed(bad, train_tiny, monkeypatch, tmp_path, capsys):
    spoil_loss(monkeypatch, 9, bad)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    with pytest.raises(SystemExit) as stop:
        train_tiny("--M", 2, "--seed", 0, 1)
    assert isinstance(stop.value.code, str)                # printed on stderr; the status is 1
    assert "1 of 2 runs ended without a result" in stop.value.code
    line, = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert f"the loss is {bad} by step 9" in line and "--lr" in line and NAME in line
    assert names(tmp_path / "out") == [NAME[:-1] + "1.json", NAME[:-1] + "1.pt"]


def test_the_last_loss_is_looked_at_too(train_tiny, monkeypatch, tmp_path):
    spoil_loss(monkeypatch, 20, float("nan"))
    monkeypatch.setattr(train, "TESTS", 3)
    with pytest.raises(SystemExit):
        train_tiny()
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("model", ["rope", "mamba"])
def test_learning_rate_far_too_high(model, train_tiny, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train_tiny("--model", model, "--lr", "1e30")
    assert "1 of 1 runs ended without a result" in stop.value.code and names(tmp_path / "out") == []
