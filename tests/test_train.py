"""Training runs: their results, that they repeat and resume exactly, and what happens when something is wrong."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

import hybrid
import train
from conftest import ROOT, TINY
from hybrid import FAMILY, MODELS

NAME = "rope_M2_tau1_K16_d8_L8_seed0"


def names(folder):
    return sorted(os.listdir(folder))


def curves_and_eval(results):
    return [json.dumps([result["train"], result["eval"]]) for result in results]


# ---- results ----

def test_command_line(tmp_path):
    script = os.path.join(ROOT, "train.py")
    done = subprocess.run([sys.executable, script, *TINY, "--model", "rope", "--M", "2", "--steps", "4", "--lr", "0.01"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == ["results"] and names(tmp_path / "results") == [NAME + ".json", NAME + ".pt"]
    result = json.loads((tmp_path / "results" / (NAME + ".json")).read_text())
    assert list(result) == ["config", "params", "train", "eval", "env", "seconds"]
    assert result["config"] == {
        "model": "rope", "M": 2, "tau": 1, "K": 16, "d": 8, "L": 8, "seed": 0, "batch_size": 4, "steps": 4, "lr": 0.01,
        "stop_early": True, "weight_decay": 0.0, "n_heads": 1, "d_state": 16, "init": "official", "train_lengths": "fixed",
        "learn_embedding": False,
        "device": "cpu", "compile": True, "out": "results", "overwrite": False}
    assert result["params"] == 2 * (4 * 8 * 8 + 4 * 8) + 3 * 8 + 8 * 16
    assert result["train"]["step"] == [1, 2, 3, 4]
    assert list(result["train"]) == ["step", "loss", "accuracy"] and {len(v) for v in result["train"].values()} == {4}
    assert all(0 < loss < 10 for loss in result["train"]["loss"])
    assert list(result["eval"]) == ["length", "accuracy", "sequences"] and result["eval"]["sequences"] == 1024
    assert result["eval"]["length"] == list(range(2, 25)) and len(result["eval"]["accuracy"]) == 23
    assert all(0 <= a <= 1 for a in result["eval"]["accuracy"] + result["train"]["accuracy"])
    assert {"torch", "device"} <= set(result["env"]) and set(result["seconds"]) == {"train", "eval"}

    checkpoint = torch.load(tmp_path / "results" / (NAME + ".pt"), weights_only=True)
    assert checkpoint["config"] == result["config"]
    train.model_from(checkpoint["config"]).load_state_dict(checkpoint["model"])
    assert "context length" in done.stdout and done.stdout.endswith(f"wrote {os.path.join('results', NAME)}.json\n")


def test_wider_models_learn_more_slowly(train_tiny, tmp_path):
    results = train_tiny("--d", 8, 16, 64, "--steps", 1)
    assert {r["config"]["d"]: r["config"]["lr"] for r in results} == {8: 0.008, 16: 0.008, 64: 0.002}
    assert train_tiny("--d", 64, "--lr", 0.3, "--steps", 1, out=tmp_path / "own")[0]["config"]["lr"] == 0.3


def test_large_test_batches_go_through_in_parts(train_tiny, monkeypatch, tmp_path):
    whole, = train_tiny("--model", "mamba", "--steps", 3, out=tmp_path / "whole")
    monkeypatch.setattr(train, "TEST_TOKENS", 8 * 5)                                  # 5 of 32 sequences at a time
    seen = []
    forward = hybrid.Model.forward
    monkeypatch.setattr(hybrid.Model, "forward", lambda self, tokens, *rest: seen.append(len(tokens)) or forward(self, tokens, *rest))
    parts, = train_tiny("--model", "mamba", "--steps", 3, out=tmp_path / "parts")
    assert parts["train"] == whole["train"] and max(seen) == 5


def test_every_model_trains(train_tiny):
    results = train_tiny("--model", *MODELS, *FAMILY, "MRA", "--tau", 2, "--L", 5, "--steps", 3)
    assert sorted(r["config"]["model"] for r in results) == sorted([*MODELS, *FAMILY, "MRA"])
    for result in results:
        assert result["eval"]["length"] == list(range(3, 16))
        assert result["params"] > 0 and all(math.isfinite(loss) for loss in result["train"]["loss"])


def test_a_model_learns(train_tiny):
    """The assignment's easiest question, at a length where it takes a moment."""
    result, = train_tiny("--model", "rope", "--d", 16, "--L", 6, "--steps", 600, "--batch-size", 32)
    assert result["train"]["step"] == list(range(3, 601, 3))
    assert result["train"]["accuracy"][0] < 0.3 and result["train"]["accuracy"][-1] > 0.9
    assert result["eval"]["accuracy"][result["eval"]["length"].index(6)] > 0.8


def test_uniform_lengths_and_learned_embedding(train_tiny, monkeypatch):
    drawn, recall_batch = [], train.recall_batch

    def noted(*arguments):
        drawn.append(arguments)
        return recall_batch(*arguments)
    monkeypatch.setattr(train, "recall_batch", noted)

    def lengths():
        return {n for batch in drawn if len(batch) == 8 for n in ([None] if batch[7] is None else batch[7].tolist())}
    plain, = train_tiny("--tau", 3)
    assert lengths() == {None}
    drawn.clear()
    both, = train_tiny("--tau", 3, "--train-lengths", "uniform", "--learn-embedding", "--overwrite")
    assert lengths() == {4, 5, 6, 7, 8}
    assert both["params"] == plain["params"] + 16 * 8
    assert (both["config"]["train_lengths"], both["config"]["learn_embedding"]) == ("uniform", True)


def test_learned_embedding_moves(train_tiny, tmp_path):
    for flags, moves in ([], False), (["--learn-embedding", "--overwrite"], True):
        train_tiny("--M", 2, *flags)
        weights = torch.load(tmp_path / "out" / (NAME + ".pt"), weights_only=True)["model"]
        assert torch.equal(weights["embedding.weight"], train.model_from(
            dict(model="rope", K=16, d=8, L=8, n_heads=1, learn_embedding=False)).embedding.weight) != moves


@pytest.mark.parametrize("model", ["learned", "hybrid-b"])
def test_same_seed_same_run(model, train_tiny, tmp_path):
    flags = "--model", model, "--M", 4, "--train-lengths", "uniform"
    once = train_tiny(*flags, out=tmp_path / "a")
    torch.rand(5)
    assert curves_and_eval(once) == curves_and_eval(train_tiny(*flags, out=tmp_path / "b"))
    assert curves_and_eval(once) != curves_and_eval(train_tiny(*flags, "--seed", 1, out=tmp_path / "c"))


# ---- several runs ----

def test_grid(train_tiny, tmp_path, capsys):
    flags = "--M", 4, 2, 4, "--seed", 1, 0, "--steps", 2
    expected = [f"rope_M{M}_tau1_K16_d8_L8_seed{seed}" for M in (4, 2) for seed in (1, 0)]
    first = train_tiny(*flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if "wrote" in line]
    assert lines == [f"[{n}/4] wrote {tmp_path / 'out' / name}.json" for n, name in enumerate(expected, 1)]
    assert names(tmp_path / "out") == sorted(name + end for name in expected for end in (".json", ".pt"))
    assert [(r["config"]["M"], r["config"]["seed"]) for r in first] == [(2, 0), (2, 1), (4, 0), (4, 1)]

    for path in (tmp_path / "out").glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "mark": 1}))
    os.remove(tmp_path / "out" / (expected[1] + ".json"))
    again = train_tiny(*flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if ".json" in line]
    assert ["finished" in line for line in lines] == [True, False, True, True]
    assert ["mark" in r for r in again] == [True, True, False, True] and curves_and_eval(again) == curves_and_eval(first)


def test_overwrite(train_tiny, tmp_path, capsys):
    first, = train_tiny("--M", 2)
    (tmp_path / "out" / (NAME + ".json")).write_text(json.dumps({**first, "mark": 1}))
    assert "mark" in train_tiny("--M", 2)[0]
    assert "is finished; --overwrite repeats it" in capsys.readouterr().out
    assert "mark" in train_tiny("--M", 2, "--lr", 0.1)[0]
    assert "is finished, with other flags; --overwrite repeats it" in capsys.readouterr().out
    again, = train_tiny("--M", 2, "--overwrite")
    assert "mark" not in again and curves_and_eval([again]) == curves_and_eval([first])
    assert curves_and_eval(train_tiny("--M", 2, "--lr", 0.1, "--overwrite")) != curves_and_eval([first])


# ---- runs that are stopped ----

STOPPED = """
import os, signal, sys, train
moment, how = sys.argv[1:3]
train.TEST_BATCH, train.SAVE_SECONDS = 32, -1
saves, write, replace = 0, train.write_atomically, os.replace

def stop(*_):
    os.kill(os.getpid(), int(how))

def counted(path, content):
    global saves
    saves += path.endswith(train.RESUME)
    os.replace = stop if saves == 7 and moment == "in" else replace
    write(path, content)
    if saves == 7:
        stop()

signal.signal(signal.SIGINT, signal.default_int_handler)
train.write_atomically = counted
train.main(sys.argv[3:])
"""


@pytest.mark.parametrize("moment, how", [("after", signal.SIGKILL), ("in", signal.SIGKILL), ("after", signal.SIGINT)])
def test_stopped_and_resumed(moment, how, train_tiny, tmp_path):
    """Stop a run after its seventh save, or in the midst of it: in the end it has come to what one never stopped comes to."""
    flags, out = ["--model", "hybrid-a", "--M", "2", "--tau", "2", "--train-lengths", "uniform"], tmp_path / "out"
    name = "hybrid-a_M2_tau2_K16_d8_L8_seed0"
    stopped = subprocess.run([sys.executable, "-c", STOPPED, moment, str(int(how)), *TINY, *flags, "--out", str(out)],
                             cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert name + train.RESUME in names(out) and name + ".json" not in names(out)
    assert torch.load(out / (name + train.RESUME), weights_only=True)["step"] == (6 if moment == "in" else 7)
    if how == signal.SIGKILL:
        assert stopped.returncode == -signal.SIGKILL
    else:
        assert stopped.returncode == 130 and "Traceback" not in stopped.stderr
        assert stopped.stderr.splitlines()[-1].startswith("stopped; the same command goes on with ")

    resumed = train_tiny(*flags)
    assert curves_and_eval(resumed) == curves_and_eval(train_tiny(*flags, out=tmp_path / "never stopped"))
    assert names(out) == [name + ".json", name + ".pt"]


@pytest.mark.parametrize("flags, steps", [([], 35), (["--lr", "0.5"], 40), (["--batch-size", "5"], 40)])
def test_goes_on_only_with_the_same_flags(flags, steps, train_tiny, monkeypatch, tmp_path, refuses):
    """A run that was stopped at step 5 takes 35 steps more; with other flags it is another run, which has to say --overwrite."""
    write_atomically, loss, taken = train.write_atomically, train.F.cross_entropy, []

    def interrupted(path, write):
        write_atomically(path, write)
        if path.endswith(train.RESUME) and torch.load(path)["step"] == 5:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, "SAVE_SECONDS", -1)
        patch.setattr(train, "write_atomically", interrupted)
        with pytest.raises(SystemExit) as stop:
            train_tiny("--M", 2)
        assert stop.value.code == 130
    monkeypatch.setattr(train.F, "cross_entropy", lambda *arguments, **options: taken.append(0) or loss(*arguments, **options))
    if flags:
        before = (tmp_path / "out" / (NAME + ".resume.pt")).read_bytes()
        error = refuses(train.main, [*TINY, "--M", 2, *flags, "--out", tmp_path / "out"])
        assert "unfinished run with other flags" in error and not taken
        assert (tmp_path / "out" / (NAME + ".resume.pt")).read_bytes() == before
        flags = [*flags, "--overwrite"]
    resumed = train_tiny("--M", 2, *flags)
    assert len(taken) == steps
    assert curves_and_eval(resumed) == curves_and_eval(train_tiny("--M", 2, *flags, out=tmp_path / "in one go"))


def test_overwriting_can_be_stopped_too(train_tiny, monkeypatch, tmp_path, capsys):
    """A run that was finished, and is stopped while it is repeated, is not finished: the command says how it goes on."""
    first, write_atomically = train_tiny(), train.write_atomically

    def interrupted(path, write):
        write_atomically(path, write)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, "SAVE_SECONDS", -1)
        patch.setattr(train, "write_atomically", interrupted)
        with pytest.raises(SystemExit):
            train_tiny("--overwrite")
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped; the same command without --overwrite goes on with ")
    assert len(names(tmp_path / "out")) == 3
    again = train_tiny()
    assert "is finished" not in capsys.readouterr().out and len(names(tmp_path / "out")) == 2
    assert curves_and_eval(again) == curves_and_eval(first) and again != first


# ---- several processes ----

@pytest.mark.parametrize("count, flags", [(2, ["--model", "mamba"]), (2, ["--model", "learned"]),
                                          (3, ["--train-lengths", "uniform"])])
def test_processes_share_a_run(count, flags, train_tiny, tmp_path):
    """Two and three processes, of which three get unequal shares of a batch of 4, make the run that one makes."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {ROOT!r})\nimport train\n"
                      "train.TEST_BATCH = train.TEST_SEQUENCES = 32\ntrain.main()\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}",
                           "--", script, *TINY, *flags, "--out", tmp_path / "shared"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("wrote") == 1, done.stderr
    alone, = train_tiny(*flags)
    shared = json.loads(next((tmp_path / "shared").glob("*.json")).read_text())
    assert shared["env"]["processes"] == count and names(tmp_path / "shared") == names(tmp_path / "out")
    assert shared["train"]["step"] == alone["train"]["step"]
    assert shared["train"]["loss"] == pytest.approx(alone["train"]["loss"], rel=1e-4)


# ---- the loss, the learning rate and the end of a run ----

@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_no_number(bad, train_tiny, monkeypatch, tmp_path):
    calls, loss = [], train.F.cross_entropy

    def spoiled(*arguments, **options):
        calls.append(0)
        return loss(*arguments, **options) * (bad if len(calls) == 20 else 1)
    monkeypatch.setattr(train.F, "cross_entropy", spoiled)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    with pytest.raises(SystemExit) as stop:
        train_tiny("--M", 2)
    assert isinstance(stop.value.code, str)                                        # printed; the exit status is 1
    assert f"the loss is {bad} at step 20" in stop.value.code and "--lr" in stop.value.code
    assert "\n" not in stop.value.code and names(tmp_path / "out") == []


def test_last_loss_that_is_no_number(train_tiny, monkeypatch, tmp_path):
    """The last step of a run that stops early is not among those that are measured; its loss is looked at all the same."""
    calls, loss = [], train.F.cross_entropy
    monkeypatch.setattr(train, "SOLVED", (3, 0.0))
    monkeypatch.setattr(train, "COOLDOWN", (3, 0.2))
    assert train_tiny("--steps", 400)[0]["train"]["step"] == [2, 4, 6, 8]

    def spoiled(*arguments, **options):
        calls.append(0)
        return loss(*arguments, **options) * (float("nan") if len(calls) == 9 else 1)
    monkeypatch.setattr(train.F, "cross_entropy", spoiled)
    with pytest.raises(SystemExit) as stop:
        train_tiny("--steps", 400, out=tmp_path / "spoiled")
    assert "the loss is nan at step 9" in stop.value.code and names(tmp_path / "spoiled") == []


@pytest.mark.parametrize("model", ["rope", "mamba"])
def test_learning_rate_far_too_high(model, train_tiny, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train_tiny("--model", model, "--lr", "1e30")
    assert "the loss is" in str(stop.value.code) and names(tmp_path / "out") == []


def test_learning_rate():
    warm_up, (steps, share) = train.WARMUP, train.COOLDOWN
    for last in 4 * steps, 20 * steps:
        fall = max(steps, round(share * last))
        rates = [train.learning_rate(step, last, 0.01) for step in range(last + 1)]
        assert rates[0] == pytest.approx(0.01 / warm_up) and rates[warm_up // 2 - 1] == pytest.approx(0.005)
        assert set(rates[warm_up - 1:last + 1 - fall]) == {0.01}                   # the plateau
        assert rates[last - fall // 2] == pytest.approx(0.005) and rates[last] == 0
        assert all(a > b for a, b in zip(rates[last - fall:], rates[last + 1 - fall:]))
    assert all(0 < train.learning_rate(step, 10, 1.0) < 1 for step in range(10))   # fewer steps than the warm-up
    assert train.learning_rate(700, 1000, 1.0) == 1 > train.learning_rate(800, 1000, 1.0)


def test_last_step():
    (batches, enough), (steps, share) = train.SOLVED, train.COOLDOWN

    def last(accuracy, every=10, most=10**6, stop_early=True):
        return train.last_step({"step": list(range(every, every * len(accuracy) + 1, every)), "accuracy": accuracy},
                               {"steps": most, "stop_early": stop_early})
    solved = [enough] * batches
    assert last([]) == last([1.0] * (batches - 1)) == last(([1.0] * (batches - 1) + [enough - 0.01]) * 3) == 10**6
    assert last(solved) == 10 * batches + steps
    assert last([0.5] + solved) == 10 * (batches + 1) + steps
    assert last(solved + [0.0] * 3) == 10 * batches + steps                        # once solved it stays so
    assert last(solved, every=10**4) == pytest.approx(10**4 * batches / (1 - share))           # a long run falls for longer
    assert last(solved, most=steps) == steps and last(solved, stop_early=False) == 10**6


def test_stops_early(train_tiny, monkeypatch):
    monkeypatch.setattr(train, "SOLVED", (3, 0.0))
    monkeypatch.setattr(train, "COOLDOWN", (4, 0.2))
    assert train_tiny()[0]["train"]["step"] == list(range(1, 8))
    assert train_tiny("--no-stop-early", "--overwrite")[0]["train"]["step"] == list(range(1, 41))


# ---- wrong commands ----

@pytest.mark.parametrize("flags, sentence", [
    ("--M 17", "--M is 17"), ("--M 5 --K 4", "--M is 5"), ("--M 0", "--M is 0"), ("--M -1", "--M is -1"),
    ("--M 1 17", "--M is 17"),
    ("--tau 8", "at least tau + 1 = 9"), ("--tau 0", "--tau is 0"), ("--tau -2", "--tau is -2"), ("--tau x", "--tau"),
    ("--K 0", "--K is 0"), ("--K 1", "--K is 1"), ("--K -4", "--K is -4"),
    ("--d 0", "--d is 0"), ("--d -8", "--d is -8"), ("--L 0", "--L is 0"), ("--L -8", "--L is -8"), ("--L 1", "--L is 1"),
    ("--batch-size 0", "--batch-size is 0"), ("--batch-size -1", "--batch-size is -1"),
    ("--steps 0", "--steps is 0"), ("--steps -5", "--steps is -5"), ("--steps 1.5", "--steps"),
    ("--lr 0", "--lr is 0"), ("--lr -0.1", "--lr is -0.1"), ("--lr nan", "--lr is nan"), ("--lr inf", "--lr is inf"),
    ("--weight-decay -1", "--weight-decay is -1"), ("--weight-decay nan", "--weight-decay is nan"),
    ("--seed -1", "--seed is -1"), ("--model gpt", "hybrid-a, hybrid-b"), ("--model rope gpt", "'gpt'"),
    ("--model rope --d 6 --n-heads 2", "--n-heads 2"), ("--model rope --d 7", "odd size 7"),
    ("--model nope --n-heads 3", "number of heads, 3"), ("--model jamba --d 6", "number of heads, 4"),
    ("--model rope --init mimetic", "--model rope has none"),
    ("--model nope --n-heads 0", "--n-heads is 0"), ("--model mamba --n-heads 0", "--n-heads is 0"),
    ("--model mamba --d-state 0", "--d-state is 0"), ("--init random", "--init"),
    ("--train-lengths some", "--train-lengths"), ("--step 20", "--step"),
    ("--d 1000000000000", "does not fit"), ("--heads 2", "--heads"), ("--seed", "--seed"),
    ("--device cuda:77", "--device is 'cuda:77'"), ("--device nonsense", "--device is 'nonsense'"),
    ("--device meta", "--device is 'meta'")])
def test_wrong_flags(flags, sentence, refuses, tmp_path):
    error = refuses(train.main, [*TINY, "--out", tmp_path / "out", *flags.split()])
    assert sentence in error and names(tmp_path) == []


def test_cuda_without_triton(refuses, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--no-compile does without" in refuses(train.main, [*TINY, "--out", tmp_path / "out"])
    assert names(tmp_path) == []


def test_out_that_cannot_be_written(refuses, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "below", tmp_path / "file"):
        assert f"--out is '{out}'" in refuses(train.main, [*TINY, "--out", out])
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_other_files_in_out_are_left_alone(train_tiny, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("writable", "notes.txt", "other.resume.pt"):
        (tmp_path / "out" / name).write_text("mine")
    train.main([*TINY, "--M", "2", "--steps", "1", "--out", str(tmp_path / "out")])
    assert names(tmp_path / "out") == sorted([NAME + ".json", NAME + ".pt", "writable", "notes.txt", "other.resume.pt"])
    assert all((tmp_path / "out" / name).read_text() == "mine" for name in ("writable", "notes.txt", "other.resume.pt"))


def test_saved_state_of_another_run_is_not_used(train_tiny, tmp_path, capsys):
    fresh, = train_tiny("--M", 2, out=tmp_path / "fresh")
    out = tmp_path / "out"
    for spoiled in (b"a line of text\n", b""):
        out.mkdir(exist_ok=True)
        (out / (NAME + ".resume.pt")).write_bytes(spoiled)
        result, = train_tiny("--M", 2, "--overwrite", out=out)
        assert "starts from the beginning" in capsys.readouterr().out
        assert curves_and_eval([result]) == curves_and_eval([fresh])
