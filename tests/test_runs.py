"""Runs and their files: names, grids, what counts as finished, checkpoints."""

import hashlib
import json
import os
import pickle
import time

import pytest
import torch

import eval as evaluation
import gpu
import grid
import output
import runs
import summary
import train
from conftest import names, numbers
from grid import GRID, make_all
from hybrid import build_model

CONFIG = {**runs.DEFAULTS, "model": "rope", "M": 1, "tau": 1, "K": 16, "d": 8, "L": 64, "seed": 0,
          "lr": 0.008}
NAME = "rope_M1_tau1_K16_d8_L8_batch-size4_steps20_seed0"
NO_SPACE = OSError(28, "No space left on device")


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
    assert set(vars(args)) == {*GRID, *runs.DEFAULTS, "device", "compile", "out", "overwrite"}


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


def test_a_finished_run_shows_its_result_again(train_tiny, capsys):
    def tables():
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.split()[0] in ("length", "accuracy")]
    train_tiny("--seed", 0, 1)
    first = tables()
    assert len(first) == 4 and first[1] != first[3]
    train_tiny("--seed", 0, 1)
    assert tables() == first
    train_tiny("--seed", 1)
    assert tables() == first[2:]


def test_overwrite_repeats_finished_runs(train_tiny, tmp_path):
    first, = train_tiny()
    path = tmp_path / "out" / (NAME + ".json")
    path.write_text(json.dumps({**first, "mark": 1}))
    assert "mark" in train_tiny()[0]
    again, = train_tiny("--overwrite")
    assert "mark" not in again and numbers(again) == numbers(first)


def runs_made(configs, out):
    """(d, runs left) of the runs that make_all makes, in their order."""
    made = []

    def make(config, path, title, runs_left):
        made.append((config["d"], runs_left))

    configs = [{**config, "out": str(out), "overwrite": False} for config in configs]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):   # nothing is written
        patch.setattr("grid.connect", lambda: None)
        make_all(configs, make)
    return made


def test_runs_left_are_those_of_the_shape_without_a_result(tmp_path):
    configs = [{**CONFIG, "M": M, "seed": seed, **more} for M in (1, 4) for seed in (0, 1)
               for more in ({}, {"d": 16})]
    assert [left for _, left in runs_made(configs, tmp_path)] == [3] * 8
    (tmp_path / (runs.run_name(configs[-2]) + ".json")).write_text("{}")
    assert [left for _, left in runs_made(configs, tmp_path)] == [2] * 3 + [3] * 5
    copied = [{**config, "task": "copy"} for config in configs]          # there M is a length, too
    assert [left for _, left in runs_made(copied, tmp_path)] == [1] * 8


def test_runs_share_kernels_only_if_the_same_parameters_are_trained():
    assert gpu.shape_of(CONFIG) == gpu.shape_of({**CONFIG, "seed": 1, "lr": 0.1})
    assert gpu.shape_of(CONFIG) != gpu.shape_of({**CONFIG, "learn_embedding": True})


def test_a_process_stays_with_a_shape_and_begins_with_another(tmp_path, monkeypatch):
    configs = [{**CONFIG, "seed": seed, "d": d} for seed in (0, 1) for d in (8, 16, 32)]
    for rank, order in (0, [8, 8, 16, 16, 32, 32]), (1, [16, 16, 32, 32, 8, 8]), (4, None):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "5")
        made = runs_made(configs, tmp_path)
        assert [d for d, _ in made] == (order or [16, 16, 32, 32, 8, 8])
        assert {left for _, left in made} == {0}                 # of one run, shared by two


def test_a_failed_run_is_tried_again_by_the_next_command_alone(train_tiny, tmp_path, monkeypatch):
    """Its mark is for the other processes of the command: the first one removes it at the start."""
    monkeypatch.setattr("grid.connect", lambda: None)
    mark = tmp_path / "out/.locks" / (NAME + ".failed")
    for rank, train_one in ("0", fail), ("1", None):
        monkeypatch.setenv("RANK", rank)
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="without a result"):
            patch.setattr(train, "train_one", train_one)
            train_tiny()
        assert mark.exists()
    monkeypatch.delenv("RANK")
    assert len(train_tiny()) == 1 and not mark.exists()


def fail(*_):
    raise FloatingPointError("the loss is nan")


def test_a_failure_is_said_before_others_can_know_of_it(train_tiny, tmp_path, monkeypatch):
    """Once its lock is free, the others may exit, and torchrun then ends all processes."""
    held = []

    def say(line):
        with grid.locked(str(tmp_path / "out" / NAME)) as free:
            held.append((not free, " failed: " in line))

    monkeypatch.setattr(grid, "say", say)
    monkeypatch.setattr(train, "train_one", fail)
    with pytest.raises(SystemExit):
        train_tiny()
    assert held == [(True, True)]


@pytest.mark.parametrize("text", [
    "", "{", "\0" * 400, "[]", "null", '{"config": {}}', "[" * 100000,
    '{"config": {}, "seconds": {}, "eval": {"length": [1], "accuracy": [1], "sequences": 1}}'])
def test_a_json_that_does_not_read_is_not_finished(text, train_tiny, tmp_path):
    first, = train_tiny()
    path = tmp_path / "out" / (NAME + ".json")
    path.write_text(text)
    again, = train_tiny()
    assert numbers(again) == numbers(first) == numbers(json.loads(path.read_text()))


def test_a_copy_of_another_runs_files_is_not_its_result(train_tiny, tmp_path):
    first, = train_tiny()
    for ending in ".json", ".pt":
        path = tmp_path / "out" / (NAME + ending)
        path.with_name(path.name.replace("seed0", "seed1")).write_bytes(path.read_bytes())
    second, = train_tiny("--seed", 1)
    assert second["config"]["seed"] == 1 and numbers(second) != numbers(first)


def test_a_result_without_its_model_is_not_finished(train_tiny, tmp_path):
    train_tiny()
    (tmp_path / "out" / (NAME + ".pt")).unlink()
    train_tiny()
    assert names(tmp_path / "out") == [NAME + ".json", NAME + ".pt"]


def test_other_files_are_left_alone(train_tiny, tmp_path):
    (tmp_path / "out").mkdir()
    for name in "notes.txt", "other.resume.pt", "mine.tmp":
        (tmp_path / "out" / name).write_text("mine")
    train_tiny("--overwrite")
    for name in "notes.txt", "other.resume.pt", "mine.tmp":
        assert (tmp_path / "out" / name).read_text() == "mine"
    assert len(names(tmp_path / "out")) == 4


# ---- files ---------------------------------------------------------------------------------------

def test_write_file_replaces_what_a_killed_process_left(tmp_path):
    """Process numbers come back: the file may be there, or a link that someone put in its place."""
    path, elsewhere = tmp_path / "x", tmp_path / "elsewhere"
    for leave in (lambda name: name.write_bytes(b"cut"), lambda name: name.symlink_to(elsewhere)):
        leave(tmp_path / f"x.{os.getpid()}.tmp")
        runs.write_file(str(path), b"new")
        assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["x"]


def test_write_file_follows_no_link_that_appears_at_the_last_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "remove", lambda *paths: None)
    (tmp_path / f"x.{os.getpid()}.tmp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        runs.write_file(str(tmp_path / "x"), b"new")
    assert not (tmp_path / "elsewhere").exists()


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
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "it is as readable as others"
    (tmp_path / "plain").unlink()
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
        remove(path)                                     # raises an error if it is not there
        done.append("remove " + path.split("_seed0")[1])
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(os, "remove", noted_remove)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    train_tiny("--steps", 2)
    assert done == ["write .resume.pt", "write .pt", "write .json", "remove .resume.pt"]


# ---- checkpoints ---------------------------------------------------------------------------------

@pytest.fixture
def checkpoint(tmp_path):
    """write(change) writes a checkpoint that change(content) has changed; returns its path."""
    def write(change=None):
        model = build_model("rope", L=8)
        content = {"config": {**CONFIG, "L": 8}, "model": model.state_dict()}
        other = change(content) if change else None
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
    *map(without, GRID), change_config(M=17), change_config(tau=0), change_config(tau=8),
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
    assert "x.pt is not a whole checkpoint" in error or "x.pt cannot be loaded: " in error
    assert time.monotonic() - began < 5


def test_a_model_too_large_to_train_here_can_be_tested(checkpoint, monkeypatch):
    path = str(checkpoint(change_config(batch_size=1000)))
    config = torch.load(path)["config"]
    monkeypatch.setattr(runs, "memory", lambda device: 10**6)
    with pytest.raises(ValueError, match="more than 0.0 GiB"):
        runs.check(config)
    assert runs.load_run(path)[1]["batch_size"] == 1000


@pytest.mark.parametrize("flag, value", [("L", 8.0), ("L", "8"), ("M", True), ("seed", -1)])
def test_a_number_that_is_not_whole_is_named(flag, value, checkpoint, refuses):
    error = refuses(evaluation.main, [checkpoint(change_config(**{flag: value}))])
    assert f"--{flag} is {value!r}, but it must be a whole number" in error


def test_a_missing_checkpoint_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="x.pt is not there"):
        runs.load_run(str(tmp_path / "x.pt"))


def test_a_result_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="x.json is not a whole checkpoint of train.py, a .pt file"):
        (tmp_path / "x.json").write_text("{}")
        runs.load_run(str(tmp_path / "x.json"))


def test_a_checkpoint_of_an_unknown_layer_names_it(checkpoint):
    with pytest.raises(ValueError, match="cannot be loaded: .*'gpt' is no layer$"):
        runs.load_run(checkpoint(change_config(model="gpt")))


def test_a_checkpoint_of_a_layer_that_was_changed_says_so(checkpoint):
    def change(saved):
        saved["model"]["head.1.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="its weights do not fit the layers of .* was one changed"):
        runs.load_run(checkpoint(change))


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""), lambda path: path.write_text("a line of text\n"),
    *(lambda path, end=end: path.write_bytes(path.read_bytes()[:end]) for end in (300, -100))])
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


def test_a_flag_that_joins_the_grid_is_part_of_names(monkeypatch):
    config = {**summary.DEFAULTS, **summary.GRID, "lr": 0.008}
    before = runs.run_name(config)
    monkeypatch.setitem(summary.GRID, "clip", 0.2)
    assert runs.run_name({**config, "clip": 0.5}) == before.replace("_L64", "_L64_clip0.5")
