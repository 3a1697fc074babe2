"""Runs that are stopped, runs that several processes share, and a stdout that fails."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import eval as evaluation
import grid
import hybrid
import runs
import train
from conftest import ROOT, names, numbers, stopped_run, tiny

NAME = "rope_M1_tau1_K16_d8_L8_batch-size4_steps20_seed0"


# ---- runs that are stopped -----------------------------------------------------------------------

@pytest.mark.parametrize("at", [1, 2, 11, 19, 20, 21])
def test_stopped_at_any_write_and_resumed(at, train_tiny, monkeypatch, tmp_path):
    """Writes 1 to 19 are of progress, 20 is the model, 21 the result."""
    flags = "--model", "hybrid-a", "--M", 2, "--train-lengths", "uniform"
    stopped_run(train_tiny, monkeypatch, flags, at)
    assert not list((tmp_path / "out").glob("*.json"))
    resumed, = train_tiny(*flags)
    whole, = train_tiny(*flags, out=tmp_path / "whole")
    assert numbers(resumed) == numbers(whole)
    weights = [torch.load(next(folder.glob("*.pt")), weights_only=True)["model"]
               for folder in (tmp_path / "out", tmp_path / "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert names(tmp_path / "out") == names(tmp_path / "whole")


def test_a_stopped_run_with_dropout_and_resumed(train_tiny, monkeypatch, tmp_path):
    """Dropout draws from torch's own generator, whose state must be saved, too."""
    class Dropout(torch.nn.Dropout):
        def __init__(self, d):
            super().__init__()

        def forward(self, x, state=None):
            return super().forward(x), x[:, :0]              # a state, as every layer returns

    monkeypatch.setitem(hybrid.LAYERS, "dropout", Dropout)
    flags = "--model", "rope+dropout"
    stopped_run(train_tiny, monkeypatch, flags, 11)
    resumed, = train_tiny(*flags)
    whole, = train_tiny(*flags, out=tmp_path / "whole")
    assert numbers(resumed) == numbers(whole)


def test_a_file_left_by_a_killed_save_goes(train_tiny, tmp_path):
    """A kill leaves the temporary file of the save; the next owner of the run removes it."""
    (tmp_path / "out").mkdir()
    left = tmp_path / "out" / f"{NAME}.resume.pt.abc123.tmp"
    other = tmp_path / "out" / f"{NAME.replace('seed0', 'seed1')}.pt.abc123.tmp"
    left.touch()
    other.touch()
    train_tiny()
    assert not left.exists() and other.exists()              # that one may be in use


def test_a_save_is_named_after_its_file(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "replace", lambda source, target: seen.append(source))
    runs.write_file(str(tmp_path / "x.pt"), b"")
    assert os.path.basename(seen[0]).startswith("x.pt.") and seen[0].endswith(".tmp")


def test_a_resumed_run_takes_the_steps_that_are_left(train_tiny, monkeypatch, capsys):
    stopped_run(train_tiny, monkeypatch, [], 6)
    taken, cross_entropy = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy",
                        lambda *words: taken.append(0) or cross_entropy(*words))
    train_tiny()
    assert len(taken) == 15 and "continues at step 5" in capsys.readouterr().out


def test_overwrite_stopped_and_the_same_command_without_it(train_tiny, monkeypatch, tmp_path):
    flags = "--seed", 0, 1, 2
    first = train_tiny(*flags)
    for path in (tmp_path / "out").glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "mark": 1}))
    for at in 1, 21, 30, 42:
        stopped_run(train_tiny, monkeypatch, [*flags, "--overwrite"], at)
        again = train_tiny(*flags)
        assert not any("mark" in result for result in again), "all are repeated"
        assert list(map(numbers, again)) == list(map(numbers, first))


def test_ctrl_c_is_one_sentence(train_tiny, monkeypatch, tmp_path, capsys):
    stop = stopped_run(train_tiny, monkeypatch, [], 6, KeyboardInterrupt)
    assert stop.code == 130
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and error.startswith("stopped; the same command ")
    assert NAME + ".resume.pt" in names(tmp_path / "out")


def in_child(flags):
    """Make runs in a process of its own, with many saves."""
    evaluation.TEST_SEQUENCES, train.EVAL_SEQUENCES, train.SAVE_SECONDS = 32, 16, 0.02
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.main(tiny(*flags))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def saved_at(folder):
    """The time of the newest progress in a folder whose files come and go."""
    times = [0]
    for path in folder.glob("*.resume.pt"):
        try:
            times.append(path.stat().st_mtime_ns)
        except FileNotFoundError:
            pass
    return max(times)


def test_killed_at_random_moments(train_tiny, tmp_path):
    """SIGKILL a few times, wherever it hits; then the command finishes as if nothing had been."""
    flags = "--model", "hybrid-a", "--M", 2, "--seed", 0, 1, "--steps", 150
    out, dice, kills = tmp_path / "out", random.Random(0), 0
    server = multiprocessing.get_context("forkserver")       # imports torch once for all children
    server.set_forkserver_preload(["train", "conftest"])
    for _ in range(3):
        before = saved_at(out)
        child = server.Process(target=in_child, args=([*flags, "--out", out],))
        child.start()
        wait_for(lambda: saved_at(out) > before or child.exitcode is not None)
        time.sleep(dice.random() / 8)
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
    assert kills >= 2
    resumed, whole = train_tiny(*flags), train_tiny(*flags, out=tmp_path / "whole")
    assert list(map(numbers, resumed)) == list(map(numbers, whole))
    assert names(out) == names(tmp_path / "whole")


def test_ctrl_c_from_outside_at_any_moment(tmp_path):
    """Also while torch is being imported, and while the configs of a large grid are checked."""
    for seconds, seeds in (0.3, 1), (1.0, 1), (3.0, 3000):
        flags = tiny("--steps", 10**6, "--seed", *range(seeds))
        process = subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), "--out",
                                    tmp_path / "out", *flags], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode in (130, -signal.SIGINT)      # the second while torch loads
        assert len(error.strip().splitlines()) <= 1, error


# ---- several processes ---------------------------------------------------------------------------

SCRIPT = f"""
import os, sys
with open(sys.argv[0] + os.environ.get("RANK", ".pid"), "w") as f:
    f.write(str(os.getpid()))
sys.path[:0] = [{ROOT!r}, {os.path.join(ROOT, "tests")!r}]
import eval, train
eval.TEST_SEQUENCES, train.EVAL_SEQUENCES, train.SAVE_SECONDS = 32, 16, -1
train.main()
"""


def torchrun(script, processes, *flags):
    script.write_text(SCRIPT)
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                             f"--nproc-per-node={processes}", "--", str(script), *tiny(*flags)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def made(folder):
    """The number of results that do not have a mark."""
    count = 0
    for path in folder.glob("*.json"):
        try:
            count += "mark" not in path.read_text()
        except FileNotFoundError:                    # --overwrite has just removed it
            pass
    return count


def test_processes_share_a_grid(tmp_path, train_tiny):
    """Two repeat it, one is killed; of three that go on one is killed, too; one makes the rest."""
    flags = ["--M", 1, 2, 3, "--seed", 0, 1, "--steps", 80]
    out, script, output = tmp_path / "shared", tmp_path / "tiny_train.py", ""
    alone = train_tiny(*flags, out=out)
    expected = names(out)
    for path in out.glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "mark": 1}))
    for processes, more in (2, ["--overwrite"]), (3, []), (1, []):
        before = made(out)
        group = torchrun(script, processes, *flags, "--out", out, *more)
        if processes > 1:
            last = tmp_path / f"{script.name}{processes - 1}"       # where it says its number
            wait_for(lambda: made(out) > before and last.exists() and last.read_text())
            os.kill(int(last.read_text()), signal.SIGKILL)
        printed, error = group.communicate(timeout=120)
        output += printed
        assert (group.returncode == 0) == (processes == 1), error
    assert names(out) == expected and made(out) == 6
    for result in alone:
        path = out / (runs.run_name(result["config"]) + ".json")
        assert numbers(json.loads(path.read_text())) == numbers(result)
        assert output.count(f"wrote {path}") <= 1, "a run was made twice"


def test_a_run_that_fails_is_tried_once(tmp_path):
    """Not by each of the processes; but the same command, given again, tries it again."""
    out, flags = tmp_path / "out", ["--lr", "1e30", "--M", "1", "2"]
    for _ in range(2):
        group = torchrun(tmp_path / "tiny_train.py", 2, *flags, "--out", out)
        printed, error = group.communicate(timeout=120)
        assert group.returncode != 0 and not list(out.glob("*.json")), error
        assert printed.count("failed: the loss is") == 2, printed


def test_a_command_gives_the_signal_handler_back(train_tiny):
    before = signal.signal(signal.SIGINT, mine := lambda *_: None)
    try:
        train_tiny()
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_overwrite_waits_for_the_process_that_has_the_run(train_tiny, tmp_path):
    """Otherwise that process could write the old result after it was removed."""
    result, = train_tiny()
    path, held = tmp_path / "out" / (NAME + ".json"), threading.Event()

    def hold():
        with grid.locked(str(tmp_path / "out" / NAME)):
            held.set()
            time.sleep(0.5)
            path.write_text(json.dumps({**result, "mark": 1}))

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    again, = train_tiny("--overwrite")
    thread.join()
    assert "mark" not in again and numbers(again) == numbers(result)


def test_processes_wait_for_each_other_more_than_once(tmp_path):
    """In turn one is late. A second process group would find old addresses."""
    script = tmp_path / "late.py"
    script.write_text(f"""
import os, sys, time
sys.path.insert(0, {ROOT!r})
from grid import barrier
rank = int(os.environ["RANK"])
for k in range(3):
    time.sleep(0.5 * (rank == k % 2))
    open(f"{tmp_path}/{{k}}{{rank}}", "w").close()
    barrier()
    assert os.path.exists(f"{tmp_path}/{{k}}{{1 - rank}}")
""")
    command = "torch.distributed.run --standalone --nproc-per-node=2".split()
    done = subprocess.run([sys.executable, "-m", *command, script], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_process_whose_torchrun_was_killed_does_not_wait_for_it(monkeypatch):
    for name, value in dict(RANK=1, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))             # nobody listens on that port
    monkeypatch.setattr(grid, "CONNECT_SECONDS", 1)
    with pytest.raises(RuntimeError):
        grid.connect.__wrapped__()


def test_nothing_is_removed_before_all_processes_are_there(train_tiny, monkeypatch, tmp_path):
    def killed():
        raise RuntimeError
    train_tiny()
    monkeypatch.setattr(grid, "connect", killed)
    with pytest.raises(RuntimeError):
        train_tiny("--overwrite")
    assert names(tmp_path / "out") == [NAME + ".json", NAME + ".pt"]


def test_a_run_that_another_process_has_is_left_to_it(train_tiny, monkeypatch, tmp_path):
    """It is waited for: the command ends when all of its runs exist."""
    out, flags = tmp_path / "out", ["--seed", "0", "1"]
    out.mkdir()
    other = contextlib.ExitStack()
    assert other.enter_context(grid.locked(str(out / NAME)))
    with grid.locked(str(out / NAME)) as mine:
        assert not mine
    made, run = [], train.train_one

    def noted(config, path, *rest):
        made.append(config["seed"])
        return run(config, path, *rest)

    def finish_the_other(seconds):
        assert made == [1]
        other.close()                                # it died
    monkeypatch.setattr(train, "train_one", noted)
    monkeypatch.setattr(grid.time, "sleep", finish_the_other)
    assert len(train_tiny(*flags)) == 2 and made == [1, 0]


def test_a_run_that_was_finished_a_moment_ago_is_not_made_again(train_tiny, monkeypatch, tmp_path):
    """By another process, between the look at its files and the lock."""
    train_tiny()
    path, lock = tmp_path / "out" / (NAME + ".json"), grid.lock
    text = path.read_text()
    path.unlink()

    def finished_meanwhile(file):
        path.write_text(text)
        return lock(file)
    monkeypatch.setattr(grid, "lock", finished_meanwhile)
    monkeypatch.setattr(train, "train_one", None)
    assert train_tiny() == [json.loads(text)]
    assert names(tmp_path / "out") == [NAME + ".json", NAME + ".pt"]


# ---- stdout --------------------------------------------------------------------------------------

def test_a_stdout_that_is_closed_or_full_loses_nothing(tmp_path):
    (tmp_path / "tiny_train.py").write_text(SCRIPT)
    command = f"{sys.executable} tiny_train.py {' '.join(tiny('--seed', 0, 1))} --out "
    cases = {"head": "2> head.err | head -1", "closed": ">&- 2> closed.err",
             "full": "> /dev/full 2> full.err"}
    started = [subprocess.Popen(["bash", "-o", "pipefail", "-c", f"{command}{out} {after}"],
                                cwd=tmp_path, stdout=subprocess.PIPE)
               for out, after in cases.items()]
    for process, out in zip(started, cases):
        process.communicate(timeout=120)
        assert process.returncode == 0
        assert len(list((tmp_path / out).glob("*.json"))) == 2
        assert (tmp_path / (out + ".err")).read_text() == ""


@pytest.mark.parametrize("command", ["eval.py x.pt", "inside.py x.pt", "bench.py", "plot.py x.json",
                                     "report/make.py"])
def test_ctrl_c_while_the_other_scripts_load(command, tmp_path):
    name, *words = command.split()
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, name), *words], cwd=tmp_path,
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130, 0, 2)             # 0 and 2: it was quicker
    assert "Traceback" not in error, error


def test_a_mistake_in_a_layer_leaves_no_lock(tmp_path, monkeypatch):
    class Wrong(torch.nn.Identity):
        """Its forward takes no state."""

    monkeypatch.setitem(hybrid.LAYERS, "wrong", Wrong)
    with pytest.raises(TypeError):
        train.main(tiny("--model", "wrong+attention", "--out", tmp_path))
    assert names(tmp_path) == []
    name, = os.listdir(tmp_path / ".locks")
    with grid.locked(str(tmp_path / name)) as mine:
        assert mine
