"""Runs and their files: names, kills, several processes, damaged files, and full disks."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import eval as evaluation
import grid
import runs
import train
from conftest import ROOT, tiny
from hybrid import build_model

CONFIG = {**runs.DEFAULTS, "model": "rope", "M": 1, "tau": 1, "K": 16, "d": 8, "L": 64, "seed": 0,
          "lr": 0.008}
NAME = "rope_M1_tau1_K16_d8_L8_batch-size4_steps20_seed0"
NO_SPACE = OSError(28, "No space left on device")


def names(folder):
    """The files in a folder, without temporary ones."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".tmp"))


def numbers(result):
    return json.dumps([result["train"], result["eval"]])


def of_run(*endings, name=NAME):
    return sorted(name + ending for ending in endings)


# ---- names ---------------------------------------------------------------------------------------

def test_defaults_have_the_plain_name():
    assert runs.run_name(CONFIG) == "rope_M1_tau1_K16_d8_L64_seed0"
    assert runs.run_name({**CONFIG, "model": "mamba+rope", "M": 4, "tau": 5, "K": 32, "d": 16,
                          "L": 128, "seed": 3}) == "mamba+rope_M4_tau5_K32_d16_L128_seed3"
    assert runs.run_name({**CONFIG, "task": "mqar"}) == "mqar_rope_M1_tau1_K16_d8_L64_seed0"
    assert runs.run_name({**CONFIG, "d": 64, "lr": 0.002}) == "rope_M1_tau1_K16_d64_L64_seed0"
    for plain in dict(device="cuda"), dict(compile="on"), dict(out="x"), dict(overwrite=True):
        assert runs.run_name({**CONFIG, **plain}) == runs.run_name(CONFIG)


@pytest.mark.parametrize("flag, value, part", [
    ("lr", 0.001, "lr0.001"), ("batch_size", 8, "batch-size8"), ("steps", 100, "steps100"),
    ("weight_decay", 0.1, "weight-decay0.1"), ("n_heads", 2, "n-heads2"),
    ("d_state", 4, "d-state4"), ("train_lengths", "uniform", "train-lengthsuniform"),
    ("learn_embedding", True, "learn-embedding"), ("stop_early", False, "no-stop-early")])
def test_any_other_flag_off_its_default_goes_before_the_seed(flag, value, part):
    assert runs.run_name({**CONFIG, flag: value}) == f"rope_M1_tau1_K16_d8_L64_{part}_seed0"


def test_every_flag_that_changes_a_run_is_in_its_name(tmp_path):
    """A flag that is added to train.py has to be added to DEFAULTS, or to the list here."""
    _, args = train.parse([])
    assert set(vars(args)) == {*runs.GRID, *runs.DEFAULTS, "device", "compile", "out", "overwrite"}


def test_runs_that_differ_in_a_flag_are_both_made(train_tiny, tmp_path):
    for flags in [], ["--lr", 0.1], ["--n-heads", 2], ["--weight-decay", 0.1]:
        train_tiny("--steps", 2, *flags)
    assert len(list((tmp_path / "out").glob("*.json"))) == 4


def test_default_learning_rates(train_tiny):
    results = train_tiny("--d", 8, 16, 64, "--steps", 1)
    assert {r["config"]["d"]: r["config"]["lr"] for r in results} == {
        8: 0.008, 16: 0.008, 64: 0.002}


# ---- a grid --------------------------------------------------------------------------------------

def test_a_grid_makes_each_run_once(train_tiny, tmp_path, capsys):
    flags = "--M", 4, 2, 4, "--M", 1, "--seed", 1, 0, "--steps", 2
    expected = [(M, seed) for M in (4, 2, 1) for seed in (1, 0)]
    first = train_tiny(*flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if "wrote" in line]
    assert [line.split("]")[0] for line in lines] == [f"[{n}/6" for n in range(1, 7)]
    assert [(r["config"]["M"], r["config"]["seed"]) for r in first] == expected
    assert len(names(tmp_path / "out")) == 12

    removed = tmp_path / "out" / (runs.run_name(first[1]["config"]) + ".json")
    removed.unlink()
    again = train_tiny(*flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if ".json" in line]
    assert sum("is finished; --overwrite repeats it" in line for line in lines) == 5
    assert sum("wrote" in line for line in lines) == 1
    assert list(map(numbers, again)) == list(map(numbers, first))
    same = [a["seconds"] == b["seconds"] for a, b in zip(first, again)]
    assert same.count(False) <= 1


def test_overwrite_repeats_finished_runs(train_tiny, tmp_path):
    first, = train_tiny()
    path = tmp_path / "out" / (NAME + ".json")
    path.write_text(json.dumps({**first, "mark": 1}))
    assert "mark" in train_tiny()[0]
    again, = train_tiny("--overwrite")
    assert "mark" not in again and numbers(again) == numbers(first)


@pytest.mark.parametrize("text", ["", "{", "\0" * 400, "[]", "null", '{"config": {}}',
                                  "[" * 100000])
def test_a_json_that_does_not_read_is_not_finished(text, train_tiny, tmp_path):
    first, = train_tiny()
    path = tmp_path / "out" / (NAME + ".json")
    path.write_text(text)
    again, = train_tiny()
    assert numbers(again) == numbers(first) == numbers(json.loads(path.read_text()))


def test_a_result_without_its_model_is_not_finished(train_tiny, tmp_path):
    train_tiny()
    (tmp_path / "out" / (NAME + ".pt")).unlink()
    train_tiny()
    assert names(tmp_path / "out") == of_run(".json", ".pt")


def test_other_files_are_left_alone(train_tiny, tmp_path):
    (tmp_path / "out").mkdir()
    for name in "notes.txt", "other.resume.pt", "other.lock", "mine.tmp":
        (tmp_path / "out" / name).write_text("mine")
    train_tiny("--overwrite")
    for name in "notes.txt", "other.resume.pt", "other.lock", "mine.tmp":
        assert (tmp_path / "out" / name).read_text() == "mine"
    assert len(os.listdir(tmp_path / "out")) == 6


# ---- runs that are stopped -----------------------------------------------------------------------

class Stop(BaseException):
    """What a kill looks like from inside: nothing catches it."""


def stopped_run(train_tiny, monkeypatch, flags, at, exception=Stop):
    """Start a run that saves after every test, and end it at its so-many-th write of a file."""
    count, replace = [0], os.replace

    def counted(source, target):
        count[0] += 1
        if count[0] == at:
            raise exception
        replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(train, "SAVE_SECONDS", -1)
        patch.setattr(os, "replace", counted)
        with pytest.raises((exception, SystemExit)) as stop:
            train_tiny(*flags)
    return stop.value


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


def test_a_resumed_run_takes_the_steps_that_are_left(train_tiny, monkeypatch, capsys):
    stopped_run(train_tiny, monkeypatch, [], 6)
    taken, cross_entropy = [], train.F.cross_entropy
    monkeypatch.setattr(train.F, "cross_entropy",
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
    """Make runs in a process of its own, with a save after every test."""
    evaluation.TEST_SEQUENCES, train.EVAL_SEQUENCES, train.SAVE_SECONDS = 32, 16, -1
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.main(tiny(*flags))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def test_killed_at_random_moments(train_tiny, tmp_path):
    """SIGKILL a few times, wherever it hits; then the command finishes as if nothing had been."""
    flags = "--model", "hybrid-a", "--M", 2, "--seed", 0, 1, "--steps", 150
    out, dice = tmp_path / "out", random.Random(0)
    server = multiprocessing.get_context("forkserver")       # imports torch once for all children
    server.set_forkserver_preload(["train", "conftest"])
    for kill in range(6):
        child = server.Process(target=in_child, args=([*flags, "--out", out],))
        child.start()
        time.sleep(0.1)
        wait_for(lambda: list(out.glob("*.lock")))
        time.sleep(dice.random() / 2)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "it was still at work"
    assert list(out.glob("*.resume.pt"))
    resumed, whole = train_tiny(*flags), train_tiny(*flags, out=tmp_path / "whole")
    assert list(map(numbers, resumed)) == list(map(numbers, whole))
    assert names(out) == names(tmp_path / "whole")


def test_ctrl_c_from_outside_at_any_moment(tmp_path):
    """Also while torch is being imported."""
    for seconds in 0.3, 1.0:
        process = subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), "--out",
                                    tmp_path / "out", *tiny("--steps", 10**6)], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in error, error
        assert len(error.strip().splitlines()) == 1


# ---- several processes ---------------------------------------------------------------------------

SCRIPT = f"""
import sys
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


def test_processes_share_a_grid(tmp_path, train_tiny):
    """Two, then three of them, of which one is killed; one alone makes what is left."""
    flags = ["--M", 1, 2, 3, "--seed", 0, 1, "--steps", 150]
    out, script, output = tmp_path / "shared", tmp_path / "tiny_train.py", ""
    for processes in 2, 3, 1:
        group = torchrun(script, processes, *flags, "--out", out)
        if processes > 1:
            before = len(list(out.glob("*.json")))
            wait_for(lambda: len(list(out.glob("*.json"))) > before
                     and len(list(out.glob("*.lock"))) >= 1)
            workers = subprocess.run(["pgrep", "-P", str(group.pid), "-f", script.name], text=True,
                                     capture_output=True).stdout.split()
            assert len(workers) == processes
            os.kill(int(workers[-1]), signal.SIGKILL)
        printed, error = group.communicate(timeout=120)
        output += printed
        assert (group.returncode == 0) == (processes == 1), error
    alone = train_tiny(*flags)
    assert names(out) == names(tmp_path / "out")
    for result in alone:
        path = out / (runs.run_name(result["config"]) + ".json")
        assert numbers(json.loads(path.read_text())) == numbers(result)
        assert output.count(f"wrote {path}") <= 1, "a run was made twice"


def test_a_run_that_another_process_has_is_left_to_it(train_tiny, monkeypatch, tmp_path):
    """It is waited for: the command ends when all of its runs exist."""
    out, flags = tmp_path / "out", ["--seed", "0", "1"]
    out.mkdir()
    other = grid.claim(str(out / NAME))
    assert grid.claim(str(out / NAME)) is None
    made, run = [], train.run

    def noted(config, path, *rest):
        made.append(config["seed"])
        return run(config, path, *rest)

    def finish_the_other(seconds):
        assert made == [1]
        other.close()                                # it died
    monkeypatch.setattr(train, "run", noted)
    monkeypatch.setattr(grid.time, "sleep", finish_the_other)
    assert len(train_tiny(*flags)) == 2 and made == [1, 0]


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


# ---- damaged and planted files -------------------------------------------------------------------

def damage_nothing(path):
    pass


def flip_bits(path):
    data = bytearray(path.read_bytes())
    for k in 40, len(data) // 2, len(data) - 1:
        data[k] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def make_directory(path):
    path.unlink()
    path.mkdir()


def with_saved(change):
    def damage(path):
        """As another version of the repository would have written it, with a right checksum."""
        saved = torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)
        change(saved)
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        data = buffer.getvalue()
        path.write_bytes(hashlib.sha256(data).digest() + data)
    return damage


@pytest.mark.parametrize("damage", [
    flip_bits, cut, empty, make_directory, with_saved(lambda s: s.pop("testing")),
    with_saved(lambda s: s.pop("curves")), with_saved(lambda s: s["model"].popitem()),
    with_saved(lambda s: s["optimizer"]["param_groups"].pop()),
    with_saved(lambda s: s.update(training=torch.zeros(7, dtype=torch.uint8)))])
def test_a_damaged_resume_file_starts_anew(damage, train_tiny, monkeypatch, tmp_path, capsys):
    stopped_run(train_tiny, monkeypatch, [], 12)
    damage(tmp_path / "out" / (NAME + ".resume.pt"))
    capsys.readouterr()
    result, = train_tiny()
    line, = [line for line in capsys.readouterr().out.splitlines() if ".resume.pt" in line]
    assert "starts from the beginning" in line
    assert numbers(result) == numbers(train_tiny(out=tmp_path / "whole")[0])
    left = [".resume.pt"] if damage is make_directory else []
    assert names(tmp_path / "out") == of_run(".json", ".pt", *left)


def test_planted_links_are_not_followed(train_tiny, monkeypatch, tmp_path):
    out, target = tmp_path / "out", tmp_path / "mine"
    out.mkdir()
    target.write_text("mine")
    for ending in (".json.tmp", ".pt.tmp", ".resume.pt.tmp", ".tmp", ".json", ".pt", ".resume.pt"):
        (out / (NAME + ending)).symlink_to(target)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    train_tiny()
    assert target.read_text() == "mine"
    assert not (out / (NAME + ".json")).is_symlink() and not (out / (NAME + ".pt")).is_symlink()


def test_a_planted_lock_is_one_sentence(train_tiny, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out" / (NAME + ".lock")).symlink_to(tmp_path / "mine")
    with pytest.raises(SystemExit) as stop:
        train_tiny("--seed", 0, 1)
    captured = capsys.readouterr()
    assert stop.value.code and "lock" in captured.out + captured.err
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "out" / (NAME[:-1] + "1.json")).exists(), "the other run is made"


# ---- a disk that fails ---------------------------------------------------------------------------

def test_a_disk_that_is_full_does_not_end_a_run_that_can_go_on(train_tiny, monkeypatch, tmp_path,
                                                               capsys):
    fsync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) < 6:
            raise NO_SPACE
        fsync(file)
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    result, = train_tiny()
    lines = [line for line in capsys.readouterr().out.splitlines() if "No space left" in line]
    assert len(lines) == 5 and all("the run goes on" in line for line in lines)
    assert len(os.listdir(tmp_path / "out")) == 2 and len(result["train"]["step"]) == 20


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_result_that_cannot_be_written_is_one_sentence(function, train_tiny, monkeypatch,
                                                         tmp_path, capsys):
    def full(*_):
        raise NO_SPACE
    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(SystemExit) as stop:
            train_tiny("--seed", 0, 1)
    assert "2 of 2 runs failed" in stop.value.code
    lines = [line for line in capsys.readouterr().out.splitlines() if "No space left" in line]
    assert len(lines) == 2 and os.listdir(tmp_path / "out") == []
    assert len(train_tiny("--seed", 0, 1)) == 2


def test_a_folder_that_disappears_is_one_sentence(train_tiny, monkeypatch, tmp_path, capsys):
    out, evaluate = tmp_path / "out", train.evaluate

    def delete(*words, **options):
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
        return evaluate(*words, **options)
    monkeypatch.setattr(train, "evaluate", delete)
    with pytest.raises(SystemExit) as stop:
        train_tiny("--seed", 0, 1)
    assert "runs failed" in str(stop.value.code)
    assert "No such file or directory" in capsys.readouterr().out


def test_write_file_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path, synced, fsync, replace = tmp_path / "file", [], os.fsync, os.replace
    path.write_text("old")

    def check(source, target):
        assert synced and path.read_text() == "old"
        assert open(source, "rb").read() == b"new" and os.path.dirname(source) == str(tmp_path)
        replace(source, target)
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(file) or fsync(file))
    monkeypatch.setattr(os, "replace", check)
    runs.write_file(str(path), b"new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(NO_SPACE))
    with pytest.raises(OSError):
        runs.write_file(str(path), b"newer")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_the_result_is_written_last_and_then_the_progress_removed(train_tiny, monkeypatch):
    done, replace, remove = [], os.replace, os.remove

    def noted_replace(source, target):
        done.append("write " + target.split("_seed0")[1])
        replace(source, target)

    def noted_remove(path):
        done.append("remove " + path.split("_seed0")[1])
        remove(path)
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(os, "remove", noted_remove)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    train_tiny("--steps", 2)
    assert done == ["write .resume.pt", "write .pt", "write .json", "remove .resume.pt",
                    "remove .lock"]


# ---- checkpoints ---------------------------------------------------------------------------------

@pytest.fixture
def checkpoint(tmp_path):
    """write(change) writes a checkpoint that change(content) has changed; returns its path."""
    def write(change=damage_nothing):
        model = build_model("rope", L=8)
        content = {"config": {**CONFIG, "L": 8}, "model": model.state_dict()}
        other = change(content)
        torch.save(content if other is None else other, tmp_path / "x.pt")
        return str(tmp_path / "x.pt")
    return write


def test_a_checkpoint_alone_is_enough(checkpoint):
    model, config = runs.load_run(checkpoint())
    assert not model.training and config["L"] == 8
    assert model(torch.randint(16, (2, 9))).shape == (2, 16)


def test_flags_that_came_later_have_their_defaults(checkpoint):
    def older(content):
        for flag in runs.DEFAULTS:
            if flag != "lr":
                del content["config"][flag]
    model, config = runs.load_run(checkpoint(older))
    assert config == {**CONFIG, "L": 8}


def change_config(**flags):
    def change(content):
        content["config"].update(flags)
    change.__name__ = str(flags)[:60]
    return change


def without(flag):
    def change(content):
        del content["config"][flag]
    return change


@pytest.mark.parametrize("change", [
    *map(without, runs.GRID), change_config(M=17), change_config(tau=0), change_config(tau=8),
    change_config(K=3), change_config(K=2**29), change_config(L=10**9), change_config(L=10**30),
    change_config(d=10**6), change_config(d=-8), change_config(L=8.0), change_config(L="8"),
    change_config(M=True), change_config(M=None), change_config(seed=-1), change_config(n_heads=0),
    change_config(lr=float("nan")), change_config(lr="fast"), change_config(task="sort"),
    change_config(task=["recall"]), change_config(model="gpt"), change_config(model=3),
    change_config(model="mamba+" * 10**5), change_config(model="100000xmamba"),
    change_config(train_lengths=7), change_config(d_state=10**9, model="mamba"),
    change_config(batch_size=10**12), change_config(steps=0),
    lambda c: c["model"].popitem() and None, lambda c: c.update(config=3),
    lambda c: c.update(model=[1]), lambda c: [1, 2], lambda c: torch.zeros(3), lambda c: {"a": 1}])
def test_crafted_checkpoints_are_refused_in_one_sentence(change, checkpoint, refuses):
    path = checkpoint(change)
    began = time.monotonic()
    error = refuses(evaluation.main, [path, "--device", "cpu"])
    assert "x.pt is not a whole checkpoint" in error
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("damage", [
    empty, cut, make_directory, lambda path: path.write_text("a line of text\n"),
    lambda path: path.write_bytes(path.read_bytes()[:300])])
def test_damaged_checkpoints_are_refused_in_one_sentence(damage, checkpoint, refuses, tmp_path):
    checkpoint()
    damage(tmp_path / "x.pt")
    error = refuses(evaluation.main, [tmp_path / "x.pt", "--device", "cpu"])
    assert "x.pt is not a whole checkpoint" in error


class Evil:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("plain", [True, False])
def test_no_load_runs_code(plain, train_tiny, monkeypatch, tmp_path, refuses):
    """weights_only, in a checkpoint and in a resume file, as torch writes them and as pickles."""
    trap, path = tmp_path / "trap", tmp_path / "x.pt"
    content = {"config": CONFIG, "model": Evil(trap)}
    if plain:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    refuses(evaluation.main, [path, "--device", "cpu"])
    assert not trap.exists()

    data = path.read_bytes()
    (tmp_path / "out").mkdir()
    resume = tmp_path / "out" / (NAME + ".resume.pt")
    resume.write_bytes(hashlib.sha256(data).digest() + data)
    train_tiny()
    assert not trap.exists()


def test_loading_leaves_the_weights_as_they_are(train_tiny, tmp_path):
    result, = train_tiny("--model", "learned")
    path = tmp_path / "out" / (runs.run_name(result["config"]) + ".pt")
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == result["checkpoint"]
    model, _ = runs.load_run(str(path))
    for name, p in torch.load(path, weights_only=True)["model"].items():
        assert torch.equal(model.state_dict()[name], p)
